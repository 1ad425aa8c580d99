"""The verdicts of all targets on a model, as rows of plain data."""

from __future__ import annotations

from typing import Any

from heddle.compose.targets.catalogue import NOT_YET
from heddle.compose.targets.servers import VERSIONS, Serves, served
from heddle.compose.targets.target import Model
from heddle.compose.targets.verdict import verdicts

REMOTE = "remote"


def target_rows(model: Model) -> list[dict[str, Any]]:
    """A row a target: whether it holds the model exactly, each field that forbids it, and which servers would take it.

    `fits` is null for a class that is asked for and not written yet; `takes` is null where a server's source was not read.
    """
    rows = []
    for found in verdicts(model):
        refused = [{"path": one.path, "why": one.why} for one in found.refusals]
        servers = served(found.target.name, model) if found.fits else {}
        rows.append(_row(found.target.name, found.target.model_class, found.fits, refused, servers))
    rows += [_row(name, None, None, [{"path": "", "why": why}], {}) for name, why in NOT_YET.items()]
    causal = model.get("kind", "causal_lm") == "causal_lm"
    return [*rows, _row(REMOTE, "code in the folder", True, [], served(REMOTE, model) if causal else {})]


def _row(
    name: str, made: str | None, fits: bool | None, refused: list[dict[str, str]], servers: dict[str, Serves]
) -> dict[str, Any]:
    told = {
        server: {
            "version": VERSIONS[server],
            "takes": one.takes,
            "note": one.note,
            "checked": "read, not run",
        }
        for server, one in servers.items()
    }
    return {"target": name, "class": made, "fits": fits, "refused": refused, "servers": told}
