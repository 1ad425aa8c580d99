"""Softmax attention in all its forms, against loops over tokens in float64 that share nothing with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import (
    EXACT,
    EXAMPLES,
    call_at,
    checkpoint,
    gradients,
    in_pieces,
    left_padded,
    noise,
    shaken,
    tokens,
)
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from heddle.compose.build import build
from heddle.compose.cache import Call, KVLayer, cache_bytes
from heddle.compose.mixers.attention import AttentionModule
from heddle.compose.modules.rope import rotary_tables, scaled_frequencies, scaling_key
from heddle.compose.modules.selection import Places, Rule, choose_blocks
from heddle.compose.modules.site import Site
from heddle.compose.modules.softmax import softmax_attention
from heddle.compose.plan import plan
from heddle.errors import HeddleError, HeddleErrors
from heddle.specs import ModelSpec, load
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.attention import Attention

HIDDEN, VOCABULARY = 24, 256
# Rotations are float32.
TURNED = 1e-5


def mixer_of(**fields: Any) -> Any:
    spec = Attention.model_validate({"heads": 4, **fields})
    data = spec.runtime(SpecSite(HIDDEN))
    del data["kind"]
    return shaken(AttentionModule(Site(HIDDEN, 0, 1), **data))


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, **how: Any) -> Tensor:
    """One row and token at a time.  Shapes:  q, out: [B, H, T, d];  k, v: [B, KV, T, d];  seen: [B, H, T, T] bool"""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        keys = seen[b, h, i].nonzero()[:, 0]
        logits = k[b, h // group, keys] @ q[b, h, i] * how.get("scale", q.shape[-1] ** -0.5)
        if how.get("softcap"):
            logits = how["softcap"] * torch.tanh(logits / how["softcap"])
        weights = logits.exp()
        sink = how["sinks"][h].exp() if how.get("sinks") is not None else 0.0
        out[b, h, i] = weights @ v[b, h // group, keys] / (weights.sum() + sink)
    return out


def in_view(length: int, window: int | None, causal: bool) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    distance = distance if causal else distance.abs()
    return (distance >= 0) & (distance < (window or length))


# Frequencies.

SCALINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "linear", "factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    (
        {"kind": "llama3", "factor": 32.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    (
        {
            "kind": "llama3",
            "factor": 8.0,
            "low_frequency_factor": 2.0,
            "high_frequency_factor": 5.0,
            "original_length": 512,
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 512,
        },
    ),
    (
        {"kind": "yarn", "factor": 4.0, "original_length": 4096},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    (
        {
            "kind": "yarn",
            "factor": 16.0,
            "original_length": 64,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), SCALINGS)
@pytest.mark.parametrize(("theta", "fraction"), [(10_000.0, 1.0), (500_000.0, 0.5)])
def test_scaled_frequencies_are_those_of_transformers(
    ours: dict[str, Any], theirs: dict[str, Any], theta: float, fraction: float
) -> None:
    spec = Attention.model_validate(
        {"heads": 2, "head_dim": 64, "rope": {"theta": theta, "fraction": fraction, "scaling": ours}}
    )
    scaling = spec.runtime(SpecSite(HIDDEN))["rope"]["scaling"]
    size = int(64 * fraction)
    got, factor = scaled_frequencies(size, theta, scaling, torch.device("cpu"))
    rope = theirs | {"rope_theta": theta, "partial_rotary_factor": fraction}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=65_536,
        rope_parameters=rope,
    )
    expected, their_factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    # Theirs are rounded to float32 at every step.
    assert ((got - expected).abs() / expected).max() < 1e-6
    assert factor == pytest.approx(their_factor, rel=1e-12)
    cos, sin = rotary_tables(torch.arange(9)[None], size, theta, scaling_key(scaling))
    angles = torch.arange(9)[:, None] * torch.cat((expected, expected))
    assert (cos[0, :, 0] - angles.cos() * factor).abs().max() < 1e-5
    assert (sin[0, :, 0] - angles.sin() * factor).abs().max() < 1e-5


def test_tables_of_one_scaling_are_made_once_in_a_forward() -> None:
    call, key = call_at(0, 5), scaling_key({"kind": "linear", "factor": 2.0})
    assert call.rotary_tables(8, 1e4, key)[0] is call.rotary_tables(8, 1e4, key)[0]
    assert not torch.equal(call.rotary_tables(8, 1e4, key)[0], call.rotary_tables(8, 1e4)[0])


# Logits, norms, biases and views of one layer.

FORMS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 0.8, "scale": 0.9},
    "sinks": {"sinks": True, "kv_heads": 2},
    "softcap, sinks, window": {"softcap": 1.5, "sinks": True, "window": 3, "kv_heads": 1},
    "bias of q, k, v": {"bias": "qkv", "kv_heads": 2},
    "bias of all": {"bias": "all", "gate": True},
    "joint norm": {"qk_norm": "full", "kv_heads": 2},
    "joint norm, gate, multiplier": {"qk_norm": "full", "gate": True, "key_multiplier": 1.7, "kv_heads": 2},
    "both sides": {"causal": False, "kv_heads": 2},
    "both sides, window": {"causal": False, "window": 4, "kv_heads": 2},
    "both sides, all": {"causal": False, "window": 4, "softcap": 0.8, "sinks": True, "bias": "all"},
    "selection": {"kv_heads": 2, "selection": {"block": 3, "count": 3}},
    "selection, all": {
        "kv_heads": 2,
        "softcap": 0.8,
        "sinks": True,
        "selection": {"block": 2, "count": 4, "sink": 0, "recent": 1},
    },
}


def expected(mixer: Any, x: Tensor, form: dict[str, Any]) -> Tensor:
    """The layer without positions, from its weights."""
    (B, T, _), d = x.shape, HIDDEN // 4
    weights = dict(mixer.named_parameters())

    def projected(name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def normed(y: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in weights:
            return y
        return y / torch.sqrt((y**2).mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]

    q, gate = projected("q_proj").view(B, T, 4, -1), None
    if form.get("gate"):
        q, gate = q[..., :d], q[..., d:]
    q = normed(q.flatten(2), "q_norm").view(B, T, 4, d).transpose(1, 2)
    k = normed(projected("k_proj"), "k_norm").view(B, T, -1, d).transpose(1, 2) * form.get(
        "key_multiplier", 1
    )
    v = projected("v_proj").view(B, T, -1, d).transpose(1, 2)
    seen = in_view(T, form.get("window"), form.get("causal", True)).expand(B, 4, T, T)
    if "selection" in form:
        how = {"sink": 1, "recent": 2, **form["selection"]}
        seen = seen & blocks_of_loops(q, k, **how).repeat_interleave(how["block"], -1)[
            ..., :T
        ].repeat_interleave(4 // k.shape[1], 1)
    how = {name: form[name] for name in ("scale", "softcap") if name in form}
    o = attention(q, k, v, seen, **how, sinks=weights.get("sinks")).transpose(1, 2)
    o = o if gate is None else o * torch.sigmoid(gate)
    y = o.flatten(2) @ weights["o_proj.weight"].T
    return y + weights["o_proj.bias"] if "o_proj.bias" in weights else y


@torch.no_grad()
def blocks_of_loops(q: Tensor, k: Tensor, *, block: int, count: int, sink: int, recent: int) -> Tensor:
    """The chosen blocks, one query at a time.  Shapes:  out: [B, KV, T, blocks] bool"""
    B, KV, T, _ = k.shape
    found = torch.zeros(B, KV, T, -(-T // block), dtype=torch.bool)
    group = q.shape[1] // KV
    for b, g, t in torch.cartesian_prod(*(torch.arange(size) for size in (B, KV, T))).tolist():
        own = t // block
        chosen = {n for n in range(own + 1) if n < sink or n > own - recent}
        heads = q[b, g * group : (g + 1) * group, t]
        scores = {}
        for n in sorted(set(range(own)) - chosen):
            mean = k[b, g, n * block : (n + 1) * block].mean(0)
            scores[n] = sum(float(head @ mean) for head in heads) / group
        best = sorted(scores, key=lambda n: (-scores[n], n))
        for n in [*chosen, *best[: max(0, count - len(chosen))]]:
            found[b, g, t, n] = True
    return found


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_attention_computes_its_equation(name: str) -> None:
    mixer, x = mixer_of(rope=None, **FORMS[name]), noise(2, 17, HIDDEN).requires_grad_()
    got, wanted = mixer(x, call_at(0, 17)), expected(mixer, x, FORMS[name])
    assert (got - wanted).abs().max() < EXACT
    pick, leaves = noise(2, 17, HIDDEN, seed=3), [x, *mixer.parameters()]
    for one, other in zip(
        *(torch.autograd.grad((y * pick).sum(), leaves) for y in (got, wanted)), strict=True
    ):
        assert (one - other).abs().max() < EXACT * 1e2


@pytest.mark.parametrize("how", [{}, {"softcap": 0.8}, {"sinks": True}])
@pytest.mark.parametrize("causal", [True, False])
def test_a_long_window_in_blocks_equals_the_whole_mask(how: dict[str, Any], causal: bool) -> None:
    mixer, x = mixer_of(rope=None, window=5, causal=causal, kv_heads=2, **how), noise(2, 200, HIDDEN)
    real = torch.ones(2, 200, dtype=torch.bool)
    real[0, :40] = False
    in_blocks = mixer(x, call_at(0, 200, key_padding=real, padding=real))
    seen = (in_view(200, 5, causal) & real[:, None]) | torch.eye(200, dtype=torch.bool)
    q, k, v = (getattr(mixer, f"{one}_proj")(x).view(2, 200, -1, 6).transpose(1, 2) for one in "qkv")
    o = softmax_attention(q, k, v, seen[:, None], softcap=mixer.softcap, sinks=mixer.sinks)
    assert (mixer.o_proj(o.transpose(1, 2).flatten(2)) - in_blocks).abs().max() < EXACT


def test_softcap_and_sinks_are_those_of_transformers() -> None:
    class Theirs(torch.nn.Module):
        num_key_value_groups, training = 2, False
        sinks = torch.nn.Parameter(noise(4, seed=7))

    q, k, v = noise(2, 4, 9, 6), noise(2, 2, 9, 6, seed=3), noise(2, 2, 9, 6, seed=4)
    seen = in_view(9, None, True)[None, None]
    bias = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    theirs, _ = gpt_oss_attention(Theirs(), q, k, v, bias, scaling=0.3)
    ours = softmax_attention(q, k, v, None, is_causal=True, scale=0.3, sinks=Theirs.sinks)
    assert (theirs.transpose(1, 2) - ours).abs().max() < EXACT
    theirs, _ = gemma2_attention(Theirs(), q, k, v, bias, scaling=0.3, softcap=0.9)
    # They take the softmax in float32.
    ours = softmax_attention(q, k, v, None, is_causal=True, scale=0.3, softcap=0.9)
    assert (theirs.transpose(1, 2) - ours).abs().max() < TURNED


# Both sides.


@pytest.mark.parametrize("window", [None, 4])
def test_a_changed_token_is_heard_on_both_sides_of_it_and_no_further_than_the_window(
    window: int | None,
) -> None:
    mixer, x = mixer_of(causal=False, window=window), noise(2, 21, HIDDEN)
    other = x.clone()
    other[:, 10] += 1
    heard = (mixer(x, call_at(0, 21)) - mixer(other, call_at(0, 21))).abs().amax((0, 2)) > 1e-12
    assert heard.tolist() == [abs(place - 10) < (window or 21) for place in range(21)]


@pytest.mark.parametrize("window", [None, 4])
def test_padding_on_either_side_equals_none(window: int | None) -> None:
    mixer, x = mixer_of(causal=False, window=window), noise(2, 12, HIDDEN)
    whole = mixer(x, call_at(0, 12))
    padded = torch.cat((noise(2, 5, HIDDEN, seed=5), x, noise(2, 3, HIDDEN, seed=6)), dim=1)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[:, :5] = real[:, 17:] = False
    positions = (torch.arange(20) - 5).clamp(min=0)[None].expand(2, -1)
    y = mixer(padded, Call(positions, real, real))
    assert y.isfinite().all()
    assert (y[:, 5:17] - whole).abs().max() < EXACT


def test_attention_to_both_sides_has_no_cache_and_refuses_to_go_on_from_one() -> None:
    spec, mixer = Attention(heads=4, causal=False), mixer_of(causal=False)
    assert (spec.is_causal, spec.states(SpecSite(HIDDEN))) == (False, ())
    assert set(spec.exemptions()) == {"causality", "step", "chunks"}
    assert Attention(heads=4).exemptions() == {}
    cache, x = mixer.new_cache(), noise(2, 6, HIDDEN)
    assert torch.equal(mixer(x, call_at(0, 6, cache)), mixer(x, call_at(0, 6)))
    cache.advance(6)
    assert cache_bytes([cache]) == 0
    with pytest.raises(HeddleError, match="cannot go on from a cache"):
        mixer(x, call_at(6, 6, cache))


# Selected blocks.

PICKS = [
    {"block": 4, "count": 3, "sink": 1, "recent": 2},
    {"block": 4, "count": 4, "sink": 0, "recent": 1},
    {"block": 1, "count": 5, "sink": 2, "recent": 2},
    {"block": 7, "count": 2, "sink": 1, "recent": 1},
    {"block": 50, "count": 3, "sink": 1, "recent": 2},
]


def picked(how: dict[str, int]) -> Rule:
    return Rule(**{name: how[name] for name in ("count", "sink", "recent")})


@pytest.mark.parametrize("how", PICKS)
@pytest.mark.parametrize("length", [1, 4, 23])
def test_chosen_blocks_are_those_of_a_loop(how: dict[str, int], length: int) -> None:
    q, k = noise(2, 6, length, 5), noise(2, 3, length, 5, seed=3)
    places = Places(how["block"], length, None, q.device)
    chosen = choose_blocks(q, k, places, picked(how))
    assert torch.equal(chosen, blocks_of_loops(q, k, **how))
    assert chosen.sum(-1).max() <= how["count"]
    last = choose_blocks(q[:, :, -1:], k, places, picked(how))
    assert torch.equal(last, chosen[:, :, -1:])


def test_blocks_are_counted_from_the_first_real_token_of_each_row() -> None:
    how, q, k = PICKS[0], noise(2, 4, 23, 5), noise(2, 2, 23, 5, seed=3)
    real = torch.ones(2, 23, dtype=torch.bool)
    real[0, :3], real[1, :9] = False, False
    places = Places(4, 23, real, q.device)
    chosen = choose_blocks(q, k, places, picked(how))
    keys = places.keys_of(chosen)
    for row, pad in enumerate((3, 9)):
        alone = blocks_of_loops(q[row : row + 1, :, pad:], k[row : row + 1, :, pad:], **how)
        assert torch.equal(chosen[row : row + 1, :, pad:, : alone.shape[-1]], alone)
        assert torch.equal(keys[row, :, pad:, pad:], alone.repeat_interleave(4, -1)[0, ..., : 23 - pad])


def test_of_equal_blocks_the_earliest_is_chosen() -> None:
    q, k = torch.ones(1, 1, 24, 2), torch.ones(1, 1, 24, 2)
    chosen = choose_blocks(q, k, Places(2, 24, None, q.device), Rule(count=5, sink=1, recent=2))
    assert chosen[0, 0, -1].nonzero()[:, 0].tolist() == [0, 1, 2, 10, 11]


@pytest.mark.parametrize("count", [6, 100])
def test_to_select_every_block_is_dense_attention(count: int) -> None:
    x, selection = noise(2, 23, HIDDEN), {"block": 4, "count": count}
    sparse, dense = mixer_of(kv_heads=2, selection=selection), mixer_of(kv_heads=2)
    assert (sparse(x, call_at(0, 23)) - dense(x, call_at(0, 23))).abs().max() < EXACT


def test_attention_reads_the_blocks_that_are_handed_to_it() -> None:
    mixer = mixer_of(rope=None, kv_heads=2, selection={"block": 4, "count": 3, "source": "pick"})
    assert mixer.takes == (("indices", "pick"),)
    chosen = torch.rand(2, 2, 17, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    x = noise(2, 17, HIDDEN)
    got = mixer(x, call_at(0, 17, handed={("indices", "pick"): chosen}))
    seen = in_view(17, None, True) & chosen.repeat_interleave(4, -1)[..., :17].repeat_interleave(2, 1)
    q, k, v = (getattr(mixer, f"{one}_proj")(x).view(2, 17, -1, 6).transpose(1, 2) for one in "qkv")
    o = attention(q, k, v, seen | torch.eye(17, dtype=torch.bool))
    assert (mixer.o_proj(o.transpose(1, 2).flatten(2)) - got).abs().max() < EXACT


# What is written.


def test_a_token_that_is_not_written_is_hidden_from_later_ones_and_not_from_itself() -> None:
    for how in ({}, {"window": 5}, {"softcap": 2.0, "sinks": True}, {"causal": False}):
        mixer, x = mixer_of(rope=None, kv_heads=2, **how), noise(2, 17, HIDDEN)
        written = (torch.rand(2, 17, generator=torch.Generator().manual_seed(0)) < 0.5).double()
        seen = in_view(17, how.get("window"), how.get("causal", True)) & (written[:, None] > 0)
        seen = (seen | torch.eye(17, dtype=torch.bool))[:, None].expand(2, 4, 17, 17)
        q, k, v = (getattr(mixer, f"{one}_proj")(x).view(2, 17, -1, 6).transpose(1, 2) for one in "qkv")
        o = attention(q, k, v, seen, softcap=how.get("softcap"), sinks=mixer.sinks)
        wanted = mixer.o_proj(o.transpose(1, 2).flatten(2))
        assert (mixer(x, call_at(0, 17, written=written)) - wanted).abs().max() < EXACT
        # With a gradient it takes the way of a bias.
        wanting = written.clone().requires_grad_()
        assert (mixer(x, call_at(0, 17, written=wanting)) - wanted).abs().max() < EXACT


WRITTEN_FORMS = [{}, {"window": 5}, {"window": 5, "softcap": 2.0}, {"selection": {"block": 3, "count": 3}}]


@pytest.mark.parametrize("form", WRITTEN_FORMS)
def test_what_is_written_is_remembered_between_calls(form: dict[str, Any]) -> None:
    mixer, x = mixer_of(kv_heads=2, **form), noise(2, 150, HIDDEN)
    written = (torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    # The first calls say nothing of it, and neither do the last.
    written[:, :20] = written[:, 148:] = 1.0
    whole = mixer(x, call_at(0, 150, written=written))
    cache, start, pieces = mixer.new_cache(), 0, []
    for end in (20, 130, *range(131, 151)):
        told = None if end == 20 or end > 148 else written[:, start:end]
        pieces.append(mixer(x[:, start:end], call_at(start, end - start, cache, written=told)))
        cache.advance(end - start)
        start = end
    assert (torch.cat(pieces, 1) - whole).abs().max() < EXACT
    held = 4 if "window" in form else 150
    marks = cache.tensors()["tokens.written" if "selection" in form else "written"]
    assert marks.shape == (2, 1, held, 1)
    assert marks.dtype == torch.bool
    assert torch.equal(marks[:, 0, :, 0].double(), written[:, 150 - held :])


def test_a_key_that_is_not_written_changes_no_later_token_through_the_choice_of_blocks() -> None:
    mixer, x = mixer_of(kv_heads=2, selection={"block": 3, "count": 3}), noise(2, 30, HIDDEN)
    written = torch.ones(2, 30, dtype=torch.float64)
    written[:, 4] = written[:, 11] = 0.0
    other = x.clone()
    other[:, 4], other[:, 11] = 3 * x[:, 5], -7 * x[:, 2]
    before, after = (mixer(one, call_at(0, 30, written=written)) for one in (x, other))
    unchanged = [place for place in range(30) if place not in (4, 11)]
    assert torch.equal(before[:, unchanged], after[:, unchanged])


@pytest.mark.parametrize("window", [None, 3])
def test_the_gradient_of_what_is_written_is_that_of_a_weight_of_its_key(window: int | None) -> None:
    mixer, x, pick = mixer_of(rope=None, window=window), noise(1, 9, HIDDEN), noise(1, 9, HIDDEN, seed=3)
    written = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1.0]], dtype=torch.float64, requires_grad=True)
    call = Call(torch.arange(9)[None], written=written)
    (got,) = torch.autograd.grad((mixer(x, call) * pick).sum(), written)

    def weighted(m: Tensor) -> Tensor:
        """p_ij in proportion to m_j exp(q_i k_j), the own key's to exp(q_i k_i)."""
        q, k, v = (getattr(mixer, f"{one}_proj")(x).view(1, 9, 4, 6).transpose(1, 2) for one in "qkv")
        e = (q @ k.mT / math.sqrt(6)).exp() * in_view(9, window, True)
        own = torch.eye(9, dtype=torch.float64)
        e = e * (m[:, None, None] * (1 - own) + own)
        o = (e / e.sum(-1, keepdim=True)) @ v
        return (mixer.o_proj(o.transpose(1, 2).flatten(2)) * pick).sum()

    m = written.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(weighted(m), m)
    # A hidden key gets none: what it would give is not computed.
    assert (got - wanted * written.detach()).abs().max() < EXACT
    assert (got[written == 0] == 0).all()


def test_marks_follow_their_rows_and_are_cropped_and_forgotten() -> None:
    cache = KVLayer()
    keys = noise(2, 1, 6, 4)
    cache.update(keys, keys)
    cache.mark(torch.tensor([[1.0] * 6, [1, 0, 1, 0, 1, 0]]), 0)
    cache.advance(6)
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.crop(2)
    assert cache.tensors()["written"][0, 0, :, 0].tolist() == [True, False, True, False]
    cache.reset()
    assert cache.tensors() == {}
    assert cache.written is None


# Models of layers that take from each other.

CHANNEL = {"kind": "gelu", "width": 40}


def model_with(blocks: dict[str, Any], layers: list[Any]) -> ModelSpec:
    made = {
        name: {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, **fields}, "channel": CHANNEL}
        for name, fields in blocks.items()
    }
    shared = {name: {**one, "shared": one["mixer"].pop("shared", False)} for name, one in made.items()}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN}
    return ModelSpec.model_validate(sizes | {"blocks": shared, "layers": layers})


MODELS: dict[str, ModelSpec] = {
    "window in window": model_with(
        {"a": {"window": 9}, "b": {"window": 5, "keys_from": "a", "gate": True}}, ["a", "b", "a", "b", "b"]
    ),
    "sink tokens of a source": model_with(
        {
            "a": {"window": 9, "sink_tokens": 3},
            "b": {"window": 5, "sink_tokens": 3, "keys_from": "a"},
            "c": {"window": 5, "keys_from": "a"},
        },
        ["a", "b", "c", "b"],
    ),
    "shared source": model_with({"a": {"shared": True}, "b": {"keys_from": "a"}}, ["a", "b", "a", "b"]),
    "shared reader": model_with({"a": {}, "b": {"shared": True, "keys_from": "a"}}, ["a", "b", "b"]),
    "values of values": model_with(
        {"a": {"window": 9}, "b": {"values_from": "a"}, "c": {"values_from": "b", "causal": True}},
        ["a", "b", "c"],
    ),
    "queries and keys of the embedding": model_with(
        {
            "a": {"qk_source": "embedding", "gate": True},
            "b": {"window": 9, "qk_source": "embedding"},
            "c": {},
        },
        ["a", "b", "c", "b"],
    ),
    "queries and keys of positions": model_with(
        {"a": {"qk_source": "position"}, "b": {"qk_source": "position", "rope": None, "qk_norm": True}},
        ["a", "b", "a"],
    ),
    "chosen of taken keys": model_with(
        {
            "a": {},
            "b": {"keys_from": "a", "selection": {"block": 4, "count": 4}},
            "c": {"selection": {"block": 4, "count": 4, "source": "b"}, "softcap": 3.0},
        },
        ["a", "b", "c", "c"],
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> Any:
    return shaken(build(MODELS[name]))


@every_model
@torch.no_grad()
def test_a_model_of_references_decodes_as_it_reads_and_ignores_padding(name: str) -> None:
    model, ids = model_of(name), tokens(80)
    whole = model(ids, use_cache=False).logits
    pieces, cache = in_pieces(model, ids, [67, 70, *range(71, 81)])
    assert (pieces - whole).abs().max() < EXACT
    held = plan(MODELS[name]).cost(80)
    assert cache_bytes(cache.layers) == 2 * 4 * (held["cache_bytes"] + held["state_bytes"])
    padded, mask = left_padded(ids, 9)
    assert (model(padded, attention_mask=mask).logits[:, 9:] - whole).abs().max() < EXACT


@every_model
def test_its_parameters_are_counted_and_gradients_reach_all_of_them(name: str) -> None:
    model, ids = model_of(name).train(), tokens(70)
    assert plan(MODELS[name]).parameters == sum(parameter.numel() for parameter in model.parameters())
    plain = gradients(model, model(ids, labels=ids).loss)
    assert plain.keys() == {key for key, _ in model.named_parameters()}
    for key, gradient in plain.items():
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key
    checkpoint(model)
    for key, gradient in gradients(model, model(ids, labels=ids).loss).items():
        assert torch.equal(gradient, plain[key]), key


@pytest.mark.parametrize("name", ["chosen of taken keys", "window in window"])
def test_a_model_of_references_compiles_with_checkpoints(name: str) -> None:
    model, ids = model_of(name).train(), tokens(20)
    plain = gradients(model, model(ids, labels=ids).loss)
    checkpoint(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(model, compiled(ids, labels=ids).loss)
    torch.compiler.reset()
    for key, gradient in found.items():
        assert (gradient - plain[key]).abs().max() < EXACT, key


def handed(layer: Any, seen: dict[Any, Tensor], name: str) -> None:
    layer.mixer.register_forward_hook(lambda _, __, out: seen.update({name: out}))
    layer.mixer.register_forward_pre_hook(lambda _, args: seen.update({f"{name} in": args[0]}))


def test_taken_keys_and_values_are_those_of_the_source() -> None:
    model, seen = model_of("shared source"), dict[Any, Tensor]()
    handed(model.model.layers[0], seen, "a")
    handed(model.model.layers[3], seen, "b")
    model(tokens(11))
    # The second pass of the shared layer was the last one, and it is what layer 3 takes from.
    source, taker = model.model.layers[0].mixer, model.model.layers[3].mixer
    assert {name for name, _ in taker.named_parameters()} == {"q_proj.weight", "o_proj.weight"}
    tables = call_at(0, 11).rotary_tables(6, 1e4)
    heads = {
        "q": taker.q_proj(seen["b in"]).view(2, 11, 4, 6),
        "k": source.k_proj(seen["a in"]).view(2, 11, 2, 6),
    }
    turned = {}
    for name, x in heads.items():
        low, high = x.chunk(2, -1)
        turned[name] = (x * tables[0] + torch.cat((-high, low), -1) * tables[1]).transpose(1, 2)
    v = source.v_proj(seen["a in"]).view(2, 11, 2, 6).transpose(1, 2)
    o = attention(turned["q"], turned["k"], v, in_view(11, None, True).expand(2, 4, 11, 11))
    assert (taker.o_proj(o.transpose(1, 2).flatten(2)) - seen["b"]).abs().max() < EXACT


def test_mixed_values_are_shares_of_both_and_begin_at_a_half() -> None:
    spec = load(EXAMPLES["value_residual"]).spec.model
    shares = [layer.mixer.value_share for layer in build(spec).model.layers[1:]]
    assert [share.item() for share in shares] == [0.5] * 5
    model, cache = model_of("values of values"), None
    out = model(tokens(7), past_key_values=cache, use_cache=True)
    seen, layers = dict[Any, Tensor](), model.model.layers
    for index, layer in enumerate(layers):
        handed(layer, seen, str(index))
    model(tokens(7))
    values = layers[0].mixer.v_proj(seen["0 in"])
    for index in (1, 2):
        share = layers[index].mixer.value_share
        values = (1 - share) * layers[index].mixer.v_proj(seen[f"{index} in"]) + share * values
        held = out.past_key_values.layers[index].values
        assert (held.transpose(1, 2).flatten(2) - values).abs().max() < EXACT


def test_nothing_is_kept_for_layers_that_do_not_ask() -> None:
    model = model_of("window in window")
    assert model.model.wanted == {(what, layer) for what in ("keys", "values") for layer in (0, 2)}
    call = call_at(0, 3, layer=1, wanted=model.model.wanted)
    call.hand(keys=noise(1), values=noise(1))
    assert call.given == {}


def test_a_layer_that_chooses_hands_its_blocks_on() -> None:
    mixer = mixer_of(kv_heads=2, selection={"block": 4, "count": 3})
    call = call_at(0, 17, layer=3, wanted=frozenset({("indices", 3)}))
    mixer(noise(2, 17, HIDDEN), call)
    assert call.given["indices"].shape == (2, 2, 17, 5)
    assert call.given["indices"].dtype == torch.bool


# What is refused.

A, B = {"kv_heads": 2}, {"kv_heads": 2, "keys_from": "a"}
PICK = {"selection": {"block": 4, "count": 4}}
MISFITS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (A, B | {"kv_heads": 4}, "keys_from", "the keys of a are 2 x 6 a token, and 4 x 6 are needed"),
    (A, B | {"head_dim": 4}, "keys_from", "the keys of a are 2 x 6 a token, and 2 x 4 are needed"),
    (A, B | {"rope": None}, "keys_from", "the keys of a are turned otherwise; both need the same rope"),
    (
        A,
        B | {"rope": {"theta": 5.0}},
        "keys_from",
        "the keys of a are turned otherwise; both need the same rope",
    ),
    (A | {"window": 9}, B, "keys_from", "a keeps a window of 9, and all tokens are to be seen"),
    (A | {"window": 9}, B | {"window": 10}, "keys_from", "a keeps a window of 9, and 10 are to be seen"),
    (
        A,
        {"heads": 2, "values_from": "a"},
        "values_from",
        "the values of a are 2 x 6 a token, and 2 x 12 are needed",
    ),
    (
        A,
        {"selection": {"source": "a"}},
        "selection.source",
        "a is attention, which has no indices to hand on",
    ),
    (
        PICK,
        {"selection": {"block": 8, "count": 4, "source": "a"}},
        "selection.source",
        "the blocks of a are of 4 keys, and here of 8",
    ),
    (
        PICK,
        {"selection": {"block": 4, "source": "a"}},
        "selection.source",
        "the indices of a are 2 x 4 a token, and 2 x 16 are needed",
    ),
]


def refused(spec: ModelSpec) -> list[HeddleError]:
    with pytest.raises(HeddleErrors) as told:
        plan(spec)
    return list(told.value.errors)


@pytest.mark.parametrize(("source", "taker", "field", "what"), MISFITS)
def test_what_does_not_fit_its_source_is_refused(
    source: dict[str, Any], taker: dict[str, Any], field: str, what: str
) -> None:
    fields = {"hidden_size": 24, "a": source, "b": taker}
    (error,) = refused(model_with({"a": fields["a"], "b": fields["b"]}, ["a", "b"]))  # type: ignore[dict-item]
    assert (error.code, error.where.path) == ("reference-mismatch", f"layers.1.mixer.{field}")
    assert error.what == f"{what} (pass link_references)"


def test_a_window_inside_that_of_the_source_is_let_through() -> None:
    plan(model_with({"a": {"window": 9}, "b": {"window": 9, "keys_from": "a"}}, ["a", "b"]))


@pytest.mark.parametrize("field", ["keys_from", "values_from"])
def test_a_chain_of_taken_keys_is_refused(field: str) -> None:
    spec = model_with({"a": {}, "b": {"keys_from": "a"}, "c": {field: "b"}}, ["a", "b", "c"])
    (error,) = refused(spec)
    assert error.what.startswith("b takes its own keys and values from a; name the layer that made them")


def test_a_chain_of_taken_blocks_is_refused() -> None:
    reuse = {"selection": {"block": 4, "count": 4, "source": "b"}}
    taken = {"selection": {"block": 4, "count": 4, "source": "a"}}
    (error,) = refused(model_with({"a": PICK, "b": taken, "c": reuse}, ["a", "b", "c"]))
    assert error.what.startswith("b takes its own blocks from a; name the layer that made them")


def test_a_composite_hands_nothing_on_and_may_take() -> None:
    both = {
        "kind": "parallel",
        "mixers": [{"kind": "attention", "heads": 4}, {"kind": "attention", "heads": 4}],
    }
    full = {"kind": "attention", "heads": 4}
    takes = {
        "kind": "parallel",
        "mixers": [full | {"keys_from": "a"}, {"kind": "decay_attention", "heads": 4}],
    }
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "layers": ["a", "b"]}

    def spec(first: dict[str, Any], second: dict[str, Any]) -> ModelSpec:
        blocks = {name: {"mixer": one, "channel": CHANNEL} for name, one in (("a", first), ("b", second))}
        return ModelSpec.model_validate(sizes | {"blocks": blocks})

    (error,) = refused(spec(both, takes))
    assert error.what.startswith("a is parallel, which has no keys to hand on")
    assert error.where.path == "layers.1.mixer.mixers.0.keys_from"
    model, ids = shaken(build(spec(full, takes))), tokens(20)
    whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [*range(1, 21)])[0] - whole).abs().max() < EXACT


def test_what_takes_its_keys_cannot_stand_where_a_router_decides_what_is_remembered() -> None:
    assert set(Attention(heads=4, keys_from="a").exemptions()) == {"written"}


def test_a_shared_block_that_would_take_from_two_layers_is_refused() -> None:
    (error,) = refused(model_with({"a": {}, "b": {"keys_from": "a", "shared": True}}, ["a", "b", "a", "b"]))
    assert (error.code, error.where.path) == ("reference-mismatch", "layers.3.mixer.keys_from")
    assert "layers 1 and 3 share their weights, and would take keys from layers 0 and 2" in error.what


CONFLICTS: list[tuple[dict[str, Any], str, str]] = [
    ({"keys_from": "a", "values_from": "a"}, "values_from", "conflicting-fields"),
    ({"keys_from": "a", "key_multiplier": 2.0}, "key_multiplier", "conflicting-fields"),
    ({"keys_from": "a", "qk_source": "position"}, "qk_source", "conflicting-fields"),
    ({"selection": {}, "window": 9}, "selection", "conflicting-fields"),
    ({"selection": {}, "causal": False}, "selection", "conflicting-fields"),
    ({"selection": {"count": 2}}, "selection.count", "out-of-range"),
    (
        {"rope": {"scaling": {"kind": "llama3", "factor": 2.0, "high_frequency_factor": 1.0}}},
        "rope.scaling.high_frequency_factor",
        "out-of-range",
    ),
    (
        {"rope": {"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 9, "beta_fast": 0.5}}},
        "rope.scaling.beta_fast",
        "out-of-range",
    ),
]


@pytest.mark.parametrize(("fields", "field", "code"), CONFLICTS)
def test_fields_that_rule_each_other_out_are_refused(fields: dict[str, Any], field: str, code: str) -> None:
    (problem,) = Attention.model_validate({"heads": 4, **fields}).problems(SpecSite(HIDDEN))
    assert (problem.field, problem.code) == (field, code)


def test_defaults_leave_the_data_of_a_layer_as_it_was() -> None:
    data = Attention(heads=4).runtime(SpecSite(HIDDEN))
    assert data == {
        "kind": "attention",
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 6,
        "rope": {"theta": 10_000.0, "fraction": 1.0},
        "qk_norm": False,
        "gate": False,
        "window": None,
    }


@pytest.mark.parametrize("window", [None, 5])
def test_flops_from_both_sides_are_counted_key_by_key(window: int | None) -> None:
    spec, site = Attention(heads=4, causal=False, window=window), SpecSite(HIDDEN)
    for length in (1, 4, 5, 30):
        pairs = int(in_view(length, window, False).sum())
        weights = 2 * 4 * HIDDEN * HIDDEN
        assert spec.prefill_flops(site, length) == pytest.approx(weights + 4 * HIDDEN * pairs / length)
