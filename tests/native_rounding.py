"""How far a native class and ours are off in float32, both held against float64, and that in float64 they are the same.

    PYTHONPATH=tests:. python tests/native_rounding.py --specs 50 kimi_linear --append --commit SHA

Classes of transformers cast to float32 within their layers whatever the type of the model is. `Wide` makes float64 of those
casts, so that the class computes in float64 throughout. For Kimi Linear the float32 pass is also repeated with a softplus that
is exact near 0 in the decay gate, where the class has log(1 + exp(x)). Ours is repeated with that formula, as an export is
compared, and with the classes' own chunk forms of the delta rule beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from native_specs import SPECS, model_spec, ready, written
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_5 import modeling_qwen3_5

from heddle.compose.hf.verify import as_classes_round, logits_of
from heddle.compose.mixers import gated_deltanet, kda

# Classes with a delta rule.
DELTA = ("qwen3_5_text", "qwen3_next", "olmo_hybrid", "kimi_linear")
RESULTS = Path(__file__).parent / "bench" / "results" / "evidence-export.jsonl"


class Wide(TorchFunctionMode):
    """Within it whoever asks torch for float32 gets float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        named = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return function(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def class_of(folder: Path) -> Any:
    """The model of a folder in float32; experts one by one, since a grouped product knows no float64."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, experts_implementation="eager").eval()


@torch.no_grad()
def in_float64(model: Any, ids: Tensor) -> Tensor:
    """The logits of the class with no float32 left; the model is in float64 afterwards."""
    with Wide():
        logits: Tensor = model.double()(ids, use_cache=False).logits
    return logits


def largest(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one.double() - other.double()).abs().max())


@contextmanager
def exact_softplus() -> Iterator[None]:
    """Kimi Linear's decay gate with torch's softplus."""
    gate = modeling_kimi_linear.KimiLinearForgetGate
    before = gate.forward

    def forward(self: Any, hidden: Tensor) -> Tensor:
        low = self.f_b_proj(self.f_a_proj(hidden)).float() + self.dt_bias.float()
        soft = torch.nn.functional.softplus(low).view(*hidden.shape[:2], -1, self.head_dim)
        return -torch.exp(self.A_log.float()) * soft

    gate.forward = forward
    try:
        yield
    finally:
        gate.forward = before


@contextmanager
def own_chunks() -> Iterator[None]:
    """Our delta rules in the chunk form of transformers."""
    before = gated_deltanet.gated_delta_rule, kda.kda

    def gated(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, **given: Any) -> Any:
        q, k = (one.repeat_interleave(v.shape[2] // one.shape[2], dim=2) for one in (q, k))
        sides = {"g": log_decay, "beta": beta, "initial_state": given["initial_state"]}
        return modeling_qwen3_5.torch_chunk_gated_delta_rule(q, k, v, **sides, output_final_state=True)

    def by_channel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, **given: Any) -> Any:
        sides = {"g": log_decay, "beta": beta, "initial_state": given["initial_state"]}
        return modeling_kimi_linear.chunk_kimi_delta_attention(q, k, v, **sides, output_final_state=True)

    gated_deltanet.gated_delta_rule, kda.kda = gated, by_channel
    try:
        yield
    finally:
        gated_deltanet.gated_delta_rule, kda.kda = before


@torch.no_grad()
def measured(name: str, seed: int) -> dict[str, float]:
    """The largest differences of a random spec's logits."""
    spec = model_spec(name, seed)
    ours = ready(spec, seed)
    ids = torch.randint(1, 256, (2, 70), generator=torch.Generator().manual_seed(seed))
    (exact,) = logits_of(ours, {"ids": ids}, torch.float64).values()
    mine = ours(ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as scratch:
        theirs = class_of(written(ours, name, Path(scratch) / "out"))
    plain = theirs(ids, use_cache=False).logits
    found = {"ours_float32": largest(mine, exact), "class_float32": largest(plain, exact)}
    found["between_float32"] = largest(plain, mine)
    rounded = as_classes_round(ours)
    found["between_float32_as_class"] = largest(plain, rounded(ids, use_cache=False).logits)
    if name in DELTA:
        with own_chunks():
            found["between_float32_own_chunks"] = largest(plain, rounded(ids, use_cache=False).logits)
    if name == "kimi_linear":
        with exact_softplus():
            found["class_float32_softplus"] = largest(theirs(ids, use_cache=False).logits, exact)
    return found | {"class_float64": largest(in_float64(theirs, ids), exact)}


def main(options: Any) -> None:
    for name in options.targets or SPECS:
        started = time.monotonic()
        figures = [measured(name, seed) for seed in range(options.specs)]
        worst = {key: max(one[key] for one in figures) for key in figures[0]}
        row: Mapping[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()), "commit": options.commit, "device": "cpu",
            "torch": torch.__version__, "transformers": transformers.__version__,
            "command": f"python tests/native_rounding.py --specs {options.specs} {name}", "target": name,
            "specs": options.specs, "largest_logit_apart": worst, "wall_s": round(time.monotonic() - started, 1),
            "note": "each side against float64, in which class_float64 is the class with its casts to float32 made float64",
        }  # fmt: skip
        print(json.dumps(row))
        if options.append:
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help="classes, all if not given")
    parser.add_argument("--specs", type=int, default=5)
    parser.add_argument("--append", action="store_true", help="add rows to the evidence")
    parser.add_argument("--commit", default="")
    main(parser.parse_args())
