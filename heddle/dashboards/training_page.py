"""The page of one training by `heddle train`, from its train.json and spec.yaml; no model is built."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heddle import specs
from heddle.dashboards import data, model_figures, sections, words
from heddle.dashboards.bars import bars
from heddle.dashboards.figures import LINES, Figure, escape, layout, slug
from heddle.dashboards.frame import Page, copyable, tiles, url
from heddle.dashboards.html import Html, element, table
from heddle.dashboards.site import TRAIN_FILE, Site
from heddle.errors import HeddleError
from heddle.search.costs import layer_costs
from heddle.specs.pattern import layers_of

SPEC_FILE = "spec.yaml"
# Steps of a curve that are drawn.
POINTS = 500


def training_page(site: Site, key: str) -> Page:
    """What was trained and how it went.

    Raises:
        HeddleError: "run-not-found", also where the record is damaged.
    """
    folder = site.training(key)
    record = read_record(folder)
    page = Page(f"{record['name']} · training", here="Runs", follows=False, is_plain_first=True)
    machine = record.get("environment", {}).get("device_name", "unknown device")
    over = f"Heddle training · {machine} · {words.duration_text(record['wall_s'])}"
    page.add(element("header", element("p", over, cls="over"), element("h1", record["name"])))
    facts: list[tuple[str, object]] = [
        (f"{record['task']['name']}, {record['task']['metric'].replace('_', ' ')}", _score(record)),
        ("normalised score", f"{record['normalised']:.4f}"),
        ("steps", record["steps"]),
        ("tokens", words.count_text(record["tokens"])),
    ]
    page.add(element("section", tiles(facts)))
    text = _spec(folder)
    if text is not None:
        _model(page, text)
    page.plots("Training", curves(record))
    recipe = sections.flat({"recipe": record["recipe"], "environment": record.get("environment", {})})
    page.add(sections.section("Recipe and machine", table(["What", "Value"], recipe)))
    command = f"heddle export {shlex.quote(str(folder))} --out my-model"
    parts = [copyable("Export this model", command, "export")]
    parts += [copyable(f"Its spec, hash {record['spec_hash']}", text, "spec")] if text else []
    page.add(sections.section("Take it along", *parts))
    return page


def trainings(site: Site) -> Html | None:
    """The trainings of a folder, a row each."""
    rows = []
    for key in site.trainings():
        link = element("a", key, href=url(None, "training", key))
        try:
            record = read_record(site.training(key))
        except HeddleError as error:
            rows.append([key, "", "", "", error.what])
            continue
        score = f"{record['task']['name']} {_score(record)}"
        rows.append([link, score, record["steps"], words.duration_text(record["wall_s"]), ""])
    if not rows:
        return None
    header = ["Training", "Score ± standard error", "Steps", "Took", ""]
    return sections.section("Trainings", table(header, rows, numeric=(1, 2, 3)))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished training. Raises HeddleError "run-not-found"."""
    path = folder / TRAIN_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        # All that the pages need of it.
        if not all(isinstance(record[name], dict) for name in ("task", "score", "recipe")):
            raise ValueError("parts of it are no mappings")
        for name in ("wall_s", "normalised", "steps", "tokens"):
            float(record[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeddleError("run-not-found", f"{path} is damaged: {type(error).__name__}: {error}") from None
    return record


def curves(record: Mapping[str, Any]) -> list[Figure]:
    """The loss of each step, thinned, and the auxiliary losses, which have no factor here."""
    found = [_curve("loss", "training loss, nats per token", {"loss": record["losses"]})]
    aux = record.get("aux") or {}
    return [*found, _curve("auxiliary", "auxiliary loss", aux)] if aux else found


def _curve(name: str, unit: str, series: Mapping[str, Sequence[float]]) -> Figure:
    traces = []
    for index, (key, values) in enumerate(series.items()):
        step = max(1, -(-len(values) // POINTS))
        line: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": escape(key)}
        line |= {"x": list(range(1, len(values) + 1, step)), "y": list(values[::step])}
        traces.append(line | {"line": {"dash": LINES[index % len(LINES)]}})
    drawn = layout("step", unit) | {"showlegend": len(traces) > 1}
    return Figure(slug(f"curve {name}"), unit.capitalize(), traces, drawn)


def _score(record: Mapping[str, Any]) -> str:
    value, se = record["score"]["value"], record["score"]["se"]
    if record["task"]["metric"] == "accuracy":
        return f"{100 * value:.1f} ± {100 * se:.1f} %"
    return f"{value:.4f} ± {se:.4f}"


def _spec(folder: Path) -> str | None:
    path = folder / SPEC_FILE
    inside = path.is_file() and path.resolve().is_relative_to(folder.resolve())
    return path.read_text(encoding="utf-8", errors="replace") if inside else None


def _model(page: Page, text: str) -> None:
    """Layers and their costs, where this heddle can read and plan the spec."""
    try:
        file = specs.loads(text)
        held = [(layer.index, data.mixer_name(layer.spec)) for layer in layers_of(file.spec.model)]
        context = file.spec.data.sequence_length
        costs = layer_costs(text, context=context, batch=1)
    except HeddleError:
        return
    cells = [data.Cell(index, name, name) for index, name in held]
    strip = sections.strip_table([("layers", cells)])
    page.add(sections.section("Layers", sections.legend({cell.mixer for cell in cells}), strip))
    named = dict(held)
    layers = [layer | {"mixer": named.get(layer["index"], layer["mixer"])} for layer in costs]
    page.add(sections.section("What each layer costs", bars(model_figures.costs(layers, context, 1))))
