"""Encoders: readouts by their equations, padding on either side, losses, loading, compilation, and what refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from toys import EXACT, EXAMPLES, noise, shaken
from toys import tokens as ids_of
from transformers import AutoModel, AutoTokenizer

from heddle import api
from heddle.compose.build import build, build_causal_lm, config_for, kernel_paths
from heddle.compose.diagram import mermaid
from heddle.compose.hf.card import Card
from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.encoder import HeddleForMaskedLM, HeddleForSequenceClassification
from heddle.compose.hf.export import export, is_export
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.modules.readout import EfficientProbing, readout_module
from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.specs import ModelSpec

HIDDEN, CLASSES = 48, 5

BOTH_WAYS = {
    "mixer": {"kind": "attention", "heads": 4, "causal": False},
    "channel": {"kind": "gelu", "width": 40},
}
LINEAR = {"mixer": {"kind": "gated_deltanet", "heads": 2}, "channel": {"kind": "swiglu", "width": 40}}
READOUTS: dict[str, dict[str, Any] | None] = {
    "masked": None,
    "last": {"kind": "last", "classes": CLASSES},
    "mean": {"kind": "mean", "classes": CLASSES},
    "cls": {"kind": "cls", "classes": CLASSES},
    "ep": {"kind": "ep", "classes": CLASSES, "queries": 8},
    "ep of half the width": {"kind": "ep", "classes": CLASSES, "queries": 3, "reduction": 2},
}
every_encoder = pytest.mark.parametrize("name", READOUTS)
every_readout = pytest.mark.parametrize("name", [name for name in READOUTS if name != "masked"])


def spec_of(name: str, **fields: Any) -> ModelSpec:
    """An encoder of both kinds of layers: one that sees all tokens, one that carries a state from left to right."""
    sizes = {"vocab_size": 50, "hidden_size": HIDDEN, "kind": "encoder", "readout": READOUTS[name]}
    layers = {"blocks": {"both": BOTH_WAYS, "linear": LINEAR}, "layers": ["linear", "both", "linear", "both"]}
    return ModelSpec.model_validate(sizes | layers | fields)


def encoder_of(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    return shaken(build(spec_of(name, **fields))).to(dtype)


def tokens(length: int = 30, batch: int = 2) -> Tensor:
    return ids_of(length, batch, vocabulary=50)


def probe(queries: int = 4, size: int = 24, reduction: int = 1) -> EfficientProbing:
    made = EfficientProbing(size, queries=queries, reduction=reduction).double()
    with torch.no_grad():
        made.queries.copy_(noise(queries, size, seed=3))
        made.value.weight.copy_(noise(size // reduction, size, seed=4))
    return made


@pytest.mark.parametrize(("queries", "reduction"), [(1, 1), (4, 1), (4, 2), (3, 2), (24, 1)])
def test_efficient_probing_is_its_equation(queries: int, reduction: int) -> None:
    made, x = probe(queries, 24, reduction), noise(3, 17, 24)
    scores = torch.einsum("mc,btc->bmt", made.queries, x) / 24**0.5
    weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
    # Each token is projected first, as the paper writes it.
    values = (x @ made.value.weight.T).chunk(queries, dim=-1)
    expected = torch.cat([weights[:, m, :, None].mul(values[m]).sum(1) for m in range(queries)], dim=-1)
    assert made(x, None).shape == (3, 24 // reduction)
    assert (made(x, None) - expected).abs().max() < EXACT


def test_queries_of_zero_pool_the_mean() -> None:
    made, x = probe(), noise(2, 9, 24)
    with torch.no_grad():
        made.queries.zero_()
    assert (made(x, None) - made.value(x.mean(1))).abs().max() < EXACT
    real = torch.arange(9)[None] < torch.tensor([[4], [9]])
    expected = torch.stack((x[0, :4].mean(0), x[1].mean(0)))
    assert (made(x, real) - made.value(expected)).abs().max() < EXACT


def test_long_queries_take_the_one_token_that_fits_best() -> None:
    made, x = probe(queries=2), noise(1, 9, 24)
    best = (made.queries @ x[0].T).argmax(-1)
    with torch.no_grad():
        made.queries.mul_(1e4)
    values = made.value(x[0])
    expected = torch.cat([values[best[m], 12 * m : 12 * (m + 1)] for m in range(2)])
    assert (made(x, None)[0] - expected).abs().max() < EXACT


@pytest.mark.parametrize("kind", ["mean", "ep"])
def test_the_order_of_tokens_does_not_matter_to_a_pooling_readout(kind: str) -> None:
    made = readout_module(24, {"kind": "mean"}) if kind == "mean" else probe()
    x, order = noise(2, 13, 24), torch.randperm(13, generator=torch.Generator().manual_seed(5))
    assert (made(x, None) - made(x[:, order], None)).abs().max() < EXACT


@pytest.mark.parametrize("kind", ["last", "mean", "cls", "ep"])
def test_padding_is_not_read_out_and_has_no_gradient(kind: str) -> None:
    made = probe() if kind == "ep" else readout_module(24, {"kind": kind}).double()
    x = noise(2, 9, 24).requires_grad_()
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :4] = real[1, 6:] = False
    z = made(x, real)
    z.square().sum().backward()
    assert x.grad is not None
    assert (x.grad[~real] == 0).all()
    other = torch.where(real[..., None], x, noise(2, 9, 24, seed=8))
    assert torch.equal(made(other, real), z)
    alone = torch.cat((made(x[:1, 4:], None), made(x[1:, :6], None)))
    assert (alone - z).abs().max() < EXACT
    assert made(x, torch.zeros_like(real)).isfinite().all()


@every_encoder
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_none(name: str, side: str) -> None:
    model, ids, short = encoder_of(name), tokens(), 19
    mask = torch.ones_like(ids)
    hidden = slice(0, 30 - short) if side == "left" else slice(short, 30)
    mask[0, hidden] = 0
    got = model(ids, attention_mask=mask).logits
    kept = ids[:1, 30 - short :] if side == "left" else ids[:1, :short]
    alone = model(kept).logits
    shown = got[:1, mask[0].bool()] if name == "masked" else got[:1]
    assert (shown - alone).abs().max() < EXACT
    assert (got[1:] - model(ids[1:]).logits).abs().max() < EXACT
    ids[0, hidden] = 7
    assert torch.equal(
        model(ids, attention_mask=mask).logits[mask.bool()]
        if name == "masked"
        else model(ids, attention_mask=mask).logits,
        got[mask.bool()] if name == "masked" else got,
    )


@every_encoder
def test_a_mask_of_ones_changes_nothing_and_a_row_of_padding_gives_no_nan(name: str) -> None:
    model, ids = encoder_of(name), tokens()
    mask = torch.ones_like(ids)
    assert torch.equal(model(ids, attention_mask=mask).logits, model(ids).logits)
    mask[0] = 0
    got = model(ids, attention_mask=mask).logits
    assert got.isfinite().all()
    assert (got[1] - model(ids).logits[1]).abs().max() < EXACT
    with pytest.raises(HeddleError, match="attention_mask") as told:
        model(ids, attention_mask=mask[:, 1:])
    assert told.value.code == "bad-argument"


@every_encoder
def test_every_token_has_a_say_from_both_sides(name: str) -> None:
    model, ids = encoder_of(name), tokens(batch=1)
    before = model(ids).logits
    for changed in (0, 14, 29):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % 50
        differs = (model(other).logits - before).abs()
        assert (differs.flatten(0, -2).max(-1).values > EXACT).all()


def test_causal_mixers_stay_causal_in_an_encoder() -> None:
    model, ids = encoder_of("masked", layers=["linear", "linear"]), tokens()
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 50
    assert torch.equal(model(ids).logits[:, :-1], model(other).logits[:, :-1])


def test_the_first_token_of_cls_is_a_token_before_the_others() -> None:
    model, ids = encoder_of("cls"), tokens()
    assert isinstance(model, HeddleForSequenceClassification)
    token = model.readout.token.expand(2, 1, -1)
    x = torch.cat((token, model.model.embed_tokens(ids)), dim=1)
    hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
    outputs = model(ids, output_hidden_states=True)
    assert (outputs.logits - model.classifier(hidden[:, 0])).abs().max() < EXACT
    assert len(outputs.hidden_states) == 5
    assert outputs.hidden_states[-1].shape == (2, 31, HIDDEN)


@every_readout
def test_a_readout_reads_the_hidden_states_after_the_last_norm(name: str) -> None:
    model, ids = encoder_of(name, logit_multiplier=0.5, logit_softcap=3.0, embedding_multiplier=2.0), tokens()
    assert isinstance(model, HeddleForSequenceClassification)
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    y = 0.5 * model.classifier(model.readout(hidden, None))
    assert (model(ids).logits - 3.0 * torch.tanh(y / 3.0)).abs().max() < EXACT
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    with pytest.raises(HeddleError, match="either"):
        model(ids, inputs_embeds=embedded)


@every_encoder
def test_the_loss_is_the_cross_entropy_of_the_labels_as_they_are(name: str) -> None:
    model, ids = encoder_of(name), tokens()
    if name == "masked":
        labels = torch.where(torch.arange(30)[None] % 7 == 3, ids, -100)
        expected = F.cross_entropy(model(ids).logits[labels >= 0], labels[labels >= 0])
    else:
        labels = torch.tensor([4, 1])
        expected = F.cross_entropy(model(ids).logits, labels)
    assert (model(ids, labels=labels).loss - expected).abs() < EXACT
    first, *_ = model(ids, labels=labels, return_dict=False)
    assert torch.equal(first, model(ids, labels=labels).loss)


@every_encoder
def test_gradients_are_finite_and_everywhere(name: str) -> None:
    model, ids = encoder_of(name).train(), tokens(60)
    model(ids, labels=ids if name == "masked" else torch.tensor([4, 1])).loss.backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().sum() > 0, path


def test_auxiliary_losses_join_the_loss_of_an_encoder() -> None:
    experts = {"kind": "token_router", "mixers": [LINEAR["mixer"], {"kind": "decay_attention", "heads": 2}]}
    blocks = {"both": BOTH_WAYS, "linear": LINEAR | {"mixer": experts | {"budget": 0.25}}}
    for name in ("masked", "mean"):
        model, ids = encoder_of(name, blocks=blocks).train(), tokens()
        labels = ids if name == "masked" else torch.tensor([4, 1])
        outputs = model(ids, labels=labels)
        plain = F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())
        aux = model.model(ids, use_cache=False).aux_loss
        assert aux.abs() > 0
        assert (outputs.loss - plain - aux).abs() < EXACT


@every_encoder
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_every_parameter(name: str, tied: bool) -> None:
    spec = spec_of(name, tie_embeddings=tied)
    built = build(spec, device="meta")
    assert plan(spec).parameters == sum(parameter.numel() for parameter in built.parameters())
    ends = 0 if name == "masked" else CLASSES * (built.classifier.in_features + 1)
    nodes = {path: data["node"] for path, data in plan(spec).graph.nodes(data=True)}
    assert ("head" in nodes) is (name == "masked")
    assert ("readout" in nodes) is ("classifier" in nodes) is (name != "masked")
    if name != "masked":
        assert nodes["classifier"].parameters == ends
        assert nodes["readout"].parameters == sum(one.numel() for one in built.readout.parameters())


@every_encoder
def test_an_encoder_decodes_nothing_and_keeps_nothing(name: str) -> None:
    made = plan(spec_of(name))
    for cost in (made.cost(100, 3), *(layer.cost(100, 3) for layer in made.layers)):
        once = [
            cost.pop(name) for name in ("prefill_flops_per_token", "train_flops_per_token", "prefill_bytes")
        ]
        assert min(once) > 0
        assert set(cost.values()) == {0}
    lines = str(made).splitlines()
    assert ("readout" in lines[-2]) is (name != "masked")
    assert len(mermaid(made).splitlines()) == 1 + 2 * made.graph.number_of_nodes() - 1 + (name == "masked")
    causal = plan(spec_of("masked", kind="causal_lm", layers=["linear"]))
    assert causal.cost(100)["decode_flops_per_token"] > 0


@pytest.mark.parametrize("reduction", [1, 2])
def test_the_cost_of_a_probe_is_counted(reduction: int) -> None:
    readout = {"kind": "ep", "classes": CLASSES, "queries": 8, "reduction": reduction}
    spec = spec_of("masked", readout=readout).readout
    assert spec is not None
    made, x = probe(8, HIDDEN, reduction), noise(1, 60, HIDDEN)
    classifier = torch.nn.Linear(made.width, CLASSES).double()
    with FlopCounterMode(display=False) as counter:
        classifier(made(x, None))
    assert counter.get_total_flops() == spec.flops(HIDDEN, 60)


@every_encoder
def test_an_encoder_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    model, ids = encoder_of(name, torch.float32), tokens()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.model_kind == "encoder"
    assert loaded.config.readout == model.config.readout
    narrow = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert narrow(ids).logits.dtype == torch.bfloat16
    if name == "masked":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    else:
        assert loaded.config.num_labels == CLASSES


@every_encoder
def test_an_encoder_is_built_and_run_on_the_meta_device(name: str) -> None:
    model = build(spec_of(name), device="meta", dtype=torch.bfloat16)
    ids = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    logits = model(ids).logits
    assert logits.is_meta
    assert logits.shape == ((2, 9, 50) if name == "masked" else (2, CLASSES))


COMPILED = [("masked", True, ["linear", "both"]), ("cls", False, ["linear", "both"])]
COMPILED += [(name, True, ["both"]) for name in READOUTS if name != "masked"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_padded", "layers"), COMPILED)
def test_an_encoder_compiles_without_a_graph_break(name: str, is_padded: bool, layers: list[str]) -> None:
    model, ids = encoder_of(name, torch.float32, layers=layers), tokens()
    mask = torch.arange(30)[None] >= torch.tensor([[11], [0]]) if is_padded else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, expected = (one(ids, attention_mask=mask).logits for one in (compiled, model))
    shown = mask if is_padded and name == "masked" else ...
    assert (got - expected)[shown].abs().max() < 1e-5
    torch.compiler.reset()


@every_encoder
def test_an_encoder_runs_in_bfloat16_and_under_autocast(name: str) -> None:
    model, ids = encoder_of(name, torch.float32), tokens()
    mask = torch.arange(30)[None] >= torch.tensor([[11], [0]])
    wide = model(ids, attention_mask=mask).logits
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(ids, attention_mask=mask).logits
    narrow = encoder_of(name, torch.bfloat16)(ids, attention_mask=mask).logits
    assert narrow.dtype == torch.bfloat16
    shown = mask if name == "masked" else ...
    for got in (cast, narrow):
        # Rounding of the weights alone moves logits by some percent.
        assert ((got - wide)[shown].norm() / wide[shown].norm()) < 0.1


def test_the_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (build(spec_of("ep"), seed=seed) for seed in (1, 1, 2))
    for path, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[path]), path
    assert not torch.equal(first.readout.queries, other.readout.queries)
    assert first.readout.queries.std().item() == pytest.approx(0.02, rel=0.2)
    assert build(spec_of("cls")).readout.token.std().item() == pytest.approx(0.02, rel=0.5)


def test_each_kind_of_model_has_its_own_class() -> None:
    assert isinstance(build(spec_of("masked")), HeddleForMaskedLM)
    assert isinstance(build(spec_of("ep")), HeddleForSequenceClassification)
    causal = spec_of("masked", kind="causal_lm", layers=["linear"], blocks={"linear": LINEAR})
    assert isinstance(build(causal), HeddleForCausalLM)
    assert isinstance(build_causal_lm(causal), HeddleForCausalLM)
    with pytest.raises(HeddleError, match="encoder") as told:
        build_causal_lm(spec_of("ep"))
    assert told.value.code == "bad-argument"
    with pytest.raises(HeddleError, match="no readout"):
        HeddleForSequenceClassification(config_for(spec_of("masked")))
    assert set(kernel_paths(spec_of("ep"), "cpu", torch.float32)) == {"attention", "gated_deltanet"}
    config = config_for(spec_of("ep"))
    assert config.use_cache is False
    assert HeddleConfig.from_dict(config.to_dict()).readout == {"kind": "ep", "queries": 8, "reduction": 1}


@pytest.mark.slow
@pytest.mark.usefixtures("_own_module_cache")
@pytest.mark.parametrize("name", ["masked", "ep"])
def test_an_exported_encoder_is_loaded_without_heddle(name: str, tmp_path: Path) -> None:
    # The bytes tokenizer has 256 tokens.
    model = build(spec_of(name, vocab_size=256, context_length=64)).eval()
    card = Card("an encoder", "version: 1\nname: an encoder\n")
    result = export(model, tmp_path / "it", card=card, battery="short")
    assert result.max_difference <= 1e-5
    assert result.generated_text == ""
    config = json.loads((result.path / "config.json").read_text())
    kind = "MaskedLM" if name == "masked" else "SequenceClassification"
    assert config["architectures"] == [f"HeddleFor{kind}"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_heddle.HeddleConfig",
        "AutoModel": "modeling_heddle_encoder.HeddleModel",
        f"AutoModelFor{kind}": f"modeling_heddle_encoder.HeddleFor{kind}",
    }
    assert is_export(result.path)
    assert not (result.path / "generation_config.json").exists()
    page = (result.path / "README.md").read_text()
    assert "An encoder " in page
    assert f"AutoModelFor{kind}.from_pretrained" in page
    assert "generate(" not in page
    base = AutoModel.from_pretrained(result.path, trust_remote_code=True).eval()
    hidden = base(tokens(), use_cache=False).last_hidden_state
    assert torch.allclose(hidden, model.model(tokens(), use_cache=False).last_hidden_state, atol=1e-5)
    loaded = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(result.path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(result.path, trust_remote_code=True)
    # The snippet of the card, by its last two lines.
    inputs = tokenizer("def main():", return_tensors="pt")
    code = page.split("```python\n")[1].split("```")[0].splitlines()[-2:]
    exec("\n".join(code), {"model": loaded, "tokenizer": tokenizer, "inputs": inputs})


def test_an_encoder_is_timed_as_a_pass_over_whole_sequences(tmp_path: Path) -> None:
    path = EXAMPLES["encoder"]
    shown = api.show(path, context=64)
    assert shown["parameters"] > 0
    assert shown["cost"]["decode_flops_per_token"] == 0
    with pytest.raises(HeddleError, match="an encoder decodes nothing") as told:
        api.bench(path, phases=("decode",))
    assert told.value.code == "conflicting-fields"
    assert told.value.where.path == "model.kind"
    line = path.read_text().splitlines()[(told.value.where.line or 0) - 1]
    assert line.strip() == "kind: encoder"
    with pytest.raises(HeddleError, match="no `search` section"):
        api.search(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
