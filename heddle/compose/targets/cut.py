"""Cuts the space of a search to what the classes of `export.must_fit` can hold and its servers take. No torch.

What no combination that fits has is left out before anything is drawn: options and numbers of open values, and blocks. First
each block is judged alone with all its settings, then, where they are few enough, all settings of the whole space. A trial that
still does not fit is refused as it is drawn. The cut follows from the spec alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from heddle.compose.plan import plan
from heddle.compose.targets.cut_counts import Counts
from heddle.compose.targets.demand import DEMANDS, Demand
from heddle.compose.targets.part_verdict import FIRST
from heddle.compose.targets.support import Judged, Support, label
from heddle.compose.targets.target import Refusal
from heddle.errors import NOWHERE, HeddleError, Where
from heddle.specs import Space, SpecFile
from heddle.specs.space_cut import Cut, Walk, cut_space

# Settings that are judged, of a block and of the whole space; each takes some milliseconds.
MOST = 256
# Settings of the whole space that are looked at, many of which are the same model but for the numbers of layers.
MOST_WALKED = 10_000
# Fields whose value, also as a word, is or has a kind.
KINDED = ("mixer", "channel", "kind")
# What an error about other layers than the block's own, or about the layers as a whole, may be called.
OF_LAYERS = ("unknown-layer", "reference-direction", "reference-mismatch", "duplicate-name", "bad-placement")


def cut_to_targets(file: SpecFile) -> Cut:
    """The file with the space that its `search.export.must_fit` leaves; without one the file as it is.

    Raises:
        HeddleError: "target-mismatch", where nothing of the space fits, with a field that forbids it.
    """
    search = file.spec.search
    if search is None or search.export is None:
        return Cut(file, file)
    return _Cutter(file, [DEMANDS[name] for name in search.export.must_fit]).cut()


class _Cutter:
    """The cut of one file. `space` grows smaller; `whys` says of what was left out why."""

    def __init__(self, file: SpecFile, targets: Sequence[Demand]) -> None:
        self.file, self.targets, self.space = file, targets, file.space
        self.whys: dict[str, str] = {}
        self.unjudged: list[str] = []
        # Of each kind of mixer the first that does not fit.
        self.refused: dict[str, Judged] = {}
        self.counts = Counts.of(file)
        placement = file.space.placement
        self.blocks = list(placement.of) if placement is not None else list(file.spec.model.blocks)

    def cut(self) -> Cut:
        for name in self.blocks:
            self._judge_block(name)
        self._keep_counts()
        self._judge_whole()
        for name in self.counts.unfit:
            self.whys.setdefault(f"layers: none of block {name}", self.counts.why[name])
        if not self.whys:
            return Cut(self.file, self.file, unjudged=tuple(self.unjudged))
        told = tuple(f"{what} ({why})" if why else what for what, why in self.whys.items())
        return Cut(replace(self.file, space=self.space), self.file, told, tuple(self.unjudged))

    # One block.

    def _judge_block(self, name: str) -> None:
        if not self.counts.may_stand(name):
            return
        names = self._names_of(name)
        support = Support(self.space, names)
        settings = list(islice(Walk(self.space, names), MOST + 1))
        if len(settings) > MOST:
            # Too many sizes and switches: by their kinds alone.
            names = [one for one in names if _may_change_kinds(self.space, one)]
            settings = list(islice(Walk(self.space, names), MOST + 1))
            self.unjudged.append(name)
            if len(settings) > MOST:
                return
            support = Support(self.space, names)
            judge = Demand.kind_refusals
        else:
            judge = Demand.part_refusals
        providers = set[str]()
        for values in settings:
            judged = self._block_at(name, values, judge)
            support.add(values, judged)
            if not judged.refusals:
                providers.add(judged.kind)
            elif judged.kind:
                self.refused.setdefault(judged.kind, judged)
        self.counts.provides(name, providers)
        if not support.fits:
            self._unfit(name, support)
            return
        # What stands beside the layers is for all blocks to say, unless this one is there whatever is drawn.
        certain = self.counts.must_stand(name)
        self._leave_out(support, beside=lambda one: _is_of(one, name) or (certain and _is_beside(one)))

    def _names_of(self, block: str) -> list[str]:
        """The parameters that may change the block: its own, those of the model beside its layers, those that open them."""
        by_name = {one.name: one for one in self.space.parameters}
        own = [one for one in by_name if _is_of(one, block) or _is_beside(one)]
        found = dict.fromkeys(own)
        todo = own
        while todo:
            needed = [one for name in todo for one in by_name[name].needs() if one not in found]
            found |= dict.fromkeys(needed)
            todo = needed
        return [one for one in by_name if one in found]

    def _block_at(self, block: str, values: Mapping[str, Any], judge: Callable[..., Any]) -> Judged:
        placement = self.file.space.placement
        try:
            layers = None if placement is None else [block] * placement.length
            model = self.file.resolve(values, layers=layers).model
        except HeddleError as error:
            own = [one for one in error.errors if _is_of(one.where.path.removeprefix("model."), block)]
            if own and all(one.code not in OF_LAYERS for one in error.errors):
                return Judged((Refusal(f"blocks.{block}", own[0].what),))
            # It speaks of other blocks, or of layers that stand elsewhere in a model of the space.
            return Judged()
        kind = model.blocks[block].mixer.kind
        for target in self.targets:
            refused = judge(target, model, block)
            if refused:
                return Judged(tuple(_of_block(one, block) for one in refused), str(kind), target)
        return Judged(kind=str(kind))

    def _unfit(self, block: str, support: Support) -> None:
        first = support.first
        assert first is not None
        self.counts.forbid(block, first.told())
        if not self.counts.possible:
            self._nothing(first)
        # No layer has what its values say, so none of them is drawn.
        needed = {
            name for one in self.space.parameters if not _is_of(one.name, block) for name in one.needs()
        }
        own = [one for one in self.space.parameters if _is_of(one.name, block) and one.name not in needed]
        self.space = cut_space(self.space, {one.name: [one.default] for one in own})

    # Numbers of layers.

    def _keep_counts(self) -> None:
        """What the classes need, and what is left beside it, as numbers of layers."""
        for target in self.targets:
            for kind in target.needs:
                lacking = self.counts.need(kind)
                if lacking:
                    none = Refusal("layers", f"have no {kind}; the class needs one")
                    self._nothing(self.refused.get(kind) or Judged((none,), "", target))
        kept = self.counts.kept(self.space)
        if kept is None:
            self._nothing(
                Judged((Refusal("layers", "leave no numbers of layers that fit"),), "", self.targets[0])
            )
            return
        self._tell(kept, dict.fromkeys(kept, ""))
        self.space = cut_space(self.space, kept)

    # The whole space.

    def _judge_whole(self) -> None:
        names = [one.name for one in self.space.parameters]
        keyed, models = list[tuple[Any, dict[str, Any]]](), dict[Any, dict[str, Any]]()
        for number, values in enumerate(Walk(self.space, names)):
            key = self._model_key(values)
            if key is not None:
                models.setdefault(key, values)
                keyed.append((key, values))
            if number == MOST_WALKED or len(models) > MOST:
                return
        support = Support(self.space, names)
        known = {key: self._whole_at(values) for key, values in models.items()}
        for key, values in keyed:
            support.add(values, known[key])
        if not support.fits:
            self._nothing(support.first or Judged((Refusal("layers", "leave no room"),), "", self.targets[0]))
        self._leave_out(support, beside=lambda _: True)

    def _model_key(self, values: Mapping[str, Any]) -> Any:
        """What of the values a verdict can depend on: of numbers of layers, which are none; None where they have no room."""
        placement = self.space.placement
        if placement is None:
            return label(values)
        counts = placement.count(self.space.held(values))
        if min(counts.values()) < 0:
            return None
        others = {name: value for name, value in values.items() if name not in placement.counts.values()}
        return label(others), tuple(name for name, count in counts.items() if count)

    def _whole_at(self, values: Mapping[str, Any]) -> Judged:
        try:
            runtime = plan(self.file.resolve(values).model).runtime()
        except HeddleError as error:
            return Judged((Refusal(error.where.path, error.what),))
        for target in self.targets:
            # Layers that are placed stand otherwise in a trial.
            refused = target.refusals(runtime, any_order=self.space.placement is not None)
            if refused:
                return Judged(refused, "", target)
        return Judged()

    # What is left out, and what is said about it.

    def _leave_out(self, support: Support, beside: Callable[[str], bool]) -> None:
        """Leave out what fits in no setting; `beside` says of which parameters that is known."""
        kept = {name: values for name, values in support.kept().items() if beside(name)}
        self._tell(kept, support.whys(kept))
        self.space = cut_space(self.space, kept)

    def _tell(self, kept: Mapping[str, Sequence[Any]], whys: Mapping[str, str]) -> None:
        for one in self.space.parameters:
            if one.name not in kept:
                continue
            left = {label(value) for value in kept[one.name]}
            gone = [value for value in one.values() if label(value) not in left]
            if gone:
                told = ", ".join(label(value) for value in gone[:8]) + (", …" if len(gone) > 8 else "")
                self.whys[f"{one.name}: not {told}"] = whys.get(one.name, "")

    def _nothing(self, judged: Judged) -> None:
        target = judged.target
        names = " and ".join(one.name for one in self.targets) if target is None else target.name
        first = judged.refusals[0]
        raise HeddleError(
            "target-mismatch",
            f"nothing of this space fits {names}: {first}",
            where=self._where(first.path),
            hint="open other values, or take the class out of search.export.must_fit; heddle show SPEC --targets tells"
            " what fits",
        )

    def _where(self, path: str) -> Where:
        """The place of the field in the file, or of the nearest around it."""
        steps = path.split(".")
        for size in range(len(steps), 0, -1):
            found = self.file.where(".".join(steps[:size]))
            if found.line is not None:
                return found
        return NOWHERE


def _is_of(name: str, block: str) -> bool:
    """Whether a dotted path leads into a block."""
    return f"{name}.".startswith(f"blocks.{block}.")


def _is_beside(name: str) -> bool:
    """Whether a dotted path leads to what the model has beside its blocks and layers."""
    return name.partition(".")[0] not in ("blocks", "layers")


def _may_change_kinds(space: Space, name: str) -> bool:
    """Whether the values of a parameter may be parts of other kinds, or open such parameters."""
    one = next(one for one in space.parameters if one.name == name)
    if any(isinstance(value, (dict, list)) for value in one.choices) or name.rpartition(".")[2] in KINDED:
        return True
    below = [other.name for other in space.parameters if name in other.needs()]
    return any(_may_change_kinds(space, other) for other in below)


def _of_block(refusal: Refusal, block: str) -> Refusal:
    """The refusal of the first of made-up layers, as one of the block they are made of."""
    return Refusal(refusal.path.replace(FIRST, f"blocks.{block}.", 1), refusal.why)
