"""Gated linear attention: the layer is its formula, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.gla import GlaModule
from heddle.compose.modules.site import Site
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Gla

HIDDEN, HEADS, KEYS, VALUES, RANK, TAPS, LENGTH = 48, 3, 8, 12, 5, 4, 100
# Float64 on a CPU: two ways to compute one thing differ by rounding alone.
EXACT = 1e-9
SITE = Site(HIDDEN, 1, 3, norm_eps=1e-5)


def ready(short_conv: int | None, gate: str) -> GlaModule:
    """A mixer in float64 whose every weight counts."""
    torch.manual_seed(0)
    rank = {"gate_rank": RANK} if gate == "channel" else {}
    mixer = GlaModule(
        SITE, heads=HEADS, head_dim=KEYS, value_dim=VALUES, short_conv=short_conv, gate=gate, **rank
    )
    for module in mixer.modules():
        initialise(module, std=HIDDEN**-0.5)
    # Gates from those that forget to those that keep.
    last = mixer.decay_up if gate == "channel" else mixer.decay_proj
    nn.init.normal_(last.weight, std=8.0)
    nn.init.normal_(last.bias, std=8.0)
    nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixer.double()


def by_loop(mixer: GlaModule, x: Tensor) -> Tensor:
    """Token by token and head by head, from the weights alone."""
    mixed = x @ mixer.qkv_proj.weight.T
    if mixer.conv is not None:
        past = torch.cat((torch.zeros_like(mixed[:, : TAPS - 1]), mixed), dim=1)
        mixed = sum(mixer.conv.weight[:, tap] * past[:, tap : tap + LENGTH] for tap in range(TAPS))
        mixed = mixed / (1 + torch.exp(-mixed))
    if mixer.of_heads:
        gate = (x @ mixer.decay_proj.weight.T + mixer.decay_proj.bias).repeat_interleave(KEYS, dim=-1)
    else:
        gate = x @ mixer.decay_down.weight.T @ mixer.decay_up.weight.T + mixer.decay_up.bias
    decay = (1 / (1 + torch.exp(-gate))) ** (1 / 16)
    queries, keys, values = mixed.split((HEADS * KEYS, HEADS * KEYS, HEADS * VALUES), dim=-1)
    outputs = torch.zeros(2, LENGTH, HEADS, VALUES, dtype=torch.float64)
    for row in range(2):
        for head in range(HEADS):
            own, wide = slice(head * KEYS, (head + 1) * KEYS), slice(head * VALUES, (head + 1) * VALUES)
            state = torch.zeros(KEYS, VALUES, dtype=torch.float64)
            for t in range(LENGTH):
                state = torch.diag(decay[row, t, own]) @ state
                state = state + torch.outer(keys[row, t, own], values[row, t, wide])
                outputs[row, t, head] = queries[row, t, own] @ state * KEYS**-0.5
    o = outputs / (outputs.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    o = o * F.silu(x @ mixer.z_proj.weight.T).view_as(o)
    return o.flatten(2) @ mixer.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("gate", ["channel", "head"])
@pytest.mark.parametrize("short_conv", [None, TAPS])
def test_it_equals_its_formula(short_conv: int | None, gate: str) -> None:
    mixer, x = ready(short_conv, gate), torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    call = Call(torch.arange(LENGTH)[None].expand(2, LENGTH))
    assert (mixer(x, call) - by_loop(mixer, x)).abs().max() < EXACT


def test_it_costs_what_the_sheet_says() -> None:
    # The published layer: keys half as wide as values, "~4 D²" parameters, a gate of rank 16.
    D, site = 2048, SpecSite(hidden_size=2048)
    spec = Gla.model_validate({"heads": 4, "head_dim": 256, "value_dim": 512})
    gate = 16 * (D + D // 2) + D // 2
    assert spec.params(site) == 4 * D * D + gate + 512
    assert spec.state_bytes(site, 1, 2) == 2 * 2**20
    # A gate for each head: "like GLA plus gk_proj [H, D] + bias".
    simple = Gla.model_validate({"heads": 4, "head_dim": 256, "value_dim": 512, "gate": "head"})
    assert simple.params(site) == 4 * D * D + 4 * (D + 1) + 512
    square = Gla.model_validate({"heads": 16})
    outside = 2 * (5 * D * D + 16 * 2 * D)
    # "98 kFLOP" a token and head at chunks of 64.
    assert (square.prefill_flops(site, 4096) - outside) / 16 == 98_304
    assert square.flops(site, 7) - outside == 5 * 16 * 128 * 128


def test_gates_of_channels_have_the_hash_they_had_and_those_of_heads_their_own() -> None:
    site = SpecSite(hidden_size=HIDDEN)
    plain, simple = (Gla.model_validate({"heads": 3, **gate}) for gate in ({}, {"gate": "head"}))
    assert plain == Gla.model_validate({"heads": 3, "gate": "channel"})
    assert "gate" not in plain.canonical(site)
    assert simple.canonical(site)["gate"] == "head"
    assert simple.kernels() == ("simple_gla",)


def test_a_rank_of_the_gate_of_heads_is_refused() -> None:
    spec = Gla.model_validate({"heads": 3, "gate": "head", "gate_rank": 8})
    (problem,) = spec.problems(SpecSite(hidden_size=HIDDEN))
    assert (problem.field, problem.code) == ("gate_rank", "conflicting-fields")
