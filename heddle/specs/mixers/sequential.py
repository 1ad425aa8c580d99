"""Several mixers one after the other in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from heddle.specs.composite import MAX_PARTS, CompositeMixer
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

if TYPE_CHECKING:
    # The union of all kinds, this one among them; the catalogue fills it in.
    from heddle.specs.kinds import MixerSpec as Mixer


class Sequential(CompositeMixer):
    """Mixers that run one after the other, with an RMSNorm before each but the first: the layer's norm stands there.

    residual:      u_i = u_(i-1) + mixer_i(norm_i(u_(i-1))),  u_0 = x,   y = u_n - x, which is the sum of their outputs
    not residual:  u_i = mixer_i(norm_i(u_(i-1))),            u_0 = x,   y = u_n
    """

    kind: Literal["sequential"] = "sequential"
    mixers: Annotated[
        list[Annotated[Mixer, Field(discriminator="kind")]],
        Field(
            min_length=2,
            max_length=MAX_PARTS,
            description="The mixers, first one first, each a mapping with a kind.",
        ),
    ]
    residual: Annotated[
        bool,
        Field(
            description="Each mixer adds to what goes past it, and the layer gives the sum; false: each sees the output of "
            "the one before alone, and the layer gives the last one's."
        ),
    ] = True

    def sights(self, site: Site) -> tuple[Sight, ...]:
        parts = [part.sights(site) for part in self.parts_at(site).values()]
        # Past a mixer that is passed by, the others are seen alone.
        alone = tuple(one for part in parts for one in part) if self.residual else ()
        return (*alone, _through(parts))

    def own_params(self, site: Site) -> int:
        return (len(self.mixers) - 1) * site.hidden_size


def _through(parts: Sequence[tuple[Sight, ...]]) -> Sight:
    """What is seen through all of them: windows add up, and the slowest decay of those that see furthest is left.

    Of each part the widest sight counts that is certain.
    """
    widest = []
    for part in parts:
        certain = [one for one in part if one.is_certain] or [Sight(window=1)]
        widest.append(max(certain, key=lambda one: (one.window is None, one.window or 0, one.log_decay)))
    endless = [one for one in widest if one.window is None]
    return Sight(
        window=None if endless else 1 + sum((one.window or 1) - 1 for one in widest),
        log_decay=max(one.log_decay for one in endless or widest),
        is_causal=all(one.is_causal for part in parts for one in part),
        # What one mixer hears of a first token the others carry on by their windows.
        sinks=max((one.sinks for part in parts for one in part if one.is_certain), default=0),
    )
