"""Loads an exported folder in a process that has no heddle, and writes down what it computes.

Run by `verify` as `python -I -c <this file> TASK.json`; it imports nothing of ours, and runs the file of the parity battery
that the task names. Packages that an export must not need are hidden from every finder, as if they were not installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import platform
import runpy
import signal
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

# Tensors that the class has and the folder has not, and the other way round, and those of another shape.
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
# <linux/prctl.h>
PR_SET_PDEATHSIG = 1


class _Hidden(MetaPathFinder):
    """A finder that does not find some packages."""

    def __init__(self, finder: Any, names: frozenset[str]) -> None:
        self._finder, self._names = finder, names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return (
            None
            if fullname.partition(".")[0] in self._names
            else self._finder.find_spec(fullname, path, target)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide(names: frozenset[str]) -> None:
    """Makes `names` impossible to import."""
    sys.meta_path[:] = [_Hidden(finder, names) for finder in sys.meta_path]


def end_with_parent() -> None:
    """Have the system end this process with the one that waits for it; only Linux can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as told:
        for line in told:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def logits_of(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the model answers to each input, without a cache."""
    return {name: model(input_ids=ids, use_cache=False).logits for name, ids in inputs.items()}


def generated(model: Any, tokenizer: Any, task: dict[str, Any]) -> tuple[str, int]:
    """A text, and how many of its tokens are others without a cache, if that is asked."""
    prompt = tokenizer(task["prompt"], return_tensors="pt")
    options = {"max_new_tokens": task["new_tokens"], "do_sample": False}
    if task["checks_cache"]:
        # As many as are told, greedily, whatever stops the model and however it generates by default.
        options |= {"min_new_tokens": task["new_tokens"], "num_beams": 1}
    tokens = model.generate(**prompt, **options)
    again = model.generate(**prompt, **options, use_cache=False) if task["checks_cache"] else tokens
    # One may have ended before the other.
    size = min(tokens.shape[1], again.shape[1])
    differing = int((tokens[:, :size] != again[:, :size]).sum()) + abs(tokens.shape[1] - again.shape[1])
    return tokenizer.decode(tokens[0]), differing


def battery_of(task: dict[str, Any], *loaded: Any) -> Any:
    """The checks of the parity battery, whose files stand beside this one, in the form that the task names."""
    parity, reader, known = (
        runpy.run_path(task[name]) for name in ("battery_file", "reader_file", "known_file")
    )
    beside = (reader["second_reader"], known["known_failures"])
    return parity["asked"](parity["Loaded"](*loaded, *beside), task["battery"])


def loader(task: dict[str, Any]) -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """What loads a folder in float32, and tells which tensors it and the class do not have in common."""
    import torch
    import transformers

    usual = {"trust_remote_code": task["trusted"], "dtype": torch.float32, "output_loading_info": True}

    def load(folder: str) -> tuple[Any, dict[str, Any]]:
        model, loading = getattr(transformers, task["auto_class"]).from_pretrained(folder, **usual)
        return model.eval(), loading

    return load


def apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference between two sets of logits; NaN if there is one anywhere, which Python's max may pass over."""
    import torch

    return float(torch.stack([(found[name] - expected[name]).abs().max() for name in expected]).max())


def looked_at(task: dict[str, Any], load: Callable[[str], tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    """What the model computes, writes and gives when it is saved again; it is gone from memory afterwards."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    model, loading = load(task["folder"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["folder"], trust_remote_code=task["trusted"])
    inputs = load_file(task["inputs"])
    with torch.no_grad():
        logits = logits_of(model, inputs)
        text, differing = generated(model, tokenizer, task) if model.can_generate() else ("", 0)
    known = runpy.run_path(task["known_file"])
    excuse, _ = known["known_failures"](model.config).get(known["GENERATION"], ("", ""))
    save_file(logits, task["logits"])
    model.save_pretrained(task["again"])
    # One model is in memory at a time.
    del model
    gc.collect()
    with torch.no_grad():
        again = logits_of(load(task["again"])[0], inputs)
    gc.collect()
    return {
        "text": text,
        "saved_again": apart(again, logits),
        "tokens_differ": differing,
        "cache_excuse": excuse,
        "keys": sorted(str(key) for kind in KEYS for key in loading[kind]),
    }


def main(task: dict[str, Any]) -> None:
    end_with_parent()
    sys.path[:] = task["path"]
    hide(frozenset(task["hidden"]))
    import torch
    import transformers

    gc.enable()
    load = loader(task)
    found = looked_at(task, load) | {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": processor(),
        "battery": {"rows": [], "form": "none", "seconds": 0.0},
    }
    if task["battery"]:
        auto_class, again = getattr(transformers, task["auto_class"]), found["saved_again"]
        told = (auto_class, task["folder"], task["again"], again, task["trusted"])
        found["battery"] = battery_of(task, load(task["folder"])[0], *told)
    found["imported"] = sorted(set(task["hidden"]) & set(sys.modules))
    with open(task["found"], "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    # What is imported stays: to collect it over and over would take a sixth of the time.
    gc.disable()
    with open(sys.argv[1], encoding="utf-8") as task_file:
        main(json.load(task_file))
