"""THE CATALOGUE of mixers: one line a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from heddle.specs.composite import CompositeMixer
from heddle.specs.kinds import MixerSpec
from heddle.specs.mixers.attention import Attention
from heddle.specs.mixers.decay_attention import DecayAttention
from heddle.specs.mixers.gated_deltanet import GatedDeltaNet
from heddle.specs.mixers.parallel import Parallel

KINDS: tuple[type[MixerSpec], ...] = (
    Attention,
    GatedDeltaNet,
    DecayAttention,
    Parallel,
)

if TYPE_CHECKING:
    Mixer = MixerSpec
else:
    Mixer = Union[KINDS]  # noqa: UP007 - made at run time

# The composite kinds hold mixers of any kind, themselves included.
for _kind in KINDS:
    if issubclass(_kind, CompositeMixer):
        _kind.model_rebuild(_types_namespace={"Mixer": Mixer})

__all__ = ["KINDS", "Attention", "DecayAttention", "GatedDeltaNet", "Mixer", "MixerSpec", "Parallel"]
