"""HGRN-2: the layer is its formula, token by token, and the bounds of all layers come from one table of the model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import call_at, mixer_of, noise, shaken, tokens

from heddle.compose.build import build
from heddle.compose.modules.lower_bounds import bounded_log_forget, hand_bounds
from heddle.compose.plan import plan
from heddle.compose.train import parameter_groups
from heddle.specs import ModelSpec
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Hgrn2

HIDDEN, HEADS, KEYS, VALUES, TAPS, LENGTH, LAYERS = 48, 3, 8, 12, 4, 100, 4
SIZES = (HEADS * KEYS, HEADS * KEYS, HEADS * VALUES)
# Float64 on a CPU: two ways to compute one thing differ by rounding alone.
EXACT = 1e-9
# A few operations in float32.
ROUNDED = 4 * torch.finfo(torch.float32).eps
FIELDS: dict[str, Any] = {"kind": "hgrn2", "heads": HEADS, "head_dim": KEYS, "value_dim": VALUES}


def bound_of(table: Tensor, layer: int) -> Tensor:
    """Σ of the shares of the layers up to this one, the first left out.  Shapes:  table: [L, W];  out: [W]"""
    powers = [torch.exp(table[one]) for one in range(table.shape[0])]
    whole = sum(powers)
    return sum((power / whole for power in powers[1 : layer + 1]), torch.zeros_like(table[0]))


def by_loop(mixer: Any, x: Tensor, bound: Tensor) -> Tensor:
    """Token by token and head by head, from the weights alone."""
    sides = [x @ one.weight.T for one in (mixer.q_proj, mixer.f_proj, mixer.i_proj)]
    if mixer.conv is not None:
        mixed = torch.cat(sides, dim=-1)
        past = torch.cat((torch.zeros_like(mixed[:, : TAPS - 1]), mixed), dim=1)
        mixed = sum(mixer.conv.weight[:, tap] * past[:, tap : tap + LENGTH] for tap in range(TAPS))
        sides = list(mixed.split(SIZES, dim=-1))
    query, gate, value = sides
    query = query / (1 + torch.exp(-query))
    forget = bound + (1 - bound) / (1 + torch.exp(-gate))
    outputs = torch.zeros(2, LENGTH, HEADS * VALUES, dtype=torch.float64)
    for row in range(2):
        for head in range(HEADS):
            own, wide = slice(head * KEYS, (head + 1) * KEYS), slice(head * VALUES, (head + 1) * VALUES)
            state = torch.zeros(KEYS, VALUES, dtype=torch.float64)
            for t in range(LENGTH):
                kept = forget[row, t, own]
                state = torch.diag(kept) @ state + torch.outer(1 - kept, value[row, t, wide])
                outputs[row, t, wide] = query[row, t, own] @ state * KEYS**-0.5
    # One norm over the heads together.
    o = outputs / (outputs.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.g_norm.weight
    return o @ mixer.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize(("short_conv", "layer"), [(None, 0), (None, 2), (TAPS, LAYERS - 1)])
def test_it_equals_its_formula(short_conv: int | None, layer: int) -> None:
    mixer, x = mixer_of(HIDDEN, **FIELDS, short_conv=short_conv), noise(2, LENGTH, HIDDEN)
    # Gates from those that forget to those that keep.
    nn.init.normal_(mixer.f_proj.weight, std=0.5)
    # Wider than the gates, as beside a layer with more of them.
    table, call = noise(LAYERS, HEADS * KEYS + 5, seed=4), call_at(0, LENGTH)
    hand_bounds(table, call)
    call.layer = layer
    bound = bound_of(table, layer)[: HEADS * KEYS]
    assert (mixer(x, call) - by_loop(mixer, x, bound)).abs().max() < EXACT


def test_the_gate_and_its_gradients_are_those_of_the_plain_formula() -> None:
    table, gate = noise(LAYERS, 6, seed=4), 4.0 * noise(2, 9, 6, seed=5)
    for layer in range(LAYERS):
        found = []
        for is_plain in (False, True):
            rows, x = table.clone().requires_grad_(), gate.clone().requires_grad_()
            call = call_at(0, 9)
            hand_bounds(rows, call)
            call.layer = layer
            bound = bound_of(rows, layer)
            log_forget = (
                torch.log(bound + (1 - bound) * torch.sigmoid(x)) if is_plain else bounded_log_forget(x, call)
            )
            (log_forget * noise(2, 9, 6, seed=6)).sum().backward()
            # The first layer has no bound, so nothing reaches the table.
            found.append((log_forget, x.grad, torch.zeros_like(rows) if rows.grad is None else rows.grad))
        for ours, plain in zip(*found, strict=True):
            assert (ours - plain).abs().max() < EXACT


def test_bounds_begin_in_equal_steps_from_nothing() -> None:
    call, wide_open = call_at(0, 1), torch.full((2, 1, 6), -200.0)
    hand_bounds(torch.zeros(LAYERS, 6), call)
    for layer in range(1, LAYERS):
        call.layer = layer
        assert ((bounded_log_forget(wide_open, call).exp() - layer / LAYERS).abs() < ROUNDED).all()
    call.layer = 0
    assert torch.equal(bounded_log_forget(wide_open, call), wide_open)


def test_a_shut_gate_keeps_the_memory_and_writes_nothing() -> None:
    mixer, x = mixer_of(HIDDEN, **FIELDS), noise(2, 9, HIDDEN)
    cache = mixer.new_cache()
    mixer(x, call_at(0, 9, cache))
    before = cache.tensors()["memory"].clone()
    with torch.no_grad():
        mixer.f_proj.weight.copy_(1e6 * x[0, 0].expand_as(mixer.f_proj.weight))
    y = mixer(x[:1, :1].expand(2, -1, -1), call_at(9, 1, cache))
    assert y.isfinite().all()
    assert torch.equal(cache.tensors()["memory"], before)


def test_keys_of_gates_near_one_keep_their_digits() -> None:
    gate = torch.tensor([12.0, 30.0])
    key = -torch.expm1(bounded_log_forget(gate, call_at(0, 1))).double()
    assert ((key * (1 + torch.exp(gate.double())) - 1).abs() < ROUNDED).all()


def model_of(*mixers: dict[str, Any], layers: list[str], shared: bool = False) -> ModelSpec:
    channel = {"kind": "none"}
    blocks = {
        name: {"mixer": mixer, "channel": channel, "shared": shared}
        for name, mixer in zip("abc", mixers, strict=False)
    }
    sizes = {"vocab_size": 256, "hidden_size": HIDDEN, "blocks": blocks, "layers": layers}
    return ModelSpec.model_validate(sizes)


def test_a_model_has_one_table_of_a_row_for_each_layer_and_as_wide_as_its_widest_gate() -> None:
    narrow, inside = (
        {"kind": "hgrn2", "heads": 2, "head_dim": 5},
        {"kind": "parallel", "mixers": [FIELDS, FIELDS]},
    )
    spec = model_of({"kind": "attention", "heads": 4}, narrow, inside, layers=["a", "b", "c", "b"])
    model = build(spec)
    assert model.config.lower_bounds_width == HEADS * KEYS
    tables = {name: one.shape for name, one in model.named_parameters() if "bounds" in name}
    assert tables == {"model.lower_bounds": (4, HEADS * KEYS)}
    assert not model.model.lower_bounds.any()
    assert plan(spec).parameters == sum(one.numel() for one in model.parameters())
    alone = sum(layer.parameters for layer in plan(spec).layers) + 256 * HIDDEN + HIDDEN
    assert plan(spec).parameters == alone + 4 * HEADS * KEYS
    (table,) = [one for name, one in model.named_parameters() if name in tables]
    decayed, kept = parameter_groups(model, 0.1)
    assert not any(one is table for one in decayed["params"])
    assert any(one is table for one in kept["params"])


@pytest.mark.parametrize("layers", ["bb", "abb", "a"])
def test_a_model_without_such_gates_after_its_first_layer_has_no_table(layers: str) -> None:
    spec = model_of(FIELDS, {"kind": "gla", "heads": 2}, layers=list(layers))
    model = build(spec)
    assert model.model.lower_bounds is None
    assert not any("bounds" in name for name in model.state_dict())
    assert plan(spec).parameters == sum(one.numel() for one in model.parameters())


def test_layers_of_a_shared_block_have_each_a_bound_of_its_own() -> None:
    once = shaken(build(model_of(FIELDS, layers=["a"] * 3, shared=True)))
    each = shaken(build(model_of(FIELDS, layers=["a"] * 3)))
    weights = once.state_dict()
    first = {name: re.sub(r"layers\.\d", "layers.0", name) for name in each.state_dict()}
    each.load_state_dict({name: weights[known] for name, known in first.items()})
    ids = tokens(20)
    assert torch.equal(once(ids).logits, each(ids).logits)


def test_it_costs_what_the_sheet_says() -> None:
    # "4 D² params per layer", beside the norm; a state of 1 MiB a layer at 16 heads.
    D, site = 2048, SpecSite(hidden_size=2048)
    spec = Hgrn2.model_validate({"heads": 16})
    assert spec.params(site) == 4 * D * D + D
    assert spec.state_bytes(site, 1, 2) == 2**20
    # "98 kFLOP" a token and head at chunks of 64.
    assert (spec.prefill_flops(site, 4096) - 8 * D * D) / 16 == 98_304
    assert spec.flops(site, 7) - 8 * D * D == 5 * 16 * 128 * 128
