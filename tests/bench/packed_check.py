"""One call on a GPU machine: documents packed into one row, right or wrong in every kind of mixer, and what they cost.

    python tests/bench/packed_check.py --out "$OUT" --budget 300 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/packed_check.py --out /tmp/packed --budget 60 --commit none --tiny

Each kind, in the forms that its schema names for tests, as a model of two layers in float32 and, unless it chooses, in bfloat16:
logits and gradients of packed documents are at most twice as far from the CPU's in float64 as those of each document alone. Then
times, in bfloat16, of 32,768 tokens as documents of one length and of many: `dense_attention` packed, one by one and as a batch
of rows (of equal lengths), and layers packed, one by one, and as one sequence. Writes packed_check.log and rows to
evidence-packed.jsonl, and a short table last; exits with 1 if anything was wrong. `--tiny`: small, on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from rat_check import DEVICE, TINY, Rows
from torch import Tensor, nn

from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.modules.documents import mixed
from heddle.compose.modules.layer import make_mixer
from heddle.compose.modules.packing import Packing
from heddle.compose.modules.site import Site
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.bench import machine
from heddle.kernels.dense_attention import dense_attention
from heddle.specs import MIXERS, ModelSpec
from heddle.specs import Site as SpecSite
from heddle.specs.plugins import OPTIONAL

HALF = torch.float32 if TINY else torch.bfloat16
# Right or wrong: a token, more, none, more than a chunk of kernels.
DOCUMENTS = (1, 40, 0, 65, 130)
# Cost: documents of one length and, last, of many.
TOKENS = 256 if TINY else 32768
EQUAL = (64,) if TINY else (512, 2048, 8192)
HEADS, SIZE = (2, 16) if TINY else (16, 128)
BOTH = [{"kind": "attention", "heads": 4}, {"kind": "gated_deltanet", "heads": 4}]
FORMS: dict[str, tuple[dict[str, Any], ...]] = {
    "attention": (
        {"heads": 4},
        {"heads": 4, "kv_heads": 2, "window": 7},
        {"heads": 4, "softcap": 5.0, "sinks": True},
    ),
    **{kind: ({"mixers": BOTH},) for kind in ("parallel", "sequential", "token_router")},
    "layer_router": ({"mixers": BOTH, "router_dim": 8},),
    "head_split": ({"mixers": BOTH, "share": 0.5},),
    "moh": ({"mixer": {"kind": "attention", "heads": 8, "kv_heads": 2}, "shared_heads": 3, "active": 2},),
}
LAYERS: dict[str, dict[str, Any]] = {
    "attention": {"heads": HEADS, "head_dim": SIZE},
    "attention, window": {"heads": HEADS, "head_dim": SIZE, "window": 32 if TINY else 512},
    "gated_deltanet": {"heads": HEADS, "head_dim": SIZE},
} | ({} if TINY else {
    "gla": {"heads": HEADS, "head_dim": SIZE, "value_dim": SIZE},
    "mamba2": {"heads": HEADS, "head_dim": SIZE},
    "rat": {"heads": HEADS},
})  # fmt: skip
TABLE: list[str] = []


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    optional = {one.kind for one in OPTIONAL}
    for kind, schema in MIXERS.items():
        for index, fields in enumerate(FORMS.get(kind, schema.cases)):
            if kind not in optional and (not TINY or index == 0):
                yield f"{kind}, form {index}", {"kind": kind, **fields}


def model_of(fields: dict[str, Any]) -> Any:
    is_causal = MIXERS[fields["kind"]].model_validate(fields).is_causal
    block = {"mixer": fields, "channel": {"kind": "gelu", "width": 96}}
    sizes = {"vocab_size": 64, "hidden_size": 96, "context_length": 256, "layers": ["it", "it"]}
    kind = "causal_lm" if is_causal else "encoder"
    return build(ModelSpec.model_validate({"kind": kind, **sizes, "blocks": {"it": block}})).eval()


def told(model: Any, ids: Tensor, *, is_packed: bool) -> list[Tensor]:
    """Logits of all documents, and gradients, in float64 on the CPU."""
    if is_packed:
        ends = torch.tensor([0, *accumulate(DOCUMENTS)], device=ids.device)
        logits = model(ids, cu_seqlens=ends).logits
    else:
        logits = torch.cat([model(own).logits for own in ids.split(DOCUMENTS, 1) if own.shape[1]], 1)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.zero_grad(set_to_none=True)
    (logits * weights.to(logits.device, torch.bfloat16).to(logits.dtype)).sum().backward()
    found = [parameter.grad for _, parameter in model.named_parameters() if parameter.grad is not None]
    return [one.detach().double().cpu() for one in (logits, *found)]


def right_or_wrong(log: Log, rows: Rows, late: Callable[[], bool], first: str) -> None:
    """Every kind from `first` on, in the order of the alphabet."""
    ids = torch.randint(64, (1, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(0))
    for name, fields in cases():
        if fields["kind"] < first:
            continue
        # What is chosen may be another thing after rounding.
        chooses = MIXERS[fields["kind"]].model_validate(fields).is_routed()
        for dtype in (torch.float32, HALF)[: 1 if TINY or chooses else 2]:
            if late():
                log(f"none  {name} in {dtype}: the time is over")
                continue
            try:
                # What is rounded first is no error of either.
                model = model_of(fields).to(dtype)
                exact = told(model_of(fields).to(dtype).double(), ids, is_packed=False)
                model, there = model.to(DEVICE), ids.to(DEVICE)
                packed, alone = (told(model, there, is_packed=one) for one in (True, False))
                scale = [one.norm().clamp(min=1e-9) for one in exact]
                errors, bounds = (
                    [
                        float((one - it).norm() / norm)
                        for one, it, norm in zip(side, exact, scale, strict=True)
                    ]
                    for side in (packed, alone)
                )
                # One that is NaN is the worst.
                worst = float(
                    torch.tensor([one - 2 * bound for one, bound in zip(errors, bounds, strict=True)]).max()
                )
                is_wrong = not worst <= EPSILON[dtype]
                line = f"{name} in {dtype}: logits {errors[0]:.1e} (alone {bounds[0]:.1e}), worst over twice alone {worst:.1e}"
            except Exception as error:
                is_wrong, errors, bounds, worst = True, [], [], None
                line = f"{name} in {dtype}: {' '.join(str(error).split())[-300:]}"
            log(f"{'WRONG' if is_wrong else 'ok   '} {line}")
            log.wrong += [line] if is_wrong else []
            rows.write(
                {"what": name, "dtype": str(dtype), "packed": errors[:1], "alone": bounds[:1], "worst": worst}
            )


def lengths_of(each: int | None) -> list[int]:
    """Documents of one length, or of lengths of all sizes up to a quarter of the row."""
    if each is not None:
        return [each] * (TOKENS // each)
    generator, found = torch.Generator().manual_seed(3), []
    while sum(found) < TOKENS:
        longest = min(TOKENS // 4, TOKENS - sum(found))
        found.append(int(longest ** float(torch.rand(1, generator=generator))))
    return found


def both_ways(function: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, Callable[[], object]]:
    """A forward pass, and one with all gradients."""
    with torch.no_grad():
        upstream = torch.randn_like(function())

    def forward() -> object:
        with torch.no_grad():
            return function()

    return {"fwd": forward, "fwdbwd": lambda: torch.autograd.grad(function(), leaves, upstream)}


def beside(rows: Rows, op: str, shape: dict[str, int], impls: dict[str, Any], leaves: list[Tensor]) -> None:
    """Times of one thing done in several ways, and their ratio to the first."""
    calls = {name: both_ways(function, leaves) for name, function in impls.items()}
    for phase in ("fwd", "fwdbwd"):
        times = {}
        for name in impls:
            times[name] = rows((op, name, phase), shape, calls[name][phase])
        first = next(iter(times.values()))
        ratios = "  ".join(f"{name} {ms:.3f} ms ({ms / first:.2f})" for name, ms in times.items())
        TABLE.append(f"{op} {phase} {shape}: {ratios}")


def attention(lengths: list[int], rows: Rows) -> None:
    q, k, v = (
        torch.randn(1, HEADS, TOKENS, SIZE, device=DEVICE, dtype=HALF, requires_grad=True) for _ in range(3)
    )
    ends = torch.tensor([0, *accumulate(lengths)], device=DEVICE, dtype=torch.int32)

    def one_by_one() -> Tensor:
        sides = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat([dense_attention(*one, is_causal=True) for one in sides], dim=2)

    def as_rows() -> Tensor:
        sides = (x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (q, k, v))
        return dense_attention(*sides, is_causal=True).transpose(0, 1).flatten(1, 2)[None]

    impls = {
        "packed": lambda: dense_attention(q, k, v, is_causal=True, cu_seqlens=ends, lengths=lengths),
        "one by one": one_by_one,
        **({"rows": as_rows} if len(set(lengths)) == 1 else {}),
        "one sequence": lambda: dense_attention(q, k, v, is_causal=True),
    }
    shape = {"T": TOKENS, "documents": len(lengths), "longest": max(lengths), "H": HEADS, "K": SIZE}
    beside(rows, "dense_attention", shape, impls, [q, k, v])


def layer(name: str, lengths: list[int], rows: Rows) -> None:
    width, kind = HEADS * SIZE, name.partition(",")[0]
    spec = MIXERS[kind].model_validate({"kind": kind, **LAYERS[name]})
    mixer = make_mixer(Site(width, 1, 3), spec.runtime(SpecSite(width, 1, 3)))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    mixer = mixer.to(DEVICE, HALF)
    x = torch.randn(1, TOKENS, width, device=DEVICE, dtype=HALF, requires_grad=True)
    ends = torch.tensor([0, *accumulate(lengths)])
    whole = torch.arange(TOKENS, device=DEVICE)[None]

    def packed(module: nn.Module) -> Tensor:
        packing = Packing.of(ends, 1, TOKENS, DEVICE)
        return mixed(module, x, Call(packing.places(), packing=packing))

    def one_by_one() -> Tensor:
        sides = zip(x.split(lengths, 1), whole.split(lengths, 1), strict=True)
        return torch.cat([mixer(own, Call(place - place[:, :1])) for own, place in sides], dim=1)

    impls = {
        "packed": lambda: packed(mixer),
        "one by one": one_by_one,
        "one sequence": lambda: mixer(x, Call(whole)),
    }
    shape = {"T": TOKENS, "documents": len(lengths), "longest": max(lengths), "D": width}
    beside(rows, f"layer, {name}", shape, impls, [x, *mixer.parameters()])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the log and the rows")
    parser.add_argument("--commit", default=None, help="what the code is")
    parser.add_argument(
        "--first", default="", help="the kind that the checks begin with; then nothing is timed"
    )
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), Log(chosen.out / "packed_check.log")
    rows = Rows(log, chosen.out / "evidence-packed.jsonl", {**machine(DEVICE), "commit": chosen.commit})

    def late(share: float = 1.0) -> bool:
        return time.monotonic() - begin > chosen.budget * share

    right_or_wrong(log, rows, lambda: late(1.0 if chosen.first else 0.6), chosen.first)
    timed = (*([] if TINY else [lengths_of(None)]), *map(lengths_of, EQUAL))
    for lengths in () if chosen.first else timed:
        if late():
            break
        attention(lengths, rows)
        for name in LAYERS:
            if not late():
                layer(name, lengths, rows)
    for line in (*TABLE, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
