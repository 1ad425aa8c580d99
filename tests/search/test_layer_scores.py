"""What each layer is worth to a model: ablation, restoration, and the profile of its attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.errors import HeddleError
from heddle.search.evaluators import Blocks, layer_profile, layer_scores
from heddle.search.evaluators.layer_profile import _overlap, _typical
from heddle.specs import loads

SPEC = """
version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 64
  blocks:
    full: {{mixer: {{kind: attention, heads: 4, kv_heads: {kv_heads}}}, channel: {{kind: gelu, ratio: 1.0}}}}
    wide: {{mixer: {{kind: attention, heads: 4, kv_heads: 4}}, channel: {{kind: gelu, ratio: 1.0}}}}
    linear: {{mixer: {{kind: gla, heads: 2}}, channel: {{kind: gelu, ratio: 1.0}}}}
  layers: [{layers}]
"""
INPUTS = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))
QUERIES = (5, 20, -4, -1)
BLOCKS = Blocks(size=4, top=5, sink=4, recent=6, mass=0.8)


def built(layers: str, *, seed: int = 0, kv_heads: int = 2) -> HeddleForCausalLM:
    spec = loads(SPEC.format(layers=layers, kv_heads=kv_heads)).spec
    model = build_causal_lm(spec.model, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights of such a size that attention looks at some tokens more than at others.
            if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(12.0)
    return model.eval()


def test_a_layer_that_is_replaced_by_itself_is_worth_nothing() -> None:
    model = built("full, linear")
    scores = layer_scores(model, INPUTS, student=built("full, linear"))
    assert scores.ablation == pytest.approx((0.0, 0.0), abs=1e-6)
    assert scores.restoration == pytest.approx((0.0, 0.0), abs=1e-6)


def test_scores_are_the_divergence_from_a_model_without_the_mixer() -> None:
    model = built("full, linear, full")
    scores = layer_scores(model, INPUTS)

    def divergence(*silent: int) -> float:
        other = built("full, linear, full")
        for index in silent:
            torch.nn.init.zeros_(other.model.layers[index].mixer.o_proj.weight)
        p, q = (one(input_ids=INPUTS).logits.double().log_softmax(-1) for one in (model, other))
        return float(F.kl_div(q, p, log_target=True, reduction="sum")) / INPUTS.numel()

    with torch.no_grad():
        assert scores.ablation == pytest.approx([divergence(index) for index in range(3)], rel=1e-3)
        whole = divergence(0, 1, 2)
        assert scores.all_replaced == pytest.approx(whole, rel=1e-3)
        assert scores.restoration[1] == pytest.approx(whole - divergence(0, 2), abs=1e-3 * whole)
    assert min(scores.ablation) > 1e-4


def test_a_mixer_of_another_kind_takes_the_place_and_leaves_it_again() -> None:
    model = built("full, full")
    before = model(input_ids=INPUTS).logits
    one = layer_scores(model, INPUTS, student=built("linear, linear", seed=1))
    assert min(one.ablation) > 1e-4
    assert torch.equal(model(input_ids=INPUTS).logits, before)


def test_a_student_of_another_depth_is_refused() -> None:
    with pytest.raises(HeddleError, match="32 wide with 2 layers and 32 wide with 1 layers"):
        layer_scores(built("full, full"), INPUTS, student=built("full"))


def rows_of(model: HeddleForCausalLM, index: int) -> Tensor:
    """All attention rows of a layer.  Shapes:  [B, H, T, T]"""
    kept: list[Tensor] = []
    place = model.model.layers[index].mixer.rows_out
    place.queries = tuple(range(INPUTS.shape[1]))
    hook = place.register_forward_hook(lambda module, given, rows: kept.append(rows))  # noqa: ARG005
    model(input_ids=INPUTS)
    hook.remove()
    place.queries = None
    return kept[0]


def chosen(row: Tensor, query: int) -> tuple[set[int], float]:
    """The blocks of a row of summed heads, and the share of them that covers the mass, told by loops."""
    count = query // BLOCKS.size + 1
    mass = [float(row[b * BLOCKS.size : (b + 1) * BLOCKS.size].sum()) for b in range(count)]
    forced = {b for b in range(count) if b * BLOCKS.size < BLOCKS.sink}
    forced |= {place // BLOCKS.size for place in range(max(0, query + 1 - BLOCKS.recent), query + 1)}
    free = sorted(set(range(count)) - forced, key=lambda b: -mass[b])
    covered, needed = 0.0, 0
    for one in sorted(mass, reverse=True):
        if covered >= BLOCKS.mass * sum(mass):
            break
        covered, needed = covered + one, needed + 1
    return forced | set(free[: max(0, BLOCKS.top - len(forced))]), needed / count


def test_attention_that_is_no_number_has_no_profile() -> None:
    model = built("full, full")
    with torch.no_grad():
        next(iter(model.model.layers[1].mixer.parameters())).fill_(torch.nan)
    with pytest.raises(HeddleError, match="the attention of layer 1 is not finite") as told:
        layer_profile(model, INPUTS, QUERIES, BLOCKS)
    assert told.value.code == "loss-not-finite"


@torch.no_grad()
def test_the_profile_is_what_loops_over_dense_rows_find() -> None:
    model = built("full, linear, full, full")
    profile = layer_profile(model, INPUTS, QUERIES, BLOCKS)
    assert profile.layers == (0, 2, 3)
    sets, shares = [], []
    for index in profile.layers:
        rows = rows_of(model, index).unflatten(1, (2, 2)).sum(dim=2)
        found = [
            [chosen(rows[b, head, query % 48], query % 48) for b in range(2) for query in QUERIES]
            for head in range(2)
        ]
        sets.append([[one for one, _ in head] for head in found])
        shares.append(torch.tensor([[share for _, share in head] for head in found], dtype=torch.float64))
    assert profile.coverage == pytest.approx([_typical(one) for one in shares])
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            by_head = [
                sum(len(a & b) / len(b) for a, b in zip(*heads, strict=True)) / len(heads[0])
                for heads in zip(one, other, strict=True)
            ]
            assert profile.overlap[i][j] == pytest.approx(min(by_head) if i <= j else 0.0)
    # Some layers look elsewhere than others, or the test would say little.
    assert 0.3 < profile.overlap[0][1] < 1.0


def test_a_layer_overlaps_wholly_with_itself_and_with_any_if_all_blocks_are_taken() -> None:
    model = built("full, full")
    few = layer_profile(model, INPUTS, QUERIES, BLOCKS)
    assert [few.overlap[i][i] for i in range(2)] == [1.0, 1.0]
    every = layer_profile(model, INPUTS, QUERIES, Blocks(size=4, top=99))
    assert every.overlap == ((1.0, 1.0), (0.0, 1.0))
    # What attention needs to cover more of its mass is more.
    shares = [
        layer_profile(model, INPUTS, QUERIES, Blocks(size=4, mass=mass)).coverage[0]
        for mass in (0.3, 0.6, 0.9)
    ]
    assert all(a < b for a, b in pairwise(shares))


def test_the_worst_head_decides_an_overlap() -> None:
    masks = torch.zeros(2, 2, 1, 4, dtype=torch.bool)
    masks[0, :, 0, :2] = True
    masks[1, 0, 0, :2] = True
    masks[1, 1, 0, 1:3] = True
    assert _overlap(masks) == ((1.0, 0.5), (0.0, 1.0))


def test_one_strange_query_does_not_decide_a_coverage() -> None:
    usual = torch.full((1, 20), 0.5, dtype=torch.float64)
    usual[0, 0] = 1.0
    assert _typical(usual) == 0.5


def test_what_cannot_be_profiled_is_refused() -> None:
    with pytest.raises(HeddleError, match="no layer of the model hands out attention rows"):
        layer_profile(built("linear"), INPUTS, QUERIES)
    with pytest.raises(HeddleError, match="differ in heads of keys"):
        layer_profile(built("full, wide"), INPUTS, QUERIES)
