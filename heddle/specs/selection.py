"""Which blocks of keys a query reads, where it does not read all of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from heddle.specs.base import Schema
from heddle.specs.cost import State
from heddle.specs.kinds import Problem
from heddle.specs.layer import Reference

# Fields of the language that came later: at their defaults they are left out of the data, as if they did not exist.
LATER = ("scores", "dense_length", "decode_only", "dense_first", "distillation")
# Kernels are half a block long and a quarter apart.
QUARTERS = 4


class Selection(Schema):
    """The best blocks of keys for each query and KV head, b a complete block before the query's own.

        mean     score_b = mean_{h in group} q_h · mean_{j in b} k_j
        kernels  score_b = max_{i overlaps b} sum_{h in group} softmax_i(q_h · mean_{j in i} k_j)        (arXiv 2509.24663)

    Kernels i are half a block long and a quarter apart; those that end at the query or before count. The first `sink` blocks and
    the last `recent` ones, the query's own among them, are always read and count among `count`. With `source` the blocks are
    those that an earlier layer chose (HyLRA, arXiv 2602.00777). With `decode_only` that is so of single tokens that are decoded;
    several at once, a prompt or a training example, read all keys.
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
    scores: Annotated[
        Literal["mean", "kernels"],
        Field(
            description="What is compared with a query: the mean of each block; or, as in InfLLM-V2, means over half a block, a "
            "quarter apart, by a softmax for each head."
        ),
    ] = "mean"
    dense_length: Annotated[
        int, Field(ge=0, le=10**8, description="A query with fewer tokens before it reads all of them.")
    ] = 0
    decode_only: Annotated[
        bool,
        Field(
            description="Only a single token that is decoded reads chosen blocks; several at once read all keys (HyLRA). Its "
            "source does the same."
        ),
    ] = False
    dense_first: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="Share of a training's steps (0 to 1), the first ones, that read all keys, as InfLLM-V2's training "
            "begins dense; null: none. A layer with a source does as the source.",
        ),
    ] = None
    distillation: Annotated[
        float | None,
        Field(
            gt=0,
            le=1e6,
            description="Factor, in the training loss, of the cross-entropy between the scores of blocks and what attention over "
            "all keys would give them; null: no such loss. Not with a source.",
        ),
    ] = None
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
            taken = {"block": self.block, "source": self.source}
            return {**taken, "decode_only": True} if self.decode_only else taken
        defaults = {name: type(self).model_fields[name].default for name in LATER}
        data = self.model_dump(exclude={"source"})
        return {name: value for name, value in data.items() if name not in LATER or value != defaults[name]}

    def misfit(self, name: str, given: Selection) -> str | None:
        """Why the blocks that the layer `name` chooses cannot be read here; None if they can."""
        if self.block != given.block:
            return f"the blocks of {name} are of {given.block} keys, and here of {self.block}"
        if self.decode_only != given.decode_only:
            return f"one of {name} and this layer is decode_only; both must be, or neither"
        return None

    def means(self, shape: tuple[int, ...]) -> State:
        """The means of keys of this shape by which blocks are chosen."""
        # A kernel holds two quarters.
        every, late = (self.block, 0) if self.scores == "mean" else (self.block // QUARTERS, 1)
        return State("means", shape, grows=True, every=every, late=late)

    def blocks_before(self, tokens: int) -> int:
        """Complete blocks before the own one of the last of `tokens`."""
        return max(0, tokens - 1) // self.block

    def problems(self) -> list[Problem]:
        """Numbers that do not go together, by their paths inside the mixer."""
        found = []
        if self.source is None and self.count < self.sink + self.recent:
            what = f"{self.count} blocks, and {self.sink + self.recent} are always read"
            found.append(Problem("selection.count", what, "at least sink + recent", "out-of-range"))
        why = None if self.source is None else "the layer that chooses the blocks decides that"
        if why is None and self.decode_only:
            why = "with decode_only a training reads all keys, and chooses none"
        if why is not None:
            found += [
                Problem(f"selection.{name}", why, "leave it out", "conflicting-fields")
                for name in ("dense_first", "distillation")
                if getattr(self, name) is not None
            ]
        if self.scores == "kernels" and self.block % QUARTERS:
            what = f"{self.block} keys of a block have no quarters, and kernels are a quarter apart"
            found.append(Problem("selection.block", what, f"a multiple of {QUARTERS}, or scores: mean"))
        return found

    def keys_read(self, tokens: int) -> int:
        """Keys that the last of `tokens` reads, its own among them."""
        if tokens <= self.dense_length:
            return tokens
        before = self.blocks_before(tokens)
        return min(before, self.count - 1) * self.block + tokens - before * self.block

    def scored(self, tokens: int) -> int:
        """Means that the last of `tokens` is compared with."""
        if self.source is not None or tokens <= self.dense_length:
            return 0
        if self.scores == "mean":
            return self.blocks_before(tokens)
        return max(0, tokens * QUARTERS // self.block - 1)

    def mean_scored(self, length: int) -> float:
        """`scored`, the mean over a pass of `length` tokens."""
        if self.source is not None or self.decode_only:
            return 0.0
        dense = min(length, self.dense_length)
        return (self._all_scored(length) - self._all_scored(dense)) / max(length, 1)

    def mean_keys_read(self, length: int) -> float:
        """`keys_read`, the mean over a pass of `length` tokens."""
        if self.decode_only:
            return (length + 1) / 2
        dense = min(length, self.dense_length)
        return (self._all_read(length) - self._all_read(dense) + dense * (dense + 1) / 2) / max(length, 1)

    def mean_blocks_before(self, length: int) -> float:
        """`blocks_before`, the mean over a pass of `length` tokens."""
        full, rest = divmod(length, self.block)
        return (self.block * full * (full - 1) / 2 + rest * full) / max(length, 1)

    def _all_scored(self, length: int) -> float:
        """The sum of what tokens 1 … length are compared with."""
        if self.scores == "mean":
            return self.mean_blocks_before(length) * max(length, 1)
        step = self.block // QUARTERS
        # The sum of t // step - 1 over the tokens t with at least one quarter before their end.
        full, rest = divmod(length, step)
        return max(0, step * full * (full - 1) / 2 + (rest + 1) * full - max(0, length - step + 1))

    def _all_read(self, length: int) -> float:
        """The sum of the keys that tokens 1 … length read by choice."""
        (full, rest), most = divmod(length, self.block), self.count - 1
        # The sum of min(b, most) over the blocks b = 0 … full - 1.
        ramp = min(full, most + 1)
        chosen = ramp * (ramp - 1) / 2 + (full - ramp) * most
        own = full * self.block * (self.block + 1) / 2 + rest * (rest + 1) / 2
        return self.block * (self.block * chosen + rest * min(full, most)) + own
