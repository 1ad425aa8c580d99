"""Mamba-2: its equation, and the mixers and models of transformers that are Mamba-2, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BambaConfig,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer, compute_mup_vector
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.mamba2 import Mamba2Module
from heddle.compose.modules.site import Site
from heddle.specs import ModelSpec
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Mamba2

HIDDEN, HEADS, DIM, STATE, LENGTH = 48, 6, 16, 8, 75
# Float64 on a CPU: two ways to compute one thing differ by rounding alone.
EXACT = 1e-9
# A few roundings to float32, in which transformers' recurrences and norms compute whatever comes.
SINGLE = 8 * torch.finfo(torch.float32).eps
FIELDS: dict[str, Any] = {
    "heads": HEADS,
    "head_dim": DIM,
    "state_dim": STATE,
    "groups": 2,
    "short_conv": 4,
    "conv_bias": True,
    "bias": False,
    "norm": "after_gate",
}
FORMS: dict[str, dict[str, Any]] = {
    "mamba2": {},
    "no biases": {"conv_bias": False, "groups": 1},
    "all biases": {"bias": True, "groups": 3},
    "norm first": {"norm": "before_gate"},
    "no norm": {"norm": "none"},
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ready(**changes: Any) -> Mamba2Module:
    """A mixer in float64 whose every weight counts, and whose heads fade at rates from slow to fast."""
    mixer = Mamba2Module(Site(HIDDEN, 1, 3, norm_eps=1e-5), **{**FIELDS, **changes})
    for module in mixer.modules():
        initialise(module, std=HIDDEN**-0.5)
    for name, parameter in mixer.named_parameters():
        if name.endswith(("norm.weight", ".bias")) or name == "D":
            nn.init.uniform_(parameter, 0.5, 1.5)
    nn.init.uniform_(mixer.dt_bias, -2.0, 1.0)
    nn.init.uniform_(mixer.A_log, -3.0, 1.0)
    return mixer.double()


def whole(length: int = LENGTH) -> Call:
    return Call(torch.arange(length)[None].expand(2, length))


def noise() -> Tensor:
    return torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)


def by_loop(mixer: Mamba2Module, u: Tensor, *, groups: int, norm: str) -> Tensor:
    """Token by token and head by head, from the weights and the fields alone."""
    width, shared = HEADS * DIM, groups * STATE
    projected = u @ mixer.in_proj.weight.T + (0 if mixer.in_proj.bias is None else mixer.in_proj.bias)
    z, mixed, dt = projected.split((width, width + 2 * shared, HEADS), dim=-1)
    past = torch.cat((torch.zeros_like(mixed[:, :3]), mixed), dim=1)
    mixed = sum(mixer.conv.weight[:, tap] * past[:, tap : tap + LENGTH] for tap in range(4))
    mixed = F.silu(mixed + (0 if mixer.conv.bias is None else mixer.conv.bias))
    x, b, c = mixed.split((width, shared, shared), dim=-1)
    step = torch.log1p(torch.exp(dt + mixer.dt_bias))
    outputs = torch.zeros(2, LENGTH, HEADS, DIM, dtype=torch.float64)
    for head in range(HEADS):
        own, group = slice(head * DIM, (head + 1) * DIM), head * groups // HEADS
        side = slice(group * STATE, (group + 1) * STATE)
        state = torch.zeros(2, STATE, DIM, dtype=torch.float64)
        for t in range(LENGTH):
            fading = torch.exp(-torch.exp(mixer.A_log[head]) * step[:, t, head])
            write = b[:, t, side, None] * (step[:, t, head, None] * x[:, t, own])[:, None]
            state = fading[:, None, None] * state + write
            read = (c[:, t, side, None] * state).sum(1)
            outputs[:, t, head] = read + mixer.D[head] * x[:, t, own]
    o, gate = outputs.flatten(2), z / (1 + torch.exp(-z))
    o = o * gate if norm == "after_gate" else o
    if norm != "none":
        parts = o.unflatten(-1, (groups, -1))
        parts = parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        o = parts.flatten(2) * mixer.norm.weight
    o = o if norm == "after_gate" else o * gate
    y = o @ mixer.o_proj.weight.T
    return y if mixer.o_proj.bias is None else y + mixer.o_proj.bias


@torch.no_grad()
@every_form
def test_it_equals_its_formula(form: str) -> None:
    fields = {**FIELDS, **FORMS[form]}
    mixer, u = ready(**FORMS[form]), noise()
    expected = by_loop(mixer, u, groups=fields["groups"], norm=fields["norm"])
    assert (mixer(u, whole()) - expected).abs().max() < EXACT


LAYERS = {"num_hidden_layers": 1, "hidden_size": HIDDEN}
SIZES = {
    "mamba_n_heads": HEADS,
    "mamba_d_head": DIM,
    "mamba_d_state": STATE,
    "mamba_chunk_size": 32,
    "rms_norm_eps": 1e-5,
    **LAYERS,
}
OWN = {"num_heads": HEADS, "head_dim": DIM, "state_size": STATE, "chunk_size": 32, **LAYERS}
HEADED = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Their layer, its configuration, and what of our fields says the same.
TWINS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mamba2": (Mamba2Mixer, Mamba2Config(n_groups=2, **OWN), {}),
    "mamba2 with biases": (
        Mamba2Mixer,
        Mamba2Config(n_groups=3, use_bias=True, use_conv_bias=False, **OWN),
        {"groups": 3, "bias": True, "conv_bias": False},
    ),
    "bamba": (BambaMixer, BambaConfig(mamba_n_groups=2, **SIZES, **HEADED), {}),
    "granite": (
        GraniteMoeHybridMambaLayer,
        GraniteMoeHybridConfig(mamba_n_groups=1, **SIZES, **HEADED),
        {"groups": 1},
    ),
    "falcon-h1 as released": (
        FalconH1Mixer,
        FalconH1Config(
            mamba_n_groups=2, mamba_d_ssm=HEADS * DIM, ssm_in_multiplier=1.25, **SIZES, **HEADED,
            ssm_multipliers=[0.5, 0.25, 2.0, 0.75, 1.5],
        ),
        {"norm": "none"},
    ),
    "falcon-h1 with a norm": (
        FalconH1Mixer,
        FalconH1Config(
            mamba_n_groups=2, mamba_d_ssm=HEADS * DIM, mamba_rms_norm=True, mamba_norm_before_gate=True, **SIZES, **HEADED
        ),
        {"norm": "before_gate"},
    ),
}  # fmt: skip


def named_as_theirs(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, weight in weights.items():
        theirs = name.replace("o_proj.", "out_proj.").replace("conv.", "conv1d.")
        found[theirs] = weight[:, None] if theirs == "conv1d.weight" else weight
    return found


@torch.no_grad()
@pytest.mark.parametrize("twin", TWINS)
def test_it_is_the_layer_of_transformers_under_other_names(twin: str) -> None:
    layer, config, fields = TWINS[twin]
    theirs, ours, u = layer(config, layer_idx=0).double().eval(), ready(**fields), noise()
    weights = named_as_theirs(ours.state_dict())
    if isinstance(theirs, FalconH1Mixer):
        # Its fixed factors are factors of our weights.
        theirs.mup_vector = compute_mup_vector(config).double()
        weights["in_proj.weight"] = (
            weights["in_proj.weight"] / theirs.mup_vector[0].T / config.ssm_in_multiplier
        )
    theirs.load_state_dict(weights)
    expected, got = theirs(u), ours(u, whole())
    assert (got - expected).abs().max() <= SINGLE * expected.abs().max()


def spec_of(block: dict[str, Any], layers: list[str], **fields: Any) -> ModelSpec:
    sizes = {"vocab_size": 90, "hidden_size": HIDDEN, "norm_eps": 1e-5}
    return ModelSpec.model_validate({**sizes, "blocks": block, "layers": layers, **fields})


MIXER = {"kind": "mamba2", **FIELDS}


def all_count(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("conv1d.bias"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.double().eval()


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, weight in weights.items():
        new = name
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        found[new] = weight.squeeze(1) if name.endswith("conv1d.weight") else weight
    return found


@torch.no_grad()
def test_a_model_equals_mamba2_of_transformers() -> None:
    config = Mamba2Config(
        **OWN | {"num_hidden_layers": 2},
        n_groups=2,
        vocab_size=90,
        tie_word_embeddings=True,
        initializer_range=0.2,
        residual_in_fp32=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = all_count(Mamba2ForCausalLM(config))
    ours = build(
        spec_of({"it": {"mixer": MIXER, "channel": {"kind": "none"}}}, ["it"] * 2), dtype=torch.float64
    )
    names = {
        "backbone.": "model.",
        ".embeddings.": ".embed_tokens.",
        ".norm_f.": ".norm.",
        ".mixer.conv1d.": ".mixer.conv.",
        ".out_proj.": ".o_proj.",
    }
    found = renamed(dict(theirs.named_parameters()), names)
    found = {
        name.replace(".norm.", ".mixer_norm.")
        if ".layers." in name and ".mixer." not in name
        else name: weight
        for name, weight in found.items()
    }
    ours.load_state_dict({**found, "lm_head.weight": found["model.embed_tokens.weight"]})
    ids = torch.randint(90, (2, LENGTH))
    expected, got = theirs(ids, use_cache=False).logits, ours.eval()(ids).logits
    assert (got - expected).abs().max() <= 2 * SINGLE * expected.abs().max()


@torch.no_grad()
def test_a_model_equals_granite_4_hybrid_of_transformers() -> None:
    config = GraniteMoeHybridConfig(
        **SIZES | HEADED | {"num_hidden_layers": 3},
        mamba_n_groups=1,
        vocab_size=90,
        shared_intermediate_size=40,
        num_local_experts=0,
        layer_types=["mamba", "attention", "mamba"],
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=4.0,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = all_count(GraniteMoeHybridForCausalLM(config))
    part = {"channel": {"kind": "swiglu", "width": 40}, "residual": {"branch": 0.5}}
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "rope": None, "scale": 0.2}
    blocks = {"linear": {"mixer": MIXER | {"groups": 1}, **part}, "full": {"mixer": attention, **part}}
    factors = {"embedding_multiplier": 3.0, "logit_multiplier": 0.25}
    ours = build(spec_of(blocks, ["linear", "full", "linear"], **factors), dtype=torch.float64)
    names = {
        ".input_layernorm.": ".mixer_norm.",
        ".post_attention_layernorm.": ".channel_norm.",
        ".mamba.": ".mixer.",
        ".self_attn.": ".mixer.",
        ".mixer.conv1d.": ".mixer.conv.",
        ".out_proj.": ".o_proj.",
        ".shared_mlp.output_linear.": ".channel.down_proj.",
    }
    found = renamed(dict(theirs.named_parameters()), names)
    for name in [name for name in found if ".input_linear." in name]:
        gate, up = found.pop(name).chunk(2)
        head = name.removesuffix("shared_mlp.input_linear.weight")
        found |= {f"{head}channel.gate_proj.weight": gate, f"{head}channel.up_proj.weight": up}
    ours.load_state_dict({**found, "lm_head.weight": found["model.embed_tokens.weight"]})
    ids = torch.randint(90, (2, LENGTH))
    expected, got = theirs(ids, use_cache=False).logits, ours.eval()(ids).logits
    assert (got - expected).abs().max() <= 2 * SINGLE * expected.abs().max()


MUP = [0.5, 0.25, 2.0, 0.75, 1.5]
FACTORS = {
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.25,
    "key_multiplier": 0.4,
    "ssm_in_multiplier": 1.25,
}
FACTORS |= {"ssm_out_multiplier": 0.3, "attention_out_multiplier": 0.9}
GATE_FACTOR, DOWN_FACTOR = 0.8, 0.6


def falcon_h1() -> Any:
    config = FalconH1Config(
        **SIZES | HEADED | {"num_hidden_layers": 2},
        **FACTORS,
        mamba_n_groups=2,
        mamba_d_ssm=HEADS * DIM,
        vocab_size=90,
        intermediate_size=40,
        ssm_multipliers=MUP,
        mlp_multipliers=[GATE_FACTOR, DOWN_FACTOR],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return all_count(FalconH1ForCausalLM(config))


@torch.no_grad()
def test_a_model_equals_falcon_h1_of_transformers_with_its_factors_in_the_weights() -> None:
    theirs = falcon_h1()
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "key_multiplier": FACTORS["key_multiplier"]}
    weights = [FACTORS["attention_out_multiplier"], FACTORS["ssm_out_multiplier"]]
    both = {"kind": "parallel", "mixers": [attention, MIXER | {"norm": "none"}], "weights": weights}
    block = {"it": {"mixer": both, "channel": {"kind": "swiglu", "width": 40}}}
    factors = {"embedding_multiplier": 3.0, "logit_multiplier": 0.25, "tie_embeddings": False}
    ours = build(spec_of(block, ["it"] * 2, **factors), dtype=torch.float64)
    names = {
        ".input_layernorm.": ".mixer_norm.",
        ".pre_ff_layernorm.": ".channel_norm.",
        ".final_layernorm.": ".norm.",
        ".self_attn.": ".mixer.mixers.0.",
        ".mamba.": ".mixer.mixers.1.",
        ".conv1d.": ".conv.",
        ".out_proj.": ".o_proj.",
        ".feed_forward.": ".channel.",
    }
    found = renamed(dict(theirs.named_parameters()), names)
    rows = compute_mup_vector(theirs.config).double()[0].T * FACTORS["ssm_in_multiplier"]
    for name, factor in ((".in_proj.", rows), (".gate_proj.", GATE_FACTOR), (".down_proj.", DOWN_FACTOR)):
        found |= {key: weight * factor for key, weight in found.items() if name in key}
    ours.load_state_dict(found)
    ids = torch.randint(90, (2, LENGTH))
    expected, got = theirs(ids, use_cache=False).logits, ours.eval()(ids).logits
    assert (got - expected).abs().max() <= 2 * SINGLE * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer",
    [
        {
            "kind": "head_split",
            "mixers": [
                {"kind": "mamba2", "heads": 6, "groups": 3, "state_dim": 8},
                {"kind": "attention", "heads": 6},
            ],
            "share": 0.5,
        },
        {"kind": "moh", "mixer": MIXER, "shared_heads": 2, "active": 2},
    ],
    ids=lambda mixer: mixer["kind"],
)
def test_heads_may_be_shared_out_and_turned_off(mixer: dict[str, Any]) -> None:
    model = build(spec_of({"it": {"mixer": mixer, "channel": {"kind": "none"}}}, ["it"]), dtype=torch.float64)
    ids = torch.randint(90, (2, 30))
    whole_logits, begun = model.eval()(ids).logits, model(ids[:, :20])
    pieces, cache = [begun.logits], begun.past_key_values
    for t in range(20, 30):
        pieces.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    assert (torch.cat(pieces, dim=1) - whole_logits).abs().max() < EXACT


def test_rates_begin_in_their_ranges_and_stay_wide() -> None:
    mixer = Mamba2Module(Site(HIDDEN, 0, 1), **FIELDS | {"heads": 512, "head_dim": 1, "groups": 1})
    for module in mixer.modules():
        initialise(module, std=0.02)
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1.0 <= rates.min() < 2.0 < 15.0 < rates.max() <= 16.0
    assert 9e-4 < steps.min() < 2e-3 < 5e-2 < steps.max() < 0.11
    narrow = mixer.to(torch.bfloat16)
    assert narrow.A_log.dtype == narrow.dt_bias.dtype == torch.float32
    assert narrow.in_proj.weight.dtype == torch.bfloat16


def test_it_costs_what_the_sheet_says() -> None:
    spec, site = Mamba2.model_validate({"heads": 64}), SpecSite(hidden_size=2048)
    D, inner, channels = 2048, 4096, 4096 + 2 * 128
    assert spec.resolved(site).head_dim == 64
    weights = D * (2 * inner + 2 * 128 + 64) + inner * D
    assert spec.params(site) == weights + channels * 5 + 3 * 64 + inner
    # 64 x 64 x 128 numbers: 2 MiB of float32 memory, and three taps of the convolution.
    assert spec.state_bytes(site, 1, 2) == 2 * 2**20 + 3 * channels * 2
    outside = 2 * weights + 2 * 4 * channels
    assert spec.flops(site, 10**6) - outside == 64 * 5 * 64 * 128


def test_groups_and_heads_must_fit() -> None:
    site = SpecSite(hidden_size=HIDDEN)
    (found,) = Mamba2.model_validate({"heads": 6, "groups": 4}).problems(site)
    assert (found.field, found.hint) == ("groups", "3 or 6 do")
    (found,) = Mamba2.model_validate({"heads": 7}).problems(site)
    assert found.field == "heads"
    assert found.what == "7 does not divide 2 · hidden_size = 96"
    split = Mamba2.model_validate({"heads": 6, "groups": 3}).resolved(site)
    assert split.takes_heads(4)
    assert not split.takes_heads(3)
    assert (split.with_heads(4).groups, split.with_heads(4).head_dim) == (2, 16)
