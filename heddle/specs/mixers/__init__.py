"""THE CATALOGUE of mixers: one line a kind."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Union

from heddle.specs.composite import CompositeMixer
from heddle.specs.kinds import MixerSpec
from heddle.specs.mixers.attention import Attention as Attention
from heddle.specs.mixers.contmix import ContMix as ContMix
from heddle.specs.mixers.decay_attention import DecayAttention as DecayAttention
from heddle.specs.mixers.deltanet import DeltaNet as DeltaNet
from heddle.specs.mixers.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from heddle.specs.mixers.gated_pool import GatedPool as GatedPool
from heddle.specs.mixers.gla import Gla as Gla
from heddle.specs.mixers.head_split import HeadSplit as HeadSplit
from heddle.specs.mixers.hgrn2 import Hgrn2 as Hgrn2
from heddle.specs.mixers.hierarchical_attention import HierarchicalAttention as HierarchicalAttention
from heddle.specs.mixers.inline import Inline as Inline
from heddle.specs.mixers.kda import Kda as Kda
from heddle.specs.mixers.landmark import Landmark as Landmark
from heddle.specs.mixers.layer_router import LayerRouter as LayerRouter
from heddle.specs.mixers.liger import Liger as Liger
from heddle.specs.mixers.lightning import Lightning as Lightning
from heddle.specs.mixers.linear_attention import LinearAttention as LinearAttention
from heddle.specs.mixers.local_linear_attention import LocalLinearAttention as LocalLinearAttention
from heddle.specs.mixers.mamba2 import Mamba2 as Mamba2
from heddle.specs.mixers.mla import Mla as Mla
from heddle.specs.mixers.moh import Moh as Moh
from heddle.specs.mixers.nats_l import NatsL as NatsL
from heddle.specs.mixers.parallel import Parallel as Parallel
from heddle.specs.mixers.rat import Rat as Rat
from heddle.specs.mixers.retnet import RetNet as RetNet
from heddle.specs.mixers.rf_attention import RfAttention as RfAttention
from heddle.specs.mixers.routing import Routing as Routing
from heddle.specs.mixers.sequential import Sequential as Sequential
from heddle.specs.mixers.still import Still as Still
from heddle.specs.mixers.token_mlp import TokenMlp as TokenMlp
from heddle.specs.mixers.token_router import TokenRouter as TokenRouter
from heddle.specs.mixers.ttt import Ttt as Ttt
from heddle.specs.plugins import OPTIONAL, load_optional, load_plugins

# The kinds of the files beside this one, in the order of the lines above.
BUILT_IN: tuple[type[MixerSpec], ...] = tuple(
    one for one in list(vars().values()) if getattr(one, "__module__", "").startswith(f"{__name__}.")
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
