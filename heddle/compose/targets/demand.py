"""What a search may demand of a model: that a class of transformers holds it, or that a server takes it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from heddle.compose.plan import plan
from heddle.compose.targets import part_verdict
from heddle.compose.targets.catalogue import BY_NAME, TARGETS
from heddle.compose.targets.servers import VERSIONS, Serves, classes_of, served
from heddle.compose.targets.target import Model, Refusal, Target
from heddle.compose.targets.verdict import Verdict, verdict
from heddle.errors import HeddleError
from heddle.specs.model import ModelSpec

PartJudge = Callable[[Target, ModelSpec, str], tuple[Refusal, ...] | None]


@dataclass(frozen=True, slots=True)
class Demand:
    """A class of transformers, or a `server` with the classes of which it takes some models."""

    name: str
    targets: tuple[Target, ...]
    server: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Mixers of which there must be one, whichever class it is."""
        first, *others = (target.needs for target in self.targets)
        return tuple(kind for kind in first if all(kind in needs for needs in others))

    def judged(self, found: Mapping[str, Verdict], model: Model) -> tuple[Target | None, tuple[Refusal, ...]]:
        """The first class that holds the model, and that the server takes of it, or what forbids it in the nearest; by the
        verdicts of all targets."""
        refused = [found[target.name].refusals or self._unserved(target, model) for target in self.targets]
        first = next((target for target, why in zip(self.targets, refused, strict=True) if not why), None)
        return first, () if first else self._nearest(refused, model)

    def holds(self, target: Target, model: Model) -> bool:
        """Whether one of its classes holds the model, and the server takes it as that."""
        return not self._refusals(target, model)

    def refusals(self, model: Model, *, any_order: bool = False) -> tuple[Refusal, ...]:
        """What forbids the model, in the class that is nearest to it; with `any_order` its layers may stand otherwise."""
        found = [self._refusals(target, model, any_order=any_order) for target in self.targets]
        return self._nearest(found, model)

    def _nearest(self, found: Sequence[tuple[Refusal, ...]], model: Model) -> tuple[Refusal, ...]:
        nearest = min(zip(found, self.targets, strict=True), key=lambda one: _distance(model, *one))
        return self._named(*nearest)

    def part_refusals(self, model: ModelSpec, block: str) -> tuple[Refusal, ...] | None:
        """As of `part_verdict`: what forbids the block whatever the other layers are."""
        return self._judged(part_verdict.part_refusals, model, block)

    def kind_refusals(self, model: ModelSpec, block: str) -> tuple[Refusal, ...] | None:
        """As of `part_verdict`: what its kinds alone forbid."""
        return self._judged(part_verdict.kind_refusals, model, block)

    def require(self, model: Model) -> None:
        """Raises:
        HeddleError: "target-mismatch", with what forbids the model.
        """
        found = self.refusals(model)
        if found:
            who = f"{self.name} ({VERSIONS[self.server]})" if self.server else self.name
            does = "does not take" if self.server else "cannot hold"
            what = f"{who} {does} this model exactly: {'; '.join(map(str, found))}"
            raise HeddleError("target-mismatch", what, hint="heddle show --targets tells what fits")

    def _refusals(self, target: Target, model: Model, *, any_order: bool = False) -> tuple[Refusal, ...]:
        return verdict(target, model).refusals or self._unserved(target, model, any_order=any_order)

    def _unserved(self, target: Target, model: Model, *, any_order: bool = False) -> tuple[Refusal, ...]:
        """What the server forbids of a model that the class holds."""
        if not self.server:
            return ()
        return tuple(_forbidden(served(target.name, model)[self.server], any_order=any_order))

    def _judged(self, judge: PartJudge, model: ModelSpec, block: str) -> tuple[Refusal, ...] | None:
        found: list[tuple[tuple[Refusal, ...], Target]] = []
        for target in self.targets:
            refused = judge(target, model, block)
            if refused is None:
                return None
            if not refused and self.server:
                refused = self._of_layer(target, model, block)
            if not refused:
                return ()
            found.append((refused, target))
        return self._named(*min(found, key=lambda one: _distance(None, *one)))

    def _of_layer(self, target: Target, model: ModelSpec, block: str) -> tuple[Refusal, ...]:
        """What the server forbids of a layer wherever it stands."""
        alone = model.model_copy(update={"blocks": {block: model.blocks[block]}, "layers": [block]})
        try:
            runtime = plan(alone).runtime()
        except (HeddleError, ValueError):
            return ()
        if any(True for _ in target.kinds(runtime)):
            # Alone it is no model of the class, so there is nothing to ask.
            return ()
        answer = served(target.name, runtime)[self.server]
        return tuple(_forbidden(answer, any_order=True)) if answer.scope == "layer" else ()

    def _named(self, refused: tuple[Refusal, ...], target: Target) -> tuple[Refusal, ...]:
        """The refusals, with the class where there are several."""
        if len(self.targets) == 1:
            return refused
        return tuple(Refusal(one.path, f"{one.why} (as {target.name})") for one in refused)


def _forbidden(answer: Serves, *, any_order: bool) -> Iterator[Refusal]:
    if not answer.takes and not (any_order and answer.scope == "order"):
        yield Refusal(answer.path or "layers", answer.note)


def _distance(model: Model | None, refused: Sequence[Refusal], target: Target) -> tuple[bool, int]:
    """Which class is nearer: one whose kinds are right, then one with fewer fields that forbid."""
    kinds = (
        ".kind" in "".join(one.path[-5:] for one in refused) if model is None else any(target.kinds(model))
    )
    return kinds, len(refused)


def meeting(names: Sequence[str], model: Model) -> Target | None:
    """The class that meets most of these demands, of several the first; None if none is met."""
    met = [
        [target for target in DEMANDS[name].targets if DEMANDS[name].holds(target, model)] for name in names
    ]
    candidates = [target for some in met for target in some]
    return max(candidates, key=lambda target: sum(target in some for some in met), default=None)


SERVERS = {name: Demand(name, tuple(BY_NAME[one] for one in classes_of(name)), name) for name in VERSIONS}
DEMANDS = {target.name: Demand(target.name, (target,)) for target in TARGETS} | SERVERS
