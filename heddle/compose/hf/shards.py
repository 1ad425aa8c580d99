"""Writes the weights of a model as safetensors: one file, or several with the index that transformers reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from errno import EDQUOT, ENOSPC
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from heddle.compose.hf.checkpoint import INDEX, WEIGHTS
from heddle.errors import HeddleError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
MAX_SHARD_SIZE = "50GB"


def write_weights(weights: Mapping[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Writes model.safetensors, or model-00001-of-00003.safetensors … and their index where one file would be larger.

    A tensor that is larger alone has a file of its own.

    Raises:
        HeddleError: "bad-argument" for what is no size.
    """
    shards = _split(weights, size_of(max_shard_size))
    if len(shards) == 1:
        write_file(shards[0], folder / WEIGHTS)
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(shard, folder / file)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in weights.values()),
        "total_size": sum(tensor.nbytes for tensor in weights.values()),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def size_of(text: str) -> int:
    """Bytes of a size like "500MB" or "5GiB".

    Raises:
        HeddleError: "bad-argument".
    """
    found = re.fullmatch(r"(\d{1,12}) ?([a-zA-Z]{1,3})", text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or int(found[1]) == 0:
        raise HeddleError(
            "bad-argument", f"{text!r} is no size of a file", hint="a number with its unit, as 500MB or 5GB"
        )
    return int(found[1]) * unit


def _split(weights: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def write_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One file of safetensors. Raises OSError also for a full disk, which the library calls an error of its own."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = next((code for code in (ENOSPC, EDQUOT) if f"os error {code})" in str(error)), None)
        if code is None:
            raise
        raise OSError(code, str(error)) from error
    # The library's files are their owner's alone.
    path.chmod(as_umask_leaves(0o666))


def as_umask_leaves(mode: int) -> int:
    """The mode that a new file or folder has which is asked for with `mode`."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mode & ~mask
