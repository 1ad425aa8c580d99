"""What the latency model of a run predicts for the blocks of a trial, beside what was measured of the whole.

A run with `latency: model` holds its model, a sum in milliseconds: what a model costs without any layer, a term for each layer,
and one for each place where two kinds of layers meet. Its file is read as plain data, for the code that fits one brings PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from heddle import specs
from heddle.dashboards import data, words
from heddle.dashboards.figures import Figure, escape, layout, slug
from heddle.dashboards.model_figures import fill
from heddle.dashboards.site import Watched
from heddle.search.latency_model.stacks import Stack, stack_of
from heddle.search.record import Latency, Run, Trial

# As in `heddle.search.latency_model.model`.
KIND, FORMAT = "latency-model", 1
# Short names of rows, since a phone is narrow.
ROWS = {"in the search": "measured", "at the end": "again"}
FRAME, PAIRS = "embedding, head and the rest", "where two kinds meet"


@dataclass(frozen=True, slots=True)
class Part:
    """A block with all its layers, or what is in no layer; `mixer` is None for the latter. `ms` is of all `layers` together."""

    name: str
    mixer: str | None
    layers: int
    ms: float


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """The predicted time at one place by its parts, and the timings of the whole there, by when they were taken."""

    phase: str
    batch: int
    context: int
    parts: tuple[Part, ...]
    margin: float | None
    measured: tuple[tuple[str, Latency], ...]

    @property
    def ms(self) -> float:
        return sum(part.ms for part in self.parts)

    @property
    def place(self) -> str:
        return f"{self.phase} at {self.batch} × {self.context}"


def block_times(watched: Watched, run: Run, trial: Trial) -> list[BlockTimes]:
    """One for each place of the run's latency model that knows all layers of `trial`; none in a run without one.

    Raises:
        HeddleErrors: where this heddle cannot read the spec.
    """
    fits = watched.once(run, "latency model", lambda: _fits(watched.latency_model()))
    if not fits or not trial.spec:
        return []
    stack = stack_of(specs.loads(trial.spec).spec.model)
    mixers = {cell.block: cell.mixer for cell in data.strip(trial)}
    own = run.reference.hash if run.reference is not None else None
    found: dict[tuple[str, int, int], BlockTimes] = {}
    # Of two fits at one place that beside the run's own reference counts.
    for fit in sorted(fits, key=lambda one: one["reference_hash"] != own):
        place = fit["place"]
        key = (place["phase"], place["batch"], place["context"])
        parts = _parts(stack, mixers, fit["sum"])
        if parts and key not in found:
            found[key] = BlockTimes(*key, tuple(parts), fit["held_out"]["margin"], _measured(trial, key))
    # Prefill comes first, as it does in use.
    return [found[key] for key in sorted(found, key=lambda one: (one[0] != "prefill", one))]


def _fits(text: str | None) -> list[Mapping[str, Any]]:
    if text is None:
        return []
    held = json.loads(text)
    return list(held["fits"]) if (held.get("kind"), held.get("format")) == (KIND, FORMAT) else []


def _parts(stack: Stack, mixers: Mapping[str, str], fitted: Mapping[str, Any]) -> list[Part]:
    """The sum by its parts; none where it has a layer, or a meeting of two, that was never measured."""
    weights = {tuple(one["column"]): float(one["ms"]) for one in fitted["weights"]}
    pairs = stack.pairs if fitted["way"]["has_pairs"] else {}
    needed = [
        ("frame", stack.frame),
        *(("term", term) for term in stack.terms),
        *(("pair", *p) for p in pairs),
    ]
    if any(column not in weights for column in needed):
        return []
    parts = [Part(FRAME, None, 0, weights["frame", stack.frame])]
    for block in dict.fromkeys(stack.blocks):
        terms = [term for name, term in zip(stack.blocks, stack.terms, strict=True) if name == block]
        ms = sum(weights["term", term] for term in terms)
        parts.append(Part(block, mixers.get(block, block), len(terms), ms))
    if pairs:
        ms = sum(weights["pair", *pair] * count for pair, count in pairs.items())
        parts.append(Part(PAIRS, None, sum(one != other for one, other in pairwise(stack.terms)), ms))
    return parts


def _measured(trial: Trial, key: tuple[str, int, int]) -> tuple[tuple[str, Latency], ...]:
    timed = (("in the search", trial.latency), ("at the end", trial.remeasured))
    return tuple(
        (when, seen)
        for when, held in timed
        for seen in held.values()
        if (seen.phase, seen.batch, seen.context) == key
    )


def stacked(times: Sequence[BlockTimes]) -> list[Figure]:
    """A plot for each place: the predicted parts on one another, and a bar for each timing of the whole."""
    found = []
    for one in times:
        traces = [_bar(part) for part in one.parts]
        for when, seen in one.measured:
            spread = {"array": [seen.high_ms - seen.median_ms], "arrayminus": [seen.median_ms - seen.low_ms]}
            bar = _row(ROWS[when], seen.median_ms, f"measured {when}", {"color": "--soft"})
            traces.append(
                bar
                | {
                    "error_x": {"type": "data", "symmetric": False, "color": "--ink", **spread},
                    "showlegend": False,
                }
            )
        drawn = layout("ms", "") | {"barmode": "relative", "showlegend": True}
        drawn["yaxis"] |= {"autorange": "reversed"}
        said = f"{one.place}: predicted by block, beside the measured whole (bars: 95 % intervals; again: at the end)"
        found.append(Figure(slug(f"blocks {one.place}"), said, traces, drawn))
    return found


def _bar(part: Part) -> dict[str, Any]:
    count = f"{part.layers} layer{'' if part.layers == 1 else 's'}"
    named = part.name if part.mixer is None else f"{part.name}: {part.mixer}, {count}"
    looks = {FRAME: {"color": "--dim"}, PAIRS: {"color": "--ink"}}
    look = looks[part.name] if part.mixer is None else fill(part.mixer)
    return _row("predicted", part.ms, named, look)


def _row(row: str, ms: float, name: str, look: Mapping[str, Any]) -> dict[str, Any]:
    bar: dict[str, Any] = {"type": "bar", "orientation": "h", "name": escape(name), "marker": dict(look)}
    return bar | {"x": [ms], "y": [row], "hovertemplate": f"{escape(name)}: %{{x:.4g}} ms<extra></extra>"}


HEADER = ["Place", "Part", "Layers", "ms each", "ms together"]


def rows(times: Sequence[BlockTimes]) -> list[list[object]]:
    """The parts in numbers, their sum with its margin, and the timings of the whole."""
    found: list[list[object]] = []
    for one in times:
        for part in one.parts:
            each = f"{part.ms / part.layers:.4g}" if part.layers else ""
            named = part.name if part.mixer is None else f"{part.name} ({part.mixer})"
            found.append([one.place, named, part.layers or "", each, f"{part.ms:.4g}"])
        margin = "" if one.margin is None else f" ± {one.margin * one.ms:.3g}"
        found.append([one.place, "predicted, all together", "", "", f"{one.ms:.4g}{margin}"])
        for when, seen in one.measured:
            found.append([one.place, f"measured {when}", "", "", words.latency_text(seen)])
    return found
