"""The verdicts of all targets on a model, as rows of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heddle.compose.plan import Plan
from heddle.compose.targets.demand import SERVERS
from heddle.compose.targets.servers import REMOTE, VERSIONS, Serves, checked, served
from heddle.compose.targets.target import Model
from heddle.compose.targets.verdict import Verdict, verdicts


def target_rows(model: Model) -> list[dict[str, Any]]:
    """A row a target: whether it holds the model exactly, each field that forbids it, and which servers would take it.

    Classes of transformers, code in the folder, and servers: a server takes what a class can carry that it has, told as
    `through`. `warning` is what the class does wrong with a model that it holds, or empty; `takes` is null where a server's
    source was not read.
    """
    rows, all_found = [], {one.target.name: one for one in verdicts(model)}
    for found in all_found.values():
        refused = [{"path": one.path, "why": one.why} for one in found.refusals]
        servers = served(found.target.name, model) if found.fits else {}
        row = _row(found.target.name, found.target.model_class, refused, servers)
        rows.append({**row, "warning": found.target.warning(model) if found.fits else ""})
    causal = model.get("kind", "causal_lm") == "causal_lm"
    rows.append(_row(REMOTE, "code in the folder", [], served(REMOTE, model) if causal else {}))
    return [*rows, *(_server_row(name, model, all_found) for name in VERSIONS)]


def padding_warning(planned: Plan) -> str:
    """What every target does wrong with a model whose cache holds a state, a window or chosen blocks; or nothing."""
    first = next((layer for layer in planned.layers if layer.places_padding), None)
    if first is None:
        return ""
    return (
        f"layers.{first.index}.mixer ({first.mixer['kind']}) keeps a state or a window, or chooses blocks: in every target, "
        "tokens that go on from a cache with padding on the right are wrong, a single pass is right; pad on the left"
    )


def fits_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """The targets that fit, of rows as of `target_rows`."""
    return f"the defaults of the space fit {', '.join(row['target'] for row in rows if row['fits'])}"


def _server_row(name: str, model: Model, found: Mapping[str, Verdict]) -> dict[str, Any]:
    through, refused = SERVERS[name].judged(found, model)
    row = _row(name, VERSIONS[name], [{"path": one.path, "why": one.why} for one in refused], {})
    return {**row, "through": None if through is None else through.name}


def _row(name: str, made: str, refused: list[dict[str, str]], servers: dict[str, Serves]) -> dict[str, Any]:
    told = {
        server: {
            "version": VERSIONS[server],
            "takes": one.takes,
            "path": one.path,
            "note": one.note,
            "checked": checked(server, name),
        }
        for server, one in servers.items()
    }
    row: dict[str, Any] = {"target": name, "class": made, "fits": not refused, "refused": refused}
    return {**row, "warning": "", "servers": told}
