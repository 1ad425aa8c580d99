"""Times `import heddle.specs` and `heddle check` of a 1,000-layer spec as whole processes, and appends rows to a file.

python tests/bench/spec_speed.py --commit "$(git rev-parse --short=12 HEAD)"

Each is run once before, so that Python has its bytecode, as after the first use of an installation.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
HEAD = """\
version: 1
name: thousand
model:
  vocab_size: 256
  hidden_size: 256
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 4}, channel: {kind: swiglu}}
    local: {mixer: {kind: attention, heads: 4, window: 128}, channel: {kind: gelu}}
    both:
      mixer: {kind: parallel, mixers: [{kind: attention, heads: 4}, {kind: decay_attention, heads: 4}]}
      channel: {kind: swiglu}
    late: {mixer: {kind: attention, heads: 4}, channel: {kind: swiglu}, skip: {source: anchor0}}
  layers:
"""
# Twenty layers: repeats, layers with a name, overrides, and a reference to each name.
PART = """\
    - {{repeat: 3, pattern: [linear, linear, local]}}
    - {{block: both, name: anchor{number}, override: {{mixer: {{merge: mean}}, norm_placement: sandwich}}}}
    - {{block: local, override: {{mixer: {{window: {window}}}}}}}
    - {{block: late, override: {{skip: {{source: anchor{number}, init: 0.5}}}}}}
    - {{repeat: 4, pattern: [linear, local]}}
"""
PARTS = 50


def spec(parts: int = PARTS) -> str:
    """A spec of 20 layers a part."""
    return HEAD + "".join(PART.format(number=number, window=64 + number) for number in range(parts))


def seconds(arguments: list[str], folder: Path) -> float:
    """Wall time of one Python process."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began


def row(op: str, times: list[float], shape: dict[str, int]) -> dict[str, Any]:
    """The times of one op in the form of a benchmark row."""
    deciles = [1e3 * one for one in statistics.quantiles(times, n=10, method="inclusive")]
    empty = dict.fromkeys(("driver", "cuda", "torch", "triton", "dtype", "gbps", "tflops", "peak_bytes"))
    return {
        **empty,
        "op": op,
        "impl": "heddle",
        "phase": "cli",
        "shape": shape,
        "ms": 1e3 * statistics.median(times),
        "ms_p10": deciles[0],
        "ms_p90": deciles[-1],
        "runs": len(times),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "cpu.jsonl", help="file the rows are appended to"
    )
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    common = {
        "run": secrets.token_hex(4),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": chosen.commit,
        "device": "cpu",
        "python": sys.version.split()[0],
    }
    with tempfile.TemporaryDirectory() as name, chosen.out.open("a") as file:
        folder = Path(name)
        (folder / "thousand.yaml").write_text(spec())
        timed = {
            "python": (["-c", "pass"], {}),
            "import heddle.specs": (["-c", "import heddle.specs"], {}),
            "heddle check 1000 layers": (["-m", "heddle", "check", "thousand.yaml"], {"layers": 20 * PARTS}),
        }
        for arguments, _ in timed.values():
            first = seconds(arguments, folder)
        for op, (arguments, shape) in timed.items():
            first = seconds(arguments, folder)
            made = {**common, **row(op, [seconds(arguments, folder) for _ in range(chosen.runs)], shape)}
            file.write(json.dumps({**made, "first_call_s": first}) + "\n")
            print(f"{op}: {made['ms']:.0f} ms ({made['ms_p10']:.0f} to {made['ms_p90']:.0f})")


if __name__ == "__main__":
    main()
