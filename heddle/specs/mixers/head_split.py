"""Two mixers in one layer that share out its heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from heddle.specs.composite import CompositeMixer
from heddle.specs.kinds import HeadedMixer, MixerSpec, Problem
from heddle.specs.layer import Site
from heddle.specs.mixers.parallel import Parallel

if TYPE_CHECKING:
    # The union of all kinds, this one among them; the catalogue fills it in.
    from heddle.specs.kinds import MixerSpec as Mixer


class HeadSplit(CompositeMixer):
    """A share of the heads is of one mixer, the rest of another; both see the same input.

        y = sum over heads h of o_h W_h,   h < n: of the first mixer with n heads,   h >= n: of the second with H - n

    Each mixer is written for all H heads, and gets n or H - n of them as large as they are; its groups of heads stay whole.
    One output projection of the heads of both is the sum of the two, so this is `parallel` with other sizes.
    """

    kind: Literal["head_split"] = "head_split"
    mixers: Annotated[
        list[Annotated[Mixer, Field(discriminator="kind")]],
        Field(
            min_length=2,
            max_length=2,
            description="The two mixers, each a mapping with a kind, as if all heads were its own; their heads are equal.",
        ),
    ]
    share: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="Share of the heads that the first mixer gets, rounded to the nearest count that both can have.",
        ),
    ]

    def parts_at(self, site: Site) -> Mapping[str, MixerSpec]:
        parts, headed = self.parts(), self._headed(site)
        count = self._count(headed)
        if count is None:
            return parts
        counts = (count, headed[0].heads - count)
        return {path: one.with_heads(number) for path, one, number in zip(parts, headed, counts, strict=True)}

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site) + [
            Problem(f"{path}.kind", f"{part.kind} has no heads of its own", code="conflicting-fields")
            for path, part in self.parts().items()
            if not isinstance(part, HeadedMixer)
        ]
        if found:
            return found
        headed = self._headed(site)
        first, second = (one.heads for one in headed)
        if first != second:
            what = f"{second} heads, and the first mixer has {first}: each is written for all heads"
            return [Problem("mixers.1.heads", what, f"heads: {first}", "conflicting-fields")]
        if self._count(headed) is not None:
            return []
        (one, own), (other, others) = ((part.kind, _groups(part)) for part in headed)
        what = f"{first} heads cannot be shared out: {one} has {own} groups of them and {other} {others}"
        hint = (
            "more kv_heads: a group, the heads of one of them, is not torn"
            if first > 1
            else "at least 2 heads"
        )
        return [Problem("share", what, hint, "out-of-range")]

    def runtime(self, site: Site) -> dict[str, Any]:
        # The mixers have their own counts of heads by then.
        return {name: one for name, one in super().runtime(site).items() if name != "share"}

    def canonical(self, site: Site) -> dict[str, Any]:
        parts = [part.canonical(site) for part in self.parts_at(site).values()]
        return Parallel(mixers=self.mixers).canonical(site) | {"mixers": parts}

    def _headed(self, site: Site) -> list[HeadedMixer]:
        """The mixers for all heads, resolved; those without heads are left out."""
        return [one.resolved(site) for one in self.mixers if isinstance(one, HeadedMixer)]

    def _count(self, headed: list[HeadedMixer]) -> int | None:
        """The heads of the first mixer: of those counts that both can have the nearest to the share, the lower of two."""
        if len(headed) < 2 or headed[0].heads != headed[1].heads:
            return None
        heads = headed[0].heads
        possible = [
            count
            for count in range(1, heads)
            if headed[0].takes_heads(count) and headed[1].takes_heads(heads - count)
        ]
        return min(possible, key=lambda count: abs(count - self.share * heads), default=None)


def _groups(mixer: HeadedMixer) -> int:
    """In how many pieces its heads come at most."""
    size = next(count for count in range(1, mixer.heads + 1) if mixer.takes_heads(count))
    return mixer.heads // size
