"""Whether a model fits a target, and if not which field forbids it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import TARGETS
from heddle.compose.targets.target import Config, Model, Refusal, Target
from heddle.errors import HeddleError
from heddle.specs.model import ModelSpec, Residual


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, and what forbids it; `config` is the configuration that holds the model, if nothing does."""

    target: Target
    refusals: tuple[Refusal, ...]
    config: Config | None = None

    @property
    def fits(self) -> bool:
        return not self.refusals


def verdicts(model: Model) -> list[Verdict]:
    """The verdict of every target on `Plan.runtime()`."""
    return [verdict(target, model) for target in TARGETS]


def verdict(target: Target, model: Model, concerns: Callable[[Refusal], bool] = lambda _: True) -> Verdict:
    """Whether `target` holds the model exactly: every field, shown by the way there and back.

    Only refusals that it `concerns` count; without those of some layers the configuration may not be theirs.
    """
    found = tuple(_once(filter(concerns, target.kinds(model))))
    if found:
        return Verdict(target, found)
    found, config = tuple(filter(concerns, target.problems(model))), target.config(model)
    try:
        back = runtime_of_spec(target.spec(config))
    # What the class cannot hold may give sizes that no spec can have.
    except (HeddleError, ValueError):
        if not found:
            raise
        return Verdict(target, found)
    found = (*found, *_once(filter(concerns, _differences(target, model, back))))
    return Verdict(target, found, None if found else config)


def require(target: Target, model: Model) -> Config:
    """The configuration that holds the model.

    Raises:
        HeddleError: "target-mismatch", with every field that forbids it.
    """
    found = verdict(target, model)
    if found.config is None:
        told = "; ".join(str(one) for one in found.refusals)
        what = f"{target.name} ({target.model_class}) cannot hold this model exactly: {told}"
        hint = "--target remote writes any model, with its code; heddle show --targets tells what fits"
        raise HeddleError("target-mismatch", what, hint=hint)
    return found.config


def runtime_of_spec(spec: dict[str, Any]) -> Model:
    """`Plan.runtime` of what a target makes of a configuration. No layer knows of another, so each block is planned once."""
    names = [*dict.fromkeys(spec["layers"])]
    runtime = plan(ModelSpec.model_validate({**spec, "layers": names})).runtime()
    layers = dict(zip(names, runtime["layers"], strict=True))
    return {**runtime, "layers": [layers[name] for name in spec["layers"]]}


def _differences(target: Target, model: Model, back: Model) -> Iterator[Refusal]:
    """What of the model does not come back from the configuration."""
    # Of the constant stream the layers tell that read it.
    for name in sorted({*model, *back} - {"layers", "constant_tokens"}):
        if model.get(name) != back.get(name):
            yield _told(target, name, name, (model.get(name), back.get(name)))
    # Of a thousand layers few are of their own.
    known: list[tuple[Any, Any, list[tuple[str, tuple[Any, Any]]]]] = []
    for index, (ours, theirs) in enumerate(zip(model["layers"], back["layers"], strict=True)):
        found = next((one for mine, its, one in known if its is theirs and mine == ours), None)
        if found is None:
            found = [*_unequal(ours, theirs, "")]
            known.append((ours, theirs, found))
        for path, values in found:
            filled = (_filled(values[0], path, model), _filled(values[1], path, back))
            yield _told(target, f"layers.{index}.{path}", path, filled)


def _unequal(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The deepest paths at which two pieces of plain data differ; absent, null, false and factors of one are the same."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in sorted({*ours, *theirs}):
            below, pair = f"{path}.{name}" if path else name, (ours.get(name), theirs.get(name))
            if _plain(pair[0]) is not None or _plain(pair[1]) is not None:
                yield from _unequal(*pair, below)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _unequal(*pair, f"{path}.{index}")
    elif ours != theirs or type(ours) is not type(theirs):
        yield path, (ours, theirs)


def _filled(value: Any, path: str, model: Model) -> Any:
    """What holds at a path inside a layer where nothing is written."""
    if value is not None:
        return value
    defaults = {"norm_placement": "pre", "residual": Residual().model_dump(), "norm_eps": model["norm_eps"]}
    return defaults.get(path.rpartition(".")[2].removeprefix("channel_"))


def _plain(value: Any) -> Any:
    off = value is False or (isinstance(value, list) and value and all(one == 1.0 for one in value))
    return None if off else value


def _told(target: Target, path: str, field: str, values: tuple[Any, Any]) -> Refusal:
    """The refusal of a field; `field` is its path inside the layer, or the model."""
    ours, theirs = (_shown(value) for value in values)
    steps = [step for step in field.split(".") if not step.isdecimal()]
    # `mixer.mixers.0.rope.theta` is explained as `mixer.rope`.
    steps = [step for step in steps if step != "mixers"]
    reasons = (target.why.get(".".join(steps[:size])) for size in range(len(steps), 0, -1))
    why = next((f": {reason}" for reason in reasons if reason is not None), "")
    if steps[-1:] == ["rope"] and values[0] is None and target.turns:
        why = ": the heads of every softmax layer turn"
    return Refusal(path, f"is {ours}; there it is {theirs}{why}")


def _shown(value: Any) -> str:
    if value is None or value is False or value is True:
        return {None: "none", False: "false", True: "true"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _once(found: Iterable[Refusal]) -> Iterator[Refusal]:
    """Each refusal once, at the first of the layers that have it, with their number."""
    first: dict[tuple[str, str], Refusal] = {}
    more: dict[tuple[str, str], int] = {}
    for one in found:
        key = (_inside(one.path), one.why)
        more[key] = more.get(key, -1) + 1
        first.setdefault(key, one)
    for key, one in first.items():
        count = more[key]
        others = f"{count} more layer{'s' * (count > 1)}"
        yield one if not count else Refusal(one.path, f"{one.why} (and in {others})")


def _inside(path: str) -> str:
    """The path inside a layer, whichever it is."""
    return path.split(".", 2)[2] if path.startswith("layers.") else path
