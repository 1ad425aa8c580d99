"""What lies in a folder beside its weights: kept through an import and an export of it, or told by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from heddle import api, cli
from heddle.compose.hf import battery, harness, reload
from heddle.compose.hf import export as export_file
from heddle.compose.hf.checkpoint import UNUSED_CODE
from heddle.compose.hf.tokenizer import tokenizer_for
from heddle.compose.hf.verify import SHORT, Verification
from heddle.errors import HeddleError
from heddle.search.import_model import ImportResult
from heddle.specs import load
from heddle.target_tables import show_imported

VOCABULARY = 100
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
CHAT = [{"role": "w1", "content": "w2 w3"}]


def without_tokenizer(folder: Path) -> Path:
    """A Llama of one layer that transformers writes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"bos_token_id": 8, "eos_token_id": 7}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.1, **sizes, **ids))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    """One as instruct models are published: a chat template, two tokens that stop it, sampling defaults."""
    folder = without_tokenizer(tmp_path / "chatty")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w7", bos_token="w8", chat_template=TEMPLATE
    ).save_pretrained(folder)
    # The first of the two tokens that stop it never comes.
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "suppress_tokens": [7]}
    generation = {"bos_token_id": 8, "eos_token_id": [7, 9], **sampling, "cache_implementation": "static"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are not loaded in a process of their own: the tests here load them."""
    monkeypatch.setattr(export_file, "verify", lambda *_, **__: Verification(0.0, "", "5", "2"))


def sampled(folder: Path, *, trusted: bool = False) -> tuple[list[int], Any]:
    """What a folder generates from a chat with its own defaults, and these."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, dtype=torch.float32)
    model.generation_config.cache_implementation = None
    inputs = tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)
    torch.manual_seed(0)
    told = model.generation_config
    defaults = {name: getattr(told, name) for name in ("eos_token_id", "do_sample", "temperature", "top_p")}
    return model.generate(**inputs, max_new_tokens=400)[0].tolist(), defaults


@pytest.mark.usefixtures("_own_module_cache", "_unchecked")
@pytest.mark.parametrize("target", ["llama", "remote"])
def test_a_model_that_is_exported_again_generates_as_the_first_did(
    target: str, chatty: Path, tmp_path: Path
) -> None:
    first, defaults = sampled(chatty)
    assert (first[-1], defaults["eos_token_id"]) == (9, [7, 9])
    made = api.import_model(chatty, tmp_path / "in").path
    again = api.export(made, tmp_path / "out", target=target).path
    assert sampled(again, trusted=target == "remote") == (first, defaults)
    # And once more, so that an export with code of its own is read too.
    made = api.import_model(again, tmp_path / "in-again").path
    last = api.export(made, tmp_path / "out-again", target="llama").path
    assert sampled(last) == (first, defaults)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (chatty, again, last)]
    assert [[one[f"{name}_token_id"] for name in ("bos", "eos", "pad")] for one in configs] == [
        [8, 7, None]
    ] * 3


def test_tokens_are_compared_as_many_as_are_told_whatever_stops_a_model(chatty: Path) -> None:
    tokenizer, model = (kind.from_pretrained(chatty) for kind in (AutoTokenizer, AutoModelForCausalLM))
    model.generation_config.cache_implementation = None
    model.generation_config.update(eos_token_id=[*range(1, VOCABULARY)], num_beams=2)
    task = {"prompt": "w2", "new_tokens": 20, "checks_cache": True}
    text, differing = reload.generated(model, tokenizer, task)
    assert (len(text.split()), differing) == (21, 0)


def test_what_an_import_leaves_behind_is_told_by_name(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("README.md", "tokenizer.model"):
        (chatty / name).write_text("")
    with pytest.raises(SystemExit) as left:
        cli.main(["import", str(chatty), "--out", str(tmp_path / "in")])
    assert not left.value.code
    told = "README.md, tokenizer.model, attention_dropout of config.json, cache_implementation of generation_config.json"
    out = capsys.readouterr().out
    assert f"left behind: {told}\n" in out
    assert "train and search begin with random ones" in out


def test_many_files_of_code_are_left_behind_as_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    left = ("README.md", *(f"kernels_{index}.py" for index in range(90)))
    show_imported(ImportResult(Path("in"), "remote", "0" * 16, 100, left))
    assert "left behind: README.md, 90 files of code\n" in capsys.readouterr().out


def test_fields_that_nothing_reads_in_a_generation_config_are_refused(chatty: Path, tmp_path: Path) -> None:
    (chatty / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    with pytest.raises(HeddleError, match="is refused by GenerationConfig") as error:
        api.import_model(chatty, tmp_path / "in")
    assert error.value.code == "import-mismatch"
    assert error.value.errors[0].where.file == str(chatty / "generation_config.json")


def test_chat_templates_are_kept_where_the_configuration_of_a_tokenizer_is_not(
    chatty: Path, tmp_path: Path
) -> None:
    config = json.loads((chatty / "tokenizer_config.json").read_text())
    (chatty / "tokenizer_config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    (chatty / "additional_chat_templates").mkdir()
    (chatty / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (chatty / "additional_chat_templates" / "notes.txt").write_text("mine")
    made = api.import_model(chatty, tmp_path / "in")
    assert {"tokenizer_config.json", "additional_chat_templates/notes.txt"} <= {*made.left}
    read = tokenizer_for(str(made.path / "tokenizer"), vocab_size=256, context_length=64)
    assert read.chat_template == {"default": TEMPLATE, "rag": "rag"}
    assert (made.path / "tokenizer" / "additional_chat_templates" / "rag.jinja").read_text() == "rag"
    assert (made.path / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_model_without_a_tokenizer_is_given_none(tmp_path: Path) -> None:
    folder = without_tokenizer(tmp_path / "bare")
    (folder / "tokenizer.model").write_text("of another form")
    made = api.import_model(folder, tmp_path / "in")
    home = tmp_path / "in" / "tokenizer"
    assert made.note.startswith(f"no tokenizer.json in the folder: put one into {home}")
    assert load(made.path / "spec.yaml").spec.tokenizer == str(home)
    with pytest.raises(HeddleError, match=f"no tokenizer at {home}") as error:
        api.export(made.path, tmp_path / "out")
    assert error.value.code == "file-not-found"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_unchecked")
def test_a_tokenizer_that_is_put_into_the_folder_of_an_import_is_exported(
    chatty: Path, tmp_path: Path
) -> None:
    made = api.import_model(without_tokenizer(tmp_path / "bare"), tmp_path / "in").path
    (made / "tokenizer").mkdir()
    (made / "tokenizer" / "tokenizer.json").write_bytes((chatty / "tokenizer.json").read_bytes())
    out = api.export(made, tmp_path / "out", target="llama").path
    assert AutoTokenizer.from_pretrained(out)("w5 w6")["input_ids"] == [5, 6]


AUTO_MAP = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}


def with_code(folder: Path, mark: Path, **fields: Any) -> None:
    """Python files that leave a mark, and a configuration that names them."""
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": AUTO_MAP} | fields))


@pytest.mark.slow
def test_code_beside_a_class_of_transformers_is_not_run(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_code(chatty, tmp_path / "ran")
    made = api.import_model(chatty, tmp_path / "in")
    assert (made.target, made.note) == ("llama", UNUSED_CODE)
    assert {"code.py", "custom_generate"} <= {*made.left}
    # How the folder is loaded is the same in every form of the battery.
    monkeypatch.setattr(battery, "FULL", SHORT)
    with pytest.raises(SystemExit) as left:
        cli.main(["verify", str(chatty)])
    assert (left.value.code, UNUSED_CODE in capsys.readouterr().out) == (0, True)
    # As far as the harness, which loads the model as `verify` does, without trust.
    assert harness._tokens(chatty, trusted=False) == {}
    monkeypatch.setattr(harness, "PACKAGE", "lm_eval_that_is_not_there")
    with pytest.raises(HeddleError) as error:
        api.evaluate(chatty, ["sums"])
    assert error.value.code == "package-missing"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "fields",
    [{"architectures": ["OwnForCausalLM"]}, {"architectures": None}, {"model_type": "own"}],
    ids=["another class", "no class", "another type"],
)
def test_code_that_a_folder_needs_is_refused(fields: dict[str, Any], chatty: Path, tmp_path: Path) -> None:
    with_code(chatty, tmp_path / "ran", **fields)
    with pytest.raises(HeddleError, match="auto_map names code of the folder, which is not run") as error:
        api.import_model(chatty, tmp_path / "in")
    assert "architectures and model_type are those of a class of transformers" in str(error.value.hint)
    for read in (api.verify, lambda folder: api.evaluate(folder, ["sums"])):
        with pytest.raises(HeddleError, match="--trust-remote-code") as error:
            read(chatty)
        assert error.value.code == "untrusted-code"
    assert not (tmp_path / "ran").exists()
