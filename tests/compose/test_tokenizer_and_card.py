"""The tokenizer and the model card of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from heddle.compose.hf.card import Card, Checked, LatencyRow, ScoreRow, render
from heddle.compose.hf.tokenizer import byte_tokenizer, tokenizer_for
from heddle.errors import HeddleError

CARD = Card("tiny", "version: 1\nname: tiny\n")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The byte tokenizer, once saved and loaded as an export's is."""
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer(64).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives_the_byte_tokenizer(text: str) -> None:
    tokenizer = byte_tokenizer(64)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    ["", "\x00", "a\x00\x00b", "\u0100\u0120\u010a", "\n\r\n\t  x ", "é😀\u2028", "<s></s>", "\x00\u0100"],
)
def test_the_saved_tokenizer_is_exact(saved: Any, text: str) -> None:
    ids = saved(text)["input_ids"]
    assert ids == list(text.encode())
    assert saved.decode(ids) == text


def test_the_byte_tokenizer_pads_on_the_left_and_masks(saved: Any) -> None:
    batch = saved(["abc", "a"], padding=True)
    assert batch["input_ids"] == [[97, 98, 99], [0, 0, 97]]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
    assert len(saved) == 256


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A user's tokenizer of 300 words."""
    own = Tokenizer(
        models.WordLevel({f"w{index}": index for index in range(299)} | {"<unk>": 299}, unk_token="<unk>")
    )
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="w7", padding_side="right").save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_a_tokenizer_may_be_a_folder_or_a_file(words: Path, name: str) -> None:
    assert len(tokenizer_for(str(words / name), vocab_size=300, context_length=64)) == 300


def test_a_tokenizer_that_does_not_fit_is_refused(words: Path, tmp_path: Path) -> None:
    with pytest.raises(HeddleError, match="has 300 ids") as error:
        tokenizer_for(str(words), vocab_size=299, context_length=64)
    assert error.value.code == "tokenizer-mismatch"
    with pytest.raises(HeddleError, match="no tokenizer") as error:
        tokenizer_for(str(tmp_path / "nowhere"), vocab_size=300, context_length=64)
    assert error.value.code == "file-not-found"
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(HeddleError, match="not a tokenizer") as error:
        tokenizer_for(str(tmp_path / "bad.json"), vocab_size=300, context_length=64)
    assert error.value.code == "file-not-readable"


def test_a_tokenizer_that_brings_code_is_refused_and_nobody_is_asked(words: Path) -> None:
    config = json.loads((words / "tokenizer_config.json").read_text())
    (words / "code.py").write_text(f"open({str(words / 'ran')!r}, 'w')\n")
    changed = {**config, "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (words / "tokenizer_config.json").write_text(json.dumps(changed))
    with pytest.raises(HeddleError, match="code of its own") as error:
        tokenizer_for(str(words), vocab_size=300, context_length=64)
    assert error.value.code == "untrusted-code"
    assert not (words / "ran").exists()


def test_a_tokenizer_beside_a_model_with_code_is_read_as_data(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (words / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}')
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question at the terminal"))
    assert len(tokenizer_for(str(words), vocab_size=300, context_length=64)) == 300


def test_the_card_tells_spec_scores_latency_and_parity() -> None:
    card = Card(
        "a | b",
        "model:\n  hidden_size: 32\n",
        scores=[ScoreRow("mqar", "accuracy", 0.9132, 0.011, 512, "2 seeds")],
        latency=[
            LatencyRow(
                "decode_ms@1x4096",
                0.31,
                0.30,
                0.32,
                "NVIDIA H200",
                "bfloat16",
                "cuda-graph",
                0.62,
                "all-full",
            )
        ],
        facts={"data": "python-stdlib"},
        tags=["hybrid"],
    )
    text = render(
        card, Checked(1234567, "bfloat16", ("attention", "decay_attention"), 0.0, "5.23.0", "2.13.0")
    )
    _, front, body = text.split("---\n", 2)
    assert YAML(typ="safe").load(front) == {
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["heddle", "custom_code", "hybrid"],
    }
    for part in (
        "1,234,567",
        "0.9132",
        "± 0.011",
        "NVIDIA H200",
        "0.62 × all-full",
        "0.0e+00",
        "hidden_size: 32",
        "| data |",
    ):
        assert part in body, part


def test_a_card_without_results_has_no_empty_sections() -> None:
    text = render(CARD, Checked(10, "float32", ("attention",), 0.0, "5", "2"))
    assert "## Scores" not in text
    assert "## Latency" not in text
