"""Exports with code of their own of random specs, under any version of transformers, in a process without Heddle.

    PYTHONPATH=tests:. python tests/remote_versions.py --transformers 5.17 5.19 --specs 50 --append --commit SHA

Every spec is written once, loaded by each version and compared with the model that was written: logits in float32 (at most 1e-5
apart), the hidden states of `AutoModel`, and 64 greedy tokens in float64 with a cache, without one, and beside ours. The figure
of bfloat16 is the worst relative norm of 64 tokens' logits against ours in float64. Rows go to
tests/bench/results/evidence-export.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import remote_spec_checks
import torch
from native_specs import IDS
from native_versions import RESULTS, TOKENS, greatest, install, path_of
from remote_specs import ready, spec
from safetensors.torch import load_file, save_file

from heddle.compose.hf.export import write_remote
from heddle.compose.hf.load_remote import read_remote
from heddle.compose.hf.parity import error
from heddle.compose.hf.verify import HIDDEN, TOLERANCE, apart, auto_class
from heddle.specs import spec_hash

SCRIPT = Path(remote_spec_checks.__file__)


@dataclass(frozen=True, slots=True)
class Figure:
    """What a version made of one spec: `apart` in float32, `bfloat16` against float64."""

    seed: int
    kinds: str
    wrong: tuple[str, ...]
    apart: float
    bfloat16: float


class Folders:
    """Exports of the random specs of some seeds, with what the models in them compute here; `python` loads them."""

    @torch.no_grad()
    def __init__(self, base: Path, seeds: Sequence[int], *, python: str = sys.executable) -> None:
        self.python = python
        self.base, self.seeds = base, {str(seed): spec(seed) for seed in seeds}
        self.classes: dict[str, str] = {}
        self.right: dict[str, dict[str, Any]] = {}
        self.back: dict[str, bool] = {}
        self.ids = torch.randint(1, 256, (2, 70), generator=torch.Generator().manual_seed(0))
        save_file({"ids": self.ids}, base / "ids")
        for key, made in self.seeds.items():
            model = ready(made, int(key))
            self.classes[key] = auto_class(model)
            (base / key).mkdir()
            write_remote(model, base / key, IDS)
            imported = read_remote(base / key, name="back")
            same = all(
                one.equal(imported.model.state_dict()[name]) for name, one in model.state_dict().items()
            )
            self.back[key] = same and spec_hash(imported.spec.model) == spec_hash(made)
            self.right[key] = {"logits": model(self.ids).logits}
            exact = model.double()
            self.right[key]["exact"] = exact(self.ids).logits
            if model.can_generate():
                usual = {
                    "max_new_tokens": TOKENS,
                    "min_new_tokens": TOKENS,
                    "do_sample": False,
                    "pad_token_id": 0,
                }
                usual["attention_mask"] = torch.ones(1, 9, dtype=torch.long)
                self.right[key]["tokens"] = exact.generate(self.ids[:1, :9], **usual)

    def ask(self, first: Sequence[str] = ()) -> tuple[str, list[Figure]]:
        """The version that was asked, with the packages in `first` before those of this process, and its figures."""
        with tempfile.TemporaryDirectory(prefix="ask-", dir=self.base) as scratch:
            found, tensors = self._run([*first], Path(scratch))
        assert found["imported"] == []
        return found["transformers"], [self.figure(key, found["results"][key], tensors) for key in self.seeds]

    def _run(self, first: list[str], scratch: Path) -> tuple[Any, Mapping[str, Any]]:
        task = {
            "folders": {key: (str(self.base / key), self.classes[key]) for key in self.seeds}, "ids": str(self.base / "ids"),
            "tensors": str(scratch / "tensors"), "found": str(scratch / "found.json"), "tokens": TOKENS,
            "hidden": [*HIDDEN], "path": [*first, str(SCRIPT.parent), *path_of(self.python)],
        }  # fmt: skip
        (scratch / "task.json").write_text(json.dumps(task))
        settings = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch / "hf"),
            "HF_MODULES_CACHE": str(scratch / "modules"),
        }
        settings |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [self.python, "-I", str(SCRIPT), str(scratch / "task.json")], cwd=scratch, text=True,
            env={**os.environ, **settings}, capture_output=True, timeout=1800, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads((scratch / "found.json").read_text()), load_file(scratch / "tensors")

    def figure(self, key: str, told: Mapping[str, Any], tensors: Mapping[str, Any]) -> Figure:
        """What a version, which told these things and gave these tensors, made of one spec."""
        kinds = "; ".join(str(one.mixer.kind) for one in self.seeds[key].blocks.values())
        if "failed" in told:
            return Figure(int(key), kinds, (told["failed"],), *[float("inf")] * 2)
        right = self.right[key]
        difference = apart({"": tensors[f"{key}.logits"]}, {"": right["logits"]})
        wrong = {
            f"tensors not in common: {told['keys']}": told["keys"],
            f"logits {difference:.2g} apart": not difference <= TOLERANCE,
            "AutoModel gives other hidden states": not told["bare_agrees"],
            "other tokens with a cache than without": not told["cache_agrees"],
            "other tokens than ours": "tokens" in right
            and not torch.equal(tensors[f"{key}.tokens"], right["tokens"]),
            "another hash, or other weights, read back": not self.back[key],
        }
        names = tuple(name for name, is_so in wrong.items() if is_so)
        return Figure(int(key), kinds, names, difference, error(tensors[f"{key}.bfloat16"], right["exact"]))


def row_of(version: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """What a version made of every spec, as a row."""
    return {
        "transformers": version,
        "remote_specs": len(figures),
        "wrong": [asdict(one) for one in figures if one.wrong],
        "worst_logit_apart": greatest(one.apart for one in figures),
        "median_bfloat16": median(one.bfloat16 for one in figures),
        "worst_bfloat16": greatest(one.bfloat16 for one in figures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", nargs="*", default=[], help="versions beside the installed one")
    parser.add_argument("--specs", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--python", default=sys.executable, help="loads the folders, of an environment without Heddle"
    )
    parser.add_argument("--append", action="store_true", help="append rows to evidence-export.jsonl")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="remote-") as scratch:
        seeds = range(chosen.first, chosen.first + chosen.specs)
        folders = Folders(Path(scratch), seeds, python=chosen.python)
        firsts = [[install(version, Path(scratch, version))] for version in chosen.transformers]
        for first in [*firsts, []]:
            row = {
                "time": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()), "commit": chosen.commit, "device": "cpu",
                "python": sys.version.split()[0], "torch": torch.__version__, "own_environment": chosen.python != sys.executable,
                "command": "python tests/remote_versions.py", **row_of(*folders.ask(first)),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if chosen.append:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
