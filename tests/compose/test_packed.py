"""Packed documents (`cu_seqlens`): whole models, what transformers calls it, losses, and what cannot be packed."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from toys import EXACT, checkpoint, every_layer, example_of, gradients, mixer_of, noise, shaken, tokens
from transformers import DataCollatorWithFlattening
from transformers.cache_utils import DynamicCache

from heddle.compose.blocks import mixer_module
from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.mixers.gated_deltanet import GatedDeltaNetModule
from heddle.compose.modules.documents import mixed, takes_packed, tell_one_by_one
from heddle.compose.modules.packing import Packing
from heddle.errors import HeddleError
from heddle.kernels.op import SlowPathWarning
from heddle.specs import MIXERS
from heddle.specs.plugins import OPTIONAL

LENGTHS = [1, 20, 0, 33]
ENDS = torch.tensor([0, *accumulate(LENGTHS)])
IDS = tokens(sum(LENGTHS), 1)
# Whose documents go one after the other: what they choose or count is laid out over the whole of a row.
ONE_BY_ONE = {
    "contmix", "gated_pool", "hierarchical_attention", "landmark", "layer_router", "nats_l", "routing", "still",
    "token_router",
}  # fmt: skip


def alone(model: Any, **options: Any) -> list[Any]:
    """What the model gives of each document that has tokens."""
    return [model(own, **options) for own in IDS.split(LENGTHS, dim=1) if own.shape[1]]


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return example_of("hybrid")


def test_what_layers_hand_on_stays_within_a_document() -> None:
    """Keys, values, streams, chosen blocks, bounds of gates and the constant stream, in one model."""
    model = shaken(build(every_layer()))
    with torch.no_grad():
        packed = model(IDS, cu_seqlens=ENDS).logits
        assert (packed - torch.cat([one.logits for one in alone(model)], dim=1)).abs().max() < EXACT


@pytest.mark.parametrize(
    "name", ["constant_stream", "decode_only", "index_reuse", "kv_sharing", "value_residual", "shared_block"]
)
def test_gradients_of_what_is_handed_on_are_those_of_each_document(name: str) -> None:
    model = example_of(name).train()
    weights = noise(1, len(IDS[0]), model.config.vocab_size).split(LENGTHS, dim=1)
    given = [
        (own, weight) for own, weight in zip(IDS.split(LENGTHS, dim=1), weights, strict=True) if own.shape[1]
    ]

    def packed() -> torch.Tensor:
        return (model(IDS, cu_seqlens=ENDS).logits * torch.cat(weights, dim=1)).sum()

    found = gradients(model, packed())
    expected = gradients(model, sum((model(own).logits * weight).sum() for own, weight in given))
    checkpoint(model)
    for told in (found, gradients(model, packed())):
        assert told.keys() == expected.keys()
        for one, gradient in expected.items():
            assert (told[one] - gradient).abs().max() < EXACT * (1 + gradient.abs().max()), one


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(1, 8), (8, 1), (4, 1, 4)])
def test_where_decoded_tokens_alone_choose_a_document_of_one_token_stands_anywhere(lengths: Any) -> None:
    model, ids = example_of("decode_only"), tokens(9, 1)
    packed = model(ids, cu_seqlens=torch.tensor([0, *accumulate(lengths)])).logits
    apart = torch.cat([model(own).logits for own in ids.split(lengths, dim=1)], dim=1)
    assert (packed - apart).abs().max() < EXACT


@torch.no_grad()
def test_what_transformers_packs_is_read(hybrid: Any) -> None:
    documents = [{"input_ids": own[0].tolist()} for own in IDS.split(LENGTHS, dim=1) if own.shape[1]]
    expected = hybrid(IDS, cu_seqlens=ENDS, labels=IDS)
    for told in (
        DataCollatorWithFlattening(),
        DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
        DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    ):
        found = hybrid(**told(documents))
        assert (found.logits - expected.logits).abs().max() < EXACT
        torch.testing.assert_close(found.loss, expected.loss)
        assert found.past_key_values is None
    # Where the first position is not 0, documents are told apart all the same; here no mixer sees by how much it is moved.
    places = torch.cat([torch.arange(count) for count in LENGTHS])[None]
    assert (hybrid(IDS, position_ids=places + 2).logits - expected.logits).abs().max() < EXACT


@torch.no_grad()
def test_the_loss_is_that_of_each_document_and_nothing_between(hybrid: Any) -> None:
    packed = hybrid(IDS, cu_seqlens=ENDS, labels=IDS).loss
    # A document of one token has nothing to predict.
    told = [
        hybrid(own, labels=own).loss * (own.shape[1] - 1)
        for own in IDS.split(LENGTHS, dim=1)
        if own.shape[1] > 1
    ]
    # transformers takes losses in float32.
    torch.testing.assert_close(packed, sum(told) / (20 - 1 + 33 - 1))


def test_auxiliary_losses_and_counts_are_those_of_all_tokens() -> None:
    for name in ("moe", "routing", "token_router", "layer_router", "moh"):
        model = example_of(name).train()
        before = {key: held.clone() for key, held in model.state_dict().items()}

        def told(
            model: Any = model, before: Any = before, **options: Any
        ) -> tuple[Any, dict[str, torch.Tensor]]:
            model.load_state_dict(before)
            return model.model(IDS, **options), {
                key: held.clone() for key, held in model.state_dict().items()
            }

        (whole, after), (packed, moved) = told(), told(cu_seqlens=torch.tensor([0, IDS.shape[1]]))
        assert (whole.aux_loss - packed.aux_loss).abs() < EXACT, name
        assert all((after[key] - held).abs().max() < EXACT for key, held in moved.items()), name
        several = told(cu_seqlens=ENDS)[0]
        assert several.aux_losses.keys() == whole.aux_losses.keys(), name
    # Of the routers' losses, shares of tokens: each document weighs by its tokens.
    model = example_of("token_router").train()
    shares = [one.aux_losses["router_share"] for one in alone(model.model)]
    expected = sum(share * n for share, n in zip(shares, (1, 20, 33), strict=True)) / 54
    assert (model.model(IDS, cu_seqlens=ENDS).aux_losses["router_share"] - expected).abs() < EXACT


def refused(model: Any, ids: torch.Tensor = IDS, **given: Any) -> str:
    with pytest.raises(HeddleError) as error:
        model(ids, **given)
    assert error.value.code == "bad-argument"
    return error.value.what


def test_what_cannot_be_packed_is_told(hybrid: Any) -> None:
    ones = torch.ones_like(IDS)
    assert "no attention_mask" in refused(hybrid, cu_seqlens=ENDS, attention_mask=ones)
    assert "no cache" in refused(hybrid, cu_seqlens=ENDS, use_cache=True)
    assert "no cache" in refused(hybrid, cu_seqlens=ENDS, past_key_values=DynamicCache())
    assert "no cache" in refused(hybrid, position_ids=torch.arange(54)[None] % 20, use_cache=True)
    assert "lie in one row, and there are 2" in refused(hybrid, IDS.expand(2, -1), cu_seqlens=ENDS)
    positions = (torch.arange(54) % 20).expand(2, -1)
    assert "begin again within 2 rows" in refused(hybrid, IDS.expand(2, -1), position_ids=positions)
    assert "must rise from 0 to 54, got [0, 1, 21, 21, 53]" in refused(hybrid, cu_seqlens=ENDS.clamp(max=53))
    assert "must rise from 0 to 54" in refused(hybrid, cu_seqlens=torch.tensor([0, 30, 20, 54]))
    assert "must be [documents + 1] of int32 or int64" in refused(hybrid, cu_seqlens=ENDS.float())
    assert "differ" in refused(hybrid, cu_seqlens=ENDS, cu_seq_lens_q=torch.tensor([0, 54]))
    for given in ({"cu_seqlens": ENDS}, {"cu_seq_lens_q": ENDS.int()}):
        assert "a readout is of a whole row" in refused(example_of("encoder"), **given)


def test_mixers_take_documents_together_where_they_say_so_themselves() -> None:
    kinds = set(MIXERS) - {one.kind for one in OPTIONAL}
    assert {kind for kind in kinds if "takes_packed" not in vars(mixer_module(kind))} == ONE_BY_ONE

    class Other(GatedDeltaNetModule):
        """May mix otherwise than what it inherits from."""

    fields = {"selection": {"block": 8, "count": 4}}
    assert takes_packed(mixer_of(48, "attention", heads=4))
    assert not takes_packed(mixer_of(48, "attention", heads=4, **fields))
    known = mixer_of(48, "gated_deltanet", heads=2)
    assert takes_packed(known)
    x, ends = noise(1, 54, 48), Packing.of(ENDS, 1, 54, torch.device("cpu"))
    call = Call(ends.places(), packing=ends)
    expected = mixed(known, x, call)
    known.__class__ = Other
    assert not takes_packed(known)
    assert (mixed(known, x, call) - expected).abs().max() < EXACT


def test_a_gpu_that_is_given_one_document_after_the_other_is_told_once() -> None:
    tell_one_by_one("SomeModule", torch.device("cpu"))
    with pytest.warns(
        SlowPathWarning, match="SomeModule takes packed documents one after the other on cuda:0"
    ):
        tell_one_by_one("SomeModule", torch.device("cuda:0"))
    tell_one_by_one("SomeModule", torch.device("cuda:0"))
