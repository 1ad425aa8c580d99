"""The check of an export: a clean process loads the folder, and its logits are compared with ours."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heddle.compose.hf.card import ParityRow
from heddle.compose.hf.model import HeddlePreTrainedModel
from heddle.compose.mixers.kda import KdaModule
from heddle.errors import HeddleError

# What an exported folder must do without.
HIDDEN = ("heddle", "pydantic", "optuna", "ray", "networkx", "ruamel", "typer", "plotly")
TOLERANCE = 1e-5
PROMPT, NEW_TOKENS = "def main():", 16
# How many of a native class, with its own cache and without one.
NATIVE_TOKENS = 64
TIMEOUT_S = 600
# The forms of the battery: auto is the full one where that takes less than a minute (`parity.FULL_SECONDS`), else the short one.
AUTO, FULL, SHORT, NONE = BATTERIES = ("auto", "full", "short", "none")


@dataclass(frozen=True, slots=True)
class Verification:
    """What a clean process found: largest logit difference to this one, a generated text, its versions, the rows of the battery,
    and which form of it ran and why."""

    max_difference: float
    generated_text: str
    transformers: str
    torch: str
    device: str = ""
    parity: tuple[ParityRow, ...] = ()
    battery: str = ""


def verify(
    model: HeddlePreTrainedModel,
    folder: Path | str,
    *,
    hidden: Sequence[str] = HIDDEN,
    trusted: bool = True,
    battery: str = AUTO,
) -> Verification:
    """Loads `folder` in a process where `hidden` packages cannot be imported, and compares logits.

    Both sides compute in float32 on the CPU. Unless `trusted`, transformers runs no code of the folder: ours then takes what its
    class has in the place of a softplus, and where logits still are more than 1e-5 apart, as its code sums in another order, they
    are held to ours in float64, with twice the error of ours in float32 for their rounding (the rule of `kernels/accuracy.py`).
    The cache is not ours then either, and 64 tokens are generated with it and without.

    That process also generates from text (an encoder does not), saves the model again and loads what it saved, and runs the
    parity battery: "full", "short" (few steps, nothing generated, no bfloat16), "auto" (full where that takes less than a
    minute) or "none".

    Raises:
        HeddleError: "bad-argument" for another form of the battery; "export-mismatch" if it does not load, differs by more than
            1e-5 and, of a native class, that rounding, has other tensors than the class, fails a check, or generates other tokens
            with the cache of a native class than without, if the class is not known for that.
    """
    check_battery(battery)
    inputs = fixed_inputs(model.config.vocab_size)
    expected = logits_of(model if trusted else as_classes_round(model), inputs)
    with tempfile.TemporaryDirectory(prefix="heddle-verify-") as scratch:
        task = {"auto_class": auto_class(model), "folder": str(Path(folder).resolve()), "hidden": [*hidden]}
        native = {} if trusted else {"trusted": False, "checks_cache": True, "new_tokens": NATIVE_TOKENS}
        form = {"battery": "" if battery == NONE else battery}
        found, logits = reload_in_clean_process({**task, **native, **form}, inputs, Path(scratch))
    if found["imported"]:
        raise HeddleError("export-mismatch", f"the exported code imported {', '.join(found['imported'])}")
    if found["keys"]:
        raise HeddleError(
            "export-mismatch", f"the class and the folder differ in tensors: {', '.join(found['keys'])}"
        )
    tokens = _tokens_row(found)
    if tokens.verdict == "fail":
        told = f"of {NATIVE_TOKENS} tokens those with a cache and those without differ"
        raise HeddleError("export-mismatch", told)
    error = difference = apart(logits, expected)
    allowed = TOLERANCE
    if not trusted and not difference <= TOLERANCE:
        error, allowed = rounded_apart(model, inputs, logits, logits_of(model, inputs))
    # Written so that NaN fails too.
    if not (error <= allowed and found["saved_again"] <= TOLERANCE):
        raise HeddleError(
            "export-mismatch",
            f"logits of the exported folder differ by {error:.3g}, once saved again by "
            f"{found['saved_again']:.3g}; at most {allowed:.3g} and {TOLERANCE:g} are allowed",
        )
    rows = (clean_row(found, hidden), *parity_rows(found["battery"]["rows"]))
    # The full battery has a row of the same in float64.
    rows += () if trusted or tokens.check in {row.check for row in rows} else (tokens,)
    failed = [f"{row.check}: {row.figure:.3g}, {row.note}" for row in rows if row.verdict == "fail"]
    if failed:
        raise HeddleError("export-mismatch", f"the exported folder fails a check: {'; '.join(failed)}")
    versions = (found["transformers"], found["torch"], found["device"])
    return Verification(
        difference, found["text"], *versions, parity=rows, battery=_form_told(battery, found["battery"])
    )


def check_battery(battery: str) -> None:
    """That it is a form of the battery.

    Raises:
        HeddleError: "bad-argument".
    """
    if battery not in BATTERIES:
        raise HeddleError("bad-argument", f"battery is {battery!r}", hint=f"one of {', '.join(BATTERIES)}")


def _form_told(wanted: str, found: dict[str, Any]) -> str:
    """Which form of the battery ran, and why where nobody asked for it."""
    if wanted == AUTO and found["form"] == SHORT:
        return f"short: the full one would take some {found['seconds'] / 60:.0f} minutes here; heddle verify runs it"
    return str(found["form"])


def clean_row(found: dict[str, Any], hidden: Sequence[str]) -> ParityRow:
    """Whether the folder was loaded without the packages that were hidden."""
    imported = found["imported"]
    note = f"imported {', '.join(imported)}" if imported else f"without {hidden[0]}, no network"
    verdict = "fail" if imported else "pass"
    return ParityRow("loads in a clean process", float(len(imported)), 0.0, verdict, note)


def parity_rows(found: Sequence[dict[str, Any]]) -> tuple[ParityRow, ...]:
    """The rows of the battery as `parity.py` tells them; a check that fails with a reason is expected."""
    rows = []
    for row in found:
        verdict = "pass" if row["passed"] else "expected" if row["expected"] else "fail"
        notes = (row["expected"] if verdict == "expected" else "", row["note"])
        told = "; ".join(note for note in notes if note)
        rows.append(ParityRow(row["check"], row["figure"], row["tolerance"], verdict, told))
    return tuple(rows)


def _tokens_row(found: dict[str, Any]) -> ParityRow:
    """What became of the tokens that were written with a cache and without."""
    differing, excuse = found["tokens_differ"], found["cache_excuse"]
    verdict = "expected" if differing and excuse else "fail" if differing else "pass"
    check = f"greedy, {NATIVE_TOKENS} tokens, with and without cache"
    return ParityRow(check, float(differing), 0.0, verdict, excuse if verdict == "expected" else "")


def as_classes_round(model: HeddlePreTrainedModel) -> HeddlePreTrainedModel:
    """The model, or a copy which rounds as the native class of its mixers does where that loses digits.

    KimiLinearForCausalLM takes log(1 + exp(x)), which far below 0 loses those of exp(x).
    """
    if not any(isinstance(part, KdaModule) for part in model.modules()):
        return model
    twin = copy.deepcopy(model)
    for part in twin.modules():
        if isinstance(part, KdaModule):
            part.softplus = rounded_softplus
    return twin


def rounded_softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) as it is written, and x above 20."""
    return torch.where(x > 20.0, x, torch.log(1.0 + torch.exp(x)))


def fixed_inputs(vocab_size: int) -> dict[str, Tensor]:
    """Token ids of a few lengths around a chunk of the kernels.  Shapes:  [2, T] int64"""
    generator = torch.Generator().manual_seed(0)
    return {f"ids_{T}": torch.randint(vocab_size, (2, T), generator=generator) for T in (1, 33, 130)}


@torch.no_grad()
def logits_of(
    model: HeddlePreTrainedModel, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The model's logits in `dtype` on the CPU, wherever it lives."""
    first = next(model.parameters())
    plain = first.device.type == "cpu" and first.dtype == dtype
    twin = model if plain else copy.deepcopy(model).to("cpu", dtype)
    training = twin.training
    twin.eval()
    logits = {name: twin(input_ids=ids, use_cache=False).logits for name, ids in inputs.items()}
    twin.train(training)
    return logits


def rounded_apart(
    model: HeddlePreTrainedModel,
    inputs: dict[str, Tensor],
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> tuple[float, float]:
    """How far `found`, from other code, is from the model in float64, and how far it may be: 1e-5 and twice as far as `expected`,
    the model in float32, is."""
    exact = logits_of(model, inputs, torch.float64)
    return apart(found, exact), TOLERANCE + 2 * apart(expected, exact)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference between two sets of logits; NaN if there is one anywhere, which Python's max may pass over."""
    return float(torch.stack([(found[name] - expected[name]).abs().max() for name in expected]).max())


def auto_class(model: HeddlePreTrainedModel) -> str:
    """The automatic class of transformers for a model with a head: AutoModelForCausalLM, …"""
    return type(model).__name__.replace("Heddle", "AutoModel", 1)


def reload_in_clean_process(
    told: dict[str, Any], inputs: dict[str, Tensor], scratch: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `reload.py` finds, and the logits it computes of `inputs`.

    `told` has auto_class, folder and hidden, and may have battery (a form of it; "" runs none), trusted (whether the
    folder's code may run), first (folders of packages that come before this process's own) and timeout_s (none where the full
    battery is asked for).

    Raises:
        HeddleError: "export-mismatch" if the folder does not load.
    """
    names = ("task", "inputs", "logits", "found", "again")
    files = {name: str(scratch / name) for name in names}
    save_file(inputs, files["inputs"])
    usual = {
        "prompt": PROMPT,
        "new_tokens": NEW_TOKENS,
        "battery": "",
        "trusted": True,
        "checks_cache": False,
        "first": [],
        "timeout_s": None if told.get("battery") == FULL else TIMEOUT_S,
    }
    names_beside = {
        "battery_file": "parity.py",
        "reader_file": "second_reader.py",
        "known_file": "known_failures.py",
    }
    beside = {name: str(_beside(file)) for name, file in names_beside.items()}
    task: dict[str, Any] = {**usual, **told, **files, **beside}
    # Modules that this process has copied from other exports must not stand in for those of this one.
    task["path"] = task["first"] + [
        entry for entry in sys.path if entry and not Path(entry, "transformers_modules").exists()
    ]
    Path(files["task"]).write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-I", "-c", _beside("reload.py").read_text("utf-8"), files["task"]]
    done = _run(command, scratch, task["timeout_s"])
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise HeddleError(
            "export-mismatch",
            f"the exported folder does not load without heddle: {said[-1]}",
            hint="the last lines it wrote: " + " / ".join(said[-6:]),
        )
    return json.loads(Path(files["found"]).read_text(encoding="utf-8")), load_file(files["logits"])


def _beside(name: str) -> Path:
    return Path(__file__).with_name(name)


def _run(command: list[str], scratch: Path, timeout_s: float | None) -> subprocess.CompletedProcess[str]:
    """Runs with the network off, no GPU, and a module cache of its own."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    try:
        return subprocess.run(
            command,
            cwd=scratch,
            env=os.environ | settings,
            # transformers asks at a terminal before it runs remote code; there is nobody to answer.
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        what = f"the exported folder did not load and write within {timeout_s} s"
        raise HeddleError("export-mismatch", what, hint="try again on an idle machine") from error
