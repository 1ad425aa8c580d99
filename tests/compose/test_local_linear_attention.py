"""Local linear attention: the layer is the paper's regression token by token, its limits, its costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toys import EXACT, Largest, call_at, mixer_of, noise, padded_call

from heddle.kernels import _local_linear_torch as blocks
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import LocalLinearAttention

KIND = "local_linear_attention"
HIDDEN, LENGTH, DIM = 24, 21, 6
SOLVED: dict[str, Any] = {"heads": 4, "kv_heads": 2, "ridge": 0.3, "rope": None}
LEARNED: dict[str, Any] = {"heads": 4, "kv_heads": 2, "slope": "learned", "rope": None, "qk_norm": False}


def ready(**fields: Any) -> Any:
    mixer = mixer_of(HIDDEN, KIND, **fields)
    if mixer.slope_weight is not None:
        nn.init.normal_(mixer.slope_weight, std=0.1)
    return mixer


def by_loop(mixer: Any, u: Tensor) -> Tensor:
    """Row by row, head by head and token by token: least squares over all earlier keys, its weights a softmax."""
    sides = {"q": mixer.q_proj.weight, "k": mixer.k_proj.weight, "v": mixer.v_proj.weight}
    if mixer.slope_weight is not None:
        sides["r"] = mixer.slope_weight
    heads = {name: (u @ weight.T).unflatten(-1, (-1, DIM)) for name, weight in sides.items()}
    for name, norm in (("q", mixer.q_norm), ("k", mixer.k_norm)):
        if norm is not None:
            x = heads[name]
            heads[name] = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    out = torch.zeros_like(heads["q"])
    for row in range(u.shape[0]):
        for head in range(mixer.heads):
            group = head // (mixer.heads // mixer.kv_heads)
            for t in range(u.shape[1]):
                q, first = heads["q"][row, t, head], max(0, t + 1 - (mixer.window or LENGTH))
                k, v = (heads[name][row, first : t + 1, group] for name in "kv")
                p = torch.softmax(k @ q / DIM**0.5, dim=0)
                if mixer.slope_weight is not None:
                    r = heads["r"][row, t, head]
                    out[row, t, head] = p @ v - ((p * (k @ r)) @ v - (p @ (k @ r)) * (p @ v))
                    continue
                # min over (b, W) of sum p_j |v_j - b - W (k_j - q)|² + ridge |W|²: the normal equations of all at once.
                inputs = torch.cat((torch.ones(len(k), 1, dtype=k.dtype), k - q), dim=1)
                penalty = mixer.ridge * torch.eye(DIM + 1, dtype=k.dtype)
                penalty[0, 0] = 0.0
                normal = inputs.T @ torch.diag(p) @ inputs + penalty
                out[row, t, head] = torch.linalg.solve(normal, inputs.T @ (p[:, None] * v))[0]
    return out.flatten(2) @ mixer.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("fields", [SOLVED, LEARNED], ids=["solved", "learned"])
@pytest.mark.parametrize("window", [None, 5])
def test_it_equals_its_formula(fields: dict[str, Any], window: int | None) -> None:
    mixer, u = ready(**fields, window=window), noise(2, LENGTH, HIDDEN)
    assert (mixer(u, call_at(0, LENGTH)) - by_loop(mixer, u)).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("slope", ["solved", "learned"])
def test_a_great_ridge_or_no_slope_is_softmax_attention_of_the_same_weights(slope: str) -> None:
    fields = {"heads": 4, "kv_heads": 2, "qk_norm": True, "window": 9}
    # A learned slope begins as nothing.
    mixer = mixer_of(HIDDEN, KIND, **fields, slope=slope, ridge=1e12)
    attention = mixer_of(HIDDEN, "attention", **fields)
    attention.load_state_dict({name: one for name, one in mixer.state_dict().items() if "slope" not in name})
    u = noise(2, LENGTH, HIDDEN)
    assert (mixer(u, call_at(0, LENGTH)) - attention(u, call_at(0, LENGTH))).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("fields", [SOLVED, LEARNED], ids=["solved", "learned"])
def test_padding_on_either_side_changes_nothing(fields: dict[str, Any]) -> None:
    mixer, u = ready(**fields), noise(2, LENGTH, HIDDEN)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :7] = real[1, 15:] = False
    y = mixer(u, padded_call(real))
    assert y.isfinite().all()
    for row, kept in ((0, slice(7, None)), (1, slice(0, 15))):
        alone = u[row : row + 1, kept]
        expected = mixer(alone, call_at(0, alone.shape[1], rows=1))
        assert (y[row, kept] - expected[0]).abs().max() < EXACT


def test_no_table_of_all_tokens_by_all_tokens_is_made() -> None:
    length, given = 1024, [noise(1, 1, 1024, 4, dtype=torch.float32) for _ in range(3)]
    inputs, form = blocks.Given.of(*given, None, None, None), blocks.Form(0.5, 1.0, None)
    with torch.no_grad(), Largest() as seen:
        out = blocks.forward(inputs, form)
        blocks.backward(torch.ones_like(out), inputs, form)
    assert seen.numbers <= blocks.QUERIES * length


@torch.no_grad()
@pytest.mark.parametrize("slope", ["solved", "learned"])
def test_flops_are_those_that_torch_counts(slope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Query by query, so that no key is multiplied that is masked. The solve itself is not counted by torch.
    monkeypatch.setattr(blocks, "QUERIES", 1)
    spec, site, length = LocalLinearAttention(heads=4, slope=slope), SpecSite(hidden_size=HIDDEN), 16
    q, k, v, r = (noise(1, 4, length, DIM) for _ in range(4))
    given = blocks.Given.of(q, k, v, r if slope == "learned" else None, None, None)
    with FlopCounterMode(display=False) as counter:
        blocks.forward(given, blocks.Form(0.5, 1.0, None))
    solve = 4 * (DIM**3 // 3 + 2 * DIM**2) if slope == "solved" else 0
    projections = 2 * HIDDEN * HIDDEN * (5 if slope == "learned" else 4)
    assert counter.get_total_flops() == length * (spec.prefill_flops(site, length) - projections - solve)
    assert spec.flops(site, length - 1) - spec.flops(site, length - 2) == spec.flops(site, 1) - spec.flops(
        site, 0
    )


def test_it_costs_the_parameters_and_cache_of_attention() -> None:
    site, D = SpecSite(hidden_size=1024), 1024
    spec = LocalLinearAttention(heads=16)
    assert spec.params(site) == 4 * D * D + 2 * 64
    assert LocalLinearAttention(heads=16, slope="learned").params(site) == 5 * D * D + 2 * 64
    assert spec.state_bytes(site, 100, 2) == 100 * 2 * D * 2
    assert LocalLinearAttention(heads=16, window=8).state_bytes(site, 100, 2) == 7 * 2 * D * 2


def test_what_does_not_fit_is_told() -> None:
    site = SpecSite(hidden_size=HIDDEN)

    def told(**fields: Any) -> list[tuple[str, str]]:
        return [(one.field, one.what) for one in LocalLinearAttention.model_validate(fields).problems(site)]

    odd = "head_dim is 3, and RoPE turns pairs of dimensions"
    assert told(heads=4, kv_heads=3) == [("kv_heads", "3 does not divide heads 4")]
    assert told(heads=5) == [("heads", "5 does not divide hidden_size 24")]
    assert told(heads=8) == [("heads", odd)]
    assert told(heads=4, head_dim=3) == [("head_dim", odd)]
    assert told(heads=8, rope=None) == told(heads=4) == []


def test_a_ridge_counts_only_where_something_is_solved() -> None:
    site = SpecSite(hidden_size=HIDDEN)
    for slope, is_same in (("solved", False), ("learned", True)):
        one, other = (
            LocalLinearAttention.model_validate({"heads": 4, "slope": slope, "ridge": ridge}).canonical(site)
            for ridge in (1.0, 2.0)
        )
        assert (one == other) is is_same
