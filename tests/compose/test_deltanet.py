"""DeltaNet: its equation, and the Gated DeltaNet layers of transformers that hold it with the decay switched off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OlmoHybridConfig, Qwen3_5TextConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.deltanet import DeltaNetModule
from heddle.compose.mixers.gated_deltanet import GatedDeltaNetModule
from heddle.compose.modules.site import Site
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import DeltaNet

HIDDEN, HEADS, KEYS, VALUES, LENGTH = 48, 4, 8, 12, 100
# Float64 on a CPU: two ways to compute one thing differ by rounding alone.
EXACT = 1e-9
# A few roundings to float32, in which transformers' recurrences and norms compute whatever comes.
SINGLE = 8 * torch.finfo(torch.float32).eps
# A decay rate of exp(-1e4) is 0 in every dtype: nothing fades.
OFF = -1e4
SITE = Site(HIDDEN, 1, 3, norm_eps=1e-5)
SIZES: dict[str, Any] = {"heads": HEADS, "head_dim": KEYS, "value_dim": VALUES}
every_range = pytest.mark.parametrize("negative", [False, True])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ready(*, short_conv: int | None = 4, gate: bool = True, negative: bool = False) -> DeltaNetModule:
    """A mixer in float64 whose every weight counts."""
    options = {"short_conv": short_conv, "gate": gate, "negative_eigenvalues": negative}
    mixer = DeltaNetModule(SITE, **SIZES, **options)
    for module in mixer.modules():
        initialise(module, std=HIDDEN**-0.5)
    # Writes from weak to strong.
    nn.init.normal_(mixer.b_proj.weight, std=0.3)
    nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixer.double()


def whole(length: int = LENGTH) -> Call:
    return Call(torch.arange(length)[None].expand(2, length))


def noise() -> Tensor:
    return torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)


def by_loop(mixer: DeltaNetModule, x: Tensor, *, most: float) -> Tensor:
    """Token by token and head by head, from the weights alone."""
    mixed = x @ mixer.qkv_proj.weight.T
    if mixer.conv is not None:
        past = torch.cat((torch.zeros_like(mixed[:, :3]), mixed), dim=1)
        mixed = sum(mixer.conv.weight[:, tap] * past[:, tap : tap + LENGTH] for tap in range(4))
    mixed = mixed / (1 + torch.exp(-mixed))
    beta = most / (1 + torch.exp(-x @ mixer.b_proj.weight.T))
    queries, keys, values = mixed.split((HEADS * KEYS, HEADS * KEYS, HEADS * VALUES), dim=-1)
    outputs = torch.zeros(2, LENGTH, HEADS, VALUES, dtype=torch.float64)
    for row in range(2):
        for head in range(HEADS):
            own, wide = slice(head * KEYS, (head + 1) * KEYS), slice(head * VALUES, (head + 1) * VALUES)
            state = torch.zeros(KEYS, VALUES, dtype=torch.float64)
            for t in range(LENGTH):
                q, k = (
                    side[row, t, own] / (side[row, t, own].square().sum() + 1e-6).sqrt()
                    for side in (queries, keys)
                )
                turn = torch.eye(KEYS, dtype=torch.float64) - beta[row, t, head] * torch.outer(k, k)
                state = turn @ state + beta[row, t, head] * torch.outer(k, values[row, t, wide])
                outputs[row, t, head] = q @ state * KEYS**-0.5
    o = outputs / (outputs.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    if mixer.z_proj is not None:
        o = o * F.silu(x @ mixer.z_proj.weight.T).view_as(o)
    return o.flatten(2) @ mixer.o_proj.weight.T


@torch.no_grad()
@every_range
@pytest.mark.parametrize("short_conv", [None, 4])
def test_it_equals_its_formula(short_conv: int | None, negative: bool) -> None:
    mixer, x = ready(short_conv=short_conv, gate=short_conv is None, negative=negative), noise()
    expected = by_loop(mixer, x, most=2.0 if negative else 1.0)
    assert (mixer(x, whole()) - expected).abs().max() < EXACT


@torch.no_grad()
@every_range
def test_it_is_gated_deltanet_without_the_decay(negative: bool) -> None:
    ours, x = ready(negative=negative), noise()
    gated = GatedDeltaNetModule(SITE, **SIZES, value_heads=HEADS, short_conv=4, negative_eigenvalues=negative)
    gated.load_state_dict(ours.state_dict() | switched_off("a_proj.weight"))
    assert (ours(x, whole()) - gated.double()(x, whole())).abs().max() < EXACT


def switched_off(projection: str) -> dict[str, Tensor]:
    zeros = torch.zeros(HEADS)
    return {"A_log": zeros + OFF, "dt_bias": zeros, projection: torch.zeros(HEADS, HIDDEN)}


LINEAR = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "linear_num_key_heads": HEADS,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": KEYS,
    "linear_value_head_dim": VALUES,
    "layer_types": ["linear_attention", "full_attention"],
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@torch.no_grad()
def test_qwen3_5_holds_it_exactly() -> None:
    ours, x = ready(), noise()
    theirs = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(**LINEAR), 0).double().eval()
    names = {"qkv_proj": "in_proj_qkv", "z_proj": "in_proj_z", "b_proj": "in_proj_b", "o_proj": "out_proj"}
    weights = {f"{own}.weight": getattr(ours, name).weight for name, own in names.items()}
    weights |= {"norm.weight": ours.norm.weight, "conv1d.weight": ours.conv.weight[:, None]}
    theirs.load_state_dict(weights | switched_off("in_proj_a.weight"))
    expected = theirs(x)
    assert (ours(x, whole()) - expected).abs().max() <= SINGLE * expected.abs().max()


@torch.no_grad()
@every_range
def test_olmo_hybrid_holds_it_exactly_with_beta_up_to_2_too(negative: bool) -> None:
    ours, x = ready(negative=negative), noise()
    config = OlmoHybridConfig(**LINEAR, linear_allow_neg_eigval=negative)
    theirs = OlmoHybridGatedDeltaNet(config, 0).double().eval()
    q, k, v = ours.qkv_proj.weight.split(ours.sizes)
    weights = {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "g_proj.weight": ours.z_proj.weight,
    }
    weights |= {f"{name}.weight": getattr(ours, name).weight for name in ("b_proj", "o_proj")}
    weights |= {"o_norm.weight": ours.norm.weight, "conv1d.weight": ours.conv.weight[:, None]}
    theirs.load_state_dict(weights | switched_off("a_proj.weight"))
    expected = theirs(x)
    assert (ours(x, whole()) - expected).abs().max() <= SINGLE * expected.abs().max()


def test_it_costs_what_the_sheet_says() -> None:
    # 16 heads of 128: 4 D² parameters, 5 D² with the gate, and "172 kFLOP" a token and head at chunks of 64.
    site, D = SpecSite(hidden_size=2048), 2048
    for gate in (False, True):
        spec = DeltaNet.model_validate({"heads": 16, "gate": gate})
        weights = (5 if gate else 4) * D * D + 16 * D
        assert spec.params(site) == weights + 4 * 3 * D + 128
        outside = 2 * weights + 2 * 4 * 3 * D
        assert spec.flops(site, 7) - outside == 6 * 16 * 128 * 128
        assert (spec.prefill_flops(site, 4096) - outside) / 16 == 172_032
        assert spec.state_bytes(site, 1, 2) == 16 * 64 * 1024 + 3 * 3 * D * 2
