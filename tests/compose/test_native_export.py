"""Native folders as users meet them: verdicts with their lines, the clean process, what is refused on the way in and out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers as hf
from native_specs import HYBRID
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from heddle import api
from heddle.cli import app
from heddle.compose.build import build
from heddle.compose.hf import export as export_file
from heddle.compose.hf.card import Card
from heddle.compose.hf.checkpoint import Checkpoint
from heddle.compose.hf.export import export, is_export
from heddle.compose.hf.load_native import read_native
from heddle.compose.hf.verify import Verification
from heddle.compose.targets.catalogue import BY_NAME, TARGETS
from heddle.compose.targets.matrix import ROWS, exports, read_rows, with_tables
from heddle.errors import HeddleError
from heddle.search.import_model import load_import
from heddle.specs import ModelSpec, load, spec_hash
from heddle.specs.search import TargetName

ROOT = Path(__file__).parents[2]
CARD = Card("tiny", "version: 1\nname: tiny\n")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("specs") / "hybrid.yaml"
    path.write_text(HYBRID)
    return path


@pytest.fixture(scope="module")
def native(hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return api.export(hybrid, tmp_path_factory.mktemp("native") / "out", battery="short")


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_file, "verify", lambda *_, **__: Verification(0.0, "", "5", "2"))


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in found["targets"] if one["target"] == name)


def test_a_clean_process_loads_a_native_folder_that_holds_no_code(native: Any) -> None:
    assert native.target == "qwen3_5_text"
    assert native.max_difference <= 1e-5
    assert not [*native.path.glob("*.py")]
    assert "trust_remote_code" not in (native.path / "README.md").read_text()
    assert is_export(native.path)


def test_another_user_can_read_every_file_of_an_export(native: Any) -> None:
    mask = os.umask(0o077)
    os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in native.path.iterdir()}
    assert {*modes.values()} == {0o666 & ~mask}, modes


@pytest.mark.usefixtures("_unchecked")
def test_a_native_folder_in_shards_loads_and_comes_back(hybrid: Path, tmp_path: Path) -> None:
    whole = load_file(api.export(hybrid, tmp_path / "whole").path / "model.safetensors")
    made = api.export(hybrid, tmp_path / "shards", max_shard_size="20KB")
    shards = sorted(made.path.glob("model-*-of-*.safetensors"))
    assert (made.target, len(shards) > 2) == ("qwen3_5_text", True)
    assert not (made.path / "model.safetensors").exists()
    index = json.loads((made.path / "model.safetensors.index.json").read_text())
    found = {name: one for shard in shards for name, one in load_file(shard).items()}
    assert found.keys() == index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(one, found[name]) for name, one in whole.items())
    theirs, told = hf.AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
    assert not any(told.values()), told
    back, ids = read_native(made.path, name="x"), torch.arange(9)[None]
    assert (theirs(ids).logits - back.model(ids).logits).abs().max() <= 1e-5
    assert spec_hash(back.spec.model) == spec_hash(load(hybrid).spec.model)


def test_verdicts_name_the_field_its_line_and_what_the_class_has(hybrid: Path) -> None:
    found = api.targets(hybrid)
    assert row(found, "qwen3_5_text")["fits"]
    assert row(found, "qwen3_5_text")["servers"]["sglang"]["takes"] is False
    (first, *_) = row(found, "olmo3")["refused"]
    assert first["path"] == "layers.0.mixer.kind"
    assert (first["line"], "gated_deltanet" in first["why"]) == (8, True)
    assert "there it is kda or mla" in row(found, "kimi_linear")["refused"][0]["why"]
    assert row(found, "remote")["fits"]
    # A server is a target too: the nearest class that it has, and the field that forbids it there.
    assert (row(found, "vllm")["fits"], row(found, "vllm")["through"]) == (True, "qwen3_5_text")
    (refused,) = row(found, "sglang")["refused"]
    assert (refused["path"], refused["line"]) == ("layers.2.mixer.kind", 10)


def test_a_check_tells_what_fits_and_with_targets_what_forbids_the_rest(hybrid: Path) -> None:
    def told(*options: str) -> str:
        done = CliRunner().invoke(app, ["check", str(hybrid), *options])
        assert done.exit_code == 0, done.output
        return done.output

    lines = [line.split() for line in told().splitlines()]
    assert ["fits", "qwen3_5_text", "Qwen3_5ForCausalLM"] in lines
    assert ["fits", "vllm", "as", "qwen3_5_text"] in lines
    assert not any(line[:2] in (["fits", "llama"], ["fits", "sglang"]) for line in lines)
    assert "layers.0.mixer.kind: is gated_deltanet; there it is attention" in told("--targets")
    assert json.loads(told("--json"))["fits"] == ["qwen3_5_text", "qwen3_next", "remote", "vllm"]
    rows = json.loads(told("--json", "--targets"))["targets"]
    assert row({"targets": rows}, "llama")["refused"][0]["line"] == 8


def test_a_check_imports_no_torch(hybrid: Path) -> None:
    code = f"import sys; from heddle import api; api.check_with_targets({str(hybrid)!r}); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


def test_a_field_that_no_target_knows_is_refused_by_all() -> None:
    data = {"kind": "attention", "heads": 2, "qk_norm": True, "sinks": True}
    block = {"mixer": data, "channel": {"kind": "swiglu"}}
    sizes = {"vocab_size": 256, "hidden_size": 32, "blocks": {"a": block}, "layers": ["a"]}
    model = build(ModelSpec.model_validate(sizes))
    with pytest.raises(HeddleError, match=r"layers.0.mixer.sinks: is true; there it is none") as told:
        export(model, "never", card=CARD, target="qwen3")
    assert told.value.code == "target-mismatch"
    assert not Path("never").exists()


def test_an_unknown_target_is_told_with_the_nearest(hybrid: Path, tmp_path: Path) -> None:
    with pytest.raises(HeddleError, match="no target 'qwen35_text'") as told:
        api.export(hybrid, tmp_path / "out", target="qwen35_text")
    assert told.value.hint == "did you mean qwen3_5_text?"


def test_a_server_is_no_class_to_export_to(hybrid: Path, tmp_path: Path) -> None:
    with pytest.raises(HeddleError, match="sglang is a server") as told:
        api.export(hybrid, tmp_path / "out", target="sglang")
    assert told.value.code == "bad-argument"


@pytest.mark.usefixtures("_unchecked")
def test_force_replaces_a_native_export_and_no_checkpoint_of_others(hybrid: Path, tmp_path: Path) -> None:
    out = api.export(hybrid, tmp_path / "out").path
    assert api.export(hybrid, out, force=True, target="remote").target == "remote"
    assert api.export(hybrid, out, force=True).target == "qwen3_5_text"
    (out / "heddle.json").unlink()
    with pytest.raises(HeddleError, match="is there already"):
        api.export(hybrid, out, force=True)


def test_auto_goes_back_to_code_where_the_class_fails_its_check(
    hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, trusted: bool, **__: Any) -> Verification:
        if not trusted:
            raise HeddleError("export-mismatch", "logits differ")
        return Verification(0.0, "", "5", "2")

    monkeypatch.setattr(export_file, "verify", fail)
    result = api.export(hybrid, tmp_path / "auto")
    assert result.target == "remote"
    assert "qwen3_5_text" in result.note
    with pytest.raises(HeddleError, match="logits differ"):
        api.export(hybrid, tmp_path / "named", target="qwen3_5_text")


def test_an_export_is_imported_and_exported_again(native: Any, hybrid: Path, tmp_path: Path) -> None:
    result = api.import_model(native.path, tmp_path / "in")
    assert (result.target, result.hash) == ("qwen3_5_text", spec_hash(load(hybrid).spec.model))
    file, model, _ = load_import(result.path)
    assert spec_hash(file.spec.model) == result.hash
    assert torch.equal(model.model.norm.weight, read_native(native.path, name="x").model.model.norm.weight)
    with pytest.raises(HeddleError, match="is there already"):
        api.import_model(native.path, result.path)


def test_export_takes_an_import(native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_file, "verify", lambda *_, **__: Verification(0.0, "", "5", "2"))
    folder = api.import_model(native.path, tmp_path / "in").path
    again = api.export(folder, tmp_path / "again")
    theirs, ours = (load_file(path / "model.safetensors") for path in (native.path, again.path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_an_import_reads_a_few_tensors_at_a_time(
    native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    load_some = Checkpoint.load

    def told(self: Checkpoint, names: Any = None) -> Any:
        found = load_some(self, names)
        held.append(sum(one.nbytes for one in found.values()))
        return found

    monkeypatch.setattr(Checkpoint, "load", told)
    made = api.import_model(native.path, tmp_path / "in").path
    whole = load_file(native.path / "model.safetensors")
    assert sum(held) == sum(one.nbytes for one in whole.values())
    assert max(held) == max(one.nbytes for one in whole.values())
    assert (made / "model.safetensors").is_file()


def changed_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def changed_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return write


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "another activation": (changed_config(hidden_act="gelu"), "import-mismatch", "hidden_act is 'gelu'"),
    "an unknown field": (changed_config(trick=3), "import-mismatch", "trick is 3"),
    "a scaling that the language lacks": (
        changed_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "import-mismatch",
        "rope_parameters.rope_type is 'dynamic'",
    ),
    "numbers in few bits": (
        changed_config(quantization_config={"quant_method": "fp8"}),
        "import-mismatch",
        "quantization_config",
    ),
    "code": (
        changed_config(auto_map={"AutoConfig": "a.B"}, architectures=["B"]),
        "import-mismatch",
        "auto_map",
    ),
    "another class": (changed_config(model_type="jamba"), "import-mismatch", "model_type is 'jamba'"),
    "a size that is none": (changed_config(num_attention_heads=0), "import-mismatch", "configuration"),
    "heads of another size": (changed_config(head_dim=8), "checkpoint-broken", "q_proj"),
    "a tensor too few": (
        changed_weights(lambda held: held.pop("model.norm.weight")),
        "checkpoint-broken",
        "model.norm.weight",
    ),
    "a tensor too many": (
        changed_weights(lambda held: held.update(extra=held[EMBEDDING].clone())),
        "checkpoint-broken",
        "extra",
    ),
    "a tied head that is another": (
        changed_weights(lambda held: held.update({HEAD: held[EMBEDDING] + 1})),
        "import-mismatch",
        "tie_word_embeddings",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_a_spec_cannot_say_is_refused_by_name(case: str, native: Any, tmp_path: Path) -> None:
    change, code, told = REFUSED[case]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((native.path / name).read_bytes())
    change(tmp_path)
    with pytest.raises(HeddleError, match=re.escape(told)) as error:
        read_native(tmp_path, name="x")
    assert error.value.code == code


def test_an_import_runs_no_code_and_leaves_that_of_the_tokenizer_behind(native: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(native.path, tmp_path / "folder")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    made = api.import_model(folder, tmp_path / "in").path
    assert [path.name for path in (made / "tokenizer").iterdir()] == ["tokenizer.json"]
    changed_config(auto_map={"AutoModelForCausalLM": "code.Model"}, architectures=["Model"])(folder)
    with pytest.raises(HeddleError, match="names code of the folder, which is not run"):
        api.import_model(folder, tmp_path / "never")
    assert not (tmp_path / "ran").exists()


def test_fields_that_change_no_logits_are_passed_over(native: Any, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((native.path / name).read_bytes())
    changed_config(attention_dropout=0.1, initializer_range=0.5, eos_token_id=[1, 2])(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, HEAD: weights[EMBEDDING].clone()}, tmp_path / "model.safetensors")
    assert read_native(tmp_path, name="x").target.name == "qwen3_5_text"


def test_the_names_of_a_spec_are_those_of_the_catalogue() -> None:
    assert get_args(TargetName) == tuple(target.name for target in TARGETS) == (*BY_NAME,)


def test_the_tables_of_the_page_are_those_of_the_rows() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = read_rows(ROOT / ROWS)
    assert page == with_tables(page, rows), "python -m heddle.compose.targets.matrix writes them"


def test_rows_hold_every_class_in_every_version_and_nothing_that_is_wrong() -> None:
    rows = read_rows(ROOT / ROWS)
    found = exports(rows)
    versions = {version for _, version in found}
    assert {version.rpartition(".")[0] for version in versions} == {"5.17", "5.19", "5.23"}
    assert found.keys() == {(name, version) for name in BY_NAME for version in versions}
    for told in found.values():
        same = told["same_as_ours"] + told.get("tied", 0)
        assert {told["same_cached"] + told["excused"], same, told["hash_back"]} == {told["specs"]}
    imports = next(row["imports"] for row in reversed(rows) if "imports" in row)
    assert imports.keys() == BY_NAME.keys()
    assert all(told["held"] == told["configurations"] for told in imports.values())
