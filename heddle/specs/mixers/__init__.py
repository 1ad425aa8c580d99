"""THE CATALOGUE of mixers: one line a kind."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Union

from heddle.specs.composite import CompositeMixer
from heddle.specs.kinds import MixerSpec
from heddle.specs.mixers.attention import Attention
from heddle.specs.mixers.decay_attention import DecayAttention
from heddle.specs.mixers.gated_deltanet import GatedDeltaNet
from heddle.specs.mixers.head_split import HeadSplit
from heddle.specs.mixers.layer_router import LayerRouter
from heddle.specs.mixers.moh import Moh
from heddle.specs.mixers.parallel import Parallel
from heddle.specs.mixers.sequential import Sequential
from heddle.specs.mixers.token_router import TokenRouter
from heddle.specs.plugins import OPTIONAL, load_optional, load_plugins

BUILT_IN: tuple[type[MixerSpec], ...] = (
    Attention,
    GatedDeltaNet,
    DecayAttention,
    Parallel,
    TokenRouter,
    LayerRouter,
    Sequential,
    HeadSplit,
    Moh,
)

# Kinds of ours that wait for a package, and kinds that other installed packages offer; and those that cannot be used.
_joined, ABSENT = load_optional()
_taken = {one.model_fields["kind"].default for one in BUILT_IN} | {one.kind for one in OPTIONAL}
_offered, BROKEN = load_plugins(_taken)
KINDS = (*BUILT_IN, *_joined, *_offered)

if TYPE_CHECKING:
    Mixer = MixerSpec
else:
    Mixer = Union[KINDS]  # noqa: UP007 - made at run time

# The composite kinds hold mixers of any kind, themselves included: their modules learn here what `Mixer` means.
for _kind in KINDS:
    if issubclass(_kind, CompositeMixer):
        vars(sys.modules[_kind.__module__])["Mixer"] = Mixer

__all__ = [
    "ABSENT",
    "BROKEN",
    "BUILT_IN",
    "KINDS",
    "Attention",
    "DecayAttention",
    "GatedDeltaNet",
    "HeadSplit",
    "LayerRouter",
    "Mixer",
    "MixerSpec",
    "Moh",
    "Parallel",
    "Sequential",
    "TokenRouter",
]
