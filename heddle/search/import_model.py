"""From a checkpoint of transformers to a folder of ours: a spec, weights, and the tokenizer's files.

<out>/spec.yaml            the spec; `heddle check`, `show`, `train` and `search` take it
<out>/model.safetensors    the weights under our names; a tied head is stored once
<out>/tokenizer/           tokenizer.json and its configuration, if the checkpoint has them
<out>/import.json          what it was; written last, so a folder that has it is whole
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from heddle.compose.build import build
from heddle.compose.hf.checkpoint import TOKENIZER_CONFIG, fill, read_config, read_json
from heddle.compose.hf.load_native import read_native
from heddle.compose.hf.load_remote import is_remote, read_remote
from heddle.compose.hf.model import HeddlePreTrainedModel
from heddle.compose.hf.native import REMOTE
from heddle.errors import HeddleError
from heddle.search.durable import full_disk_told, write_json, write_whole
from heddle.search.training import SPEC_FILE, WEIGHTS_FILE, weights_of
from heddle.specs import Spec, SpecFile, load, spec_hash, to_yaml

IMPORT_FILE, TOKENIZER = "import.json", "tokenizer.json"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True, slots=True)
class ImportResult:
    """Where the folder is, the target that it was read from ("remote" for an export with code of its own), the hash of its spec,
    how many parameters it has, and what else to tell."""

    path: Path
    target: str
    hash: str
    parameters: int
    note: str = ""


def import_folder(folder: Path | str, out: Path | str) -> ImportResult:
    """Reads the checkpoint in `folder` and writes the new folder `out`. No code of `folder` runs.

    Raises:
        HeddleError: "file-exists", "disk-full", and what `heddle.compose.hf.load_native.read_native` and
            `heddle.compose.hf.load_remote.read_remote` raise.
    """
    source, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HeddleError("file-exists", f"{out} is there already", hint="name a new or empty folder")
    tokenizer = str(out.resolve() / TOKENIZER_FOLDER) if (source / TOKENIZER).is_file() else "bytes"
    spec, model, target, note = _read(source, name=_name(source), tokenizer=tokenizer)
    model_hash = spec_hash(spec.model)
    if tokenizer != "bytes":
        _copy_tokenizer(source, out / TOKENIZER_FOLDER)
    write_whole(out / SPEC_FILE, to_yaml(spec).encode())
    _write_weights(model, out / WEIGHTS_FILE)
    write_json(out / IMPORT_FILE, {"from": str(source), "target": target, "hash": model_hash})
    return ImportResult(out, target, model_hash, sum(one.numel() for one in model.parameters()), note)


def _read(folder: Path, **fields: str) -> tuple[Spec, HeddlePreTrainedModel, str, str]:
    """The spec and the model of a folder, the target that it was, and what else to tell."""
    if is_remote(read_config(folder)):
        remote = read_remote(folder, **fields)
        return remote.spec, remote.model, REMOTE, remote.note
    native = read_native(folder, **fields)
    return native.spec, native.model, native.target.name, ""


def _write_weights(model: HeddlePreTrainedModel, path: Path) -> None:
    """Straight from the model's memory; the library calls a full disk an error of its own."""
    with full_disk_told(path):
        try:
            save_file(weights_of(model), path, metadata={"format": "pt"})
        except SafetensorError as error:
            if f"os error {errno.ENOSPC}" not in str(error):
                raise
            raise OSError(errno.ENOSPC, str(error)) from error


def is_import(path: Path | str) -> bool:
    """Whether folder `path` was written by `import_folder`."""
    return (Path(path) / IMPORT_FILE).is_file()


def load_import(path: Path | str) -> tuple[SpecFile, HeddlePreTrainedModel, dict[str, str]]:
    """The spec, the model in float32, and what it was.

    Raises:
        HeddleError: what reading the spec raises; "checkpoint-broken" for weights that are not those of the spec, or cut off.
    """
    folder = Path(path)
    file = load(folder / SPEC_FILE)
    model = build(file.spec.model)
    fill(model, folder / WEIGHTS_FILE)
    told: dict[str, str] = json.loads((folder / IMPORT_FILE).read_bytes())
    return file, model.eval(), told


def _name(folder: Path) -> str:
    """The folder's name as the name of a spec."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name)[:64].strip("-.") or "imported"


def _copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer as data: a configuration that names code stays behind."""
    with full_disk_told(out.parent):
        out.mkdir(parents=True)
        shutil.copyfile(source / TOKENIZER, out / TOKENIZER)
        config = source / TOKENIZER_CONFIG
        if config.is_file() and not read_json(config).get("auto_map"):
            shutil.copyfile(config, out / TOKENIZER_CONFIG)
