"""Where a layer stands in its model: what a mixer may know beyond its own fields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Site:
    """The runtime twin of `heddle.specs.layer.Site`; an exported model carries this one."""

    hidden_size: int
    layer_index: int
    layer_count: int
    norm_eps: float = 1e-6
    context_length: int = 32768
