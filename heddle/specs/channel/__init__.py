"""THE CATALOGUE of channel blocks: one line a kind."""

from __future__ import annotations

from heddle.specs.channel.geglu import GeGLU
from heddle.specs.channel.gelu import GELU
from heddle.specs.channel.moe import MoE
from heddle.specs.channel.none import NoChannel
from heddle.specs.channel.relu2 import ReLU2
from heddle.specs.channel.swiglu import SwiGLU
from heddle.specs.kinds import ChannelSpec

Channel = SwiGLU | GeGLU | GELU | ReLU2 | MoE | NoChannel

__all__ = ["GELU", "Channel", "ChannelSpec", "GeGLU", "MoE", "NoChannel", "ReLU2", "SwiGLU"]
