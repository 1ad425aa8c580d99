"""ContMix: short kernels over the last tokens, made for each token from what came before; or over an image, from all of it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

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

# Means, and the last values.
States = tuple[Tensor, Tensor]


class ContMixModule(Initialised):
    """A convolution whose weights each token makes from running means.        (arXiv 2502.20087; the causal form is ours)

        a = affinities of q with the means of k, over sqrt(query_dim);   w = softmax_j (P a + r)_j
        y_t = W_o (silu(W_g x_t) * sum_j (w_tj + u_j) v_(t-j)),   v 0 before the first token

    With `grid`, in the paper's form, the means are those of k over summaries² regions of the image, the sum goes over squares
    around the token, of `taps` and `small_taps` for the two halves of a head's channels with a softmax each, and v is 0 beyond
    the edges; its state is empty. Padding and what is not written is in no mean and in no other token's sum. Weights and means
    are float32. Training works the sums of long sequences out again.

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
        o = self._around(wide(q), wide(k), wide(v), call) if self.grid else self._behind(q, k, v, call)
        o = o.to(x.dtype)
        o = o * F.silu(self.g_proj(x)).view_as(o)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _behind(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Shapes:  q, k: [B, T, H, query_dim];  v, out: [B, T, H, d], out wide"""
        means, past = call.state("means"), call.state("values")
        if means is None:
            shape = (len(q), self.heads, self.summaries, self.query_dim)
            means = q.new_zeros(shape, dtype=wide_dtype(q.dtype))
        if past is None:
            past = v.new_zeros(len(v), self.reach, self.heads * self.head_dim)
        past = wide(past).view(len(v), -1, *v.shape[2:])
        marks = () if call.written is None else (call.written,)
        o, (means, past) = in_stretches(self._stretch, (means, past), (q, k, v, *marks))
        call.keep(means=means, values=past.flatten(2).to(self.v_proj.weight.dtype))
        return o

    def _stretch(
        self, state: States, q: Tensor, k: Tensor, v: Tensor, written: Tensor | None = None
    ) -> tuple[Tensor, States]:
        """The sums of a stretch of tokens; the means, and the last values, before it and after it."""
        (means, past), (q, k, v) = state, (wide(side) for side in (q, k, v))
        heard = v
        if written is not None:
            k, heard = (side * written[..., None, None].to(side.dtype) for side in (k, v))
        a, means = affinities(q * self.query_dim**-0.5, k, means)
        w = torch.softmax(F.linear(a, wide(self.tap_weight)) + wide(self.tap_bias), dim=-1)
        held = torch.cat((past, heard), dim=1)
        # A view would keep all of a long prefill in memory.
        return self._mixed(v, held, w), (means, held[:, held.shape[1] - self.reach :].clone())

    def _around(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Shapes:  q, k: [B, T, H, query_dim];  v, out: [B, T, H, d];  all wide"""
        if call.cache is not None and call.cache.get_seq_length() > 0:
            raise HeddleError("bad-argument", "kernels that see later tokens cannot go on from a cache")
        canvas = Canvas.of(call, v.shape[1], self.grid["width"])
        weight = canvas.laid(call.hide_unwritten(call.hide_padding(v.new_ones(*v.shape[:2], 1))))
        regions = canvas.region_means(canvas.laid(k.flatten(2)), weight, self.regions)
        regions = regions.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
        a = torch.einsum("bthq,bshq->bths", q * self.query_dim**-0.5, regions)
        w = F.linear(a, wide(self.tap_weight)) + wide(self.tap_bias)
        image, large = canvas.laid(v.flatten(2)).unflatten(-1, (self.heads, -1)), self.taps**2  # type: ignore[no-untyped-call]
        half, sides = self.head_dim // 2, (self.taps, self.grid["small_taps"])
        o = [
            _over_square(part, weight, canvas.laid(torch.softmax(made, dim=-1).flatten(2)), side)
            for part, made, side in zip(
                (image[..., :half], image[..., half:]), (w[..., :large], w[..., large:]), sides, strict=True
            )
        ]
        out = torch.cat(o, dim=-1)
        if self.static is not None:
            out = out + _over_square(image, weight, wide(self.static), self.static_taps)
        return canvas.taken(out.flatten(3)).unflatten(-1, (self.heads, -1))  # type: ignore[no-any-return, no-untyped-call]

    def _mixed(self, v: Tensor, held: Tensor, w: Tensor) -> Tensor:
        """Shapes:  v, out: [B, T, H, d];  held: [B, reach + T, H, d], what is heard of v;  w: [B, T, H, taps];  all wide"""
        o = torch.zeros_like(v)
        for tap in range(self.reach + 1):
            # A token hears itself, whether later ones will or not.
            row = v if tap == 0 else held[:, self.reach - tap : held.shape[1] - tap]
            if tap < w.shape[-1]:
                o = o + w[..., tap, None] * row
            if self.static is not None and tap < self.static.shape[-1]:
                o = o + wide(self.static[..., tap]) * row
        return o

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

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "torch"


def _over_square(image: Tensor, weight: Tensor, kernel: Tensor, side: int) -> Tensor:
    """Sums over squares around each token; a token hears itself, and of others those with a weight.

    Shapes:  image, out: [B, rows, width, H, d];  weight: [B, rows, width, 1] of 0 and 1
             kernel: [B, rows, width, H side²], or one for all tokens, [H, d, side²]
    """
    rows, width, heads = image.shape[1:4]
    kernel = kernel if kernel.dim() == 3 else kernel.unflatten(-1, (heads, 1, -1))  # type: ignore[no-untyped-call]
    reach = side // 2
    heard = F.pad(image * weight[..., None], (0, 0, 0, 0, reach, reach, reach, reach))
    out = torch.zeros_like(image)
    for tap, (down, right) in enumerate(product(range(side), repeat=2)):
        is_own = down == right == reach
        row = image if is_own else heard[:, down : down + rows, right : right + width]
        out = out + kernel[..., tap] * row
    return out
