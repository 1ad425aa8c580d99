"""Exported folders: loaded by plain transformers without heddle, same logits, tokenizer and card included."""

from __future__ import annotations

import ast
import copy
import errno
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from heddle.compose.build import build
from heddle.compose.hf import export as export_file
from heddle.compose.hf import reload, shards
from heddle.compose.hf import verify as verify_file
from heddle.compose.hf.card import Card
from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.export import ExportResult, export, is_export, write_remote
from heddle.compose.hf.flatten import flatten
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.hf.verify import (
    HIDDEN,
    auto_class,
    fixed_inputs,
    logits_of,
    reload_in_clean_process,
    verify,
)
from heddle.errors import HeddleError
from heddle.kernels.accuracy import EPSILON
from heddle.specs import MIXERS, ModelSpec

ATTENTION = {
    "kind": "attention",
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "rope": {"theta": 1e4, "fraction": 1.0},
}
ATTENTION |= {"qk_norm": True, "gate": True, "window": 9}
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
CARD = Card("tiny hybrid", "version: 1\nname: tiny hybrid\n", license="apache-2.0")


def model_of(*mixers: dict[str, Any], channel: str = "swiglu", tied: bool = True) -> HeddleForCausalLM:
    layers = [
        {"mixer": mixer, "channel": {"kind": channel, "width": 48}, "norm": "rmsnorm"} for mixer in mixers
    ]
    torch.manual_seed(len(mixers))
    config = HeddleConfig(
        vocab_size=256, hidden_size=32, layers=layers, tie_word_embeddings=tied, initializer_range=0.25
    )
    return HeddleForCausalLM(config).eval()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeddleForCausalLM, ExportResult]:
    model = model_of(DELTA, ATTENTION, LIGHTNING)
    return model, export(model, tmp_path_factory.mktemp("exports") / "hybrid", card=CARD)


@pytest.fixture(scope="module")
def softmax(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeddleForCausalLM, ExportResult]:
    model = model_of(ATTENTION, channel="gelu", tied=False).to(torch.bfloat16)
    return model, export(model, tmp_path_factory.mktemp("exports") / "softmax", card=CARD, battery="short")


def code_of(folder: Path) -> dict[str, ast.Module]:
    return {path.name: ast.parse(path.read_text()) for path in folder.glob("*.py")}


def names_imported(tree: ast.Module) -> set[str]:
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in found | {node.module or "" for node in froms}}


def test_a_clean_process_finds_the_same_logits_and_generates_from_text(hybrid: Any, softmax: Any) -> None:
    for _, result in (hybrid, softmax):
        assert result.max_difference <= 1e-5
        assert result.generated_text.startswith("def main():")
        assert len(result.generated_text) > len("def main():")


def test_the_card_tells_the_checks_that_an_export_runs_and_which_form_of_them(
    hybrid: Any, softmax: Any
) -> None:
    card, short = (
        (result.path / "README.md").read_text().partition("## Parity")[2] for _, result in (hybrid, softmax)
    )
    for told in (
        "| one-token steps |",
        "| left padding |",
        "| pass |",
        "| expected |",
        "| transformers |",
        "| device |",
        "| greedy, 64 tokens, with and without cache |",
        "| bfloat16, one-token steps |",
        "| loads in a clean process |",
        "| parity battery | full |",
    ):
        assert told in card
    assert "| one-token steps |" in short
    assert "| parity battery | short |" in short
    assert "greedy" not in short


def test_an_export_loads_where_triton_is_not_installed(hybrid: Any) -> None:
    model, result = hybrid
    assert verify(model, result.path, hidden=(*HIDDEN, "triton"), battery="short").max_difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_kind", ["causal_lm", "encoder"])
def test_every_kind_that_tells_its_cases_travels(
    model_kind: str, tmp_path: Path, random_seed: int, full_counts: bool
) -> None:
    told = {kind: schema for kind, schema in MIXERS.items() if "cases" in vars(schema)}
    mixers = [{"kind": kind, **schema.cases[-1]} for kind, schema in told.items()]
    # An encoder for those that a model which decodes cannot have.
    is_causal = model_kind == "causal_lm"
    mixers = [one for one in mixers if told[one["kind"]].model_validate(one).is_causal == is_causal]
    # By default half of the kinds.
    drawn = random.Random(random_seed).sample(mixers, -(-len(mixers) // 2))
    travels = [one for one in mixers if full_counts or one in drawn]
    blocks = {one["kind"]: {"mixer": one, "channel": {"kind": "none"}} for one in travels}
    print("drawn:", *blocks)
    sizes = {
        "kind": model_kind,
        "vocab_size": 256,
        "hidden_size": 48,
        "blocks": blocks,
        "layers": list(blocks),
    }
    model = build(ModelSpec.model_validate(sizes)).eval()
    assert export(model, tmp_path / "kinds", card=CARD, battery="short").max_difference <= 1e-5


def test_exported_code_needs_torch_and_transformers_alone(hybrid: Any, softmax: Any) -> None:
    allowed = {"torch", "transformers", "triton", *sys.stdlib_module_names}
    for _, result in (hybrid, softmax):
        for name, tree in code_of(result.path).items():
            assert names_imported(tree) <= allowed, name
            # What transformers insists on before it runs a file.
            assert "triton" not in get_imports(result.path / name), name


def test_the_entry_file_names_every_other_file(hybrid: Any) -> None:
    _, result = hybrid
    files = {path.stem for path in result.path.glob("*.py")} - {"modeling_heddle"}
    assert set(get_relative_imports(result.path / "modeling_heddle.py")) == files


def test_only_the_kinds_in_use_travel(softmax: Any) -> None:
    _, result = softmax
    names = {path.name for path in result.path.glob("*.py")}
    assert {"compose_mixers_attention.py", "compose_channel_gelu.py"} <= names
    # Blocks that are chosen, windows, windows that slide inward, heads that are chosen: all are forms of attention.
    ops = {"op", "block_attention", "dense_attention", "member_attention", "sliding_window_attention"}
    ops |= {"head_sparse_attention", "span_attention", "grid_window_attention"}
    kernels = {name for name in names if name.startswith("kernels")}
    # Kernels come with what they share.
    shared = {name for name in kernels if name.startswith(("kernels_common", "kernels_configs"))}
    parts = ("torch", "op", "launch", "fwd", "bwd")
    ops |= {f"_{op}_{part}" for op in ("block_attention", "sliding_window_attention") for part in parts}
    ops |= {f"_head_sparse_attention_{part}" for part in ("op", "launch", "fwd", "bwd", "lists")}
    # Every norm of rows has kernels too.
    ops |= {"_block_attention_lists", "rms_norm", "_rms_norm_op", "_rms_norm_kernels"}
    ops |= {f"_{op}_{part}" for op in ("span_attention", "grid_window_attention") for part in parts[1:]}
    ops |= {"block_choice", "_block_choice_op", "_block_choice_launch", "_block_choice_kernels"}
    assert kernels - shared == {f"kernels_{op}.py" for op in ops}
    assert "kernels_configs_block_attention.py" in shared
    assert not [name for name in names if "delta" in name or "swiglu" in name]


def test_the_flat_code_is_the_same_every_time_and_its_ops_have_a_name_of_their_own() -> None:
    some, other = {"decay_attention"}, {"decay_attention", "gated_deltanet"}
    assert flatten(some, {"none"}) == flatten(some, {"none"})
    libraries = {
        flatten(kinds, {"none"})["kernels_op.py"].partition('LIBRARY = "')[2][:19] for kinds in (some, other)
    }
    assert len(libraries) == 2
    assert all(library.startswith("heddle_") for library in libraries)


@pytest.mark.usefixtures("_own_module_cache")
def test_two_exports_live_in_one_process(hybrid: Any, softmax: Any) -> None:
    ids = torch.arange(40).view(2, 20)
    for model, result in (hybrid, softmax, hybrid):
        loaded = AutoModelForCausalLM.from_pretrained(result.path, trust_remote_code=True).eval()
        assert type(loaded).__module__ != type(model).__module__
        assert loaded.dtype == model.dtype
        assert (loaded(ids).logits - model(ids).logits).abs().max() <= 1e-5


@pytest.mark.usefixtures("_own_module_cache")
def test_two_exports_of_one_folder_name_live_in_one_process(tmp_path: Path) -> None:
    ids = torch.arange(40).view(2, 20)
    for place, mixer in (("one", LIGHTNING), ("two", ATTENTION), ("three", LIGHTNING)):
        model, folder = model_of(mixer), tmp_path / place / "export"
        folder.mkdir(parents=True)
        write_remote(model, folder, dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")))
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert (loaded(ids).logits - model(ids).logits).abs().max() <= 1e-5


@pytest.mark.usefixtures("_own_module_cache")
def test_the_bare_model_loads_too_and_remembers_every_auto_class(hybrid: Any) -> None:
    model, result = hybrid
    loaded = AutoModel.from_pretrained(result.path, trust_remote_code=True).eval()
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(loaded(ids).last_hidden_state, model.model(ids).last_hidden_state)
    config = json.loads((result.path / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


@pytest.mark.usefixtures("_own_module_cache")
def test_gates_are_stored_and_loaded_as_float32(hybrid: Any, tmp_path: Path) -> None:
    model, _ = hybrid
    narrow = HeddleForCausalLM(model.config).to(torch.bfloat16)
    result = export(narrow, tmp_path / "narrow", card=CARD, battery="none")
    assert result.max_difference <= 1e-5
    stored = load_file(result.path / "model.safetensors")
    assert {name for name, held in stored.items() if held.dtype == torch.float32} == {
        "model.layers.0.mixer.A_log",
        "model.layers.0.mixer.dt_bias",
    }
    loaded = AutoModelForCausalLM.from_pretrained(result.path, trust_remote_code=True)
    assert loaded.model.layers[0].mixer.A_log.dtype == torch.float32
    assert loaded.model.layers[0].mixer.z_proj.weight.dtype == torch.bfloat16


def test_the_tied_head_is_stored_once(hybrid: Any, softmax: Any) -> None:
    for (model, result), stored in ((hybrid, False), (softmax, True)):
        assert model.config.tie_word_embeddings is not stored
        assert ("lm_head.weight" in load_file(result.path / "model.safetensors")) is stored


def test_a_changed_weight_is_noticed(hybrid: Any, tmp_path: Path) -> None:
    model, result = hybrid
    folder = shutil.copytree(result.path, tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.001
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeddleError, match="differ by") as error:
        verify(model, folder, battery="none")
    assert error.value.code == "export-mismatch"


@pytest.mark.parametrize("name", ["ids_1", "ids_33", "ids_130"])
def test_logits_that_are_no_numbers_in_one_of_several_inputs_are_noticed(
    hybrid: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def with_nan(*given: Any) -> dict[str, torch.Tensor]:
        found = logits_of(*given)
        found[name][-1, -1, -1] = torch.nan
        return found

    monkeypatch.setattr(verify_file, "logits_of", with_nan)
    model, result = hybrid
    with pytest.raises(HeddleError, match="differ by nan") as error:
        verify(model, result.path, battery="none")
    assert error.value.code == "export-mismatch"


@pytest.mark.parametrize("apart", [verify_file.apart, reload.apart])
def test_the_largest_difference_is_nan_wherever_one_is(apart: Any) -> None:
    expected = {name: torch.zeros(2, 3, 4) for name in ("a", "b", "c")}
    found = {name: torch.full((2, 3, 4), value) for name, value in zip("abc", (0.1, 0.5, 0.2), strict=True)}
    assert apart(found, expected) == pytest.approx(0.5)
    for name in found:
        broken = {**found, name: torch.full((2, 3, 4), torch.nan)}
        assert math.isnan(apart(broken, expected))
        assert math.isnan(apart(expected, broken))


def test_a_missing_file_is_noticed(hybrid: Any, tmp_path: Path) -> None:
    model, result = hybrid
    folder = shutil.copytree(result.path, tmp_path / "missing")
    (folder / "compose_cache.py").unlink()
    with pytest.raises(HeddleError, match="does not load"):
        verify(model, folder, battery="none")


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch, hybrid: Any) -> None:
    """The check in a clean process takes seconds; here it is not what is tested."""
    _, result = hybrid
    found = export_file.Verification(result.max_difference, "", "5", "2")
    monkeypatch.setattr(export_file, "verify", lambda *_, **__: found)


@pytest.mark.usefixtures("_unchecked")
def test_only_an_earlier_export_is_overwritten(tmp_path: Path) -> None:
    model, out = model_of(LIGHTNING), tmp_path / "deep" / "out"
    export(model, out, card=CARD)
    assert out.stat().st_mode & 0o700 == 0o700
    (out / "notes.txt").write_text("mine")
    with pytest.raises(HeddleError, match="is there already") as error:
        export(model, out, card=CARD)
    assert error.value.code == "file-exists"
    export(model, out, card=CARD, overwrite=True)
    assert is_export(out)
    assert not (out / "notes.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(HeddleError, match="is there already"):
        export(model, tmp_path / "other", card=CARD, overwrite=True)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "mine"


FULL = "No space left on device"
# As Python tells a full disk, and as the library of safetensors does.
FULL_DISKS = [OSError(errno.ENOSPC, FULL), SafetensorError(f"I/O error: {FULL} (os error {errno.ENOSPC})")]


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("told", FULL_DISKS, ids=["python", "safetensors"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise told

    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(HeddleError, match="no space left") as error:
        export(model_of(LIGHTNING), tmp_path / "out", card=CARD)
    assert error.value.code == "disk-full"
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hybrid: Any
) -> None:
    _, result = hybrid
    folder = shutil.copytree(result.path, tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise HeddleError("export-mismatch", "no")

    monkeypatch.setattr(export_file, "verify", fail)
    with pytest.raises(HeddleError, match="no"):
        export(model_of(LIGHTNING), folder, card=CARD, overwrite=True)
    assert (
        load_file(folder / "model.safetensors").keys() == load_file(result.path / "model.safetensors").keys()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@torch.no_grad()
def test_the_kernels_in_an_export_compute_the_same(hybrid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, result = hybrid
    inputs = fixed_inputs(model.config.vocab_size)
    plain, exact = logits_of(model, inputs), copy.deepcopy(model).double()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with tempfile.TemporaryDirectory() as scratch:
        task = {"auto_class": auto_class(model), "folder": str(result.path), "hidden": list(HIDDEN)}
        _, found = reload_in_clean_process(task, inputs, Path(scratch))
    for name, ids in inputs.items():
        right = exact(input_ids=ids, use_cache=False).logits
        error, baseline = (float((one[name] - right).norm() / right.norm()) for one in (found, plain))
        assert error <= 2 * baseline + EPSILON[torch.float32]
        # Not bit-equal: other code did it.
        assert not torch.equal(found[name], plain[name])


@pytest.mark.usefixtures("_unchecked")
def test_a_users_tokenizer_travels_with_its_special_tokens(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(260)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w7", padding_side="right")
    own.save_pretrained(tmp_path / "words")
    model = model_of(LIGHTNING)
    model.resize_token_embeddings(264, mean_resizing=False)
    result = export(model, tmp_path / "out", card=CARD, tokenizer=str(tmp_path / "words"))
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    assert tokenizer("w3 w250")["input_ids"] == [3, 250]
    assert tokenizer.padding_side == "left"
    assert json.loads((result.path / "config.json").read_text())["eos_token_id"] == 7
    assert json.loads((result.path / "generation_config.json").read_text())["eos_token_id"] == 7


def test_a_tokenizer_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    model = HeddleForCausalLM(HeddleConfig(vocab_size=200, hidden_size=32))
    with pytest.raises(HeddleError, match="has 256 ids") as error:
        export(model, tmp_path / "out", card=CARD)
    assert error.value.code == "tokenizer-mismatch"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_own_module_cache")
def test_the_snippet_of_the_card_runs(hybrid: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, result = hybrid
    text = (result.path / "README.md").read_text()
    snippet = text.partition("```python\n")[2].partition("```")[0].replace("PATH", str(result.path))
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("def main():")
