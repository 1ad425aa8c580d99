"""Reads an export with code of its own as a spec and a model of ours. No code of it runs: config.json holds the spec."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heddle.compose.build import build, config_for
from heddle.compose.hf.checkpoint import CONFIG, Checkpoint, open_checkpoint
from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.export import source_files
from heddle.compose.hf.generation import Generation, read_generation
from heddle.compose.hf.model import HeddlePreTrainedModel
from heddle.errors import HeddleError, Where
from heddle.specs import Spec, loads

# What a configuration of ours has beside what transformers writes into every one.
FIELDS = (
    "vocab_size", "hidden_size", "context_length", "norm_eps", "embedding_multiplier", "logit_multiplier", "logit_softcap",
    "lower_bounds_width", "constant_tokens", "model_kind", "readout", "num_labels", "tie_word_embeddings", "layers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImportedRemote:
    """A model read from a folder, its spec, and how it generates; `note` tells where the folder's code is another than would be
    written today."""

    spec: Spec
    model: HeddlePreTrainedModel
    checkpoint: Checkpoint
    generation: Generation
    note: str = ""


def is_remote(config: Mapping[str, Any]) -> bool:
    """Whether config.json is one of a model of ours, which `read_remote` reads."""
    return config.get("model_type") == HeddleConfig.model_type


def read_remote(folder: Path | str, *, name: str, tokenizer: str = "bytes") -> ImportedRemote:
    """The spec and the model of an export with code of its own; `name` and `tokenizer` are those of the spec.

    The spec must give the very configuration that it stands in, and the files must hold the tensors of its model.

    Raises:
        HeddleError: "import-mismatch", naming the field; "checkpoint-broken", naming the tensor, and what else `open_checkpoint`
            raises.
    """
    checkpoint = open_checkpoint(folder)
    spec = _spec(checkpoint, {"name": name, "tokenizer": tokenizer})
    model = _understood(spec, checkpoint)
    generation = read_generation(checkpoint.folder, checkpoint.config, checkpoint.config)
    _load(checkpoint, model)
    note = _other_code(model, checkpoint.folder)
    return ImportedRemote(spec, model.eval(), checkpoint, generation, note)


def _spec(checkpoint: Checkpoint, fields: Mapping[str, str]) -> Spec:
    told = checkpoint.config.get("spec")
    if not isinstance(told, Mapping) or not {"version", "model"} <= told.keys():
        what = "holds no spec: what wrote it was not heddle export, or one older than this"
        raise _mismatch(checkpoint.folder, "spec", what, hint="export the model again, or take its spec.yaml")
    text = json.dumps({"version": told["version"], **fields, "model": told["model"]})
    try:
        return loads(text, file=str(checkpoint.folder / CONFIG)).spec
    except HeddleError as error:
        raise _mismatch(checkpoint.folder, "spec", f"is refused: {error.what}", hint=error.hint) from error


def _understood(spec: Spec, checkpoint: Checkpoint) -> HeddlePreTrainedModel:
    """The model of the spec, random as yet, if the configuration is that of the spec."""
    try:
        theirs = HeddleConfig.from_dict(dict(checkpoint.config))
    # Its checks raise classes of their own, below no common one.
    except Exception as error:
        raise _mismatch(checkpoint.folder, "", f"is refused by HeddleConfig: {error}") from error
    made = config_for(spec.model)
    for name in FIELDS:
        apart = next(_apart(_plain(getattr(theirs, name)), _plain(getattr(made, name)), name), None)
        if apart is not None:
            path, found, wanted = apart
            raise _mismatch(checkpoint.folder, path, f"is {found!r}, and the spec beside it says {wanted!r}")
    return build(spec.model)


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(value))


def _apart(found: Any, wanted: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """The deepest fields that differ: path, and the value on each side."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys([*found, *wanted]):
            yield from _apart(found.get(name), wanted.get(name), f"{path}.{name}")
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            yield from _apart(*pair, f"{path}.{index}")
    elif found != wanted:
        yield path, found, wanted


@torch.no_grad()
def _load(checkpoint: Checkpoint, model: HeddlePreTrainedModel) -> None:
    """Fill the model, a tensor at a time: no two of it are ever in memory."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    ours = {name: one for name, one in model.state_dict().items() if name not in tied}
    checkpoint.expect({name: tuple(one.shape) for name, one in ours.items()})
    for name, tensor in ours.items():
        tensor.copy_(checkpoint.load([name])[name])


def _other_code(model: HeddlePreTrainedModel, folder: Path) -> str:
    """What to tell of Python files that are not those which an export would bring today."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    if files == {name: text.encode() for name, text in source_files(model).items()}:
        return ""
    return "the Python files in it are not those of this Heddle, which reads the spec and the weights alone"


def _mismatch(folder: Path, field: str, what: str, hint: str | None = None) -> HeddleError:
    told = f"{field} {what}" if field else f"the configuration {what}"
    return HeddleError("import-mismatch", told, where=Where(file=str(folder / CONFIG), path=field), hint=hint)
