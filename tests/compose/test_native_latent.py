"""What is peculiar to Kimi Linear and MiniMax as targets: other spellings, tables, and what is refused by its field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from heddle.compose.build import build
from heddle.compose.hf.card import Card
from heddle.compose.hf.export import export
from heddle.compose.hf.load_native import read_native, spec_of_config
from heddle.compose.hf.native import chosen_target, left_by_auto, write_native
from heddle.compose.hf.verify import rounded_apart
from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import BY_NAME
from heddle.compose.targets.report import target_rows
from heddle.compose.targets.verdict import verdict
from heddle.errors import HeddleError
from heddle.specs import ModelSpec, spec_hash

CARD = Card("it", "version: 1\nname: it\n")
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "context_length": 512,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
}
IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
EXPERTS = {"kind": "moe", "experts": 4, "active": 2, "width": 8}
SIGMOID = EXPERTS | {"shared_width": 8, "score": "sigmoid", "correction_bias": True}
MLA = {
    "kind": "mla",
    "heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "norm_eps": 1e-6,
}
KIMI = {
    **SIZES,
    "blocks": {
        "full": {"mixer": MLA, "channel": SIGMOID},
        "linear": {"mixer": {"kind": "kda", "heads": 2, "head_dim": 8}, "channel": {"kind": "swiglu", "width": 24}},
    },
    "layers": ["linear", "full"],
}  # fmt: skip
NORMED = {"of": "normed", "stream": 2.0}
MINIMAX = {
    **SIZES,
    "blocks": {
        "full": {"mixer": {"kind": "attention", "heads": 2, "head_dim": 8}, "channel": EXPERTS, "residual": NORMED},
        "linear": {
            "mixer": {"kind": "lightning", "heads": 2, "head_dim": 8, "norm_eps": 1e-6},
            "channel": EXPERTS,
            "residual": NORMED,
        },
    },
    "layers": ["linear", "full", "linear"],
}  # fmt: skip


def model_of(data: dict[str, Any]) -> Any:
    model = build(ModelSpec.model_validate(data), seed=0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def folder_of(model: Any, name: str, folder: Path) -> Path:
    folder.mkdir()
    write_native(model, folder, BY_NAME[name], IDS)
    return folder


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(model_of(KIMI), "kimi_linear", tmp_path_factory.mktemp("kimi") / "out")


@pytest.fixture(scope="module")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(model_of(MINIMAX), "minimax", tmp_path_factory.mktemp("minimax") / "out")


def changed(folder: Path, made: Path, **fields: Any) -> Path:
    """The folder with other fields in its configuration."""
    made.mkdir()
    config = json.loads((folder / "config.json").read_text()) | fields
    (made / "config.json").write_text(json.dumps(config))
    (made / "model.safetensors").symlink_to(folder / "model.safetensors")
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_the_class_writes_itself_is_read_too(kimi: Path, tmp_path: Path) -> None:
    hf.AutoModelForCausalLM.from_pretrained(kimi, dtype=torch.float32).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    # Its dense blocks go by the experts' name there, and by their own where they are published.
    assert "model.layers.0.block_sparse_moe.gate_proj.weight" in names
    assert "model.layers.0.mlp.gate_proj.weight" in load_file(kimi / "model.safetensors")
    first, again = (read_native(folder, name="it") for folder in (kimi, tmp_path))
    assert (
        spec_hash(first.spec.model)
        == spec_hash(again.spec.model)
        == spec_hash(ModelSpec.model_validate(KIMI))
    )
    ours = again.model.state_dict()
    assert all(torch.equal(one, ours[name]) for name, one in first.model.state_dict().items())


def test_servers_find_the_placement_of_kimi_linear_under_the_published_names(kimi: Path) -> None:
    config = json.loads((kimi / "config.json").read_text())
    assert config["linear_attn_config"] == {
        "full_attn_layers": [2], "kda_layers": [1], "num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 4,
    }  # fmt: skip
    assert (config["first_k_dense_replace"], config["mla_use_nope"], config["model_max_length"]) == (
        1,
        True,
        512,
    )


@pytest.mark.filterwarnings("ignore:`rope_scaling`")
def test_a_configuration_in_published_fields_alone_is_the_same_spec(kimi: Path, tmp_path: Path) -> None:
    config = json.loads((kimi / "config.json").read_text())
    ours = {
        "layer_types",
        "mlp_layer_types",
        "router_aux_loss_coef",
        *(one for one in config if one.startswith("linear_")),
    }
    published = {name: one for name, one in config.items() if name not in ours - {"linear_attn_config"}}
    published |= {"head_dim": 72, "rope_theta": 10000.0, "rope_scaling": None}
    spec, _ = spec_of_config(published, tmp_path, name="it")
    experts = with_block(KIMI, "full", "channel", balance=0.0)
    assert spec_hash(spec.model) == spec_hash(ModelSpec.model_validate(experts))


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("kimi", {"mla_use_nope": False}, "mla_use_nope"),
        ("kimi", {"num_expert_group": 2, "topk_group": 1}, "num_expert_group"),
        ("kimi", {"topk_method": "greedy"}, "topk_method"),
        ("kimi", {"attention_bias": True}, "attention_bias"),
        ("kimi", {"hidden_act": "gelu"}, "hidden_act"),
        ("kimi", {"num_key_value_heads": 1}, "num_key_value_heads"),
        ("minimax", {"hidden_act": "gelu"}, "hidden_act"),
        ("minimax", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
    ],
)  # fmt: skip
def test_a_configuration_is_refused_by_its_field(
    name: str, fields: dict[str, Any], told: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(HeddleError) as error:
        read_native(changed(request.getfixturevalue(name), tmp_path / "made", **fields), name="it")
    assert error.value.code == "import-mismatch"
    assert told in str(error.value)


def with_block(data: dict[str, Any], block: str, part: str, **fields: Any) -> dict[str, Any]:
    blocks = {
        **data["blocks"],
        block: {**data["blocks"][block], part: {**data["blocks"][block][part], **fields}},
    }
    return {**data, "blocks": blocks}


@pytest.mark.parametrize(
    ("name", "data", "path"),
    [
        ("kimi_linear", with_block(KIMI, "full", "mixer", rope={"theta": 1e4}), "layers.1.mixer.rope"),
        ("kimi_linear", with_block(KIMI, "full", "mixer", window=5), "layers.1.mixer.window"),
        ("kimi_linear", with_block(KIMI, "full", "mixer", norm_eps=1e-5), "layers.1.mixer.norm_eps"),
        ("kimi_linear", with_block(KIMI, "linear", "mixer", lower_bound=-5.0), "layers.0.mixer.lower_bound"),
        ("kimi_linear", with_block(KIMI, "linear", "mixer", gate_rank=4), "layers.0.mixer.gate_rank"),
        ("kimi_linear", with_block(KIMI, "full", "channel", correction_bias=False), "layers.1.channel.correction_bias"),
        ("kimi_linear", with_block(KIMI, "full", "channel", shared_width=12), "layers.1.channel.shared_width"),
        ("kimi_linear", {**KIMI, "tie_embeddings": True}, "tie_embeddings"),
        ("minimax", with_block(MINIMAX, "full", "residual", of="stream"), "layers.1.residual"),
        ("minimax", with_block(MINIMAX, "linear", "mixer", heads=4), "layers.0.mixer.heads"),
        ("minimax", with_block(MINIMAX, "linear", "mixer", slopes="linear"), "layers.0.mixer.slopes"),
        ("minimax", with_block(MINIMAX, "full", "mixer", rope={"fraction": 0.5}), "layers.1.mixer.rope"),
        ("minimax", with_block(MINIMAX, "full", "channel", scale=2.0), "layers.1.channel.scale"),
    ],
)  # fmt: skip
def test_a_spec_is_refused_by_its_field(name: str, data: dict[str, Any], path: str) -> None:
    refused = verdict(BY_NAME[name], plan(ModelSpec.model_validate(data)).runtime()).refusals
    assert any(one.path.startswith(path) for one in refused), [*map(str, refused)]


def test_tables_of_decays_are_the_ones_that_the_class_computes(minimax: Path, tmp_path: Path) -> None:
    config = hf.AutoConfig.from_pretrained(minimax)
    stored = load_file(minimax / "model.safetensors")
    held = {
        name: one
        for name, one in hf.MiniMaxForCausalLM(config).named_buffers()
        if "decay" in name or "slope" in name
    }
    assert held.keys() == {name for name in stored if "decay" in name or "slope" in name}
    assert len(held) == 8
    assert all(
        (stored[name] - one).abs().max() <= 4 * torch.finfo(torch.float32).eps for name, one in held.items()
    )
    # Without them the class computes them, and so may a folder be without them; with others it is another model.
    name = "model.layers.2.self_attn.slope_rate"
    bare = changed(minimax, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    save_file({key: one for key, one in stored.items() if key not in held}, bare / "model.safetensors")
    assert torch.equal(
        read_native(bare, name="it").model(torch.arange(9)[None]).logits,
        read_native(minimax, name="it").model(torch.arange(9)[None]).logits,
    )
    save_file({**stored, name: 2 * stored[name]}, bare / "model.safetensors")
    with pytest.raises(HeddleError, match=f"{name} is another table than the class computes"):
        read_native(bare, name="it")


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_minimax_with_a_linear_first_layer_is_exact_without_a_cache_alone(minimax: Path) -> None:
    ours, ids = model_of(MINIMAX), torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(0))
    theirs = hf.AutoModelForCausalLM.from_pretrained(minimax, dtype=torch.float32).eval()
    right = ours(ids).logits
    error, allowed = rounded_apart(
        ours, {"ids": ids}, {"ids": theirs(ids, use_cache=False).logits}, {"ids": right}
    )
    assert error <= allowed
    # Today's behaviour of the class: it counts the tokens of its first layer, and places all later ones at 0 unless it is told.
    assert after(theirs, ids, 40, 1, placed=True) <= 2 * allowed
    for count, placed in ((1, False), (20, False), (20, True)):
        assert after(theirs, ids, 40, count, placed=placed) > 100 * allowed, (count, placed)
    rows = {row["target"]: row for row in target_rows(plan(ModelSpec.model_validate(MINIMAX)).runtime())}
    assert rows["minimax"]["fits"]
    assert "right without a cache; with one" in rows["minimax"]["warning"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [["full", "linear"], ["full", "full"]])
def test_minimax_is_warned_of_for_beams_where_it_has_a_linear_layer(
    layers: list[str], tmp_path: Path
) -> None:
    data, linear = {**MINIMAX, "layers": layers}, "linear" in layers
    ours = model_of(data)
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder_of(ours, "minimax", tmp_path / "out")).eval()
    ids = torch.randint(1, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    usual = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "num_beams": 3, "do_sample": False}
    found = [theirs.generate(ids, use_cache=cached, pad_token_id=0, **usual) for cached in (True, False)]
    assert torch.equal(*found) != linear
    rows = {row["target"]: row for row in target_rows(plan(ModelSpec.model_validate(data)).runtime())}
    assert rows["minimax"]["fits"]
    assert ("other beams" in rows["minimax"]["warning"]) == linear
    assert "several tokens" not in rows["minimax"]["warning"]
    # Nobody gets it unasked, and who asked for nothing is told.
    chosen = chosen_target("auto", ours)
    assert (None if chosen is None else chosen.name) == (None if linear else "minimax")
    assert ("--target minimax insists" in left_by_auto(ours)) == linear


def after(model: Any, ids: Tensor, start: int, count: int, *, placed: bool) -> float:
    """How far the logits of `count` tokens after a cache of `start` are from a pass without one."""
    right = model(ids, use_cache=False).logits[:, start : start + count]
    past = model(ids[:, :start], use_cache=True).past_key_values
    given = {"position_ids": torch.arange(start, start + count)[None].expand(2, -1)} if placed else {}
    found = model(ids[:, start : start + count], past_key_values=past, use_cache=True, **given).logits
    return float((found - right).abs().max())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_minimax_with_a_linear_first_layer_and_a_window_generates_wrong_with_a_cache(tmp_path: Path) -> None:
    data = with_block(MINIMAX, "full", "mixer", window=7)
    ours = model_of(data)
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder_of(ours, "minimax", tmp_path / "out")).eval()
    ids = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(0))
    assert (theirs(ids, use_cache=False).logits - ours(ids).logits).abs().max() <= 1e-5
    # Steps are right up to the window, which the class ends where its first layer says.
    assert after(theirs, ids, 4, 1, placed=True) <= 1e-5
    assert after(theirs, ids, 40, 1, placed=True) > 1e-3
    (row,) = [
        row
        for row in target_rows(plan(ModelSpec.model_validate(data)).runtime())
        if row["target"] == "minimax"
    ]
    assert "wrong past its window" in row["warning"]
    # Who names the class gets it with that verdict; nobody gets it unasked.
    assert chosen_target("auto", ours) is None
    export(ours, tmp_path / "named", card=CARD, target="minimax")
    card = (tmp_path / "named" / "README.md").read_text()
    for check in ("one-token steps", "greedy, 64 tokens, with and without cache"):
        assert re.search(rf"^\| {check} \|.*\| expected \|", card, re.MULTILINE), check


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "data"),
    [("kimi_linear", KIMI), ("minimax", {**MINIMAX, "layers": ["full", "linear"]}), ("minimax", MINIMAX)],
)
def test_the_check_of_an_export_passes_them(name: str, data: dict[str, Any], tmp_path: Path) -> None:
    made = export(model_of(data), tmp_path / "out", card=CARD, target=name)
    assert (made.target, made.max_difference <= 1e-5) == (name, True)
