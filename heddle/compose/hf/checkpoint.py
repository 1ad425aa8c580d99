"""Reads a folder that somebody else may have written: its configuration and its safetensors, and never a line of its code.

What a file claims is checked before anything is allocated or read for it: the header of each safetensors file against the
file's own size, the index against the headers. Files are read by name alone, in that folder alone. Layout of a file:
8 bytes n (little-endian), n bytes of JSON {tensor: {dtype, shape, data_offsets}}, then the data without a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from heddle.compose.targets.catalogue import BY_NAME
from heddle.errors import HeddleError, Where

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, TOKENIZER_CONFIG, ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"
# Of a configuration; with a "/" in it the value names kernels of a hub.
IMPLEMENTATIONS = tuple(
    f"{prefix}{kind}_implementation{suffix}"
    for prefix in ("", "_")
    for kind in ("attn", "experts")
    for suffix in ("", "_internal")
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Endings of files that torch.load unpickles, which can run anything.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Configurations are kilobytes; an index has a line for each tensor.
MAX_JSON = 64 << 20
# The limit of the safetensors library itself.
MAX_HEADER = 100_000_000
# torch's own.
MAX_DIMS = 64
# What to tell where code of a folder is of no matter.
UNUSED_CODE = "auto_map names code of the folder, which is not run: transformers has the class"
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint: its file, and its type (as safetensors names it) and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of transformers: its configuration, and every tensor it stores, by name."""

    folder: Path
    config: Mapping[str, Any]
    stored: Mapping[str, Stored]

    @property
    def has_code(self) -> bool:
        """Whether transformers would run Python files of this folder to load it."""
        return bool(self.config.get("auto_map")) and not is_known(self.config)

    @property
    def unused_code(self) -> str:
        """What to tell if the configuration names code of the folder though transformers has the class, else nothing."""
        return UNUSED_CODE if self.config.get("auto_map") and is_known(self.config) else ""

    def load(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors `names`, all if not given, as they are stored, on the CPU.

        Raises:
            HeddleError: "checkpoint-broken".
        """
        wanted = self.stored if names is None else {name: self._named(name) for name in names}
        found = {}
        for file in dict.fromkeys(one.file for one in wanted.values()):
            with _library_told(file), safe_open(file, framework="pt") as opened:
                for name in (name for name, one in wanted.items() if one.file == file):
                    found[name] = opened.get_tensor(name)
        return {name: found[name] for name in wanted}

    def expect(self, shapes: Mapping[str, tuple[int, ...]], *, ignored: Collection[str] = ()) -> None:
        """Refuse the checkpoint unless it stores these tensors, of these shapes, and no others but those `ignored`.

        Raises:
            HeddleError: "checkpoint-broken", naming file and tensor.
        """
        for name, shape in shapes.items():
            stored = self._named(name)
            if stored.shape != tuple(shape):
                raise _broken(stored.file, f"is {list(stored.shape)}, the model's is {list(shape)}", name)
        for name, stored in self.stored.items():
            if name not in shapes and name not in ignored:
                raise _broken(stored.file, "is no tensor of the model", name)

    def _named(self, name: str) -> Stored:
        if name not in self.stored:
            raise _broken(self.folder, "is not stored", name)
        return self.stored[name]


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """The checkpoint in `folder`; its tensors are not read yet. No code of the folder runs.

    Raises:
        HeddleError: "file-not-found" for what is no checkpoint, "pickle-refused", "file-not-readable", "file-too-large", and
            "checkpoint-broken" for truncated, oversized or mismatching files, naming file and tensor.
    """
    folder = Path(folder)
    return Checkpoint(folder, read_config(folder), _stored(folder))


def fill(model: nn.Module, path: Path) -> None:
    """Copies the tensors of one safetensors file into those of the model, one at a time; what has two names is stored once.

    Raises:
        HeddleError: "checkpoint-broken", naming file and tensor.
    """
    ours: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        ours.setdefault(tensor.data_ptr(), (name, tensor))
    checkpoint = Checkpoint(path.parent, {}, _header(path))
    checkpoint.expect({name: tuple(tensor.shape) for name, tensor in ours.values()})
    for name, tensor in ours.values():
        tensor.copy_(checkpoint.load([name])[name])


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        HeddleError: "file-not-found", "file-not-readable", "file-too-large", "checkpoint-broken" for one beside an adapter.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        hint = "name a folder that `heddle export` or save_pretrained of transformers wrote"
        raise HeddleError(
            "file-not-found", f"{folder} is no model folder: it has no {CONFIG}", where=_at(path), hint=hint
        )
    adapter = path.with_name(ADAPTER)
    if adapter.exists():
        # transformers would follow it, to another folder or to a hub, and load that model's weights.
        told = (
            f"{ADAPTER} beside {CONFIG} makes transformers load the model that it names in place of this one"
        )
        hint = (
            "merge the adapter into the model (merge_and_unload of peft) and save that, or take the file away"
        )
        raise HeddleError("checkpoint-broken", told, where=_at(adapter), hint=hint)
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        HeddleError: "file-not-readable" for what is not one, or has a key twice; "file-too-large".
    """
    if path.stat().st_size > MAX_JSON:
        raise HeddleError("file-too-large", f"more than {MAX_JSON >> 20} MiB", where=_at(path))
    return _object(path.read_bytes(), path)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether type and class are those of a class of transformers that we know: without trust it loads that, and runs no code of
    the folder, whatever `auto_map` names."""
    target = BY_NAME.get(str(config.get("model_type")))
    return target is not None and config.get("architectures") == [target.model_class]


def require_trust(folder: Path | str, *, trusted: bool) -> None:
    """Refuse a folder whose own code would run, unless the user trusts it.

    Raises:
        HeddleError: "untrusted-code", and what `read_config` raises.
    """
    told = {CONFIG: read_config(folder)}
    tokenizer = Path(folder) / TOKENIZER_CONFIG
    told |= {TOKENIZER_CONFIG: read_json(tokenizer)} if tokenizer.is_file() else {}
    for file, config in told.items():
        key = _foreign_code(config)
        if key is not None and not trusted:
            raise HeddleError(
                "untrusted-code",
                f"{folder} brings its own code, and loading it would run that"
                if key == "auto_map"
                else f"{folder} names code of a hub ({config[key]}), and loading it would fetch and run that",
                where=Where(file=str(Path(folder) / file), path=key),
                hint="read the Python files in it; if you made or trust them, say --trust-remote-code",
            )


def _foreign_code(config: Mapping[str, Any]) -> str | None:
    """The key of a configuration that makes transformers run code other than its own: the folder's, or kernels of a hub."""
    if config.get("auto_map") and not is_known(config):
        return "auto_map"
    return next((key for key in IMPLEMENTATIONS if "/" in str(config.get(key, ""))), None)


def _stored(folder: Path) -> dict[str, Stored]:
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file() and index.is_file():
        raise _broken(index, f"stands beside a {WEIGHTS}: which of the two is meant?")
    if single.is_file():
        return _header(single)
    if index.is_file():
        return _sharded(index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise HeddleError(
            "pickle-refused",
            f"the weights are pickles, and unpickling can run any code: {', '.join(pickles[:3])}",
            where=_at(folder),
            hint="write them as safetensors where you trust them: save_pretrained of transformers does",
        )
    raise HeddleError("file-not-found", f"neither {WEIGHTS} nor {INDEX}", where=_at(folder))


def _sharded(index: Path) -> dict[str, Stored]:
    """Every tensor of an index, which must agree with the headers of its files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken(index, 'has no object "weight_map"')
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise _broken(index, f"names {file!r}, which is no .safetensors file of this folder", name)
    headers = {}
    for file in dict.fromkeys(weight_map.values()):
        path = index.parent / file
        if not path.is_file():
            first = next(name for name, its in weight_map.items() if its == file)
            raise _broken(index, f"names {file}, which is not there", first)
        headers[file] = _header(path)
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name) != file:
                raise _broken(index.parent / file, f"is not in {INDEX} as a tensor of this file", name)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise _broken(index.parent / file, f"is not in the file, though {INDEX} says so", name)
    return {name: headers[file][name] for name, file in weight_map.items()}


def _is_plain(name: str) -> bool:
    """Whether `name` is a bare file name: nothing in it leads out of a folder, on any system."""
    return name.endswith(".safetensors") and not set(name) & set('/\\:\0"*?<>|') and not name.startswith(".")


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, after its header was held against its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _broken(path, f"is cut off within its header: {size} bytes")
        if length > MAX_HEADER:
            raise _broken(path, f"has a header of {length} bytes; at most {MAX_HEADER} are read")
        told = _object(file.read(length), path)
    told.pop("__metadata__", None)
    held = size - 8 - length
    spans = sorted((*_span(path, name, entry), name) for name, entry in told.items())
    end = 0
    for first, last, name in spans:
        if first != end:
            raise _broken(path, f"begins at byte {first}, the tensor before it ends at {end}", name)
        if last > held:
            raise _broken(path, f"is cut off: it ends at byte {last}, the file has {held} of data", name)
        end = last
    if end != held:
        last_name = spans[-1][2] if spans else None
        raise _broken(path, f"is followed by {held - end} bytes that belong to no tensor", last_name)
    return {name: Stored(path, entry["dtype"], tuple(entry["shape"])) for name, entry in told.items()}


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The first byte of a tensor's data and the one after its last, which must be as many as its type and shape ask for."""
    known = entry if isinstance(entry, dict) else {}
    kind, shape, span = known.get("dtype"), _counts(known.get("shape")), _counts(known.get("data_offsets"))
    if not isinstance(kind, str) or kind not in BITS:
        raise _broken(path, f"has type {kind!r}; known are {', '.join(BITS)}", name)
    if shape is None or span is None or len(span) != 2 or span[0] > span[1]:
        told = f"has shape {known.get('shape')!r} and data_offsets {known.get('data_offsets')!r}"
        raise _broken(path, told, name)
    needed = math.prod(shape) * BITS[kind] // 8
    if span[1] - span[0] != needed:
        what = f"has {span[1] - span[0]} bytes, but {kind} {list(shape)} takes {needed}"
        raise _broken(path, what, name)
    return span[0], span[1]


def _counts(value: Any) -> list[int] | None:
    """A list of a few whole numbers that count something, if `value` is one."""
    few = isinstance(value, list) and len(value) <= MAX_DIMS
    return value if few and all(type(one) is int and one >= 0 for one in value) else None


def _object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise HeddleError("file-not-readable", f"not JSON: {error}", where=_at(path)) from error
    if not isinstance(found, dict):
        raise HeddleError("file-not-readable", "not a JSON object", where=_at(path))
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal keys they take."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


@contextmanager
def _library_told(path: Path) -> Iterator[None]:
    """What the safetensors library does not like about a file, as an error of ours."""
    try:
        yield
    except SafetensorError as error:
        raise _broken(path, f"cannot be read: {error}") from error


def _at(path: Path) -> Where:
    return Where(file=str(path))


def _broken(path: Path, what: str, tensor: str | None = None) -> HeddleError:
    who = "the file" if tensor is None else f"tensor {tensor!r}"
    return HeddleError("checkpoint-broken", f"{who} {what}", where=_at(path))
