"""The zoo: each spec is checked, and has the parameters of transformers' own class, or those that were published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from heddle import api
from heddle.compose.build import build
from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.specs.zoo_files import load_zoo, zoo, zoo_text

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
FULL_LAST = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


# The same model as transformers' own class and configuration.
TWINS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-3.2-1b": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        },
    ),
    # Its router has no parameters.
    "moh-llama3-8b": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
    # Its gates are made from its keys.
    "liger-llama3-8b": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
    "gemma-3-1b": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        },
    ),
    "olmo-3-7b": (
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {"vocab_size": 100_278, "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 8},
    ),
    "smollm3-3b": ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
    "mistral-7b": ("MistralForCausalLM", "MistralConfig", {"num_key_value_heads": 8}),
    "qwen3-next-80b-a3b": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {}),
    "qwen3.5-9b": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {}),
    "olmo-hybrid-7b": ("OlmoHybridForCausalLM", "OlmoHybridConfig", {"layer_types": FULL_LAST * 8}),
    "minimax-text-01": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {
            "vocab_size": 200_064, "hidden_size": 6144, "intermediate_size": 9216, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 32,
            "layer_types": (["linear_attention"] * 7 + [FULL]) * 10,
        },
    ),
    "kimi-linear-48b-a3b": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {"layer_types": [FULL if layer in (4, 8, 12, 16, 20, 24, 27) else "linear_attention" for layer in range(1, 28)]},
    ),
    # Its second token's predictor is left out.
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {"num_mtp_layers": 0}),
    "deepseek-v2-lite": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {
            "hidden_size": 2048, "intermediate_size": 10_944, "num_hidden_layers": 27, "num_attention_heads": 16,
            "q_lora_rank": None, "first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2,
            "moe_intermediate_size": 1408, "num_experts_per_tok": 6,
        },
    ),
    "mamba-2-1.3b": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": 50_288, "hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64, "head_dim": 64,
            "state_size": 128, "n_groups": 1, "tie_word_embeddings": True,
        },
    ),
    "granite-4.0-h-micro": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            "vocab_size": 100_352, "hidden_size": 2048, "shared_intermediate_size": 8192, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 0, "mamba_n_heads": 64,
            "mamba_d_state": 128, "tie_word_embeddings": True,
            "layer_types": [FULL if layer in (5, 15, 25, 35) else "linear_attention" for layer in range(40)],
        },
    ),
    "falcon-h1-0.5b": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            "vocab_size": 32_784, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 36,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "mamba_n_heads": 24,
            "mamba_d_ssm": 1536, "mamba_d_state": 128,
        },
    ),
}  # fmt: skip
# Published counts where transformers has no such class, to the digits published.
PUBLISHED = dict.fromkeys(
    ("gdn-3-1-1.3b", "gdn-6-1-1.3b", "hgrn2-3-1-1.3b", "hgrn2-6-1-1.3b", "rat-1.3b", "rat-swa-1.3b"),
    (1.3e9, 0.05e9),
)
# 18.95 GB of released weights, two bytes each.
PUBLISHED["minicpm-sala-9b"] = (9.475e9, 0.0025e9)
KINDS = "heddle-100m-"


def yoco_3b_window() -> int:
    """The matrices and norms of the released code in its window form at `yoco_3b`, less its norm before the shared keys."""
    width, inner, vocabulary, kv = 3072, 8192, 100_288, 8 * 128
    half = 3 * width * inner + 2 * width
    return 2 * vocabulary * width + 13 * (6 * width**2 + 2 * half) + 2 * width * kv + width


def yoco_3b() -> int:
    """The same with gated retention: five matrices of the width in the place of four, a gate of each head, and our norm of heads,
    which has no weights there."""
    width, heads = 3072, 24
    return yoco_3b_window() + 13 * (width**2 + heads * width + width // heads)


# No exact count is published: the shapes of the released code are counted here.
RELEASED = {"yoco-3b": yoco_3b(), "yoco-3b-window": yoco_3b_window()}


def of(name: str) -> dict[str, Any]:
    model, config, fields = TWINS[name]
    with torch.device("meta"):
        built = getattr(hf, model)(getattr(hf, config)(**fields))
    return {key: parameter.shape for key, parameter in built.named_parameters()}


@pytest.mark.parametrize("name", zoo())
def test_a_spec_of_the_zoo_is_built_with_the_parameters_it_counts(name: str) -> None:
    file = load_zoo(name)
    assert file.warnings == ()
    assert file.spec.name == name
    built = build(file.spec.model, device="meta")
    assert plan(file.spec.model).parameters == sum(one.numel() for one in built.parameters())


@pytest.mark.parametrize("name", sorted(TWINS))
def test_it_has_the_parameters_of_the_class_of_transformers(name: str) -> None:
    assert plan(load_zoo(name).spec.model).parameters == sum(shape.numel() for shape in of(name).values())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_it_has_the_parameters_that_were_published(name: str) -> None:
    count, half_a_digit = PUBLISHED[name]
    assert abs(plan(load_zoo(name).spec.model).parameters - count) <= half_a_digit


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_it_has_the_parameters_of_the_released_code(name: str) -> None:
    assert plan(load_zoo(name).spec.model).parameters == RELEASED[name]


def test_every_spec_of_the_zoo_is_compared_with_something() -> None:
    rest = set(zoo()) - set(TWINS) - set(PUBLISHED) - set(RELEASED)
    assert all(name.startswith(KINDS) for name in rest)
    for name in rest:
        assert plan(load_zoo(name).spec.model).parameters == pytest.approx(100e6, rel=0.1)


@pytest.mark.parametrize("name", zoo())
def test_a_file_of_the_zoo_names_its_schema_and_its_source(name: str) -> None:
    lines = zoo_text(name).splitlines()
    schema = lines[0].removeprefix("# yaml-language-server: $schema=")
    assert (ROOT / "heddle" / "specs" / "zoo" / schema).resolve() == ROOT / "docs" / "heddle.schema.json"
    assert lines[1].startswith("# ")


def test_the_page_of_the_zoo_has_a_true_row_for_each() -> None:
    rows = dict(re.findall(r"^\| \[([^\]]+)\]\([^)]*\) \|.*\| ([\d,]+) \|", PAGE, flags=re.MULTILINE))
    assert rows == {name: f"{plan(load_zoo(name).spec.model).parameters:,}" for name in zoo()}


def test_init_copies_a_spec_of_the_zoo(tmp_path: Path) -> None:
    made = api.init(tmp_path / "mine.yaml", of="qwen3-0.6b")
    first, rest = made.read_text(encoding="utf-8").split("\n", 1)
    assert first == "# yaml-language-server: $schema=heddle.schema.json"
    assert rest == zoo_text("qwen3-0.6b").split("\n", 1)[1]
    with pytest.raises(HeddleError) as told:
        api.init(tmp_path / "other.yaml", of="qwen3-06b")
    assert told.value.hint == "did you mean qwen3-0.6b?"
