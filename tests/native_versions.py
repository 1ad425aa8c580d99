"""Native folders of random specs under any version of transformers, in a process without heddle.

    PYTHONPATH=tests:. python tests/native_versions.py --transformers 5.17 5.19 --specs 3 --append --commit SHA

For each class random specs are written once, loaded by each version and compared with the model that was written: logits in
float32 of the weights that a model begins with, at most 1e-5 apart, and of weights that all count by the rule of an export's
check, and 64 greedy tokens with a cache, without one, and beside ours. The figure of bfloat16 is the worst relative norm of 64
tokens' logits against ours in float64. Rows go to tests/bench/results/evidence-export.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import native_checks
import numpy as np
import torch
from native_specs import SPECS, begun, model_spec, ready, written
from safetensors.torch import load_file, save_file

from heddle.compose.hf.load_native import read_native
from heddle.compose.hf.native import runtime_of
from heddle.compose.hf.parity import error
from heddle.compose.hf.verify import HIDDEN, TOLERANCE, apart, as_classes_round, logits_of, rounded_apart
from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import BY_NAME
from heddle.specs import spec_hash

SCRIPT = Path(native_checks.__file__)
RESULTS = Path(__file__).parent / "bench" / "results" / "evidence-export.jsonl"
TOKENS = 64
# What an older version asks for in other versions than the installed one.
WITH = {"5.17": ["huggingface-hub>=1.5,<2", "httpx<1", "httpcore<2"]}


@dataclass(frozen=True, slots=True)
class Figure:
    """What a version made of one spec.

    `begun` is how far its logits are from ours where the weights are those that a model begins with, both in float32. With
    weights that all count `float32` is the same, ours with the class's softplus, `apart` how far its logits are from ours in
    float64, at most `allowed`; `bfloat16` and `ours_bfloat16` are against float64. `same_cached` are tokens with its cache as
    without, `same` without it as ours, and `excused` is whether the class is known to generate others with it, `tied` whether
    the first other token is as likely in float64, to 1e-5; `back` is the hash of what is read back.
    """

    target: str
    seed: int
    wrong: tuple[str, ...]
    begun: float
    float32: float
    apart: float
    bfloat16: float
    ours_bfloat16: float
    same_cached: bool = False
    excused: bool = False
    same: bool = False
    tied: bool = False
    back: bool = False


def install(version: str, target: Path) -> str:
    """A folder of packages with this version of transformers, and what it needs that is not installed."""
    wanted = [f"transformers=={version}.*", *WITH.get(version, [])]
    options = ["--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wanted], check=True, timeout=600)
    return str(target)


def path_of(python: str) -> list[str]:
    """Where an interpreter looks for packages."""
    if python == sys.executable:
        return [entry for entry in sys.path if entry]
    told = [python, "-I", "-c", "import json, sys; print(json.dumps(sys.path))"]
    entries: list[str] = json.loads(subprocess.run(told, capture_output=True, check=True, timeout=60).stdout)
    return entries


class Folders:
    """Folders of `specs` random specs for each class, with what the models in them compute here; `python` loads them."""

    @torch.no_grad()
    def __init__(
        self, base: Path, specs: int, targets: Sequence[str] = tuple(SPECS), *, python: str = sys.executable
    ) -> None:
        self.python = python
        self.base, self.paths, self.models, self.right = base, {}, {}, {}
        self.back: dict[str, bool] = {}
        self.begun: dict[str, Path] = {}
        self.ids = torch.randint(1, 256, (2, 70), generator=torch.Generator().manual_seed(0))
        save_file({"ids": self.ids}, base / "ids")
        mask = torch.ones(1, 9, dtype=torch.long)
        for name, seed in ((name, seed) for name in targets for seed in range(specs)):
            spec, key = model_spec(name, seed), f"{name} {seed}"
            model = self.models[key] = ready(spec, seed)
            self.paths[key] = written(model, name, base / f"{name}-{seed}")
            self.back[key] = spec_hash(read_native(self.paths[key], name="back").spec.model) == spec_hash(
                spec
            )
            beginning = begun(spec, seed)
            self.begun[key] = written(beginning, name, base / f"{name}-{seed}-begun")
            usual = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
            tokens = model.generate(self.ids[:1, :9], attention_mask=mask, pad_token_id=0, **usual)
            (exact,) = logits_of(model, {"ids": self.ids}, torch.float64).values()
            (narrow,) = logits_of(model, {"ids": self.ids}, torch.bfloat16).values()
            logits, as_class = (
                one(self.ids, use_cache=False).logits for one in (model, as_classes_round(model))
            )
            self.right[key] = {
                "logits": logits, "as_class": as_class, "tokens": tokens, "exact": exact, "bfloat16": narrow,
                "begun": beginning(self.ids, use_cache=False).logits,
            }  # fmt: skip

    def ask(self, first: Sequence[str] = ()) -> tuple[str, list[Figure]]:
        """The version that was asked, with the packages in `first` before those of this process, and its figures."""
        with tempfile.TemporaryDirectory(prefix="ask-", dir=self.base) as scratch:
            found, tensors = self._run([*first], Path(scratch))
        assert found["imported"] == []
        figures = [self._figure(key, told, tensors) for key, told in found["results"].items()]
        return found["transformers"], figures

    def _run(self, first: list[str], scratch: Path) -> tuple[Any, Mapping[str, Any]]:
        task = {
            "folders": {key: str(path) for key, path in self.paths.items()}, "ids": str(self.base / "ids"),
            "begun": {key: str(path) for key, path in self.begun.items()},
            "tensors": str(scratch / "tensors"), "found": str(scratch / "found.json"), "tokens": TOKENS,
            "hidden": [*HIDDEN], "path": first + path_of(self.python),
        }  # fmt: skip
        (scratch / "task.json").write_text(json.dumps(task))
        settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [self.python, "-I", str(SCRIPT), str(scratch / "task.json")], cwd=scratch, text=True,
            env={**os.environ, **settings, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=1800, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads((scratch / "found.json").read_text()), load_file(scratch / "tensors")

    def _figure(self, key: str, told: Mapping[str, Any], tensors: Mapping[str, Any]) -> Figure:
        target, seed = key.split()
        if "failed" in told:
            return Figure(target, int(seed), (told["failed"],), *[float("inf")] * 5)
        right, model, found = self.right[key], self.models[key], {"ids": tensors[f"{key}.logits"]}
        between = apart(found, {"ids": right["as_class"]})
        at_first = apart({"ids": tensors[f"{key}.begun"]}, {"ids": right["begun"]})
        exactly, allowed = rounded_apart(model, {"ids": self.ids}, found, {"ids": right["logits"]})
        excused = BY_NAME[target].miscounts(runtime_of(model))
        same = torch.equal(tensors[f"{key}.tokens"], right["tokens"])
        tied = not same and tie(model, right["tokens"], tensors[f"{key}.tokens"])
        wrong = {
            f"loaded as {told['class']}": told["class"] != BY_NAME[target].model_class,
            f"tensors not in common: {told['keys']}": told["keys"],
            f"logits {at_first:.2g} apart with the weights that a model begins with": not at_first
            <= TOLERANCE,
            f"logits {exactly:.2g} apart, {allowed:.2g} allowed": not between <= TOLERANCE
            and not exactly <= allowed,
            "other tokens with a cache than without": not told["cache_agrees"] and not excused,
            "other tokens than ours": not same and not tied,
            "another hash read back": not self.back[key],
        }
        narrow, ours = (error(one, right["exact"]) for one in (tensors[f"{key}.bfloat16"], right["bfloat16"]))
        names = tuple(name for name, is_so in wrong.items() if is_so)
        far = (at_first, between, exactly, narrow, ours)
        kept = (told["cache_agrees"], excused, same, tied, self.back[key])
        return Figure(target, int(seed), names, *far, *kept)


def row_of(version: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """What a version made of every class, as a row."""
    targets = dict.fromkeys(figure.target for figure in figures)
    return {
        "transformers": version,
        "specs": len(figures),
        "wrong": [asdict(one) for one in figures if one.wrong],
        "targets": {name: told_of([one for one in figures if one.target == name]) for name in targets},
    }


def told_of(held: Sequence[Figure]) -> dict[str, Any]:
    """Of the specs of one class the largest differences, and how many kept what is asked of all."""
    models = [model_spec(one.target, one.seed) for one in held]
    layers = [plan(model).runtime()["layers"] for model in models]
    mixers = dict.fromkeys(kind for all_of in layers for layer in all_of for kind in kinds_of(layer["mixer"]))
    return {
        "specs": len(held),
        "mixers": [*mixers],
        "channels": sorted({layer["channel"]["kind"] for all_of in layers for layer in all_of}),
        "orders": len({tuple(tuple(kinds_of(layer["mixer"])) for layer in all_of) for all_of in layers}),
        "begun": greatest(one.begun for one in held),
        "float32": greatest(one.float32 for one in held),
        "over": sum(not one.float32 <= TOLERANCE for one in held),
        "float32_from_float64": greatest(one.apart for one in held),
        "bfloat16": greatest(one.bfloat16 for one in held),
        "bfloat16_ours": greatest(one.ours_bfloat16 for one in held),
        "same_cached": sum(one.same_cached for one in held),
        "excused": sum(one.excused and not one.same_cached for one in held),
        "same_as_ours": sum(one.same for one in held),
        "tied": sum(one.tied for one in held),
        "hash_back": sum(one.back for one in held),
    }


def greatest(figures: Iterable[float]) -> float:
    """The greatest, which NaN is."""
    return float(np.max([*figures]))


def tie(model: Any, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether in float64 the first tokens in which two texts differ are as likely, to 1e-5.  Shapes:  one, other: [1, T]"""
    at = int((one != other)[0].int().argmax())
    (exact,) = logits_of(model, {"ids": one[:, :at]}, torch.float64).values()
    apart_by = exact[0, -1, one[0, at]] - exact[0, -1, other[0, at]]
    return abs(float(apart_by)) <= TOLERANCE


def kinds_of(mixer: Mapping[str, Any]) -> list[str]:
    """The kinds of a mixer, or of those it is made of; of attention also whether it has a window and positions."""
    if "mixers" in mixer:
        return [kind for one in mixer["mixers"] for kind in kinds_of(one)]
    window = "sliding " if mixer.get("window") else ""
    none = " without positions" if mixer["kind"] == "attention" and mixer["rope"] is None else ""
    return [f"{window}{mixer['kind']}{none}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", nargs="*", default=[], help="versions beside the installed one")
    parser.add_argument("--specs", type=int, default=3, help="of each class")
    parser.add_argument("--targets", nargs="+", default=[*SPECS], choices=[*SPECS], help="default: all")
    parser.add_argument(
        "--python", default=sys.executable, help="loads the folders, of an environment without Heddle"
    )
    parser.add_argument("--append", action="store_true", help="append rows to evidence-export.jsonl")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    asked = "".join(
        f" --{name} {' '.join(given)}"
        for name, given in (("transformers", chosen.transformers), ("targets", chosen.targets))
        if given
    )
    with tempfile.TemporaryDirectory(prefix="native-") as scratch:
        folders = Folders(Path(scratch), chosen.specs, chosen.targets, python=chosen.python)
        firsts = [[install(version, Path(scratch, version))] for version in chosen.transformers]
        for first in [*firsts, []]:
            row = {
                "time": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()), "commit": chosen.commit, "device": "cpu",
                "python": sys.version.split()[0], "torch": torch.__version__, "own_environment": chosen.python != sys.executable,
                "command": f"python tests/native_versions.py --specs {chosen.specs}{asked}", **row_of(*folders.ask(first)),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if chosen.append:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
