"""Checkpoints that transformers' own classes write of configurations of their own are imported with their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign import FOREIGN, begun, foreign, imported
from safetensors.torch import load_file, save_file

from heddle.compose.hf.load_native import read_native
from heddle.compose.targets.catalogue import BY_NAME, TARGETS
from heddle.errors import HeddleError

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))]
every_class = pytest.mark.parametrize("name", FOREIGN)
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_target_has_foreign_configurations() -> None:
    assert {*FOREIGN} == {target.name for target in TARGETS}


@pytest.mark.slow
@every_class
@pytest.mark.parametrize("seed", SEEDS)
def test_a_foreign_checkpoint_has_the_logits_of_its_class(name: str, seed: int, tmp_path: Path) -> None:
    found = imported(name, seed, tmp_path)
    assert found.holds, found


@pytest.mark.slow
@every_class
def test_a_foreign_checkpoint_in_bfloat16_and_shards_is_upcast_exactly(name: str, tmp_path: Path) -> None:
    found = imported(name, 1, tmp_path, dtype=torch.bfloat16, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert found.holds, found
    assert found.bfloat16 < 1, found


@pytest.mark.slow
def test_rounded_tables_of_minimax_are_refused_by_tensor(tmp_path: Path) -> None:
    model = foreign("minimax", 0).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    name = next(key for key in load_file(tmp_path / "model.safetensors") if key.endswith("query_decay"))
    told = rf"{name} is rounded to bfloat16: the class computes with it"
    with pytest.raises(HeddleError, match=told) as error:
        read_native(tmp_path, name="back")
    assert error.value.code == "import-mismatch"
    assert "in float32, or leave them out" in str(error.value.hint)


# A tensor that a class passes over, and one that it does not.
IGNORED = {
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.fc.weight"),
    "qwen3_next": ("mtp.layers.0.mlp.gate.weight", "model.layers.0.mtp.weight"),
    "kimi_linear": (None, "model.layers.0.self_attn.rotary_emb.inv_freq"),
}


@pytest.mark.parametrize("name", IGNORED)
def test_tensors_that_a_class_passes_over_are_passed_over_and_no_others(name: str, tmp_path: Path) -> None:
    begun(name, 0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights, (ignored, other) = load_file(file), IGNORED[name]
    if ignored is not None:
        save_file({**weights, ignored: torch.zeros(4)}, file)
        class_of = getattr(transformers, BY_NAME[name].model_class)
        assert not class_of.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"]
        found = read_native(tmp_path, name="back")
        assert found.ignored == (ignored,)
    save_file({**weights, other: torch.zeros(4)}, file)
    with pytest.raises(HeddleError, match=f"tensor '{other}' is no tensor of the model"):
        read_native(tmp_path, name="back")


# What a class takes and a spec cannot say, by the field that is named.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ("qwen2", {"hidden_act": "relu"}, "hidden_act"),
    ("qwen3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 24, "truncate": False,
    }}, "truncate"),
    ("qwen3_next", {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True}, "active"),
    ("granitemoehybrid", {"time_step_limit": (0.01, 0.5)}, "time_step_limit"),
    ("granitemoehybrid", {"shared_intermediate_size": 0}, "width"),
    ("bamba", {"time_step_limit": (0.01, 0.5)}, "time_step_limit"),
    ("bamba", {"mamba_n_groups": 2}, "groups"),
    ("falcon_h1", {"mlp_bias": True}, "mlp_bias"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("kimi_linear", {"num_expert_group": 2, "topk_group": 1, "mlp_layer_types": ["sparse"] * 3}, "num_expert_group"),
    ("kimi_linear", {"hidden_act": "gelu"}, "hidden_act"),
    ("kimi_linear", {"layer_types": ["linear_attention"] * 3}, "mla"),
    ("minimax", {"num_experts_per_tok": 1}, "active"),
    ("olmo_hybrid", {"hidden_act": "gelu"}, "hidden_act"),
    ("olmo3", {"hidden_act": "gelu"}, "hidden_act"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen3_5_text", {"hidden_act": "gelu"}, "hidden_act"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "told"), REFUSED)
def test_a_foreign_configuration_that_a_spec_cannot_say_is_refused_by_name(
    name: str, fields: dict[str, Any], told: str, tmp_path: Path
) -> None:
    foreign(name, 0, **fields).save_pretrained(tmp_path)
    with pytest.raises(HeddleError) as error:
        read_native(tmp_path, name="back")
    assert error.value.code == "import-mismatch"
    assert told in str(error.value)
