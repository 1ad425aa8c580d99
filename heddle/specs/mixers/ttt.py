"""A memory of fast weights that learns while it reads (test-time training)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site

# Numbers of a head's state beside its matrices: the mean of its gates in the open chunk, and how much of that is read.
SCALARS = 2


class Ttt(HeadedMixer):
    """Fast weights W, written by gradient descent after every chunk (AllMem's memory, arXiv 2602.13680; LaCT's form of it).

        o_t = f_W(q_t),   f_W(z) = z + W_1 z, or z + W_1 (silu(W_0 z) * W_2 z)
        M = theta M + sum over the chunk of rate_t dL(f_W(k_t), v_t)/dW,   W = W - M,   rows of W at the norm of the first W
        y = scale * W_o rms of each head(o);   rate_t = softplus(W_r x_t + softplus⁻¹(rate)),   theta = mean sigmoid(W_m x_t)

    q and k are silu of projections, each head of norm 1. Tokens of one chunk do not see each other: it stands beside a window of
    attention that is at least as long. The first W and `scale`, a factor of each channel, are learned. No biases.
    """

    ops: ClassVar[tuple[str, ...]] = ("ttt",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 2, "chunk": 7, "rate": 0.05, "width": 20},
        {
            **{"heads": 3, "head_dim": 8, "memory": "linear", "loss": "l2", "normalise": "before"},
            **{"chunk": 21, "rate": 0.05, "momentum": False, "short_conv": 3, "scale": 0.5},
        },
    )
    kind: Literal["ttt"] = "ttt"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count), each a memory of its own.")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    memory: Annotated[
        Literal["linear", "mlp"],
        Field(description="linear: one matrix a head; mlp: a gated feed-forward net of three."),
    ] = "mlp"
    width: Annotated[
        int | None, Field(ge=1, le=65_536, description="Features inside an mlp memory; null: as head_dim.")
    ] = None
    chunk: Annotated[
        int, Field(ge=1, le=10**7, description="Tokens that are read before they are written together.")
    ] = 512
    loss: Annotated[
        Literal["dot", "l2"],
        Field(description="What a write makes smaller, of f = f_W(k): dot: -f · v; l2: |f - v|² / 2."),
    ] = "dot"
    rate: Annotated[
        float, Field(gt=0, le=100, description="Learning rate of a token where its projection is 0.")
    ] = 1e-3
    momentum: Annotated[bool, Field(description="Whether earlier writes go on, by a gate of each chunk.")] = (
        True
    )
    normalise: Annotated[
        Literal["after", "before", "none"],
        Field(
            description="When rows of W get the norm of the first W: after each write; before it, so that what was written is "
            "read once as it is (AllMem); none: never."
        ),
    ] = "after"
    short_conv: Annotated[
        int | None,
        Field(
            ge=2,
            le=64,
            description="Taps of a causal convolution with SiLU on q, k and v, in tokens; null: none, SiLU on q and k.",
        ),
    ] = None
    scale: Annotated[
        float, Field(ge=-1e6, le=1e6, description="What the learned factor of each channel begins with.")
    ] = 1.0

    def resolved(self, site: Site) -> Ttt:
        _, width, size = self._matrices(site)
        return self.model_copy(update={"head_dim": size, "width": width})

    def problems(self, site: Site) -> list[Problem]:
        found, size = heads_problems(self, site), head_dim_of(self, site)
        if self.memory == "linear" and self.width not in (None, size):
            what = f"{self.width} features in a linear memory of {size} dimensions, which has nothing inside"
            found.append(Problem("width", what, "null, or memory: mlp", "out-of-range"))
        return found

    def risks(self) -> list[Problem]:
        if self.memory == "linear" or self.normalise == "after":
            return []
        what = f"writes of an mlp with normalise: {self.normalise} may run away until outputs are no numbers, in every dtype"
        return [Problem("normalise", what, "normalise: after, or memory: linear with loss: dot", "runs-away")]

    def kernels(self) -> tuple[str, ...]:
        return self.ops if self.short_conv is None else (*self.ops, "causal_conv1d")

    def params(self, site: Site) -> int:
        (count, width, size), channels = self._matrices(site), self._channels(site)
        # Beside the projections: the convolution, the first W, the norm's weight and the factors.
        memory = self.heads * count * width * size
        return self._weights(site) + (self.short_conv or 0) * channels + memory + size + site.hidden_size

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        count, width, size = self._matrices(site)
        # Products alone: one a matrix to read. The gradient's own are two a matrix, and what leads to it all others but that
        # with W_1, which the loss l2 takes as well; of a linear memory dL/df is all that leads to it.
        gradient = (1 if count == 1 else 6) + (self.loss == "l2")
        outside = 2 * self._weights(site) + 2 * (self.short_conv or 0) * self._channels(site)
        return outside + self.heads * 2 * width * size * (count + gradient)

    def prefill_flops(self, site: Site, length: int) -> float:
        return self.flops(site, length)

    def states(self, site: Site) -> tuple[State, ...]:
        count, width, size = self._matrices(site)
        # What W has learned, the open chunk's gradient, and the momentum.
        numbers = (3 if self.momentum else 2) * count * width * size + SCALARS
        memory = State("memory", (self.heads, numbers), element=FLOAT32_BYTES)
        if self.short_conv is None:
            return (memory,)
        return memory, State("conv", (self._channels(site), self.short_conv - 1))

    def _matrices(self, site: Site) -> tuple[int, int, int]:
        """Matrices of a head's memory, their features and the head's dimensions."""
        size = head_dim_of(self, site)
        return (1, size, size) if self.memory == "linear" else (3, self.width or size, size)

    def _channels(self, site: Site) -> int:
        return 3 * self.heads * head_dim_of(self, site)

    def _weights(self, site: Site) -> int:
        (count, _, size), gates = self._matrices(site), int(self.momentum)
        # q, k, v and the output; the rates; the momentum's gate.
        return site.hidden_size * self.heads * (4 * size + count + gates)
