"""Queries and keys of the embedded tokens or of positions: what the layer's input has no say in, and what it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, model_with, noise, padded_call, shaken, tokens

from heddle.compose.build import build
from heddle.compose.modules.qk_source import EMBEDDED, position_rows
from heddle.compose.plan import plan
from heddle.specs import Site
from heddle.specs.canonical import spec_hash
from heddle.specs.mixers import Attention

HIDDEN, HEADS, DIM, LENGTH = 24, 3, 8, 40
ATTENTION: dict[str, Any] = {"heads": HEADS, "head_dim": DIM, "rope": None}
# Of positions 0, 1 and 100,000,000.
KNOWN = [[1.274283, -1.610562, 0.113044], [1.866820, 0.450773, 0.014356], [1.268551, 0.835136, -0.516233]]


def by_formula(mixer: Any, x: Tensor, source: Tensor) -> Tensor:
    """All T x T weights at once, of which `source` alone decides."""

    def heads(of: Tensor, name: str) -> Tensor:
        weight = getattr(mixer, f"{name}_proj").weight
        return (of @ weight.T).unflatten(-1, (HEADS, DIM)).transpose(1, 2)

    q, k, v = heads(source, "q"), heads(source, "k"), heads(x, "v")
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    p = (q @ k.mT / DIM**0.5).masked_fill(later, -torch.inf).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2) @ mixer.o_proj.weight.T


@torch.no_grad()
def test_it_equals_its_formula() -> None:
    x, embedded = noise(2, LENGTH, HIDDEN), noise(2, LENGTH, HIDDEN, seed=5)
    mixer = mixer_of(HIDDEN, "attention", **ATTENTION, qk_source="embedding")
    call = call_at(0, LENGTH, handed={EMBEDDED: embedded})
    assert (mixer(x, call) - by_formula(mixer, x, embedded)).abs().max() < EXACT
    mixer = mixer_of(HIDDEN, "attention", **ATTENTION, qk_source="position")
    rows = position_rows(torch.arange(LENGTH).expand(2, -1), HIDDEN).double()
    assert (mixer(x, call_at(0, LENGTH)) - by_formula(mixer, x, rows)).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("source", ["embedding", "position"])
def test_the_input_decides_no_weight_and_goes_through_as_a_linear_map(source: str) -> None:
    mixer = mixer_of(HIDDEN, "attention", **ATTENTION, qk_source=source)
    embedded, (x, other) = noise(2, LENGTH, HIDDEN, seed=5), noise(2, 2, LENGTH, HIDDEN)
    seen: list[Tensor] = []
    mixer.rows_out.register_forward_hook(lambda _, __, rows: seen.append(rows))
    mixer.rows_out.queries = (3, LENGTH - 1)

    def given(x: Tensor) -> Tensor:
        y: Tensor = mixer(x, call_at(0, LENGTH, handed={EMBEDDED: embedded}))
        return y

    whole = given(2 * x - 3 * other)
    assert (whole - (2 * given(x) - 3 * given(other))).abs().max() < EXACT
    assert all(torch.equal(rows, seen[0]) for rows in seen)


@torch.no_grad()
def test_rows_of_positions_are_standard_normal_and_follow_the_position_alone() -> None:
    rows = position_rows(torch.arange(2000)[None], 64)
    # Four standard deviations of the mean, of the variance, and of the product of two rows.
    assert rows.mean().abs() < 4 / rows.numel() ** 0.5
    assert (rows.square().mean() - 1).abs() < 4 * (2 / rows.numel()) ** 0.5
    near = (rows[0, 1:] * rows[0, :-1]).sum(-1) / 64**0.5
    assert near.mean().abs() < 4 / near.numel() ** 0.5
    # The largest of 128,000 numbers, and none beyond what 23 bits can give.
    assert 4 < rows.abs().max() < (2 * 24 * 0.6932) ** 0.5
    # Exported weights mean these rows: another hash would be another model.
    expected = torch.tensor(KNOWN)
    assert (position_rows(torch.tensor([[0, 1, 10**8]]), 3)[0] - expected).abs().max() < 1e-5
    late = torch.tensor([[3, 70, 1999]])
    assert torch.equal(position_rows(late, 64), rows[:, late[0]])


@torch.no_grad()
def test_positions_are_those_of_real_tokens() -> None:
    mixer, x = mixer_of(HIDDEN, "attention", **ATTENTION, qk_source="position"), noise(2, LENGTH, HIDDEN)
    real = (torch.arange(LENGTH) >= 9).expand(2, -1)
    rows = position_rows(torch.arange(LENGTH - 9).expand(2, -1), HIDDEN).double()
    expected = by_formula(mixer, x[:, 9:], rows)
    assert (mixer(x, padded_call(real))[:, 9:] - expected).abs().max() < EXACT


def test_a_layer_hears_of_the_embedded_tokens_whatever_stands_between() -> None:
    spec = model_with({"kind": "attention", "heads": 3, "qk_source": "embedding"}, HIDDEN, layers=2)
    model, ids = shaken(build(spec)), tokens(12, vocabulary=9)
    seen: list[Tensor] = []
    first, second = (model.model.layers[index].mixer for index in range(2))
    second.q_proj.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    model(ids)
    assert torch.equal(seen[0], model.model.embed_tokens(ids))
    with torch.no_grad():
        first.o_proj.weight.mul_(2.0)
    model(ids)
    assert torch.equal(seen[0], seen[1])


def test_the_plan_tells_the_edge_and_other_specs_keep_their_hash() -> None:
    plain, taken = (
        model_with({"kind": "attention", "heads": 3, **fields}, HIDDEN)
        for fields in ({"qk_source": "hidden"}, {"qk_source": "embedding"})
    )
    assert "makes queries and keys of embedding" in str(plan(taken))
    assert "qk_source" not in Attention(heads=3).runtime(Site(hidden_size=HIDDEN))
    assert spec_hash(plain) == spec_hash(model_with({"kind": "attention", "heads": 3}, HIDDEN))
    read = [plan(one).cost(100)["prefill_bytes"] for one in (plain, taken)]
    assert read[1] - read[0] == 100 * HIDDEN * 2


def test_a_part_of_a_composite_may_have_such_a_source() -> None:
    parts = [{"kind": "attention", "heads": 3, "qk_source": one} for one in ("embedding", "position")]
    spec = model_with({"kind": "parallel", "mixers": parts}, HIDDEN)
    model, ids = shaken(build(spec)), tokens(12, vocabulary=9)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*texts)
