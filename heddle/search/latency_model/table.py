"""Measurements that outlive a run: a folder of small files, addressed by what was measured and with what.

    <cache>/latency/<environment digest>/environment.json
    <cache>/latency/<environment digest>/<key>.json

The environment is all that a latency depends on besides spec and place. Under a new one nothing is found; but where only
software changed, and a few sentinels measured anew agree with an older environment within 2 %, its rows are taken over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import heddle
from heddle.kernels.configs.found import cache_folder, kernel_digest, running_digest
from heddle.search import environment
from heddle.search.cores import usable_cores
from heddle.search.durable import write_json
from heddle.search.ledger import key_of

FORMAT = 1
ENVIRONMENT_FILE = "environment.json"
SENTINELS = 5
AGREE = 0.02
# Where a change means another machine: no sentinel can speak for its rows.
MACHINE = ("device", "kind", "dtype", "threads")
# The code that a latency is made of, by what it is called in the environment.
CODE = {"kernels": "kernels", "modules": "compose"}


def timing_environment(device: str) -> dict[str, Any]:
    """What a latency on `device` depends on besides spec, shape and phase."""
    packages = environment.package_versions()
    return {
        "device": environment.device_name(device),
        "kind": device,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "threads": usable_cores() if device == "cpu" else None,
        "driver": environment.driver_version(),
        "cuda": torch.version.cuda,
        "torch": packages.get("torch"),
        "triton": packages.get("triton"),
        **{name: code_digest(folder) for name, folder in CODE.items()},
        **({} if running_digest() == kernel_digest() else {"launches": running_digest()}),
    }


@cache
def code_digest(part: str) -> str:
    """A digest of every file of code and of launch configurations in heddle/<part>."""
    folder, digest = Path(heddle.__file__).parent / part, hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".json") and path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Table:
    """Rows of one environment. A row is written whole or not at all, and never changed."""

    def __init__(self, made_with: Mapping[str, Any], folder: Path | None = None) -> None:
        self.environment = dict(made_with)
        self._root = (cache_folder() if folder is None else folder) / "latency"
        self._folder = self._root / key_of(self.environment)

    def get(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of `inputs`; None where it was never measured, or cannot be read."""
        return _read(self._folder / f"{key_of(inputs)}.json")

    def put(
        self, inputs: Mapping[str, Any], row: Mapping[str, Any], *, taken_from: str | None = None
    ) -> None:
        """Keep a row. `taken_from` is the digest of the older environment that it was measured in.

        Raises:
            HeddleError: "disk-full".
        """
        if not (self._folder / ENVIRONMENT_FILE).exists():
            write_json(self._folder / ENVIRONMENT_FILE, self.environment)
        kept = {"format": FORMAT, "inputs": dict(inputs), "row": dict(row), "taken_from": taken_from}
        write_json(self._folder / f"{key_of(inputs)}.json", kept)

    def adopt(
        self,
        wanted: Sequence[Mapping[str, Any]],
        measure: Callable[[Mapping[str, Any]], dict[str, Any]],
        figures: Sequence[str],
    ) -> int:
        """Take over rows of an older environment of this machine for what of `wanted` is missing; gives how many.

        Up to five sentinels, spread over those rows, are measured anew and kept; the others are taken over when every one of
        `figures` of every sentinel agrees within 2 %. The newest environment is asked first.
        """
        missing = [inputs for inputs in wanted if self.get(inputs) is None]
        for folder in self._older():
            known = [(one, row) for one in missing if (row := _read(folder / f"{key_of(one)}.json"))]
            if len(known) <= SENTINELS:
                continue
            places = {index * (len(known) - 1) // (SENTINELS - 1) for index in range(SENTINELS)}
            agreed = True
            for place in sorted(places):
                inputs, old = known[place]
                fresh = measure(inputs)
                self.put(inputs, fresh)
                agreed = agreed and all(_agree(old[name], fresh[name]) for name in figures)
                if not agreed:
                    break
            if not agreed:
                missing = [inputs for inputs in missing if self.get(inputs) is None]
                continue
            rest = [one for index, one in enumerate(known) if index not in places]
            for inputs, row in rest:
                self.put(inputs, row, taken_from=folder.name)
            return len(rest)
        return 0

    def _older(self) -> list[Path]:
        """Folders of other environments of the same machine, the newest first."""
        found = []
        for path in self._root.glob(f"*/{ENVIRONMENT_FILE}"):
            other = _json(path)
            same = other is not None and all(
                other.get(name) == self.environment.get(name) for name in MACHINE
            )
            if same and path.parent != self._folder:
                found.append(path)
        return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def _agree(old: Any, new: Any) -> bool:
    if old is None or new is None:
        return old is new
    return abs(float(new) / float(old) - 1) <= AGREE


def _read(path: Path) -> dict[str, Any] | None:
    kept = _json(path)
    if kept is None or kept.get("format") != FORMAT:
        return None
    row: dict[str, Any] = kept["row"]
    return row


def _json(path: Path) -> dict[str, Any] | None:
    """The mapping in a file; None where there is none: a cache that somebody spoilt costs a measurement, nothing more."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
