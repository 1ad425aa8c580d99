"""The whole model: generation, caches, padding, loading, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import checkpoint
from transformers import Cache, DynamicCache, StaticCache

from heddle.compose.cache import StateLayer
from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.errors import HeddleError

ATTENTION = {
    "kind": "attention",
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "rope": {"theta": 1e4, "fraction": 1.0},
}
ATTENTION |= {"qk_norm": True, "gate": False, "window": None}
WINDOWED = ATTENTION | {"window": 6, "gate": True}
NOPE = ATTENTION | {"rope": None, "qk_norm": False, "kv_heads": 4}
DELTA = {
    "kind": "gated_deltanet",
    "heads": 2,
    "value_heads": 4,
    "head_dim": 8,
    "value_dim": 8,
    "short_conv": 4,
}
DELTA |= {"negative_eigenvalues": False}
LIGHTNING = {"kind": "decay_attention", "heads": 4, "head_dim": 8, "form": "lightning", "short_conv": None}
RETNET = LIGHTNING | {"form": "retnet", "short_conv": 3}
SWIGLU, GELU, NONE = {"kind": "swiglu", "width": 48}, {"kind": "gelu", "width": 48}, {"kind": "none"}

MODELS = {
    "hybrid": [DELTA, ATTENTION, LIGHTNING, WINDOWED, RETNET],
    "all-softmax": [ATTENTION, NOPE],
    "all-linear": [LIGHTNING, DELTA],
    "windows": [WINDOWED, ATTENTION | {"window": 1}, ATTENTION | {"window": 9}],
}
every_model = pytest.mark.parametrize("name", MODELS)


def model_of(name: str = "hybrid", *, tied: bool = True) -> HeddleForCausalLM:
    """A model with weights large enough that a mistake shows in what it generates."""
    channels = [SWIGLU, GELU, NONE]
    layers = [
        {"mixer": mixer, "channel": channels[index % 3], "norm": ("rmsnorm", "layernorm")[index % 2]}
        for index, mixer in enumerate(MODELS[name])
    ]
    torch.manual_seed(0)
    config = HeddleConfig(
        vocab_size=60,
        hidden_size=32,
        layers=layers,
        tie_word_embeddings=tied,
        initializer_range=0.25,
        context_length=512,
    )
    return HeddleForCausalLM(config).eval()


def tokens(batch: int = 2, length: int = 23, seed: int = 1) -> Tensor:
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths with zeros on the left, and the mask."""
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((row.new_zeros(length - len(row)), row)) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return ids, mask


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
}


@every_model
@pytest.mark.parametrize("mode", MODES)
def test_generation_with_and_without_cache_agree(name: str, mode: str) -> None:
    model, found = model_of(name).double(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(
            model.generate(tokens(), max_new_tokens=12, use_cache=use_cache, pad_token_id=0, **MODES[mode])
        )
    assert torch.equal(*found)


@every_model
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_left_padded_batch_generates_what_each_row_does_alone(name: str, mode: str) -> None:
    model = model_of(name).double()
    rows = [tokens(1, length, seed=length)[0] for length in (5, 23, 14)]
    ids, mask = padded(rows)
    options = {"max_new_tokens": 10, "pad_token_id": 0, **MODES[mode]}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row[None], **options)[0, len(row) :], got[ids.shape[1] :])


@every_model
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 5}, {"cache_implementation": "static"}])
def test_other_ways_to_prefill_and_cache_generate_the_same(name: str, options: dict[str, Any]) -> None:
    model = model_of(name).double()
    ids, mask = padded([tokens(1)[0], tokens(1, 9)[0]])
    usual = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(model.generate(ids, **usual, **options), model.generate(ids, **usual))


@every_model
def test_a_conversation_continues_from_its_cache(name: str) -> None:
    model, cache = model_of(name).double(), DynamicCache()
    usual: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    first = model.generate(tokens(), past_key_values=cache, **usual)
    longer = torch.cat((first, tokens(2, 4, seed=9)), dim=1)
    assert torch.equal(
        model.generate(longer, past_key_values=cache, **usual), model.generate(longer, **usual)
    )


@every_model
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_decode_equals_prefill_at_many_lengths(name: str, length: int) -> None:
    model, ids = model_of(name).double(), tokens(2, length + 1)
    whole = model(ids, use_cache=False).logits
    cache = model(ids[:, :length]).past_key_values
    step = model(ids[:, length:], past_key_values=cache)
    assert (step.logits[:, 0] - whole[:, -1]).abs().max() < 1e-9
    assert step.past_key_values.get_seq_length() == length + 1


@every_model
def test_left_padding_leaves_logits_as_they_are(name: str) -> None:
    model, ids = model_of(name).double(), tokens(1, 80)
    padded_ids, mask = padded([ids[0], tokens(1, 100)[0]])
    got = model(padded_ids, attention_mask=mask).logits[0, 20:]
    assert (got - model(ids).logits[0]).abs().max() < 1e-9
    assert model(padded_ids, attention_mask=mask).logits.isfinite().all()


@every_model
def test_a_row_of_padding_alone_gives_no_nan(name: str) -> None:
    model, ids = model_of(name).double(), tokens()
    mask = torch.stack((torch.zeros(23), torch.ones(23))).long()
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert (logits[1] - model(ids).logits[1]).abs().max() < 1e-9


def test_positions_given_win_over_counted_ones() -> None:
    model, ids = model_of("all-softmax").double(), tokens()
    shifted = model(ids, position_ids=torch.arange(23)[None].expand(2, -1) * 3).logits
    assert not torch.allclose(shifted, model(ids).logits)
    usual = model(ids, position_ids=torch.arange(23)[None].expand(2, -1)).logits
    assert torch.equal(usual, model(ids).logits)


def test_a_mask_of_ones_changes_nothing() -> None:
    model, ids = model_of(), tokens()
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("columns", [22, 24])
def test_a_mask_of_another_length_is_refused(columns: int) -> None:
    with pytest.raises(HeddleError, match="attention_mask") as error:
        model_of()(tokens(), attention_mask=torch.ones(2, columns))
    assert error.value.code == "bad-argument"


def test_ids_and_embeddings_exclude_each_other() -> None:
    model = model_of()
    embedded = model.get_input_embeddings()(tokens())
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens()).logits)
    with pytest.raises(HeddleError, match="either"):
        model(tokens(), inputs_embeds=embedded)
    with pytest.raises(HeddleError, match="either"):
        model()


@torch.no_grad()
@pytest.mark.parametrize("made", ["nothing", "configuration", "static"])
def test_an_empty_cache_of_transformers_becomes_ours(made: str) -> None:
    model = model_of().eval()
    caches: dict[str, Callable[[], Cache]] = {
        "nothing": DynamicCache,
        "configuration": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }
    cache, ids = caches[made](), tokens()
    found = [model(part, past_key_values=cache).logits for part in (ids[:, :5], ids[:, 5:])]
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    assert (torch.cat(found, dim=1) - model(ids, use_cache=False).logits).abs().max() <= 1e-5


def test_a_cache_filled_by_other_layers_is_refused() -> None:
    cache = DynamicCache()
    for index in range(5):
        cache.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), index)
    with pytest.raises(HeddleError, match="DynamicCache") as error:
        model_of()(tokens(), past_key_values=cache)
    assert error.value.code == "bad-argument"


def test_an_offloading_cache_is_refused() -> None:
    with pytest.raises(HeddleError, match="DynamicCache"):
        model_of().generate(tokens(), max_new_tokens=2, cache_implementation="offloaded")


def test_assisted_decoding_is_refused_because_a_state_cannot_roll_back() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens(1), assistant_model=model_of(), max_new_tokens=4, do_sample=False)


def test_softmax_caches_crop_and_recurrent_ones_say_no() -> None:
    model, ids = model_of("all-softmax").double(), tokens()
    cache = model(ids).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 20
    step = model(ids[:, 20:21], past_key_values=cache).logits
    assert (step[:, 0] - model(ids).logits[:, 20]).abs().max() < 1e-9
    for name in ("all-linear", "windows"):
        held = model_of(name)(ids).past_key_values
        with pytest.raises(RuntimeError, match=r"cannot forget|dropped"):
            held.crop(-3)
        held.crop(-23)
        assert held.get_seq_length() == 0


def test_logits_are_computed_only_where_asked() -> None:
    model, ids = model_of(), tokens()
    logits = model(ids).logits
    hidden = model.model(ids).last_hidden_state
    for got, expected in (
        (model(ids, logits_to_keep=1).logits, logits[:, -1:]),
        (model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]]),
        (model.lm_head(hidden[:, 3]), logits[:, 3]),
    ):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, atol=1e-5)


def test_the_loss_is_that_of_the_next_token() -> None:
    model, ids = model_of(), tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    assert model(ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_hidden_states_and_tuples_are_given_when_asked() -> None:
    model, ids = model_of(), tokens()
    seen = model(ids, output_hidden_states=True).hidden_states
    assert len(seen) == 6
    assert torch.equal(seen[-1], model.model(ids).last_hidden_state)
    first, *_ = model(ids, return_dict=False)
    assert torch.equal(first, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_with_the_same_logits_and_ties(tied: bool, tmp_path: Path) -> None:
    model = model_of(tied=tied)
    model.save_pretrained(tmp_path)
    loaded = HeddleForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert (loaded.model.embed_tokens.weight is loaded.get_input_embeddings().weight) is True


def test_decays_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    loaded = HeddleForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for narrow in (cast, loaded):
        delta, decay = narrow.model.layers[0].mixer, narrow.model.layers[2].mixer
        assert delta.qkv_proj.weight.dtype == torch.bfloat16
        assert torch.equal(delta.A_log, model.model.layers[0].mixer.A_log)
        assert torch.equal(delta.dt_bias, model.model.layers[0].mixer.dt_bias)
        assert torch.equal(decay.log_decay, model.model.layers[2].mixer.log_decay)
    assert torch.equal(cast(tokens()).logits, loaded.eval()(tokens()).logits)
    assert cast.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 26)


def test_checkpointing_needs_no_cache_and_refuses_to_go_on_from_one() -> None:
    model, ids = model_of().train(), tokens()
    checkpoint(model)
    assert model.model(ids, use_cache=True).past_key_values is None
    with pytest.raises(HeddleError, match="checkpoint"):
        model(ids, past_key_values=model_of()(ids).past_key_values)


def test_the_vocabulary_can_grow() -> None:
    model = model_of()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model(tokens()).logits.shape[-1] == 70
    assert model.lm_head.weight is model.model.embed_tokens.weight
