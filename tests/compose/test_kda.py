"""Kimi Delta Attention: the layer is that of transformers' Kimi Linear, and its bounded form is its formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.kda import KdaModule
from heddle.compose.modules.site import Site
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Kda

HIDDEN, HEADS, KEYS, TAPS, LENGTH = 48, 4, 8, 4, 100
SITE = Site(HIDDEN, 0, 2, norm_eps=1e-5)
# Float64 on a CPU: two ways to compute one thing differ by rounding alone.
EXACT = 1e-9
# A few roundings to float32, in which transformers' recurrence, gate and norm compute whatever comes.
SINGLE = 8 * torch.finfo(torch.float32).eps


def ready(lower_bound: float | None = None, value_dim: int = KEYS, gate_rank: int = KEYS) -> KdaModule:
    """A mixer in float64 whose every weight counts."""
    torch.manual_seed(0)
    mixer = KdaModule(
        SITE,
        heads=HEADS,
        head_dim=KEYS,
        value_dim=value_dim,
        gate_rank=gate_rank,
        short_conv=TAPS,
        lower_bound=lower_bound,
    )
    for module in mixer.modules():
        initialise(module, std=HIDDEN**-0.5)
    # Steps and writes from small to large.
    nn.init.normal_(mixer.decay_up.weight, std=1.0)
    nn.init.normal_(mixer.b_proj.weight, std=0.3)
    nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixer.double()


def noise() -> Tensor:
    return torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)


def whole() -> Call:
    return Call(torch.arange(LENGTH)[None].expand(2, LENGTH))


@torch.no_grad()
def test_kimi_linear_holds_it_exactly() -> None:
    ours, x = ready(), noise()
    # Theirs sums the decays of a chunk in float32, where those of fast channels would drown its precision.
    nn.init.uniform_(ours.A_log, -4.0, -1.0)
    config = KimiLinearConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "dense"],
        linear_num_heads=HEADS,
        linear_head_dim=KEYS,
        linear_conv_kernel_dim=TAPS,
        rms_norm_eps=1e-5,
    )
    theirs = KimiLinearDeltaAttention(config, 0).double().eval()
    q, k, v = ours.qkv_proj.weight.split(ours.sizes)
    weights = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v}
    names = {"g_a_proj": "z_down", "g_b_proj": "z_up", "b_proj": "b_proj", "o_proj": "o_proj"}
    names |= {"forget_gate.f_a_proj": "decay_down", "forget_gate.f_b_proj": "decay_up", "o_norm": "norm"}
    weights |= {f"{name}.weight": getattr(ours, own).weight for name, own in names.items()}
    weights["conv1d.weight"] = ours.conv.weight[:, None]
    weights |= {
        "forget_gate.A_log": ours.A_log.view(1, 1, HEADS, 1),
        "forget_gate.dt_bias": ours.dt_bias,
    }
    theirs.load_state_dict(weights)
    expected = theirs(x)
    assert (ours(x, whole()) - expected).abs().max() <= SINGLE * expected.abs().max()


@torch.no_grad()
def test_with_a_bound_it_equals_its_formula() -> None:
    values, rank = 12, 5
    mixer, x = ready(lower_bound=-5.0, value_dim=values, gate_rank=rank), noise()
    mixed = x @ mixer.qkv_proj.weight.T
    past = torch.cat((torch.zeros_like(mixed[:, : TAPS - 1]), mixed), dim=1)
    mixed = sum(mixer.conv.weight[:, tap] * past[:, tap : tap + LENGTH] for tap in range(TAPS))
    mixed = mixed / (1 + torch.exp(-mixed))
    step = x @ mixer.decay_down.weight.T @ mixer.decay_up.weight.T + mixer.dt_bias
    step = step.view(2, LENGTH, HEADS, KEYS) * torch.exp(mixer.A_log)[:, None]
    decay = torch.exp(-5.0 / (1 + torch.exp(-step)))
    beta = 1 / (1 + torch.exp(-x @ mixer.b_proj.weight.T))
    queries, keys, worth = (side.view(2, LENGTH, HEADS, -1) for side in mixed.split(mixer.sizes, dim=-1))
    queries, keys = (side / (side.square().sum(-1, keepdim=True) + 1e-6).sqrt() for side in (queries, keys))
    outputs = torch.zeros(2, LENGTH, HEADS, values, dtype=torch.float64)
    for row in range(2):
        for head in range(HEADS):
            state = torch.zeros(KEYS, values, dtype=torch.float64)
            for t in range(LENGTH):
                k, share = keys[row, t, head], beta[row, t, head]
                state = torch.diag(decay[row, t, head]) @ state
                state = state + share * torch.outer(k, worth[row, t, head] - k @ state)
                outputs[row, t, head] = queries[row, t, head] @ state * KEYS**-0.5
    o = outputs / (outputs.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    gate = x @ mixer.z_down.weight.T @ mixer.z_up.weight.T
    expected = (o * torch.sigmoid(gate).view_as(o)).flatten(2) @ mixer.o_proj.weight.T
    assert (mixer(x, whole()) - expected).abs().max() < EXACT


def test_it_costs_what_the_sheet_says() -> None:
    # Kimi-Linear-48B: 32 heads of 128 at a width of 2304, both gates of rank 128.
    D, H, d = 2304, 32, 128
    spec, site = Kda.model_validate({"heads": H, "head_dim": d}), SpecSite(hidden_size=D)
    matrices = 4 * D * H * d + D * H + 2 * (D * d + d * H * d)
    assert spec.params(site) == matrices + 4 * 3 * H * d + H + H * d + d
    outside = 2 * (matrices + 4 * 3 * H * d)
    assert spec.flops(site, 7) - outside == 7 * H * d * d
    # Both triangles, the inverse and the state: as Gated DeltaNet.
    assert (spec.prefill_flops(site, 4096) - outside) / H == 172_032
    assert spec.state_bytes(site, 1, 2) == H * 64 * 1024 + 3 * 3 * H * d * 2
