"""`heddle import` of exports with code of their own: the same hash and weights, and not a line of the folder's code is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_specs import ready, spec
from transformers import AutoTokenizer

from heddle import api, cli
from heddle.compose.hf import export as export_file
from heddle.compose.hf.card import Card
from heddle.compose.hf.export import export
from heddle.compose.hf.verify import Verification
from heddle.errors import HeddleError
from heddle.search.import_model import load_import
from heddle.specs import spec_hash

CAUSAL, CLASSIFIER = 0, 4
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Exports of a decoder, in several files, and of a classifier; that they are right is tested elsewhere."""
    base = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_file, "verify", lambda *_, **__: Verification(0.0, "", "5", "2"))
        for seed in (CAUSAL, CLASSIFIER):
            card = Card(str(seed), "version: 1\n")
            export(ready(spec(seed), seed), base / str(seed), card=card, max_shard_size="30KB")
    return {seed: base / str(seed) for seed in (CAUSAL, CLASSIFIER)}


@pytest.fixture
def copied(folders: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[CAUSAL], tmp_path / "copy"))


@pytest.mark.parametrize("seed", [CAUSAL, CLASSIFIER])
def test_hash_and_weights_come_back(folders: dict[int, Path], seed: int, tmp_path: Path) -> None:
    assert len([*folders[seed].glob("*.safetensors")]) > 1
    found = api.import_model(folders[seed], tmp_path / "in")
    assert (found.target, found.hash, found.note) == ("remote", spec_hash(spec(seed)), "")
    file, model, told = load_import(tmp_path / "in")
    assert told["hash"] == spec_hash(file.spec.model) == found.hash
    right = ready(spec(seed), seed).state_dict()
    assert model.state_dict().keys() == right.keys()
    assert all(torch.equal(one, right[name]) for name, one in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(file.spec.tokenizer)("a")["input_ids"] == [97]


def test_an_import_is_exported_to_the_same_files(
    folders: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_file, "verify", lambda *_, **__: Verification(0.0, "", "5", "2"))
    for seed, first in folders.items():
        made = api.import_model(first, tmp_path / f"in-{seed}").path
        again = api.export(made, tmp_path / f"out-{seed}", max_shard_size="30KB", target="remote").path
        assert "an export with code of its own" in (again / "README.md").read_text()
        for path in first.iterdir():
            if path.suffix in (".py", ".safetensors"):
                assert (again / path.name).read_bytes() == path.read_bytes(), path.name
        configs = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
        assert configs[0] == configs[1]


@pytest.mark.usefixtures("_own_module_cache")
def test_what_transformers_saved_again_comes_back(folders: dict[int, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model = load(folders[CAUSAL], trust_remote_code=True, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    found = api.import_model(tmp_path / "saved", tmp_path / "in")
    assert found.hash == spec_hash(spec(CAUSAL))
    right = model.state_dict()
    held = load_import(tmp_path / "in")[1].state_dict()
    assert all(torch.equal(one, right[name].float()) for name, one in held.items())


def test_no_code_of_the_folder_runs_and_other_code_is_told(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    for path in copied.glob("*.py"):
        path.write_text(f"open({str(marker)!r}, 'w')\n")
    (copied / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    with pytest.raises(SystemExit) as left:
        cli.main(["import", str(copied), "--out", str(tmp_path / "in")])
    assert not left.value.code
    assert "the Python files in it are not those of this Heddle" in capsys.readouterr().out
    assert not marker.exists()
    assert not (tmp_path / "in" / "tokenizer" / "tokenizer_config.json").exists()


def _wider(config: dict[str, Any]) -> None:
    config["spec"]["model"]["hidden_size"] *= 2


def _other_layer(config: dict[str, Any]) -> None:
    config["layers"][0]["norm_placement"] = (
        "sandwich" if config["layers"][0].get("norm_placement") != "sandwich" else "post"
    )


def _without_spec(config: dict[str, Any]) -> None:
    del config["spec"]


def _no_such_kind(config: dict[str, Any]) -> None:
    config["spec"]["model"]["blocks"]["a"]["mixer"] = {"kind": "attentoin", "heads": 2}


def _later_version(config: dict[str, Any]) -> None:
    config["spec"]["version"] = 10**6


def _no_layers(config: dict[str, Any]) -> None:
    config["layers"] = 5


EDITS: dict[str, tuple[Edit, str]] = {
    "a spec of another size": (_wider, "hidden_size is 48, and the spec beside it says 96"),
    "another layer than the spec has": (_other_layer, "layers.0.norm_placement is"),
    "no spec": (_without_spec, "spec holds no spec"),
    "a kind that is none": (_no_such_kind, "attentoin"),
    "a spec of a later Heddle": (_later_version, "spec is refused"),
    "layers that are none": (_no_layers, "is refused by HeddleConfig"),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_configuration_that_is_not_that_of_its_spec_is_refused_by_name(
    case: str, copied: Path, tmp_path: Path
) -> None:
    edit, told = EDITS[case]
    config = json.loads((copied / "config.json").read_text())
    edit(config)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeddleError, match=told) as error:
        api.import_model(copied, tmp_path / "in")
    assert error.value.code == "import-mismatch"
    assert error.value.errors[0].where.file == str(copied / "config.json")
    assert not (tmp_path / "in").exists()


def test_weights_that_are_not_those_of_the_spec_are_refused_by_name(copied: Path, tmp_path: Path) -> None:
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("model.norm.weight")
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HeddleError, match=r"tensor 'model.norm.weight'") as error:
        api.import_model(copied, tmp_path / "in")
    assert error.value.code == "checkpoint-broken"
    assert error.value.errors[0].where.file == str(copied / file)


def test_what_needs_a_causal_language_model_refuses_an_encoder(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    made = api.import_model(folders[CLASSIFIER], tmp_path / "in").path
    with pytest.raises(HeddleError, match="is an encoder") as error:
        api.reuse_policy(made)
    assert error.value.code == "bad-argument"


def test_an_import_whose_weights_are_cut_off_names_file_and_tensor(copied: Path, tmp_path: Path) -> None:
    made = api.import_model(copied, tmp_path / "in").path
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(HeddleError, match=r"tensor '.*' is cut off") as error:
        api.export(made, tmp_path / "out")
    assert (error.value.code, error.value.errors[0].where.file) == ("checkpoint-broken", str(weights))
