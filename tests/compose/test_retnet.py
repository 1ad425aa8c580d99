"""Multi-scale retention: its parallel form, its positions, its costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.retnet import RetNetModule, log_decays
from heddle.compose.modules.site import Site
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import RetNet

HIDDEN, HEADS, KEYS, VALUES, LENGTH = 48, 4, 12, 20, 150
# Float64 on a CPU: two ways to compute one thing differ by rounding alone.
EXACT = 1e-9
# Angles of RoPE are float32, and so wrong by a rounding of the last position.
ANGLE = LENGTH * torch.finfo(torch.float32).eps
ROPE = {"theta": 1e4, "fraction": 1.0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ready(**fields: Any) -> RetNetModule:
    """A mixer in float64 whose every weight counts."""
    sizes = {"heads": HEADS, "head_dim": KEYS, "value_dim": VALUES, "rope": None, "short_conv": None}
    mixer = RetNetModule(Site(HIDDEN, 1, 3, norm_eps=1e-5), **{**sizes, **fields})
    for module in mixer.modules():
        initialise(module, std=HIDDEN**-0.5)
    if mixer.log_decay is None:
        # Gates from those that forget to those that keep.
        nn.init.normal_(mixer.decay_proj.weight, std=8.0)
    nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    mixer.double()
    if mixer.log_decay is not None:
        # The decays are float32; here their own rounding is not what is asked about.
        mixer.log_decay = log_decays(HEADS)
    return mixer


def at(first: int = 0) -> Call:
    return Call(torch.arange(first, first + LENGTH)[None].expand(2, LENGTH))


def noise() -> Tensor:
    return torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)


def turned(x: Tensor, rope: dict[str, float]) -> Tensor:
    """Pairs (j, j + size/2) of the first dimensions as complex numbers, turned by pos * theta^(-2j/size)."""
    size = int(rope["fraction"] * KEYS)
    frequency = rope["theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(LENGTH, dtype=torch.float64)[:, None] * frequency
    real, imaginary = x[..., : size // 2], x[..., size // 2 : size]
    pairs = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag, x[..., size:]), dim=-1)


def by_formula(mixer: RetNetModule, x: Tensor, rope: dict[str, float] | None) -> Tensor:
    """The parallel form, head by head: (q kᵀ * D) v, D_ij = γ^(i-j), of gates γ_(j+1) ... γ_i; from the weights alone."""
    projected = x @ mixer.qkv_proj.weight.T
    if mixer.conv is not None:
        past = torch.cat((torch.zeros_like(projected[:, :3]), projected), dim=1)
        mixed = sum(mixer.conv.weight[:, tap] * past[:, tap : tap + LENGTH] for tap in range(4))
        projected = mixed / (1 + torch.exp(-mixed))
    queries, keys, values = projected.split((HEADS * KEYS, HEADS * KEYS, HEADS * VALUES), dim=-1)
    gates = x @ mixer.gate_proj.weight.T
    time = torch.arange(LENGTH, dtype=torch.float64)
    age = time[:, None] - time
    outputs = []
    for head in range(HEADS):
        own, wide = slice(head * KEYS, (head + 1) * KEYS), slice(head * VALUES, (head + 1) * VALUES)
        q, k = queries[..., own], keys[..., own]
        if rope is not None:
            q, k = turned(q, rope), turned(k, rope)
        if mixer.log_decay is None:
            kept = (1 / (1 + torch.exp(-(x @ mixer.decay_proj.weight[head])))) ** (1 / 16)
            total = torch.log(kept).cumsum(-1)
            fading = torch.exp(total[:, :, None] - total[:, None]).tril()
        else:
            fading = ((1 - 2.0 ** (-5 - head)) ** age.clamp(min=0)).tril()
        o = (q @ k.mT * KEYS**-0.5 * fading) @ values[..., wide]
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
        outputs.append(o * gates[..., wide] / (1 + torch.exp(-gates[..., wide])))
    return torch.cat(outputs, dim=-1) @ mixer.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("decay", ["fixed", "gate"])
@pytest.mark.parametrize("short_conv", [None, 4])
def test_it_equals_its_parallel_form(short_conv: int | None, decay: str) -> None:
    mixer, x = ready(short_conv=short_conv, decay=decay), noise()
    assert (mixer(x, at()) - by_formula(mixer, x, None)).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("decay", ["fixed", "gate"])
@pytest.mark.parametrize("rope", [ROPE, {"theta": 100.0, "fraction": 0.5}])
def test_it_equals_its_parallel_form_with_rotary_positions(rope: dict[str, float], decay: str) -> None:
    mixer, x = ready(rope=rope, decay=decay), noise()
    expected = by_formula(mixer, x, rope)
    assert (mixer(x, at()) - expected).abs().max() <= ANGLE * expected.abs().max()


@torch.no_grad()
def test_only_distances_count() -> None:
    mixer, x = ready(rope=ROPE), noise()
    here, later = mixer(x, at()), mixer(x, at(100))
    # The angles are then those of a position 100 further on.
    assert (here - later).abs().max() <= 2 * ANGLE * here.abs().max()


def test_decays_are_those_of_the_paper_and_stay_wide() -> None:
    expected = [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]
    assert log_decays(3).exp().tolist() == pytest.approx(expected, rel=1e-14)
    spec = RetNet.model_validate({"heads": 3, "head_dim": 4})
    assert [one.log_decay for one in spec.sights(SpecSite(HIDDEN))] == pytest.approx(log_decays(3).tolist())
    mixer = ready().float()
    before = mixer.log_decay.clone()
    assert torch.equal(mixer.to(torch.bfloat16).log_decay, before)


def test_it_costs_what_the_sheet_says() -> None:
    # D 2048, 8 heads: keys of 256, values of 512, 8 D² parameters, 4 MiB of state.
    spec, site = RetNet.model_validate({"heads": 8}), SpecSite(hidden_size=2048)
    assert spec.params(site) == 8 * 2048**2 + 512
    assert spec.state_bytes(site, 1, 2) == 4 * 2**20
    assert spec.flops(site, 9) == 2 * 8 * 2048**2 + 5 * 8 * 256 * 512
    assert spec.prefill_flops(site, 64) - 2 * 8 * 2048**2 == 8 * 2 * (64 * 768 + 2 * 256 * 512)


def test_a_gate_costs_a_row_for_each_head_and_fixed_decays_have_the_hash_they_had() -> None:
    site = SpecSite(hidden_size=3072)
    plain, gated = (
        RetNet.model_validate({"heads": 24, "value_dim": 128, **decay}) for decay in ({}, {"decay": "gate"})
    )
    assert gated.params(site) == 5 * 3072**2 + 24 * 3072 + 128 == plain.params(site) + 24 * 3072
    assert gated.flops(site, 9) == plain.flops(site, 9) + 2 * 24 * 3072
    assert "decay" not in plain.canonical(site)
    assert gated.canonical(site)["decay"] == "gate"
    assert (plain.kernels(), gated.kernels()) == (("decay_attention",), ("simple_gla",))
    # A gate of 1/2, with which training begins.
    assert [one.log_decay for one in gated.sights(site)] == [pytest.approx(math.log(0.5) / 16)]


def test_what_turns_must_be_pairs() -> None:
    site = SpecSite(hidden_size=HIDDEN)

    def told(**fields: Any) -> list[tuple[str, str]]:
        return [(one.field, one.what) for one in RetNet.model_validate(fields).problems(site)]

    odd = "of 3 dimensions of a head would turn, and RoPE turns pairs"
    assert told(heads=16) == [("heads", f"3 {odd}")]
    assert told(heads=4, head_dim=3) == [("head_dim", f"3 {odd}")]
    assert told(heads=4, head_dim=3, rope={"fraction": 0.5}) == [("rope.fraction", f"1 {odd}")]
    assert told(heads=16, rope=None) == told(heads=8) == []
    scaling = {"kind": "yarn", "factor": 2.0, "original_length": 64, "beta_fast": 1.0, "beta_slow": 2.0}
    assert [field for field, _ in told(heads=4, rope={"scaling": scaling})] == ["rope.scaling.beta_fast"]
