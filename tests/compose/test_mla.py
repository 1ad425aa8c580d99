"""Multi-head latent attention is that of DeepSeek-V3 and of Kimi Linear in transformers, and caches the latent alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import EXACT, call_at, mixer_of, model_with, noise
from transformers import DeepseekV3Config, KimiLinearConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

from heddle.compose.build import build
from heddle.compose.modules import stretches
from heddle.compose.plan import plan
from heddle.errors import HeddleErrors
from heddle.specs import MIXERS, ModelSpec
from heddle.specs import Site as SpecSite

HIDDEN, LENGTH = 48, 60
# A latent of fewer features than a key and a value have, and of more: queries go to the latents, or the latents to the queries.
FORMS: dict[str, dict[str, Any]] = {
    "small latent": {"heads": 3, "kv_lora_rank": 5, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    "large latent": {
        "heads": 4, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
    },
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS)


def latent(form: str, **more: Any) -> Any:
    return mixer_of(HIDDEN, "mla", **FORMS[form], **{"norm_eps": 1e-6, **more})


def twin(made: type[nn.Module], config: Any, ours: Any, rows: Tensor | None = None) -> nn.Module:
    """Their layer with our weights; `rows` says in which order theirs has the dimensions that turn."""
    theirs = made(config, 0).double().eval()
    plain, rank = config.qk_nope_head_dim, config.kv_lora_rank
    rows = torch.arange(config.qk_rope_head_dim) if rows is None else rows
    of_head = torch.cat((torch.arange(plain), plain + rows))
    queries = ours.q_proj.weight.unflatten(0, (ours.heads, -1))[:, of_head].flatten(0, 1)
    down = ours.kv_down.weight[torch.cat((torch.arange(rank), rank + rows))]
    weights = {"kv_a_proj_with_mqa": down, "kv_a_layernorm": ours.kv_norm.weight}
    weights |= {"kv_b_proj": ours.kv_up.weight, "o_proj": ours.o_proj.weight}
    if config.q_lora_rank is None:
        weights |= {"q_proj": queries}
    else:
        weights |= {
            "q_a_proj": ours.q_down.weight,
            "q_a_layernorm": ours.q_norm.weight,
            "q_b_proj": queries,
        }
    theirs.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    # Their norms round to float32 whatever comes; torch's own do not.
    for name, norm in [*theirs.named_children()]:
        if "layernorm" in name:
            assert norm.variance_epsilon == 1e-6
            exact = nn.RMSNorm(norm.weight.shape[0], eps=1e-6).double()
            exact.weight = norm.weight
            setattr(theirs, name, exact)
    return theirs


def in_pieces(mixer: Any, x: Tensor, *ends: int) -> Tensor:
    """What the mixer gives when `x` comes in pieces that end there."""
    cache, pieces, start = mixer.new_cache(), [], 0
    for end in ends:
        pieces.append(mixer(x[:, start:end], call_at(start, end - start, cache)))
        cache.advance(end - start)
        start = end
    return torch.cat(pieces, dim=1)


def sizes(form: str) -> dict[str, Any]:
    own = FORMS[form]
    return {
        "hidden_size": HIDDEN,
        "num_attention_heads": own["heads"],
        "num_key_value_heads": own["heads"],
        "v_head_dim": own["qk_nope_head_dim"],
        "q_lora_rank": None,
        "attn_implementation": "sdpa",
        **{name: value for name, value in own.items() if name != "heads"},
    }


def counted(run: Any) -> int:
    """FLOPs of `run()` by torch's counter."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@torch.no_grad()
@every_form
def test_kimi_linear_holds_it_without_positions(form: str) -> None:
    ours, x = latent(form), noise(2, LENGTH, HIDDEN)
    expected, _ = twin(KimiLinearAttention, KimiLinearConfig(**sizes(form)), ours)(x, None)
    assert (ours(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    assert (in_pieces(ours, x, 30, 31, 32, LENGTH) - expected).abs().max() < EXACT


@torch.no_grad()
@every_form
@pytest.mark.parametrize("interleaved", [False, True])
def test_deepseek_v3_holds_it_with_positions(form: str, interleaved: bool) -> None:
    ours, x, call = latent(form, rope={"theta": 500.0}), noise(2, LENGTH, HIDDEN), call_at(0, LENGTH)
    config = DeepseekV3Config(
        **sizes(form),
        rope_interleave=interleaved,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    # Interleaved, dimension j of the first half stands at 2 j and its partner behind it.
    size = config.qk_rope_head_dim
    rows = torch.arange(size).view(2, -1).T.flatten() if interleaved else torch.arange(size)
    # Angles are float32 on both sides and differ by their roundings; attention's tests hold our tables to theirs.
    tables = tuple(one[:, :, 0].double() for one in call.rotary_tables(size, 500.0))
    expected, _ = twin(DeepseekV3Attention, config, ours, rows)(x, tables, None)
    assert (ours(x, call) - expected).abs().max() < EXACT
    assert (in_pieces(ours, x, 30, 31, 32, LENGTH) - expected).abs().max() < EXACT


@torch.no_grad()
def test_a_window_ends_what_is_seen_and_what_is_held() -> None:
    ours, x, cache = latent("large latent", window=7), noise(2, LENGTH, HIDDEN), None
    other = x.clone()
    other[:, 20] = -x[:, 20]
    changed = (ours(other, call_at(0, LENGTH)) - ours(x, call_at(0, LENGTH))).abs().amax(dim=(0, 2)) > EXACT
    assert changed.nonzero()[:, 0].tolist() == [*range(20, 27)]
    cache = ours.new_cache()
    ours(x, call_at(0, LENGTH, cache))
    assert {name: tuple(one.shape) for name, one in cache.tensors().items()} == {
        "keys": (2, 1, 6, 24),
        "values": (2, 1, 6, 8),
    }


@torch.no_grad()
@every_form
def test_rows_are_the_weights_in_both_ways_of_computing(form: str) -> None:
    ours, x = latent(form, rope={"theta": 500.0}), noise(2, LENGTH, HIDDEN)
    seen: list[Tensor] = []
    ours.rows_out.register_forward_hook(lambda *told: seen.append(told[-1]))
    cache = ours.new_cache()
    ours(x[:, :-1], call_at(0, LENGTH - 1, cache))
    cache.advance(LENGTH - 1)
    ours.rows_out.queries = (-1,)
    ours(x[:, -1:], call_at(LENGTH - 1, 1, cache))
    ours(x, call_at(0, LENGTH))
    step, whole = seen
    assert whole.shape == (2, ours.heads, 1, LENGTH)
    assert (whole.sum(-1) - 1).abs().max() < EXACT
    assert (step - whole).abs().max() < EXACT


@every_form
@pytest.mark.parametrize("context", [0, 1, 50])
def test_a_step_costs_what_torch_counts(form: str, context: int) -> None:
    spec = model_with({"kind": "mla", **FORMS[form]}, HIDDEN)
    model, ids = build(spec).eval(), torch.ones(1, context + 1, dtype=torch.long)
    cache = model(ids[:, 1:], use_cache=True).past_key_values if context else None
    found = counted(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))
    assert found == plan(spec).cost(context)["decode_flops_per_token"]


@every_form
def test_a_prefill_costs_what_torch_counts_where_every_token_sees_all(form: str) -> None:
    spec = model_with({"kind": "mla", **FORMS[form]}, HIDDEN)
    model, ids = build(spec).eval(), torch.ones(1, LENGTH, dtype=torch.long)
    found = counted(lambda: model(ids, use_cache=False)) / LENGTH
    cost, mixer = plan(spec).cost, MIXERS["mla"].model_validate({"kind": "mla", **FORMS[form]})
    # What grows with the length grows by half of what it is where nothing is masked.
    site = SpecSite(HIDDEN)
    grows = mixer.prefill_flops(site, 3) - mixer.prefill_flops(site, 1)
    assert found == pytest.approx(cost(LENGTH)["prefill_flops_per_token"] + grows * (LENGTH - 1) / 2)


def test_deepseek_v3_costs_what_its_paper_says() -> None:
    fields = {
        "heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
    }
    mixer, site = MIXERS["mla"].model_validate({"kind": "mla", **fields}), SpecSite(7168)
    # Arithmetic of arXiv 2412.19437, section 4.2: 61 layers of 512 + 64 numbers a token, against 128 heads of 192 + 128.
    assert mixer.cache_bytes_per_token(site, 2) == 2 * 576
    assert mixer.cache_bytes_per_token(site, 2) / (2 * 128 * (192 + 128)) == pytest.approx(0.0140625)
    outside = mixer.flops(site, 0) - 2 * 128 * (192 + 128)
    assert mixer.flops(site, 9999) == outside + 10_000 * 2 * 128 * (2 * 512 + 64)
    assert mixer.prefill_flops(site, 9999) == outside + 5000 * 2 * 128 * (192 + 128)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rope": {}}, "rope: positions, and qk_rope_head_dim is 0: nothing turns"),
        (
            {"rope": {}, "qk_rope_head_dim": 3},
            "qk_rope_head_dim: 3 of 3 dimensions turn, and RoPE turns pairs",
        ),
        (
            {"rope": {"fraction": 0.25}, "qk_rope_head_dim": 4},
            "rope.fraction: 1 of 4 dimensions turn, and RoPE turns pairs",
        ),
    ],
)
def test_positions_that_turn_nothing_are_refused(fields: dict[str, Any], told: str) -> None:
    mixer = {"kind": "mla", "heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, **fields}
    with pytest.raises(HeddleErrors) as errors:
        plan(model_with(mixer, HIDDEN))
    assert f"mixer.{told}" in str(errors.value)


def test_equal_computations_have_one_hash() -> None:
    base = {"kind": "mla", "heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4}
    written = base | {"v_head_dim": 12, "scale": 0.25, "norm_eps": 1e-6, "rope": None, "q_lora_rank": None}
    one, other = (plan(model_with(mixer, HIDDEN)) for mixer in (base, written))
    assert one.runtime() == other.runtime()
    assert isinstance(one.model, ModelSpec)


def test_keys_are_held_once_for_the_gradient() -> None:
    length, heads, sizes = 8, 4, {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    mixer = mixer_of(20, "mla", heads=heads, kv_lora_rank=5, rope={"theta": 100.0}, **sizes)
    held: set[int] = set()

    def weigh(one: Tensor) -> Tensor:
        held.add(one.untyped_storage().nbytes() // one.element_size())
        return one

    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda one: one):
        mixer(noise(1, length, 20).requires_grad_(), call_at(0, length, rows=1))
    assert length * heads * (8 + 4) in held
    assert length * heads * (8 + 8) not in held, "keys and values in one, of which the values would be a view"


@pytest.mark.parametrize("is_long", [False, True])
def test_long_rows_hold_no_latents_for_the_gradient(is_long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = latent("large latent", rope={"theta": 100.0}), noise(2, LENGTH, HIDDEN).requires_grad_()
    inputs, held = [x, *mixer.parameters()], set()

    def weigh(one: Tensor) -> Tensor:
        held.add(one.untyped_storage().nbytes() // one.element_size())
        return one

    def both_directions() -> tuple[Tensor, ...]:
        y = mixer(x, call_at(0, LENGTH))
        return (y, *torch.autograd.grad(y.sin().sum(), inputs))

    expected = both_directions()
    if is_long:
        monkeypatch.setattr(stretches, "STRETCH", LENGTH - 1)
    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda one: one):
        found = both_directions()
    assert all(torch.equal(one, wanted) for one, wanted in zip(found, expected, strict=True))
    # Before their norm, with what turns, and behind it.
    assert is_long == held.isdisjoint({2 * LENGTH * (24 + 8), 2 * LENGTH * 24})
