"""Folders of others: read without running anything, and refused by file and tensor where they are broken."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from heddle.compose.hf.checkpoint import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    open_checkpoint,
    read_config,
    require_trust,
)
from heddle.errors import HeddleError

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.bias": torch.arange(5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "mask": torch.tensor(True),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, tmp_path / WEIGHTS)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two files and their index."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(4), "c": torch.zeros(2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(folder: Path, code: str = "checkpoint-broken") -> str:
    with pytest.raises(HeddleError) as error:
        open_checkpoint(folder)
    assert error.value.code == code
    return str(error.value)


def bits(held: torch.Tensor) -> tuple[Any, ...]:
    return held.dtype, tuple(held.shape), held.flatten().view(torch.uint8).tolist()


def equal(found: Checkpoint, wanted: dict[str, torch.Tensor]) -> bool:
    loaded = found.load()
    return loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_a_checkpoint_is_read_as_it_was_written(folder: Path) -> None:
    found = open_checkpoint(folder)
    assert found.config == {"model_type": "llama"}
    assert found.stored["a.weight"].shape == (3, 4)
    assert found.stored["b.bias"].dtype == "BF16"
    assert equal(found, TENSORS)
    assert list(found.load(["b.bias"])) == ["b.bias"]


def test_shards_are_read_through_their_index(sharded: Path) -> None:
    found = open_checkpoint(sharded)
    assert equal(found, {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.zeros(2)})
    assert found.stored["c"].file.name == "two.safetensors"


@pytest.mark.parametrize(
    "file",
    ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "..\\one.safetensors", "C:one.safetensors",
     "pytorch_model.bin", ".safetensors", "one.safetensors\0", 7, None, ["one.safetensors"]],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_its_folder(sharded: Path, file: Any) -> None:
    write_index(sharded, {"a": file})
    assert "tensor 'a' names" in refused(sharded)


def test_files_of_a_folder_may_be_links_that_lead_out_of_it(sharded: Path) -> None:
    """Caches of Hugging Face are made of such links."""
    blobs = sharded / "elsewhere" / "blobs"
    blobs.mkdir(parents=True)
    folder = sharded / "snapshot"
    folder.mkdir()
    for file in (*sharded.glob("*.safetensors"), *sharded.glob("*.json")):
        file.rename(blobs / file.name)
        (folder / file.name).symlink_to(blobs / file.name)
    assert equal(open_checkpoint(folder), {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.zeros(2)})


def test_files_and_index_must_agree(sharded: Path) -> None:
    right = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    write_index(sharded, right | {"d": "one.safetensors"})
    assert "one.safetensors: tensor 'd' is not in the file" in refused(sharded)
    write_index(sharded, {name: right[name] for name in ("a", "b")})
    assert "two.safetensors: tensor 'c' is not in" in refused(sharded)
    write_index(sharded, right | {"a": "three.safetensors"})
    assert "tensor 'a' names three.safetensors, which is not there" in refused(sharded)
    write_index(sharded, [])
    assert "weight_map" in refused(sharded)
    write_index(sharded, right)
    save_file(TENSORS, sharded / WEIGHTS)
    assert "which of the two" in refused(sharded)


def test_a_file_cut_off_anywhere_is_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for length in range(len(whole)):
        (folder / WEIGHTS).write_bytes(whole[:length])
        told = refused(folder)
        assert WEIGHTS in told
        if length > int.from_bytes(whole[:8], "little") + 8:
            assert "cut off: it ends at byte" in told


def test_bytes_too_many_are_refused(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"x")
    assert "1 bytes that belong to no tensor" in refused(folder)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]}, "has 16 bytes, but F32 [2, 3] takes 24"),
        ({"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}, "has 16 bytes"),
        ({"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, "has shape"),
        ({"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 16]}, "has shape"),
        ({"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}, "has shape"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}, "has shape"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}, "has shape"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}, "begins at byte 4"),
        ({"dtype": "object", "shape": [4], "data_offsets": [0, 16]}, "has type 'object'"),
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "has type ['F32']"),
        ([], "has type None"),
    ],
)
def test_what_a_header_claims_is_held_against_the_file(folder: Path, entry: Any, told: str) -> None:
    write_raw(folder / WEIGHTS, {"x.y": entry}, bytes(16))
    found = refused(folder)
    assert f"tensor 'x.y' {told}" in found
    assert WEIGHTS in found


def test_tensors_may_not_overlap(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    write_raw(folder / WEIGHTS, {"x": entry, "y": entry}, bytes(16))
    assert "tensor 'y' begins at byte 0" in refused(folder)


def test_a_header_that_is_no_json_is_refused(folder: Path) -> None:
    for header in (b"{", b"[]", b'{"a": 1, "a": 1}', b"\xff\xfe", b"[" * 100_000):
        write_raw(folder / WEIGHTS, header, b"")
        assert WEIGHTS in refused(folder, "file-not-readable")
    (folder / WEIGHTS).write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    assert "cut off within its header" in refused(folder)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(tmp_path_factory: Any, data: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text("{}")
    save_file(TENSORS, folder / WEIGHTS)
    whole = bytearray((folder / WEIGHTS).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[at] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(whole)
    # Any other error fails the test.
    with suppress(HeddleError):
        found = open_checkpoint(folder).load()
        theirs = load_file(folder / WEIGHTS)
        assert {name: bits(held) for name, held in found.items()} == {
            name: bits(held) for name, held in theirs.items()
        }


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_pickles_are_refused_and_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs()))
    told = refused(tmp_path, "pickle-refused")
    assert "pytorch_model.bin" in told
    assert "can run any code" in told
    (tmp_path / "pytorch_model.bin").rename(tmp_path / WEIGHTS)
    refused(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    assert "no model folder" in refused(tmp_path / "nowhere", "file-not-found")
    assert "no model folder" in refused(tmp_path, "file-not-found")
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not JSON" in refused(tmp_path, "file-not-readable")
    (tmp_path / "config.json").write_text("{}")
    assert "neither model.safetensors" in refused(tmp_path, "file-not-found")


def test_a_configuration_may_not_be_huge(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(HeddleError, match="64 MiB") as error:
        read_config(tmp_path)
    assert error.value.code == "file-too-large"


def test_code_needs_trust(folder: Path) -> None:
    require_trust(folder, trusted=False)
    assert not open_checkpoint(folder).has_code
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["t.T", null]}}')
    with pytest.raises(HeddleError, match="--trust-remote-code") as error:
        require_trust(folder, trusted=False)
    assert error.value.code == "untrusted-code"
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    assert open_checkpoint(folder).has_code
    with pytest.raises(HeddleError, match=r"config\.json: auto_map"):
        require_trust(folder, trusted=False)
    require_trust(folder, trusted=True)


@pytest.mark.parametrize("key", ["attn_implementation", "_experts_implementation"])
def test_kernels_of_a_hub_need_trust(folder: Path, key: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", key: "someone/kernels"}))
    with pytest.raises(HeddleError, match="someone/kernels") as error:
        require_trust(folder, trusted=False)
    assert error.value.code == "untrusted-code"
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", key: "sdpa"}))
    require_trust(folder, trusted=False)


def test_an_adapter_does_not_take_the_place_of_the_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}'
    )
    for read in (open_checkpoint, lambda path: require_trust(path, trusted=True)):
        with pytest.raises(HeddleError, match="in place of this one") as error:
            read(folder)
        assert error.value.code == "checkpoint-broken"


def test_tensors_must_be_those_of_the_model(folder: Path) -> None:
    found = open_checkpoint(folder)
    shapes = {name: tuple(held.shape) for name, held in TENSORS.items()}
    found.expect(shapes)
    for changed, told in (
        (shapes | {"a.weight": (4, 3)}, f"{WEIGHTS}: tensor 'a.weight' is [3, 4], the model's is [4, 3]"),
        (shapes | {"c": (1,)}, "tensor 'c' is not stored"),
        (
            {name: shapes[name] for name in shapes if name != "mask"},
            "tensor 'mask' is no tensor of the model",
        ),
    ):
        with pytest.raises(HeddleError) as error:
            found.expect(changed)
        assert told in str(error.value)
