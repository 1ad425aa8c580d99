"""InLine attention: the layer is its formula, weight by weight, on both sides and over the tokens so far."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.errors import HeddleErrors
from heddle.specs import Site as SpecSite
from heddle.specs import loads
from heddle.specs.mixers import Inline

HIDDEN, HEADS, DIM, TAPS, LENGTH = 48, 3, 8, 3, 90
FIELDS: dict[str, Any] = {"heads": HEADS, "head_dim": DIM}
FEATURES: dict[str, Any] = {
    "identity": lambda x: x,
    "relu": lambda x: x * (x > 0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "exp": torch.exp,
}


def sides(mixer: Any, x: Tensor, feature: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k after their norm and feature map, and v.  Shapes:  out: [B, T, H, d]"""
    weight, bias = mixer.qkv_proj.weight, mixer.qkv_proj.bias
    mixed = x @ weight.T + (0 if bias is None else bias)
    q, k, v = (one.view(*x.shape[:2], HEADS, DIM) for one in mixed.chunk(3, dim=-1))
    if not isinstance(mixer.q_norm, nn.Identity):
        q, k = (
            side / (side.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for side, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    return FEATURES[feature](q), FEATURES[feature](k), v


def weights(q: Tensor, k: Tensor, shares: Tensor) -> Tensor:
    """Those of one query; shares sum to 1.  Shapes:  q: [d];  k: [N, d];  shares, out: [N]"""
    mean = shares @ k
    return shares * ((k - mean) @ q / DIM**0.5 + 1)


def fades(mixer: Any, x: Tensor, decay: str) -> Tensor:
    """By how much what came before a token fades there.  Shapes:  out: [B, T, H]"""
    if decay == "gate":
        gate = x @ mixer.decay_proj.weight.T + mixer.decay_proj.bias
        return (1 / (1 + torch.exp(-gate))) ** (1 / 16)
    rates = [1 - 2.0 ** (-5 - head) if decay == "fixed" else 1.0 for head in range(HEADS)]
    return torch.tensor(rates, dtype=torch.float64).expand(*x.shape[:2], HEADS)


def kernels(mixer: Any, x: Tensor) -> Tensor:
    """The taps of each channel, predicted head by head.  Shapes:  x: [D];  out: [H, d, taps]"""
    local, found = mixer.local, []
    for head, part in enumerate(x.chunk(HEADS)):
        y = local.first[head] @ part + local.first_bias[head]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        found.append((local.second[head] @ y + local.second_bias[head]).view(DIM, TAPS))
    return torch.stack(found)


def by_weights(mixer: Any, x: Tensor, fields: dict[str, Any]) -> Tensor:
    """Every weight of every query on every value, from the weights of the layer alone."""
    causal, decay = fields.get("causal", True), fields.get("decay", "none")
    q, k, v = sides(mixer, x, fields.get("feature", "identity"))
    fade, o = fades(mixer, x, decay), torch.zeros_like(v)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            seen = t + 1 if causal else x.shape[1]
            kernel = None if mixer.local is None else kernels(mixer, x[row, t] if causal else x[row].mean(0))
            for head in range(HEADS):
                shares = torch.ones(seen, dtype=torch.float64)
                for earlier in range(seen if causal else 0):
                    shares[earlier] = fade[row, earlier + 1 : t + 1, head].prod()
                w = weights(q[row, t, head], k[row, :seen, head], shares / shares.sum())
                assert abs(w.sum() - 1) < EXACT
                o[row, t, head] = w @ v[row, :seen, head]
                for tap in range(0 if kernel is None else TAPS):
                    other = t - tap if causal else t + tap - TAPS // 2
                    if 0 <= other < x.shape[1]:
                        o[row, t, head] += kernel[head, :, tap] * v[row, other, head]
    return o.flatten(2) @ mixer.o_proj.weight.T + mixer.o_proj.bias


CASES: list[dict[str, Any]] = [
    {"causal": False},
    {"causal": False, "feature": "exp", "local": TAPS, "bias": True},
    {"causal": False, "feature": "leaky_relu", "qk_norm": True},
    {},
    {"decay": "fixed", "local": TAPS, "bias": True},
    {"decay": "gate", "feature": "relu", "qk_norm": True},
]


def ready(fields: dict[str, Any]) -> Any:
    """A mixer whose every weight counts."""
    mixer = mixer_of(HIDDEN, "inline", **FIELDS, **fields)
    for name, weight in mixer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    return mixer


@torch.no_grad()
@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(map(str, fields.values())) or "plain")
def test_it_equals_its_weights_one_by_one(fields: dict[str, Any]) -> None:
    mixer, x = ready(fields), noise(1, LENGTH, HIDDEN)
    call = call_at(0, LENGTH, rows=1)
    assert (mixer(x, call) - by_weights(mixer, x, fields)).abs().max() < EXACT


@torch.no_grad()
def test_the_causal_form_is_the_published_one_of_each_prefix() -> None:
    whole, causal = ready({"causal": False}), ready({})
    causal.load_state_dict(whole.state_dict())
    x = noise(2, 20, HIDDEN)
    y = causal(x, call_at(0, 20))
    for length in (1, 7, 20):
        prefix = whole(x[:, :length], call_at(0, length))
        assert (y[:, length - 1] - prefix[:, -1]).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"causal": False}, {}, {"decay": "gate"}], ids=str)
def test_a_shift_of_keys_changes_nothing_and_one_of_values_the_output_by_as_much(
    fields: dict[str, Any],
) -> None:
    mixer, x = ready(fields | {"bias": True}), noise(2, LENGTH, HIDDEN)
    mixer.o_proj.weight.copy_(torch.eye(HIDDEN, HEADS * DIM))
    before = mixer(x, call_at(0, LENGTH))
    width, shift = HEADS * DIM, noise(HEADS * DIM, seed=7)
    mixer.qkv_proj.bias[width : 2 * width] += 5 * shift
    assert (mixer(x, call_at(0, LENGTH)) - before).abs().max() < EXACT
    mixer.qkv_proj.bias[2 * width :] += shift
    moved = mixer(x, call_at(0, LENGTH)) - before
    assert (moved[..., :width] - shift).abs().max() < EXACT


@torch.no_grad()
def test_a_first_token_gives_its_value() -> None:
    mixer, x = ready({"decay": "gate"}), noise(2, 1, HIDDEN)
    value = x @ mixer.qkv_proj.weight[2 * HEADS * DIM :].T
    assert (mixer(x, call_at(0, 1)) - value @ mixer.o_proj.weight.T - mixer.o_proj.bias).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_padding_weighs_nothing_on_either_side(causal: bool) -> None:
    mixer, x = ready({"causal": causal, "local": TAPS, "bias": True}), noise(2, 12, HIDDEN)
    whole = mixer(x, call_at(0, 12))
    padded = torch.cat((noise(2, 4, HIDDEN, seed=3), x, noise(2, 5, HIDDEN, seed=4)), dim=1)
    real = torch.zeros(2, 21, dtype=torch.bool)
    real[:, 4:16] = True
    assert (mixer(padded, padded_call(real))[:, 4:16] - whole).abs().max() < EXACT
    # Nothing at all is nothing, and no division by it.
    nothing = padded_call(torch.zeros(2, 21, dtype=torch.bool))
    assert torch.equal(mixer(padded, nothing), mixer.o_proj.bias.expand(2, 21, HIDDEN))


def test_what_sees_both_sides_does_not_fade() -> None:
    text = """\
version: 1
name: wrong
model:
  kind: encoder
  vocab_size: 256
  hidden_size: 64
  blocks: {it: {mixer: {kind: inline, heads: 4, causal: false, decay: gate}, channel: {kind: none}}}
  layers: [it]
"""
    with pytest.raises(HeddleErrors, match="does not fade"):
        loads(text)
    with pytest.raises(HeddleErrors, match="does not divide hidden_size 64, whose parts"):
        loads(text.replace("heads: 4, causal: false, decay: gate", "heads: 3, head_dim: 8, local: 3"))


def test_it_costs_what_the_sheet_says() -> None:
    D, site = 2048, SpecSite(hidden_size=2048)
    spec = Inline.model_validate({"heads": 16})
    assert spec.params(site) == 4 * D * D + D
    # 4 (KV + K + V + 1) bytes a head: 64 KiB and a little.
    assert spec.state_bytes(site, 1, 2) == 16 * 4 * (128**2 + 2 * 128 + 1)
    # On both sides 4 d² a token and head.
    both = Inline.model_validate({"heads": 16, "causal": False})
    assert both.prefill_flops(site, 4096) - 8 * D * D == 4 * 16 * 128**2
    # In chunks 98 kFLOP, and some 12 % for the sums.
    assert (spec.prefill_flops(site, 4096) - 8 * D * D) / 16 == pytest.approx(98e3 * 1.12, rel=0.08)
    kernels = Inline.model_validate({"heads": 16, "local": 9, "bias": True})
    assert kernels.params(site) - spec.params(site) == 3 * D + D * 128 + D + 9 * D * 128 + 9 * D
