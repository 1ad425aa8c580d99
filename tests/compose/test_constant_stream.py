"""The constant stream: a sequence beside the text through all layers, of which some make queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from toys import EXACT, checkpoint, gradients, shaken, tokens

from heddle.compose.build import build
from heddle.compose.cache import cache_bytes
from heddle.compose.constant_stream import ConstantCache
from heddle.compose.hf.card import Card
from heddle.compose.hf.export import export
from heddle.compose.modules.qk_source import position_rows
from heddle.compose.passes.graph import edges_of, nodes_of
from heddle.compose.passes.lay_constant_stream import lay_constant_stream
from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import BY_NAME
from heddle.compose.targets.verdict import verdict
from heddle.errors import HeddleError, Where
from heddle.search.evaluators.layer_profile import Blocks, layer_profile
from heddle.search.evaluators.random_features import heads_kept
from heddle.search.evaluators.supernet import Supernet
from heddle.search.learned_share import learned_shares
from heddle.specs import ModelSpec, loads
from heddle.specs.canonical import spec_hash

HIDDEN, HEADS, DIM, VOCABULARY, LENGTH = 24, 3, 8, 30, 40
TEXT = [3, 9, 27, 5, 15, 1, 0]
FULL: dict[str, Any] = {"kind": "attention", "heads": HEADS, "kv_heads": 1}
CONSTANT = FULL | {"qk_norm": True, "qk_source": "constant"}
GLU, NONE = {"kind": "swiglu", "width": 40}, {"kind": "none"}
BLOCKS: dict[str, Any] = {
    "full": {"mixer": FULL, "channel": GLU},
    "constant": {"mixer": CONSTANT | {"gate": True}, "channel": GLU},
    "delta": {"mixer": {"kind": "gated_deltanet", "heads": 2}, "channel": {"kind": "moe", "experts": 4, "active": 2}},
    "near": {"mixer": CONSTANT | {"window": 6}, "channel": NONE, "skip": {"source": "embedding", "init": 0.5}},
    "both": {"mixer": {"kind": "parallel", "mixers": [CONSTANT, FULL | {"window": 5}]}, "channel": NONE},
    "routed": {
        "mixer": {"kind": "token_router", "mixers": [CONSTANT, {"kind": "decay_attention", "heads": 3}], "budget": 0.5},
        "channel": NONE,
    },
    "split": {
        "mixer": {"kind": "head_split", "mixers": [CONSTANT | {"kv_heads": 3}, {"kind": "gla", "heads": 3}], "share": 0.34},
        "channel": NONE,
    },
    "chosen": {"mixer": {"kind": "moh", "mixer": CONSTANT | {"kv_heads": 3}, "shared_heads": 1, "active": 1}, "channel": NONE},
    "blocks": {"mixer": CONSTANT | {"selection": {"block": 4, "count": 3}}, "channel": NONE},
    "again": {"mixer": CONSTANT, "channel": NONE, "shared": True},
    "keys": {"mixer": FULL | {"keys_from": "constant"}, "channel": NONE},
    "words": {"mixer": FULL | {"qk_source": "embedding"}, "channel": NONE},
}  # fmt: skip
MODELS: dict[str, list[str]] = {
    "in turn": ["full", "constant", "full", "constant", "full"],
    "alone": ["constant"],
    "recurrent and windows": ["delta", "near", "full", "near", "delta"],
    "composites": ["routed", "split", "chosen", "blocks"],
    "parts, shared and taking": ["words", "constant", "both", "keys", "again", "again"],
}
every_model = pytest.mark.parametrize("name", MODELS)


def model_spec(names: list[str], **fields: Any) -> ModelSpec:
    blocks = {name: BLOCKS[name] for name in names}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "tie_embeddings": False}
    return ModelSpec.model_validate(sizes | {"blocks": blocks, "layers": names} | fields)


def model_of(name: str, **fields: Any) -> Any:
    return shaken(build(model_spec(MODELS[name], **fields)))


def ids_of(batch: int = 2, length: int = LENGTH, seed: int = 2) -> Tensor:
    return tokens(length, batch, vocabulary=VOCABULARY, seed=seed)


@torch.no_grad()
@pytest.mark.parametrize("text", [None, TEXT], ids=["random rows", "a fixed text"])
def test_it_equals_a_batch_with_one_row_more_of_which_queries_and_keys_are_made(
    text: list[int] | None,
) -> None:
    plain, taking = (
        {"mixer": {"kind": "attention", "heads": HEADS, "rope": None, "qk_source": one}, "channel": NONE}
        for one in ("hidden", "constant")
    )
    fields = {"blocks": {"plain": plain, "taking": taking}, "layers": ["plain", "taking"] * 2}
    model, ids = shaken(build(model_spec(["full"], constant_tokens=text, **fields))), ids_of()
    places, weights = torch.arange(LENGTH), model.model.embed_tokens.weight
    rows = (
        position_rows(places[None], HIDDEN).double()
        if text is None
        else weights[torch.tensor(text)[places % len(text)]][None]
    )
    x = torch.cat((weights[ids], rows))
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for index, layer in enumerate(model.model.layers):
        h = F.rms_norm(x, (HIDDEN,), layer.mixer_norm.weight, 1e-6)
        source = h[-1:].expand_as(h) if index % 2 else h
        q, k, v = (
            (of @ getattr(layer.mixer, f"{one}_proj").weight.T).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for one, of in (("q", source), ("k", source), ("v", h))
        )
        p = (q @ k.mT / DIM**0.5).masked_fill(later, -torch.inf).softmax(-1)
        x = x + (p @ v).transpose(1, 2).flatten(2) @ layer.mixer.o_proj.weight.T
    expected = F.rms_norm(x[:-1], (HIDDEN,), model.model.norm.weight, 1e-6) @ model.lm_head.weight.T
    assert (model(ids).logits - expected).abs().max() < EXACT


@torch.no_grad()
@every_model
def test_of_its_own_text_it_makes_what_plain_attention_does(name: str) -> None:
    model, own = model_of(name, constant_tokens=TEXT), torch.tensor([(TEXT * LENGTH)[:LENGTH]])
    found = model(own, use_cache=False).logits
    for one in model.modules():
        if getattr(one, "qk_source", None) == "constant":
            one.qk_source = "hidden"
    assert (model(own, use_cache=False).logits - found).abs().max() < EXACT
    # And of another text something else.
    other = ids_of(1)
    assert (
        model(other, use_cache=False).logits - model_of(name, constant_tokens=TEXT)(other).logits
    ).abs().max() > 1e-3


@torch.no_grad()
def test_no_text_and_no_later_token_has_a_say_in_who_looks_at_whom() -> None:
    model, seen = model_of("in turn"), list[Tensor]()
    rows_out = model.model.layers[3].mixer.rows_out
    rows_out.queries = (5, 20, 29)
    rows_out.register_forward_hook(lambda _, __, rows: seen.append(rows))
    for ids in (ids_of(1), ids_of(1, seed=3)):
        model(ids)
    assert torch.equal(*seen)
    model(ids_of(2, 30))
    assert (seen[2] - seen[0][..., :30]).abs().max() < EXACT


@torch.no_grad()
@every_model
@pytest.mark.parametrize("text", [None, TEXT], ids=["random rows", "a fixed text"])
def test_decoding_in_pieces_behind_other_padding_in_each_row_equals_each_text_alone(
    name: str, text: list[int] | None
) -> None:
    model, ids, widths = model_of(name, constant_tokens=text), ids_of(3), (0, 4, 11)
    padded = torch.zeros(3, LENGTH + max(widths), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, width in enumerate(widths):
        start = padded.shape[1] - LENGTH + width
        padded[row, start:], mask[row, start:] = ids[row, width:], 1
    pieces, cache, start = [], None, 0
    for end in (23, 30, *range(31, padded.shape[1] + 1)):
        out = model(padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        pieces.append(out.logits)
    found = torch.cat(pieces, dim=1)
    for row, width in enumerate(widths):
        alone = model(ids[row : row + 1, width:], use_cache=False).logits
        assert (found[row : row + 1, -alone.shape[1] :] - alone).abs().max() < EXACT


@torch.no_grad()
@every_model
def test_later_tokens_change_no_earlier_logits(name: str) -> None:
    model, ids = model_of(name), ids_of()
    other = ids.clone()
    other[:, 25:] = ids_of(2, LENGTH - 25, seed=8)
    assert torch.equal(model(ids).logits[:, :25], model(other).logits[:, :25])


@torch.no_grad()
@every_model
def test_rows_are_chosen_ordered_and_repeated_without_it(name: str) -> None:
    model, ids = model_of(name), ids_of(3)
    whole = model(ids, use_cache=False).logits[:, 30:]
    for change, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = model(ids[:, :30]).past_key_values
        held = cache.layers[-1]
        assert isinstance(held, ConstantCache)
        assert all(one.shape[0] == 1 for one in held.tensors().values())
        change(cache)
        found = model(ids[order, 30:], past_key_values=cache).logits
        assert (found - whole[order]).abs().max() < EXACT
        assert cache.get_seq_length() == LENGTH


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=["three", "two"]
)
def test_beams_of_a_padded_batch_write_the_same_with_and_without_a_cache(options: dict[str, Any]) -> None:
    model, ids = model_of("recurrent and windows", constant_tokens=TEXT), ids_of(2, 12)
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    usual = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": mask} | options
    assert torch.equal(*(model.generate(ids, use_cache=cached, **usual) for cached in (True, False)))


@torch.no_grad()
def test_a_cache_is_cropped_and_forgotten_with_it() -> None:
    model, ids = model_of("in turn"), ids_of()
    cache = model(ids).past_key_values
    cache.crop(-7)
    found = model(ids[:, 33:], past_key_values=cache).logits
    assert (found - model(ids, use_cache=False).logits[:, 33:]).abs().max() < EXACT
    cache.reset()
    assert cache_bytes(cache.layers) == 0
    assert (model(ids, past_key_values=cache).logits - model(ids).logits).abs().max() < EXACT


@torch.no_grad()
def test_a_step_that_repeats_leaves_it_as_it_is() -> None:
    model = model_of("recurrent and windows")
    cache = model.decode_cache(2, 40)
    before = {name: held.shape for name, held in cache.layers[-1].tensors().items()}
    first, again = (model(ids_of(2, 1), past_key_values=cache).logits for _ in range(2))
    assert torch.equal(first, again)
    assert {name: held.shape for name, held in cache.layers[-1].tensors().items()} == before
    grown = model(ids_of(2, 41)).past_key_values.layers[-1].tensors()
    assert grown.keys() == before.keys()
    assert before["inputs.3.rows"] == grown["inputs.3.rows"].shape == (1, 41, HIDDEN)


@torch.no_grad()
def test_positions_may_be_given_as_far_as_it_has_run() -> None:
    model, ids = model_of("in turn"), ids_of()[:1]
    again = torch.arange(LENGTH)[None] % 20
    # Two documents in a row have the positions of two texts, and are two.
    found = model(ids, position_ids=again).logits
    for some in (slice(20), slice(20, 40)):
        assert (found[:, some] - model(ids[:, some]).logits).abs().max() < EXACT
    with pytest.raises(
        HeddleError, match="position 40 is given, and the constant stream has run through 40 tokens"
    ) as error:
        model(ids, position_ids=torch.arange(1, LENGTH + 1)[None])
    assert error.value.code == "bad-argument"


@torch.no_grad()
def test_a_cache_of_a_model_without_it_is_refused() -> None:
    other = build(model_spec(["full"] * 5)).double().eval()(ids_of()).past_key_values
    with pytest.raises(HeddleError, match="without a constant stream"):
        model_of("in turn")(ids_of(), past_key_values=other)


@every_model
def test_it_trains_with_the_text_and_checkpoints_change_nothing(name: str) -> None:
    model, ids = model_of(name, constant_tokens=TEXT).train(), ids_of()

    def found() -> dict[str, Tensor]:
        return gradients(model, model(ids, labels=ids).loss)

    plain = found()
    assert plain.keys() == {key for key, _ in model.named_parameters()}
    # Token 0 is in the constant tokens alone.
    assert 0 not in ids
    assert plain["model.embed_tokens.weight"][0].abs().max() > 0
    checkpoint(model)
    assert all((gradient - plain[key]).abs().max() < EXACT for key, gradient in found().items())


def test_losses_and_loads_are_of_the_text_alone() -> None:
    names = ["delta", "constant"]
    model, ids = shaken(build(model_spec(names))).train(), ids_of()
    plain = shaken(build(model_spec(["delta"]))).train()
    plain.model.load_state_dict(model.model.state_dict(), strict=False)
    found = [one.model(ids, use_cache=False).aux_losses["load_balance"] for one in (model, plain)]
    assert torch.equal(*found)


@pytest.mark.parametrize("batch", [1, 3])
def test_costs_are_those_of_one_row_more(batch: int) -> None:
    spec = model_spec(["full", "constant", "full", "constant", "full"])
    model, context = build(spec, dtype=torch.bfloat16).eval(), 20
    with torch.no_grad():
        cache = model(ids_of(batch, context)).past_key_values
    cost, planned = plan(spec).cost(context, batch), plan(spec)
    assert cost["cache_bytes"] == cache_bytes(cache.layers)
    assert cost["cache_bytes"] == 2 * context * (2 * DIM * (5 * batch + 3) + 2 * HIDDEN)
    plain = plan(model_spec(["full", "full", "full", "full", "full"]))
    for index, layer in enumerate(planned.layers):
        rows = (batch + 1) / batch if index < 3 else 1
        whole = ModelSpec.model_validate(spec.model_dump() | {"layers": [spec.layers[index]]})
        alone = plan(model_spec(["full"])).layers[0] if index % 2 == 0 else plan(whole).layers[0]
        for key in ("prefill_flops_per_token", "decode_flops_per_token", "train_flops_per_token"):
            assert layer.cost(context, batch)[key] == pytest.approx(rows * alone.cost(context, batch)[key])
    assert plain.cost(context, batch)["decode_bytes"] < cost["decode_bytes"]


@torch.no_grad()
def test_flops_are_those_that_torch_counts() -> None:
    spec, length = model_spec(["full", "constant", "full", "constant"]), 64
    model = build(spec).eval()
    for batch in (1, 4):
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(ids_of(batch, length), use_cache=False)
        # As the counter has it every token sees all: as the last one does.
        expected = plan(spec).cost(length - 1, batch)["decode_flops_per_token"] * batch * length
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_its_pass_marks_the_blocks_that_it_runs_through_and_lays_an_edge_to_each_that_reads_it() -> None:
    names = ["full", "constant", "delta", "constant", "full"]
    graph = plan(model_spec(names)).graph
    marked = [name for name, node in nodes_of(graph) if getattr(node, "constant", False)]
    assert marked == [f"layers.{index}.{half}" for index in range(3) for half in ("mixer", "channel")]
    edges = [(first, second) for first, second, edge in edges_of(graph) if edge.kind == "constant"]
    assert edges == [("embedding", "layers.1.mixer"), ("embedding", "layers.3.mixer")]
    again = lay_constant_stream(graph, lambda path: Where(path=path))
    assert dict(nodes_of(again)) == dict(nodes_of(graph))
    assert list(edges_of(again)) == list(edges_of(graph))


@pytest.mark.parametrize("text", [None, TEXT], ids=["random rows", "a fixed text"])
def test_a_saved_model_and_a_native_class_know_of_its_tokens_what_they_need(
    text: list[int] | None, tmp_path: Path
) -> None:
    model, ids = model_of("in turn", constant_tokens=text).float(), ids_of()
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
    assert "model.constant_tokens" not in model.state_dict()
    # Where no layer reads the stream nothing is left of it.
    llama = ["full", "full"]
    assert verdict(BY_NAME["llama"], plan(model_spec(llama, constant_tokens=text)).runtime()).fits
    refused = verdict(
        BY_NAME["llama"], plan(model_spec(["full", "constant"], constant_tokens=text)).runtime()
    )
    assert any(one.path == "layers.1.mixer.qk_source" for one in refused.refusals)


def test_the_plan_tells_it_and_its_tokens_are_hashed_where_they_are_read() -> None:
    spec, told = model_spec(["full", "constant", "full"], constant_tokens=TEXT), str
    text = told(plan(spec))
    assert text.count("makes queries and keys of the constant stream") == 1
    # The mixer and the channel block of the first layer; of the last that reads it the input alone.
    assert text.count("with the constant stream") == 2
    hashes = {spec_hash(model_spec(["constant"], constant_tokens=one)) for one in (None, TEXT, TEXT[::-1])}
    assert len(hashes) == 3
    assert spec_hash(model_spec(["full"], constant_tokens=TEXT)) == spec_hash(model_spec(["full"]))


FILE = """\
version: 1
name: constant
model:
  vocab_size: 256
  hidden_size: 64
  constant_tokens: [1, 2]
  blocks:
    routed: {mixer: {kind: layer_router, mixers: [{kind: attention, heads: 4}, {kind: gla, heads: 2}]}, channel: {kind: none}}
    plain: {mixer: {kind: attention, heads: 4, qk_source: constant}, channel: {kind: none}}
    both: {mixer: {kind: parallel, mixers: [{kind: attention, heads: 4, qk_source: constant}, {kind: gla, heads: 2}]}, channel:
      {kind: none}}
  layers: [plain, both, routed]
tokenizer: bytes
"""
ENCODER = ("model:\n", "model:\n  kind: encoder\n")
TAKING = ("qk_source: constant}, channel", "qk_source: constant, keys_from: both}, channel")


def planned(text: str) -> None:
    file = loads(text, file="a.yaml")
    plan(file.spec.model, file.where)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[1, 2]", "[1, 256]", [(6, "out-of-range")]),
        ("[1, 2]", "[]", [(6, "out-of-range")]),
        ("[1, 2]", "[-1]", [(6, "out-of-range")]),
        (*ENCODER, [(10, "conflicting-fields"), (11, "conflicting-fields")]),
        ("both, routed]", "routed, both]", [(8, "conflicting-fields")]),
        (*TAKING, [(9, "conflicting-fields")]),
    ],
    ids=[
        "none of the vocabulary",
        "no token",
        "no id",
        "an encoder",
        "a prompt's router in front",
        "keys of another",
    ],
)
def test_where_it_cannot_be_is_told_with_its_place(
    old: str, new: str, expected: list[tuple[int, str]]
) -> None:
    planned(FILE)
    assert FILE.count(old) == 1
    with pytest.raises(HeddleError) as raised:
        planned(FILE.replace(old, new))
    errors = getattr(raised.value, "errors", [raised.value])
    assert [(one.where.line, one.code) for one in errors] == expected


def test_tokens_of_a_spec_that_no_file_tells_are_checked_by_the_plan() -> None:
    with pytest.raises(HeddleError, match=r"constant_tokens.1: token 99 is none of a vocabulary of 30"):
        plan(model_spec(["constant"], constant_tokens=[1, 99]))


@torch.no_grad()
def test_what_looks_into_layers_sees_the_text_alone() -> None:
    router = {"kind": "token_router", "mixers": [FULL, FULL | {"window": 4}], "budget": 0.5}
    names = ["router", "full", "constant", "constant", "full"]
    blocks = {name: BLOCKS.get(name, {"mixer": router, "channel": NONE}) for name in names}
    model = shaken(build(model_spec(["full"], blocks=blocks, layers=names)))
    ids, seen = ids_of(3, 20), list[Tensor]()
    model.model.layers[0].mixer.routes_out.register_forward_hook(lambda _, __, routes: seen.append(routes))
    with heads_kept(model) as heads, learned_shares(model) as shares:
        model(ids)
    # Of the stream, then of the text, whose share alone is told.
    assert [len(one) for one in seen] == [1, 3]
    assert shares == [(0, pytest.approx(float(seen[1][..., 0].sum() / seen[1].sum())))]
    assert [len(one) for one in heads] == [3] * 6
    profile = layer_profile(model_of("in turn"), ids, [-1, 7], Blocks(size=4, top=3, sink=0, recent=0))
    assert profile.layers == (0, 1, 2, 3, 4)


@torch.no_grad()
def test_a_supernet_runs_it_in_the_paths_that_read_it() -> None:
    paths = (["full"] * 3, ["full", "full", "constant"], ["constant", "full", "full"])
    specs = [model_spec(names, constant_tokens=TEXT) for names in paths]
    net, ids = Supernet(specs), ids_of()
    for spec in specs:
        alone = net.copied(spec).eval()(ids).logits
        assert torch.equal(net.select(net.path_of(spec)).eval()(ids).logits, alone)


@pytest.mark.slow
def test_an_export_with_it_passes_the_battery_without_heddle(tmp_path: Path) -> None:
    model = model_of("parts, shared and taking", constant_tokens=TEXT, vocab_size=256).float()
    card = Card("constant", "version: 1\nname: constant\n", license="apache-2.0")
    result = export(model, tmp_path / "out", card=card, battery="full")
    assert result.max_difference <= 1e-5
