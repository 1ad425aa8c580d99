"""From a checkpoint of transformers to a folder of ours: a spec, weights, and the tokenizer's files.

<out>/spec.yaml            the spec; `heddle check`, `show`, `train` and `search` take it
<out>/model.safetensors    the weights under our names; a tied head is stored once
<out>/tokenizer/           tokenizer.json, what else a tokenizer has as data, and its chat templates
<out>/generation_config.json   which tokens stop it, how it samples
<out>/import.json          what it was, and the ids in its configuration; written last, so a folder that has it is whole
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heddle.compose.build import build
from heddle.compose.hf.checkpoint import CONFIG, INDEX, TOKENIZER_CONFIG, fill, read_config, read_json
from heddle.compose.hf.generation import FILE as GENERATION_CONFIG
from heddle.compose.hf.generation import Generation
from heddle.compose.hf.load_native import Imported, read_native
from heddle.compose.hf.load_remote import ImportedRemote, is_remote, read_remote
from heddle.compose.hf.model import HeddlePreTrainedModel
from heddle.compose.hf.native import REMOTE
from heddle.compose.hf.shards import write_file
from heddle.compose.hf.tokenizer import CHAT_TEMPLATE, MORE_TEMPLATES
from heddle.errors import HeddleError
from heddle.search.durable import full_disk_told, write_json, write_whole
from heddle.search.training import SPEC_FILE, WEIGHTS_FILE, weights_of
from heddle.specs import SpecFile, load, spec_hash, to_yaml

IMPORT_FILE, TOKENIZER = "import.json", "tokenizer.json"
TOKENIZER_FOLDER = "tokenizer"
# Beside tokenizer.json; the middle two are of older tokenizers.
TOKENIZER_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)


@dataclass(frozen=True, slots=True)
class ImportResult:
    """Where the folder is, the target that it was read from ("remote" for an export with code of its own), the hash of its spec,
    how many parameters it has, what of the folder was not taken, by name, and what else to tell."""

    path: Path
    target: str
    hash: str
    parameters: int
    left: tuple[str, ...] = ()
    note: str = ""


def import_folder(folder: Path | str, out: Path | str) -> ImportResult:
    """Reads the checkpoint in `folder` and writes the new folder `out`. No code of `folder` runs.

    The spec names the tokenizer's folder in `out` also where the checkpoint has none: bytes are not the ids of its model.

    Raises:
        HeddleError: "file-exists", "disk-full", and what `heddle.compose.hf.load_native.read_native` and
            `heddle.compose.hf.load_remote.read_remote` raise.
    """
    source, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HeddleError("file-exists", f"{out} is there already", hint="name a new or empty folder")
    tokenizer = out.resolve() / TOKENIZER_FOLDER
    read = _read(source, name=_name(source), tokenizer=str(tokenizer))
    model_hash = spec_hash(read.spec.model)
    taken = {CONFIG, INDEX, *(one.file.name for one in read.checkpoint.stored.values())}
    notes = [read.note]
    if (source / TOKENIZER).is_file():
        taken |= _copy_tokenizer(source, tokenizer)
    else:
        notes.append(
            f"no {TOKENIZER} in the folder: put one into {tokenizer}, which the spec names; train, search and export need it"
        )
    write_whole(out / SPEC_FILE, to_yaml(read.spec).encode())
    with full_disk_told(out / WEIGHTS_FILE):
        write_file(weights_of(read.model), out / WEIGHTS_FILE)
    if read.model.can_generate():
        taken.add(GENERATION_CONFIG)
        write_json(out / GENERATION_CONFIG, read.generation.fields)
    target, ids = read.target.name if isinstance(read, Imported) else REMOTE, read.generation.ids
    write_json(out / IMPORT_FILE, {"from": str(source), "target": target, "hash": model_hash, "ids": ids})
    parameters = sum(one.numel() for one in read.model.parameters())
    return ImportResult(
        out, target, model_hash, parameters, _left(read, taken), "; ".join(filter(None, notes))
    )


def _read(folder: Path, **fields: str) -> Imported | ImportedRemote:
    """A folder of either kind."""
    read = read_remote if is_remote(read_config(folder)) else read_native
    return read(folder, **fields)


def _left(read: Imported | ImportedRemote, taken: set[str]) -> tuple[str, ...]:
    """Files of the folder, and fields and tensors of those that were taken, which nothing in the import holds."""
    left = []
    for one in sorted(read.checkpoint.folder.iterdir()):
        inside = [f"{one.name}/{file.name}" for file in one.iterdir()] if one.is_dir() else []
        # Of a folder that was taken in part what is left is named.
        names = sorted(inside) if any(name in taken for name in inside) else [one.name]
        left += [name for name in names if one.name not in taken and name not in taken]
    if isinstance(read, Imported):
        left += [f"{name} of {CONFIG}" for name in read.left]
        if read.ignored:
            more = f" and {len(read.ignored) - 1} more" if len(read.ignored) > 1 else ""
            left.append(f"tensor {read.ignored[0]}{more}, which {read.target.model_class} passes over")
    if GENERATION_CONFIG in taken:
        left += [f"{name} of {GENERATION_CONFIG}" for name in read.generation.left]
    return tuple(left)


def is_import(path: Path | str) -> bool:
    """Whether folder `path` was written by `import_folder`."""
    return (Path(path) / IMPORT_FILE).is_file()


def load_import(path: Path | str) -> tuple[SpecFile, HeddlePreTrainedModel, dict[str, Any]]:
    """The spec, the model in float32, and what it was.

    Raises:
        HeddleError: what reading the spec raises; "checkpoint-broken" for weights that are not those of the spec, or cut off.
    """
    folder = Path(path)
    file = load(folder / SPEC_FILE)
    model = build(file.spec.model)
    fill(model, folder / WEIGHTS_FILE)
    told: dict[str, Any] = json.loads((folder / IMPORT_FILE).read_bytes())
    return file, model.eval(), told


def generation_of(path: Path | str) -> Generation | None:
    """How the model of an import generates; None of one that was made before that was kept.

    Raises:
        HeddleError: "file-not-readable" for a generation_config.json that is no JSON.
    """
    folder = Path(path)
    ids, file = read_json(folder / IMPORT_FILE).get("ids"), folder / GENERATION_CONFIG
    return None if ids is None else Generation(ids, read_json(file) if file.is_file() else {})


def _name(folder: Path) -> str:
    """The folder's name as the name of a spec."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name)[:64].strip("-.") or "imported"


def _copy_tokenizer(source: Path, out: Path) -> set[str]:
    """The tokenizer as data, and the names of what was copied: a configuration that names code stays behind."""
    named = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if TOKENIZER_CONFIG in named and read_json(source / TOKENIZER_CONFIG).get("auto_map"):
        named.remove(TOKENIZER_CONFIG)
    more = sorted(path for path in (source / MORE_TEMPLATES).glob("*.jinja") if path.is_file())
    with full_disk_told(out.parent):
        out.mkdir(parents=True)
        for name in (TOKENIZER, *named, *(f"{MORE_TEMPLATES}/{path.name}" for path in more)):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
    held = {f"{MORE_TEMPLATES}/{path.name}" for path in more}
    if more and held == {f"{MORE_TEMPLATES}/{path.name}" for path in (source / MORE_TEMPLATES).iterdir()}:
        held.add(MORE_TEMPLATES)
    return {TOKENIZER, *named, *held}
