"""ContMix: short kernels over the last tokens, made for each token from what came before; or over an image, from all of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer, TokenCount
from heddle.compose.init import Initialised, fill, normal, uniform
from heddle.compose.modules.canvas import Canvas
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.running_means import affinities
from heddle.compose.modules.site import Site
from heddle.compose.modules.stretches import in_stretches
from heddle.errors import HeddleError
from heddle.kernels.dynamic_conv import dynamic_conv

# Means, and the last values.
States = tuple[Tensor, Tensor]


class ContMixModule(Initialised):
    """A convolution whose weights each token makes from running means.        (arXiv 2502.20087; the causal form is ours)

        a = affinities of q with the means of k, over sqrt(query_dim);   w = softmax_j (P a + r)_j
        y_t = W_o (silu(W_g x_t) * sum_j (w_tj + u_j) v_(t-j)),   v 0 before the first token

    With `grid`, in the paper's form, the means are those of k over summaries² regions of the image, the sum goes over squares
    around the token, of `taps` and `small_taps` for the two halves of a head's channels with a softmax each, and v is 0 beyond
    the edges; its state is empty. Padding and what is not written is in no mean and in no other token's sum. Weights and means
    are float32. Training works the weights of long sequences out again.

    Shapes:  x, y: [B, T, D];  P: [taps, summaries];  r: [H, taps];  u: [H, d, static_taps];  `heads_out` sees [B, T, H, d]
             states: means: [B, H, summaries, query_dim];  values: [B, most taps - 1, H d]
             with `grid` P: [taps² + small_taps², summaries²], r and u likewise, and taps lie row by row

    Raises:
        HeddleError: "bad-argument" for a cache of earlier tokens with `grid`.
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        query_dim: int,
        taps: int,
        summaries: int,
        static_taps: int,
        grid: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.taps, self.static_taps, self.regions = dict(grid or {}), taps, static_taps, summaries
        if grid is not None:
            taps, static_taps, summaries = taps**2 + grid["small_taps"] ** 2, static_taps**2, summaries**2
        self.heads, self.head_dim, self.query_dim, self.summaries = heads, head_dim, query_dim, summaries
        self.reach = max(taps, static_taps) - 1
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (
            nn.Linear(site.hidden_size, heads * size, bias=False)
            for size in (query_dim, query_dim, head_dim, head_dim)
        )
        self.tap_weight = nn.Parameter(torch.empty(taps, summaries))
        self.tap_bias = nn.Parameter(torch.empty(heads, taps))
        self.static = nn.Parameter(torch.empty(heads, head_dim, static_taps)) if static_taps else None
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        q, k, v = (
            proj(x).view(*x.shape[:2], self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        o = self._around(wide(q), wide(k), v, call) if self.grid else self._behind(q, k, v, call)
        o = o.to(x.dtype)
        o = o * F.silu(self.g_proj(x)).view_as(o)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _behind(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Shapes:  q, k: [B, T, H, query_dim];  v, out: [B, T, H, d]"""
        means, past = call.state("means"), call.state("values")
        if means is None:
            shape = (len(q), self.heads, self.summaries, self.query_dim)
            means = q.new_zeros(shape, dtype=wide_dtype(q.dtype))
        past = v[:, :0] if past is None else past.to(v.dtype).unflatten(-1, v.shape[2:])  # type: ignore[no-untyped-call]
        marks = () if call.written is None else (call.written,)
        o, (means, past) = in_stretches(self._stretch, (means, past), (q, k, v, *marks))
        call.keep(means=means, values=past.flatten(2).to(self.v_proj.weight.dtype))
        return o

    def _stretch(
        self, state: States, q: Tensor, k: Tensor, v: Tensor, written: Tensor | None = None
    ) -> tuple[Tensor, States]:
        """The sums of a stretch of tokens; the means, and the last values, before it and after it."""
        (means, past), heard = state, _heard(v, written)
        a, means = affinities(wide(q) * self.query_dim**-0.5, _heard(wide(k), written), means)
        w = torch.softmax(F.linear(a, wide(self.tap_weight)) + wide(self.tap_bias), dim=-1)
        held = torch.cat((past, heard), dim=1) if past.shape[1] else heard
        o = dynamic_conv(held, w, static=self.static)
        o = _with_own(o, v, heard, w[..., 0], None if self.static is None else self.static[..., 0])
        # Zeros before the first token, and of more the last; a view would keep all of a long prefill in memory.
        return o, (means, F.pad(held, (0, 0, 0, 0, self.reach - held.shape[1], 0)))

    def _around(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Shapes:  q, k: [B, T, H, query_dim], wide;  v, out: [B, T, H, d]"""
        if call.cache is not None and call.cache.get_seq_length() > 0:
            raise HeddleError("bad-argument", "kernels that see later tokens cannot go on from a cache")
        canvas = Canvas.of(call, v.shape[1], self.grid["width"])
        weight = canvas.laid(call.hide_unwritten(call.hide_padding(k.new_ones(*k.shape[:2], 1))))
        regions = canvas.region_means(canvas.laid(k.flatten(2)), weight, self.regions)
        regions = regions.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
        a = torch.einsum("bthq,bshq->bths", q * self.query_dim**-0.5, regions)
        w = F.linear(a, wide(self.tap_weight)) + wide(self.tap_bias)
        half, large = self.head_dim // 2, self.taps**2
        channels, taps = (slice(half), slice(half, None)), (w[..., :large], w[..., large:])
        o = [
            self._over_squares(v, torch.softmax(made, dim=-1), of, canvas, call.written)
            for of, made in zip(channels, taps, strict=True)
        ]
        return torch.cat(o, dim=-1)

    def _over_squares(
        self, v: Tensor, w: Tensor, channels: slice, canvas: Canvas, written: Tensor | None
    ) -> Tensor:
        """The sums of some channels.  Shapes:  v: [B, T, H, d];  w: [B, T, H, taps];  out: [B, T, H, channels]"""
        v, static = v[..., channels], None if self.static is None else self.static[:, channels]
        heard = _heard(v, written)
        o = dynamic_conv(canvas.begun(heard), canvas.begun(w), static=static, width=canvas.width)
        fixed = None if static is None else static[..., static.shape[-1] // 2]
        return _with_own(canvas.placed(o), v, heard, w[..., w.shape[-1] // 2], fixed)

    def initialise(self, std: float) -> None:
        normal(self.tap_weight, std)
        fill(self.tap_bias, torch.zeros(self.tap_bias.shape))
        if self.static is not None:
            bound = self.static.shape[-1] ** -0.5
            uniform(self.static, -bound, bound)

    def new_cache(self) -> StateLayer:
        return TokenCount() if self.grid else RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        if self.grid:
            return PreallocatedRecurrentLayer({}, context=context)
        means = (batch, self.heads, self.summaries, self.query_dim)
        states = {
            "means": like.new_empty(means, dtype=wide_dtype(like.dtype)).normal_(),
            "values": like.new_empty(batch, self.reach, self.heads * self.head_dim).normal_(),
        }
        return PreallocatedRecurrentLayer(states, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        size = self.head_dim - self.head_dim // 2 if self.grid else self.head_dim
        return dynamic_conv.path(device, dtype, K=size, W=len(self.tap_weight))


def _heard(x: Tensor, written: Tensor | None) -> Tensor:
    """What other tokens hear.  Shapes:  x, out: [B, T, H, *];  written: [B, T]"""
    return x if written is None else x * written[..., None, None].to(x.dtype)


def _with_own(o: Tensor, v: Tensor, heard: Tensor, tap: Tensor, fixed: Tensor | None) -> Tensor:
    """Sums over what is heard, in which each token hears itself, by its own tap, whether others do or not.

    Shapes:  o, v, heard, out: [B, T, H, d];  tap: [B, T, H];  fixed: [H, d]
    """
    if heard is v:
        return o
    taps = tap[..., None] if fixed is None else tap[..., None] + wide(fixed)
    return o + taps * (wide(v) - wide(heard))
