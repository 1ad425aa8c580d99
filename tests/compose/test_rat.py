"""RAT: its equation token by token, its two limits, chunks that count real tokens, its costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import EXACT, Largest, call_at, padded_call

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.attention import AttentionModule
from heddle.compose.mixers.rat import CLOSED, RatModule
from heddle.compose.modules.site import Site
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.common import chunks
from heddle.kernels.common.chunks import attend_with_own
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Rat

HIDDEN, HEADS, GROUPS, SIZE, LENGTH = 24, 4, 2, 6, 37
SITE = Site(HIDDEN, 1, 3)
# Angles of RoPE are float32, and so wrong by a rounding of the last position.
ANGLE = LENGTH * torch.finfo(torch.float32).eps
ROPE = {"theta": 100.0, "fraction": 1.0}
# A gate whose sigmoid is 0 in every dtype.
SHUT = -1e4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ready(chunk: int, *, rope: dict[str, float] | None = None, groups: int = GROUPS) -> RatModule:
    """A mixer in float64 whose gates lie between 0 and 1 and whose keys decide."""
    mixer = RatModule(SITE, heads=HEADS, head_dim=SIZE, groups=groups, chunk=chunk, rope=rope)
    for module in mixer.modules():
        initialise(module, std=2 * HIDDEN**-0.5)
    nn.init.normal_(mixer.gate_bias)
    return mixer.double()


def noise(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, HIDDEN, dtype=torch.float64)


def turned(x: Tensor, place: int, rope: dict[str, float] | None) -> Tensor:
    """Pairs (j, j + d/2) as complex numbers, turned by place * theta^(-2j/d).  Shapes:  x, out: [d]"""
    if rope is None:
        return x
    angle = place * rope["theta"] ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
    pairs = torch.complex(x[: SIZE // 2], x[SIZE // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag))


def by_loop(mixer: RatModule, u: Tensor, rope: dict[str, float] | None = None) -> Tensor:
    """Token by token and head by head, from the weights alone."""
    width, groups, chunk = HEADS * SIZE, mixer.sizes[3] // SIZE, mixer.chunk
    projected = u @ mixer.in_proj.weight.T
    z, x, g, q, k = projected.split((width, width, width, groups * SIZE, groups * SIZE), dim=-1)
    g = 1 / (1 + torch.exp(-g - mixer.gate_bias))
    rows = []
    for row in range(u.shape[0]):
        heads = []
        for head in range(HEADS):
            own, shared = (
                slice(head * SIZE, (head + 1) * SIZE),
                slice(head % groups * SIZE, (head % groups + 1) * SIZE),
            )
            keys: list[Tensor] = []
            values: list[Tensor] = []
            outputs = []
            for t in range(u.shape[1]):
                if t % chunk == 0:
                    key = value = torch.zeros(SIZE, dtype=torch.float64)
                gate = g[row, t, own]
                key = gate * key + (1 - gate) * k[row, t, shared]
                value = gate * value + (1 - gate) * x[row, t, own]
                seen = [*keys, turned(key, t // chunk, rope)]
                logits = torch.stack(seen) @ turned(q[row, t, shared], t // chunk, rope) * SIZE**-0.5
                outputs.append(torch.softmax(logits, 0) @ torch.stack([*values, value]))
                if t % chunk == chunk - 1:
                    keys, values = seen, [*values, value]
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, dim=-1))
    return (torch.stack(rows) / (1 + torch.exp(-z))) @ mixer.o_proj.weight.T


def in_pieces(mixer: RatModule, u: Tensor, ends: list[int], real: Tensor | None = None) -> Tensor:
    """What the mixer gives when `u` comes in pieces, `real` [B, T] false at padding."""
    cache, pieces, start = mixer.new_cache(), [], 0
    for end in ends:
        call = call_at(start, end - start, cache)
        if real is not None:
            call.padding, call.key_padding = real[:, start:end], real[:, :end]
        pieces.append(mixer(u[:, start:end], call))
        cache.advance(end - start)
        start = end
    return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 5, 16, LENGTH - 1, LENGTH, LENGTH + 1, 1000])
def test_it_equals_its_formula_at_every_token(chunk: int) -> None:
    mixer, u = ready(chunk), noise()
    expected = by_loop(mixer, u)
    assert (mixer(u, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    assert (in_pieces(mixer, u, list(range(1, LENGTH + 1))) - expected).abs().max() < EXACT
    assert (in_pieces(mixer, u, [1, 4, 5, 15, 16, 33, LENGTH]) - expected).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7])
def test_what_turns_turns_by_the_number_of_its_chunk(chunk: int) -> None:
    mixer, u = ready(chunk, rope=ROPE), noise()
    expected = by_loop(mixer, u, ROPE)
    assert (by_loop(mixer, u) - expected).abs().max() > 1e-2
    bound = ANGLE * expected.abs().max()
    assert (mixer(u, call_at(0, LENGTH)) - expected).abs().max() < bound
    assert (in_pieces(mixer, u, list(range(1, LENGTH + 1))) - expected).abs().max() < bound


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4, 5, 6, 9, 10, 11])
def test_it_ends_before_at_and_after_the_end_of_a_chunk(length: int) -> None:
    mixer, u = ready(5, groups=1), noise(length + 2)
    expected = by_loop(mixer, u)
    # The last two tokens go on from what the first calls left.
    assert (in_pieces(mixer, u, [length, length + 1, length + 2]) - expected).abs().max() < EXACT
    assert (mixer(u[:, :length], call_at(0, length)) - expected[:, :length]).abs().max() < EXACT


def test_its_gradients_are_those_of_the_formula() -> None:
    mixer, u = ready(5), noise(13).requires_grad_()
    weight = noise(13)
    inputs = [u, *mixer.parameters()]
    expected = torch.autograd.grad((by_loop(mixer, u) * weight).sum(), inputs)
    found = torch.autograd.grad((mixer(u, call_at(0, 13)) * weight).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("rope", [None, ROPE])
def test_with_chunks_of_one_token_and_gates_shut_it_is_gated_softmax_attention(rope: Any) -> None:
    ours, u = ready(1, rope=rope), noise()
    nn.init.constant_(ours.gate_bias, SHUT)
    attention = AttentionModule(
        SITE, heads=HEADS, kv_heads=HEADS, head_dim=SIZE, rope=rope, qk_norm=False, gate=True, window=None
    ).double()
    z, x, _, q, k = ours.in_proj.weight.split(ours.sizes)
    # Head h reads group h mod groups.
    queries, keys = (side.view(GROUPS, SIZE, HIDDEN).repeat(HEADS // GROUPS, 1, 1) for side in (q, k))
    gated = torch.cat((queries, z.view(HEADS, SIZE, HIDDEN)), dim=1)
    attention.q_proj.weight.copy_(gated.flatten(0, 1))
    assert attention.k_proj is not None
    assert attention.v_proj is not None
    attention.k_proj.weight.copy_(keys.flatten(0, 1))
    attention.v_proj.weight.copy_(x)
    attention.o_proj.weight.copy_(ours.o_proj.weight)
    difference = ours(u, call_at(0, LENGTH)) - attention(u, call_at(0, LENGTH))
    assert difference.abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("chunk", [LENGTH, 1000])
def test_with_one_chunk_it_is_a_gated_recurrence(chunk: int) -> None:
    mixer, u = ready(chunk, rope=ROPE), noise()
    z, x, g, _, _ = (u @ mixer.in_proj.weight.T).split(mixer.sizes, dim=-1)
    g = torch.sigmoid(g + mixer.gate_bias)
    y, states = torch.zeros_like(x[:, 0]), []
    for t in range(LENGTH):
        y = g[:, t] * y + (1 - g[:, t]) * x[:, t]
        states.append(y)
    expected = (torch.sigmoid(z) * torch.stack(states, dim=1)) @ mixer.o_proj.weight.T
    assert (mixer(u, call_at(0, LENGTH)) - expected).abs().max() < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [SHUT, 40.0])
def test_gates_of_0_and_1_leave_everything_finite(bias: float, dtype: torch.dtype) -> None:
    mixer, u = ready(8).to(dtype), noise().to(dtype)
    nn.init.constant_(mixer.gate_bias, bias)
    with torch.no_grad():
        # Half the channels keep what they would write, so that products of gates underflow beside others that do not.
        mixer.gate_bias[::2] = 0.0
    y = mixer(u, call_at(0, LENGTH))
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in mixer.parameters())


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_chunks_count_real_tokens(chunk: int) -> None:
    mixer, u = ready(chunk, rope=ROPE), noise()
    padding = (3, 11)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    for row, width in enumerate(padding):
        real[row, :width] = False
    alone = [
        mixer(u[row : row + 1, width:], call_at(0, LENGTH - width, rows=1))
        for row, width in enumerate(padding)
    ]
    found = [mixer(u, padded_call(real))]
    for ends in ([LENGTH], [1, 2, 9, 16, 30, LENGTH], [20, *range(21, LENGTH + 1)]):
        found.append(in_pieces(mixer, u, ends, real))
    for y in found:
        assert y.isfinite().all()
        for row, width in enumerate(padding):
            assert (y[row, width:] - alone[row][0]).abs().max() < EXACT


@torch.no_grad()
def test_padding_on_the_right_changes_nothing() -> None:
    mixer, u = ready(5, rope=ROPE), noise()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, 23:] = False
    y = mixer(u, padded_call(real))
    whole = mixer(u, call_at(0, LENGTH))
    assert (y[1] - whole[1]).abs().max() < EXACT
    assert (y[0, :23] - whole[0, :23]).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
def test_blocks_of_queries_are_one_attention(is_padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, u = ready(5), noise()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, : 9 * is_padded] = False
    whole = mixer(u, padded_call(real) if is_padded else call_at(0, LENGTH))
    for queries in (1, 4, 5, 6):
        monkeypatch.setattr(chunks, "QUERIES", queries)
        found = mixer(u, padded_call(real) if is_padded else call_at(0, LENGTH))
        assert ((found - whole) * real[..., None]).abs().max() < EXACT


@torch.no_grad()
def test_a_cache_holds_complete_chunks_and_the_running_pair() -> None:
    mixer, u = ready(5), noise()
    spec = Rat(heads=HEADS, head_dim=SIZE, chunk=5)
    for length in (1, 4, 5, 6, 10, LENGTH):
        cache = mixer.new_cache()
        mixer(u[:, :length], call_at(0, length, cache))
        held = cache.tensors()
        assert held["keys"].shape == held["values"].shape == (2, HEADS, length // 5, SIZE)
        assert held["running"].shape == (2, 2, HEADS * SIZE)
        # The running pair is float32 by the spec, and here float64.
        counted = spec.state_bytes(SpecSite(HIDDEN), length, 8) + 4 * 2 * HEADS * SIZE
        assert 2 * counted == sum(one.numel() * one.element_size() for one in held.values())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_lose_no_more_in_the_logit_of_the_own_key_than_in_others(dtype: torch.dtype) -> None:
    q, k, v, own_key, own_value = (torch.randn(2, 3, tokens, 16) for tokens in (40, 9, 9, 40, 40))
    # Logits up to 60, of which a rounding to bfloat16 would take up to 1/8.
    q, k, v, own_key, own_value = (one.to(dtype) for one in (q * 8, k, v, own_key + q / 4, own_value))
    seen = torch.arange(9) < torch.arange(40)[:, None] // 4
    found = attend_with_own(q, k, v, (own_key, own_value), seen=seen[None, None])

    def explicit(wide: torch.dtype) -> Tensor:
        """Products of `dtype`, all else in `wide`."""
        logits = (q.to(wide) @ k.to(wide).mT).masked_fill(~seen, -torch.inf)
        own = (q.to(wide) * own_key.to(wide)).sum(-1, keepdim=True)
        p = torch.softmax(torch.cat((logits, own), dim=-1) / 4, dim=-1)
        return p[..., :-1] @ v.to(wide) + p[..., -1:] * own_value.to(wide)

    exact = explicit(torch.float64)
    rounded = explicit(torch.float32).to(dtype)
    error, baseline = (
        worst_error(one.transpose(1, 2), exact.transpose(1, 2), timed=True)[0] for one in (found, rounded)
    )
    assert error <= 2 * baseline + EPSILON[dtype]


def test_no_table_of_all_tokens_by_all_tokens_is_made() -> None:
    length, chunk = 1024, 16
    mixer, u = ready(chunk).float(), noise(length).float()
    with Largest() as seen, sdpa_kernel(SDPBackend.MATH):
        mixer(u, call_at(0, length)).sum().backward()
    assert seen.numbers <= 2 * HEADS * length * (length // chunk + 1)
    assert seen.numbers < length * length


def test_gates_begin_with_horizons_of_up_to_a_chunk() -> None:
    for chunk in (2, 16, 64):
        mixer = RatModule(Site(2048, 0, 1), heads=16, head_dim=128, groups=2, chunk=chunk, rope=None)
        mixer.initialise(0.02)
        odds = mixer.gate_bias.exp()
        assert odds.min() >= 1 - 1e-6
        assert odds.max() <= (chunk - 1) * (1 + 1e-6)
        assert odds.mean().item() == pytest.approx(chunk / 2, rel=0.05)
    mixer = RatModule(Site(64, 0, 1), heads=4, head_dim=16, groups=2, chunk=1, rope=None)
    mixer.initialise(0.02)
    assert (mixer.gate_bias == CLOSED).all()
    # In a narrow model gates stay wide.
    assert mixer.to(torch.bfloat16).gate_bias.dtype == torch.float32


def test_it_costs_what_the_sheet_says() -> None:
    # D 2048, 16 heads of 128, 2 groups, chunks of 16: 4 D² + 4 · 128 D and a bias; 32 MiB of cache after 64k tokens.
    spec, site, D = Rat(heads=16), SpecSite(hidden_size=2048), 2048
    weights = 4 * D * D + 2 * 2 * 128 * D
    assert spec.params(site) == weights + D
    assert spec.state_bytes(site, 65_536, 2) == 32 * 2**20 + 4 * 2 * D
    assert spec.cache_bytes_per_token(site, 2) == 2 * 2 * D // 16
    assert spec.flops(site, 65_536) - 2 * weights - 6 * D == 4 * D * (4096 + 1)
    # In the mean 2 D T / L, less half a chunk that is still running, and the own pair.
    core = spec.prefill_flops(site, 65_536) - 2 * weights - 6 * D
    assert core == 2 * D * (65_536 // 16 - 1) + 4 * D
    assert Rat(heads=16, chunk=5).prefill_flops(site, 13) == pytest.approx(
        2 * weights + 6 * D + 4 * D * (1 + sum(t // 5 for t in range(13)) / 13)
    )


@pytest.mark.parametrize("phase", ["prefill", "step"])
def test_flops_are_those_that_torch_counts_and_those_of_the_recurrence(phase: str) -> None:
    length, site = 96, SpecSite(hidden_size=256)
    spec = Rat(heads=2, chunk=4)
    mixer = RatModule(
        Site(256, 0, 1), **{name: one for name, one in spec.runtime(site).items() if name != "kind"}
    )
    mixer.initialise(0.02)
    cache, u = mixer.new_cache(), torch.randn(2, length, 256)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            mixer(u, call_at(0, length, cache))
        cache.advance(length)
        tokens = 2 * length
        if phase == "step":
            tokens = 2
            with FlopCounterMode(display=False) as counter:
                mixer(u[:, :1], call_at(length, 1, cache))
    # The recurrence is made of products and sums of numbers, which the counter does not see. Nor does it see a mask: as if
    # each token came after all others.
    recurrence, context = 2 * 3 * 256, length - (phase == "prefill")
    assert counter.get_total_flops() / tokens + recurrence == pytest.approx(
        spec.flops(site, context), rel=0.02
    )


def test_what_does_not_fit_is_told() -> None:
    site = SpecSite(hidden_size=HIDDEN)

    def told(**fields: Any) -> list[tuple[str, str]]:
        return [(one.field, one.what) for one in Rat.model_validate(fields).problems(site)]

    odd = "of 3 dimensions of a head would turn, and RoPE turns pairs"
    assert told(heads=3) == [("groups", "2 does not divide heads 3")]
    assert told(heads=5, groups=1) == [("heads", "5 does not divide hidden_size 24")]
    assert told(heads=8) == [("heads", f"3 {odd}")]
    assert told(heads=4, head_dim=3) == [("head_dim", f"3 {odd}")]
    assert told(heads=4, rope={"fraction": 0.5}) == [
        ("rope.fraction", "3 of 6 dimensions of a head would turn, and RoPE turns pairs")
    ]
    assert told(heads=8, rope=None) == told(heads=4) == []
    scaling = {"kind": "yarn", "factor": 2.0, "original_length": 64, "beta_fast": 1.0, "beta_slow": 2.0}
    assert [field for field, _ in told(heads=4, rope={"scaling": scaling})] == ["rope.scaling.beta_fast"]


@torch.no_grad()
def test_a_call_without_a_cache_counts_from_its_first_token() -> None:
    mixer, u = ready(5, rope=ROPE), noise()
    later = Call(torch.arange(3, 3 + LENGTH)[None].expand(2, LENGTH))
    assert torch.equal(mixer(u, call_at(0, LENGTH)), mixer(u, later))
