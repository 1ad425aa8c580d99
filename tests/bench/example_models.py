"""Trains the byte language model of each example spec at its own size, and holds its export to the model before it.

    python tests/bench/example_models.py --out "$OUT" --budget 300 --limit 520 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/example_models.py --out /tmp/examples --tiny --kinds moh layer_router --workers 1 --commit none

The model, data, tokens and batches of `examples/specs/NAME.yaml` (20M tokens of Python source, 1,221 steps), at the rates of
`--learning-rates`; `--tokens` trains fewer, and rows tell how many. Of each: bits per byte on held-out windows (goal: below 2.6),
the export, which a process without Heddle loads, and of the exported folder, loaded by transformers, logits and 64 greedy tokens
beside those of the model before it. A row each in evidence-examples.jsonl.

Each training is a process of its own, `--workers` at once: its steps as a CUDA graph, or launched one by one where none can be
captured. After `--budget` seconds none is begun. What trains still when `--limit` is near ends there: it is scored and exported
as it stands, and its row says `done: false`. What is done is read from `--rows` and from the file in `--out`, and not done
again.
`--tiny` trains two steps, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.card import Card
from heddle.compose.hf.export import export
from heddle.compose.plan import plan
from heddle.compose.train import Recipe, fit
from heddle.search.environment import device_name, pick_device
from heddle.search.tasks import batches, make_task, recipe_for
from heddle.specs import SpecFile, TextTask, load, spec_hash

SPECS = Path(__file__).parents[2] / "examples" / "specs"
ROWS = Path(__file__).parent / "results" / "evidence-examples.jsonl"
GOAL, NEW_TOKENS, PROMPT = 2.6, 64, 64
# Those that select, route, split or leave out come first.
FIRST = (
    "moh", "landmark", "routing", "sala", "index_reuse", "layer_router", "still", "nats_l", "liger", "ttt", "mla", "sliding",
    "contmix", "token_router", "head_split", "parallel",
)  # fmt: skip
# Seconds that scoring and exporting take beside others.
AFTER = 90.0
NO_GRAPH = 3
# Steps at the end over which losses are averaged.
LAST = 25
Row = dict[str, Any]


class OutOfTimeError(Exception):
    """Ends a training where it stands."""


@dataclass(frozen=True)
class Job:
    """One training; `tokens`: in place of the example's, `tiny`: of two steps."""

    name: str
    rate: float
    tokens: int | None
    tiny: bool

    def file(self) -> SpecFile:
        return load(SPECS / f"{self.name}.yaml")

    def recipe(self) -> Recipe:
        found = replace(recipe_for(TextTask(), self.file().spec.train), learning_rate=self.rate)
        if self.tiny:
            return replace(found, tokens=1024, batch_tokens=512)
        return found if self.tokens is None else replace(found, tokens=self.tokens)

    def told(self) -> Row:
        """What its row begins with, and what makes it another training."""
        recipe = self.recipe()
        return {
            "task": "text",
            "example": self.name,
            "spec_hash": spec_hash(self.file().spec.model),
            "seed": recipe.seed,
            "lr": self.rate,
            "budget": recipe.tokens,
        }


@cache
def examples() -> list[str]:
    """The decoders among the examples, those of `FIRST` before the others."""
    names = sorted(path.stem for path in SPECS.glob("*.yaml"))
    kinds = {name: load(SPECS / f"{name}.yaml").spec.model.kind for name in names}
    decoders = [name for name in names if kinds[name] == "causal_lm"]
    return [*FIRST, *(name for name in decoders if name not in FIRST)]


def trained(job: Job, launch: Any, until: float) -> tuple[Any, Any, Row]:
    """The model, its task, and what the training was; it ends where it stands when `until` is over."""
    spec, recipe, device = job.file().spec, job.recipe(), pick_device()
    data = replace_length(spec.data, 64) if job.tiny else spec.data
    task = make_task(TextTask(), data, vocab_size=spec.model.vocab_size, tokenizer=spec.tokenizer)
    model, begin, reached = build_causal_lm(spec.model, seed=recipe.seed, device=device), time.time(), [0, 1]

    def on_step(done: int, steps: int, loss: float) -> None:  # noqa: ARG001
        reached[:] = done, steps
        if time.time() > until and done < steps:
            raise OutOfTimeError

    last: Row = {"train_bits": None, "aux": {}}
    try:
        fitted = fit(model, batches(task, recipe, device), recipe, on_step=on_step, launch=launch)
        last["train_bits"] = mean(fitted.losses[-LAST:]) / math.log(2.0)
        last["aux"] = {name: mean(held[-LAST:]) for name, held in fitted.aux.items()}
    except OutOfTimeError:
        model.eval()
    seconds, per_step = time.time() - begin, recipe.rows(task.sequence_length) * task.sequence_length
    return (
        model,
        task,
        {
            "steps": reached[0],
            "tokens": reached[0] * per_step,
            "done": reached[0] == reached[1],
            "launch": launch,
            **last,
            "train_s": round(seconds, 2),
        },
    )


def replace_length(data: Any, length: int) -> Any:
    return data.model_copy(update={"sequence_length": length})


@torch.no_grad()
def exported(job: Job, model: Any, task: Any, folder: Path) -> Row:
    """The export beside the model before it, both in float32 on a CPU."""
    inputs = task.held_out("cpu")[0]
    prompt = inputs[:1, :PROMPT]
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    logits, tokens = model(inputs[:2], use_cache=False).logits, model.generate(prompt, **how)
    text = (SPECS / f"{job.name}.yaml").read_text()
    made = export(model, folder, card=Card(job.name, text), tokenizer="bytes", target="auto", battery="short")
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    found = again.generate(prompt, **how)
    return {
        "target": made.target,
        "clean_difference": made.max_difference,
        "logits_apart": float((again(inputs[:2], use_cache=False).logits - logits).abs().max()),
        "new_tokens": tokens.shape[1] - PROMPT,
        "tokens_differ": int((found != tokens).sum()) if found.shape == tokens.shape else NEW_TOKENS,
    }


def run(job: Job, launch: str, until: float, out: Path) -> int:
    """Writes the row of a job, first after its score, again after its export."""
    torch.set_num_threads(1)
    begin, device = time.time(), pick_device()
    try:
        model, task, row = trained(job, launch, until)
    except Exception:
        if launch == "graph":
            return NO_GRAPH
        raise
    score = task.evaluate(model, device=device)
    cost = plan(job.file().spec.model).cost(task.sequence_length, element=4)
    row |= {"score": score.value, "se": score.se, "chance": task.chance}
    row |= {"parameters": sum(one.numel() for one in model.parameters())}
    row |= {"state_elements": round((cost["cache_bytes"] + cost["state_bytes"]) / 4)}
    out.write_text(json.dumps(row | {"wall_s": round(time.time() - begin, 2)}))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            row |= exported(job, model.cpu(), task, Path(scratch) / job.name)
        except Exception as error:
            row["export_error"] = " ".join(str(error).split())[-300:]
    out.write_text(json.dumps(row | {"wall_s": round(time.time() - begin, 2)}))
    return 0


def of_process(job: Job, until: float) -> Row:
    """The row of a job, whatever becomes of its process; `until` is when it is ended."""
    said = "not begun"
    with tempfile.TemporaryDirectory() as scratch:
        out, env = Path(scratch, "row.json"), {**os.environ, "HF_MODULES_CACHE": scratch}
        for launch in ("graph", "eager") if pick_device() == "cuda" else ("eager",):
            command = [sys.executable, __file__, "--job", job.name, str(job.rate), launch]
            command += [str(until - AFTER), str(out), *(["--tiny"] if job.tiny else [])]
            command += [] if job.tokens is None else ["--tokens", str(job.tokens)]
            try:
                left = max(1.0, until - time.time())
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=left, env=env, check=False
                )
                said = " ".join(done.stderr.split())[-300:] or f"ended with {done.returncode}"
                if done.returncode != NO_GRAPH:
                    break
            except subprocess.TimeoutExpired:
                said = "ended by the limit"
                break
        if not out.exists():
            return {**job.told(), "score": None, "error": said}
        row = {**job.told(), **json.loads(out.read_text())}
    return row if "tokens_differ" in row or "export_error" in row else {**row, "export_error": said}


def read_rows(paths: Sequence[Path]) -> list[Row]:
    return [
        json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines() if line
    ]


def is_whole(row: Row) -> bool:
    """Trained to its end, scored, exported and compared."""
    return bool(row.get("done")) and "tokens_differ" in row


def left(jobs: list[Job], rows: list[Row]) -> list[Job]:
    """Those without a whole row of their spec as it is now."""
    done = [row for row in rows if is_whole(row)]
    return [
        job for job in jobs if not any(job.told().items() <= pairs(row, job.told()).items() for row in done)
    ]


def pairs(row: Row, like: Row) -> Row:
    return {name: row.get(name) for name in like}


def verdict(row: Row) -> str:
    if row.get("score") is None:
        return f"FAILED: {row['error'][-90:]}"
    told = "kept" if row["score"] < GOAL else "MISSED"
    told += "" if row["done"] else f" after {row['tokens'] / 1e6:.1f}M of {row['budget'] / 1e6:.0f}M tokens"
    if "export_error" in row:
        return f"{told}; export FAILED: {row['export_error'][-90:]}"
    return f"{told}; {row['target']}, logits {row['logits_apart']:.1e}, {row['tokens_differ']} tokens of 64 differ"


def table(rows: list[Row]) -> Iterator[str]:
    """Of each example its best row."""
    for name in dict.fromkeys(row["example"] for row in rows):
        own = [row for row in rows if row["example"] == name]
        best = min(own, key=lambda row: (row.get("score") is None, row.get("score") or 0.0))
        score = "  –  " if best.get("score") is None else f"{best['score']:.3f}"
        yield f"{name:20} {score} at {best['lr']:g}, {best.get('train_s', 0):5.0f} s {best.get('launch', ''):5} {verdict(best)}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the rows")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which nothing is begun")
    parser.add_argument("--limit", type=float, default=520.0, help="seconds after which all is ended")
    parser.add_argument("--rows", type=Path, default=ROWS, help="rows of earlier pieces")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--workers", type=int, default=13, help="processes at once")
    parser.add_argument("--kinds", nargs="*", default=examples(), choices=examples(), help="examples")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--tokens", type=int, help="train on so many, not on as many as the example says")
    parser.add_argument("--tiny", action="store_true", help="two steps")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen = parsed()
    if chosen.job is not None:
        name, rate, launch, until, out = chosen.job
        job = Job(name, float(rate), chosen.tokens, chosen.tiny)
        return run(job, launch, float(until), Path(out))
    begin, device = time.time(), pick_device()
    jobs = [
        Job(name, rate, chosen.tokens, chosen.tiny)
        for rate, name in product(chosen.learning_rates, chosen.kinds)
    ]
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / ROWS.name
    waiting, rows = left(jobs, read_rows([chosen.rows, path])), list[Row]()
    header = {"run": secrets.token_hex(4), "commit": chosen.commit, "device": device_name(device)}

    def begun(job: Job) -> Row | None:
        """Nothing where its turn comes too late."""
        is_late = time.time() - begin > chosen.budget
        return None if is_late else of_process(job, begin + chosen.limit)

    with ThreadPoolExecutor(chosen.workers) as pool, path.open("a") as file:
        for done in as_completed([pool.submit(begun, job) for job in waiting]):
            row = done.result()
            if row is None:
                continue
            made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            rows.append(row)
            file.write(json.dumps({**header, "time": made, **row}) + "\n")
            file.flush()
            print(f"{row['example']:20} lr {row['lr']:g} {row.get('score')} {verdict(row)}", flush=True)
    print(*table(rows), sep="\n")
    whole = sum(map(is_whole, rows))
    print(f"{whole} of {len(waiting)} done in {time.time() - begin:.0f} s, {len(jobs) - len(waiting)} before")
    return 0 if whole == len(waiting) else 1


if __name__ == "__main__":
    sys.exit(main())
