"""Which blocks of keys a query reads, where it does not read all of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from heddle.specs.base import Schema
from heddle.specs.layer import Reference


class Selection(Schema):
    """The best blocks of keys for each query and KV head, chosen by the mean of a block's keys.

        score_b = mean_{h in group} q_h · mean_{j in b} k_j,   b a complete block before the query's own

    The first `sink` blocks and the last `recent` ones, the query's own among them, are always read and count among
    `count`. With `source` the blocks are those that an earlier layer chose (HyLRA, arXiv 2602.00777).
    """

    block: Annotated[int, Field(ge=1, le=65_536, description="Keys of a block (tokens).")] = 64
    count: Annotated[
        int,
        Field(
            ge=1, le=10**6, description="Blocks that a query reads, those that are always read among them."
        ),
    ] = 16
    sink: Annotated[int, Field(ge=0, le=10**6, description="First blocks, always read (a count).")] = 1
    recent: Annotated[
        int,
        Field(ge=1, le=10**6, description="Last blocks, always read, the query's own among them (a count)."),
    ] = 2
    source: Annotated[
        Reference | None,
        Field(
            description="The nearest earlier layer of this name or block, whose blocks are read; it has the same block "
            "and count. null: this layer chooses."
        ),
    ] = None

    def runtime(self) -> dict[str, Any]:
        """Plain data for the module; who takes blocks from another layer chooses none."""
        if self.source is not None:
            return {"block": self.block, "source": self.source}
        return self.model_dump(exclude={"source"})

    def blocks_before(self, tokens: int) -> int:
        """Complete blocks before the own one of the last of `tokens`."""
        return max(0, tokens - 1) // self.block

    def keys_read(self, tokens: int) -> int:
        """Keys that the last of `tokens` reads, its own among them."""
        before = self.blocks_before(tokens)
        return min(before, self.count - 1) * self.block + tokens - before * self.block

    def mean_blocks_before(self, length: int) -> float:
        """`blocks_before`, the mean over a pass of `length` tokens."""
        full, rest = divmod(length, self.block)
        return (self.block * full * (full - 1) / 2 + rest * full) / max(length, 1)

    def mean_keys_read(self, length: int) -> float:
        """`keys_read`, the mean over a pass of `length` tokens."""
        (full, rest), most = divmod(length, self.block), self.count - 1
        # The sum of min(b, most) over the blocks b = 0 … full - 1.
        ramp = min(full, most + 1)
        chosen = ramp * (ramp - 1) / 2 + (full - ramp) * most
        own = full * self.block * (self.block + 1) / 2 + rest * (rest + 1) / 2
        read = self.block * (self.block * chosen + rest * min(full, most)) + own
        return read / max(length, 1)
