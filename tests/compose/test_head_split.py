"""Heads shared out between two mixers: the joint projection, the counts that shares come to, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import EXACT, EXAMPLES, call_at, in_pieces, model_with, noise

from heddle.compose.build import build
from heddle.compose.mixers.head_split import HeadSplitModule
from heddle.compose.plan import plan
from heddle.errors import HeddleErrors
from heddle.specs import MIXERS, ModelSpec, load, loads, spec_hash
from heddle.specs.layer import Site as SpecSite

HIDDEN, LENGTH = 48, 21
SITE = SpecSite(HIDDEN, 0, 2)
SOFTMAX: dict[str, Any] = {"kind": "attention", "heads": 8, "kv_heads": 4}
GDN: dict[str, Any] = {"kind": "gated_deltanet", "heads": 8, "value_heads": 16, "value_dim": 5}
DECAY: dict[str, Any] = {"kind": "decay_attention", "heads": 8}
every_pair = pytest.mark.parametrize(
    "pair",
    [[SOFTMAX, GDN], [DECAY, SOFTMAX], [SOFTMAX, SOFTMAX | {"window": 3, "gate": True}]],
    ids=lambda pair: "+".join(one["kind"] for one in pair),
)


def split_of(pair: list[dict[str, Any]], share: float) -> Any:
    return MIXERS["head_split"].model_validate({"mixers": pair, "share": share})


def split_model(pair: list[dict[str, Any]], share: float) -> ModelSpec:
    return model_with({"kind": "head_split", "mixers": pair, "share": share}, HIDDEN, layers=2)


def sizes_of(pair: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    held: list[dict[str, Any]] = split_of(pair, share).runtime(SITE)["mixers"]
    return held


def counts_of(pair: list[dict[str, Any]], share: float) -> list[int]:
    return [one["heads"] for one in sizes_of(pair, share)]


@every_pair
def test_the_sum_is_one_output_projection_of_the_heads_of_both(pair: list[dict[str, Any]]) -> None:
    split = build(split_model(pair, 0.5), dtype=torch.float64).model.layers[1].mixer
    assert isinstance(split, HeadSplitModule)
    seen: list[Tensor] = []
    for mixer in split.mixers:
        mixer.heads_out.register_forward_hook(lambda _, __, heads: seen.append(heads))
    y = split(noise(2, LENGTH, HIDDEN), call_at(0, LENGTH))
    joint = torch.cat([heads.flatten(2) for heads in seen], dim=-1)
    weight = torch.cat([mixer.o_proj.weight for mixer in split.mixers], dim=-1)
    assert (y - joint @ weight.T).abs().max() < EXACT
    assert [heads.shape[2] for heads in seen] == [
        split_of(pair, 0.5).mixers[index].resolved(SITE).with_heads(4).output_heads() for index in range(2)
    ]


@pytest.mark.parametrize(
    ("share", "counts"),
    [
        (0.01, [2, 6]),
        (0.25, [2, 6]),
        (0.3, [2, 6]),
        (0.4, [4, 4]),
        (0.5, [4, 4]),
        (0.8, [6, 2]),
        (0.99, [6, 2]),
    ],
)
def test_a_share_is_the_nearest_count_that_tears_no_group(share: float, counts: list[int]) -> None:
    # Four key heads of eight: attention takes heads by twos, whichever place it has.
    assert counts_of([SOFTMAX, GDN], share) == counts
    assert counts_of([GDN, SOFTMAX], share) == counts


def test_without_groups_any_count_is_taken_and_of_two_the_lower() -> None:
    assert [counts_of([DECAY, GDN], share)[0] for share in (0.01, 0.2, 0.3125, 0.34, 0.99)] == [1, 2, 2, 3, 7]


def test_heads_stay_as_large_as_they_were_and_groups_in_proportion() -> None:
    first, second = sizes_of([SOFTMAX | {"qk_norm": True}, GDN], 0.75)
    assert (first["heads"], first["kv_heads"], first["head_dim"], first["qk_norm"]) == (6, 3, 6, True)
    assert (second["heads"], second["value_heads"], second["head_dim"], second["value_dim"]) == (2, 4, 6, 5)
    assert sizes_of([SOFTMAX | {"head_dim": 10}, GDN], 0.75)[0]["head_dim"] == 10


GROUPS = [(heads, kv) for heads in range(2, 13) for kv in range(1, heads + 1) if heads % kv == 0]


@given(st.sampled_from(GROUPS), st.integers(1, 3), st.floats(0.001, 0.999))
def test_every_share_is_split_as_said_or_refused(groups: tuple[int, int], ratio: int, share: float) -> None:
    heads, kv = groups
    pair = [
        {"kind": "attention", "heads": heads, "kv_heads": kv, "head_dim": 4},
        {"kind": "gated_deltanet", "heads": heads, "value_heads": ratio * heads, "head_dim": 4},
    ]
    found = split_of(pair, share)
    size = heads // kv
    if kv == 1:
        (problem,) = found.problems(SITE)
        assert (problem.field, problem.code) == ("share", "out-of-range")
        # What cannot be built has costs and data all the same, until it is refused.
        assert found.runtime(SITE)["mixers"][0]["heads"] == heads
        assert found.params(SITE) > 0
        return
    assert found.problems(SITE) == []
    first, second = found.runtime(SITE)["mixers"]
    assert first["heads"] + second["heads"] == heads
    assert first["heads"] == first["kv_heads"] * size
    assert second["value_heads"] == ratio * second["heads"]
    others = range(size, heads, size)
    assert first["heads"] in others
    nearest = min(abs(count - share * heads) for count in others)
    assert abs(first["heads"] - share * heads) == nearest


def test_shares_that_round_alike_are_one_model() -> None:
    hashes = [spec_hash(split_model([SOFTMAX, GDN], share)) for share in (0.4, 0.45, 0.5, 0.6)]
    assert len(set(hashes)) == 1
    assert len({*hashes, spec_hash(split_model([SOFTMAX, GDN], 0.7))}) == 2
    assert (
        plan(split_model([SOFTMAX, GDN], 0.4)).runtime() == plan(split_model([SOFTMAX, GDN], 0.6)).runtime()
    )


def test_a_split_is_the_parallel_mixer_of_its_sizes() -> None:
    spec = split_model([SOFTMAX, GDN], 0.75)
    parallel = model_with(
        {
            "kind": "parallel",
            "mixers": [
                SOFTMAX | {"heads": 6, "kv_heads": 3, "head_dim": 6},
                GDN | {"heads": 2, "value_heads": 4, "head_dim": 6},
            ],
        },
        HIDDEN,
        layers=2,
    )
    assert spec_hash(spec) == spec_hash(parallel)
    one, other = build(spec), build(parallel)
    ids = torch.arange(30).view(2, 15) % 9
    assert one.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(one.eval()(ids).logits, other.eval()(ids).logits)


def test_costs_are_those_of_the_two_at_their_sizes() -> None:
    spec = split_of([SOFTMAX, GDN], 0.75)
    parts = [MIXERS[one["kind"]].model_validate(one) for one in sizes_of([SOFTMAX, GDN], 0.75)]
    assert spec.params(SITE) == sum(one.params(SITE) for one in parts)
    assert spec.flops(SITE, 99) == sum(one.flops(SITE, 99) for one in parts)
    assert spec.prefill_flops(SITE, 99) == sum(one.prefill_flops(SITE, 99) for one in parts)
    assert spec.state_bytes(SITE, 99, 2) == sum(one.state_bytes(SITE, 99, 2) for one in parts)
    assert spec.cache_bytes_per_token(SITE, 2) == 2 * 3 * 6 * 2
    # The rates of decay are those of the heads that there are.
    assert len(split_of([DECAY | {"form": "retnet"}, DECAY], 0.5).sights(SITE)) == 8


def taking(kv_heads: int) -> ModelSpec:
    """A layer of whole attention, and a split one whose attention reads the keys of the first."""
    pair = [SOFTMAX | {"keys_from": "full"}, GDN]
    blocks = {
        "full": {
            "mixer": {"kind": "attention", "heads": 4, "kv_heads": kv_heads, "head_dim": 6},
            "channel": {"kind": "none"},
        },
        "split": {"mixer": {"kind": "head_split", "mixers": pair, "share": 0.5}, "channel": {"kind": "none"}},
    }
    sizes = {"vocab_size": 9, "hidden_size": HIDDEN, "blocks": blocks, "layers": ["full", "split"]}
    return ModelSpec.model_validate(sizes)


def test_keys_of_an_earlier_layer_have_the_shape_of_the_heads_that_are_left() -> None:
    model = build(taking(kv_heads=2), dtype=torch.float64).eval()
    ids = torch.arange(40).view(2, 20) % 9
    pieces, _ = in_pieces(model, ids, [11, 12, 20])
    assert (pieces - model(ids, use_cache=False).logits).abs().max() < EXACT
    with pytest.raises(HeddleErrors) as caught:
        plan(taking(kv_heads=4))
    (error,) = caught.value.errors
    assert (error.code, error.where.path) == ("reference-mismatch", "layers.1.mixer.mixers.0.keys_from")
    assert "the keys of full are 4 x 6 a token, and 2 x 6 are needed" in error.what


TEXT = EXAMPLES["head_split"].read_text()


@pytest.mark.parametrize(
    ("old", "new", "field", "what"),
    [
        (
            "kv_heads: 4",
            "kv_heads: 1",
            "share",
            "8 heads cannot be shared out: gated_deltanet has 8 groups of them and attention 1",
        ),
        (
            "heads: 8, kv_heads: 4",
            "heads: 4, kv_heads: 4",
            "mixers.1.heads",
            "4 heads, and the first mixer has 8",
        ),
        (
            "{kind: gated_deltanet, heads: 8}",
            "{kind: parallel, mixers: [{kind: attention, heads: 8}, {kind: attention, heads: 8}]}",
            "mixers.0.kind",
            "parallel has no heads of its own",
        ),
        ("kv_heads: 4", "kv_heads: 3", "mixers.1.kv_heads", "3 does not divide heads 8"),
        ("share: 0.75", "share: 1.0", "share", "1.0 is not below 1"),
        ("share: 0.75", "share: {float: [0.0, 0.5]}", "share", "0.0 is not above 0"),
    ],
)
def test_what_cannot_be_split_is_told_at_its_line(old: str, new: str, field: str, what: str) -> None:
    assert old in TEXT
    with pytest.raises(HeddleErrors) as caught:
        loads(TEXT.replace(old, new))
    (error,) = caught.value.errors
    assert error.where.path.startswith(f"blocks.split.mixer.{field}")
    assert error.where.line is not None
    assert error.what.startswith(what)


@pytest.mark.parametrize("share", ["{choice: [0.25, 0.5, 0.75]}", "{float: [0.1, 0.9]}"])
def test_a_share_may_be_left_open(share: str) -> None:
    file = loads(TEXT.replace("share: 0.75", f"share: {share}") + "search: {tasks: [text]}\n")
    assert [one.name for one in file.space.parameters] == ["blocks.split.mixer.share"]


def test_the_example_has_six_heads_of_the_first_and_two_of_the_second() -> None:
    first, second = build(load(EXAMPLES["head_split"]).spec.model).model.layers[3].mixer.mixers
    assert (first.heads, first.value_heads, second.heads, second.kv_heads) == (6, 6, 2, 1)
