"""The second reader of the parity battery: the safetensors files of a folder as they lie there, against the class that loaded it.

Run by `reload.py` in a process that has no heddle; it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# Names that the writer of a class gives to what is published, and loaded, under others.
RENAMED = {
    "kimi_linear": (".mlp.", ".block_sparse_moe."),
    "olmo_hybrid": ("post_attention_layernorm", "feedforward_layer_norm"),
}
# Tensors that a class joins by rows, and its name for them; its writer cuts them into equal parts, whatever theirs are.
JOINED = {"olmo_hybrid": (("q_conv1d", "k_conv1d", "v_conv1d"), "conv1d")}
# Fields that are of a folder and not of a model: weights are in float32 where the class wrote them.
OF_A_FOLDER = frozenset(("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version"))


class Raw(Mapping[str, Tensor]):
    """Every tensor in the safetensors files of a folder, read when it is asked for."""

    def __init__(self, folder: str) -> None:
        self.files: dict[str, Path] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
            return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def second_reader(model: Any, folder: str, again: str) -> tuple[list[str], int]:
    """What is wrong with names, shapes and values in the files of `folder`, against the model of its class and what that wrote
    itself, in `again`, and with its configuration; and how many tensors there are. One tensor of the files is in memory at a
    time."""
    stored, resaved, held = Raw(folder), Raw(again), model.state_dict()
    kind = model.config.model_type
    held |= joined(stored, held, *JOINED.get(kind, ((), "")))
    published, written = RENAMED.get(kind, ("", ""))
    renamed = {name.replace(published, written): name for name in stored} if published else {}
    theirs = {renamed.get(name, name): name for name in resaved}
    wrong = [f"{name} is not written by the class" for name in stored if name not in theirs | held]
    wrong += [f"{name} is not in the files" for name in theirs if name not in stored]
    for name, tensor in stored.items():
        of_class = held.get(name)
        if (of_class is None or of_class.shape != tensor.shape) and name in theirs:
            of_class = resaved[theirs[name]]
        if of_class is not None and of_class.shape != tensor.shape:
            wrong.append(f"{name} is {list(tensor.shape)}, the class has {list(of_class.shape)}")
        elif of_class is not None and not torch.equal(tensor.to(of_class.dtype), of_class):
            wrong.append(f"{name} has other values")
    return [*wrong, *changed_fields(type(model.config), folder, again)], len(stored)


def changed_fields(config_class: Any, folder: str, again: str) -> list[str]:
    """Fields of the configuration that the class of `folder` reads otherwise of what it wrote itself, in `again`."""
    first, second = (config_class.from_pretrained(one).to_dict() for one in (folder, again))
    names = sorted({*first, *second} - OF_A_FOLDER)
    return [
        f"{name} of config.json is {first.get(name)!r}, written by the class {second.get(name)!r}"
        for name in names
        if first.get(name) != second.get(name)
    ]


def joined(
    stored: Mapping[str, Tensor], held: Mapping[str, Tensor], names: Sequence[str], name: str
) -> dict[str, Tensor]:
    """The rows of each tensor `name` of a class under the `names` that they have in the files."""
    found: dict[str, Tensor] = {}
    for key in [key for key in held if names and f".{name}." in key]:
        theirs = [key.replace(f".{name}.", f".{one}.") for one in names]
        rows = [stored[one].shape[0] for one in theirs if one in stored]
        if len(rows) == len(theirs) and sum(rows) == held[key].shape[0]:
            found |= dict(zip(theirs, torch.split(held[key], rows), strict=True))
    return found
