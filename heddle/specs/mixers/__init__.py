"""THE CATALOGUE of mixers: one line a kind."""

from __future__ import annotations

from heddle.specs.kinds import MixerSpec
from heddle.specs.mixers.attention import Attention
from heddle.specs.mixers.decay_attention import DecayAttention
from heddle.specs.mixers.gated_deltanet import GatedDeltaNet

Mixer = Attention | GatedDeltaNet | DecayAttention

__all__ = ["Attention", "DecayAttention", "GatedDeltaNet", "Mixer", "MixerSpec"]
