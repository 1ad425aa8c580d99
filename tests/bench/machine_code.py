"""Does the machine code of decay_attention for Hopper read a register that nothing wrote? Compiles only; needs no GPU.

    python tests/bench/machine_code.py --quick
    python tests/bench/machine_code.py --commit "$(git rev-parse --short=12 HEAD)" --append

ptxas 12.8 does so at some launches (docs/decisions/0005-ragged-heads.md). Compiles the launches of the table, and without
`--quick` those with chunks of 64 that it avoids. Exits with 1 if one of the table's is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from heddle.kernels import _decay_attention_sweep as sweep
from heddle.kernels.configs.decay_attention import HOPPER, Launch

RESULTS = Path(__file__).parent / "results"
TARGET = GPUTarget("cuda", 90, 32)
KERNELS = {
    "output": sweep._decay_attention_sweep_output_kernel,
    "state": sweep._decay_attention_sweep_state_kernel,
}
ELEMENTS = {"bf16": 2, "fp32": 4}
FLOATS = ("log_decay_ptr", "final_ptr", "states_ptr", "initial_ptr", "d_final_ptr", "d_final_t_ptr")
INTEGERS = ("table_ptr", "cu_seqlens_ptr")
# Each tile full and partly empty.
SIZES = (16, 24, 32, 40, 64, 100, 128, 160, 256)
QUICK = (
    (64, 16),
    (64, 32),
    (64, 64),
    (40, 24),
    (40, 40),
    (24, 40),
    (32, 16),
    (100, 24),
    (128, 32),
    (256, 64),
)

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
WRITES_UNIFORM = ("U", "R2UR", "S2UR", "REDUX", "VOTEU")


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one launch; K and V are those of a, b and of c. `aligned`: strides are multiples of 16."""

    kernel: str
    dtype: str
    K: int
    V: int
    launch: Launch
    aligned: bool
    backward: bool
    in_table: bool = True

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the state as the launcher sees them."""
        rows, columns = (max(16, triton.next_power_of_2(size)) for size in (self.K, self.V))
        return rows, columns


def cases(*, quick: bool) -> Iterator[Case]:
    """What is compiled: the launches of the table, and those with chunks of 64 in place of its `narrow` ones."""
    sizes = QUICK if quick else [(K, V) for K in SIZES for V in SIZES]
    for K, V in sizes:
        for dtype, kernel in (("bf16", "output"), ("bf16", "state"), ("fp32", "output")):
            if dtype == "fp32" and (quick or K != V):
                continue
            blank = Case(kernel, dtype, K, V, HOPPER.output, aligned=False, backward=False)
            launch = HOPPER.launch(kernel, ELEMENTS[dtype], *blank.tile)
            for aligned in (False,) if quick else (False, True):
                for backward in (False, True):
                    case = replace(blank, launch=launch, aligned=aligned, backward=backward)
                    yield case
                    if not quick and launch == HOPPER.narrow and kernel == "output":
                        yield replace(case, launch=HOPPER.output, in_table=False)


def machine_code(case: Case) -> str:
    """The SASS of a case, as `nvdisasm` prints it."""
    kernel, (rows, columns) = KERNELS[case.kernel], case.tile
    constants: dict[str, Any] = {
        "K": case.K, "V": case.V, "C": case.launch.chunk, "ROWS": rows, "COLUMNS": min(case.launch.columns, columns),
        "ROLES": 3 if case.backward and case.K == case.V else 1, "BACKWARD": case.backward, "VARLEN": False,
        "PRECISION": "tf32x3",
    }  # fmt: skip
    if case.kernel == "output":
        constants |= {"SEGMENTED": False, "HAS_INITIAL": True, "HAS_D_FINAL": case.backward}
    signature, hints = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = _type(name, case.dtype, constants)
        if name.endswith("_ptr") or (case.aligned and name.startswith("stride_")):
            hints[(index,)] = [["tt.divisibility", 16]]
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, hints)
    compiled = triton.compile(source, target=TARGET, options=case.launch.options())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*fp32" if name in FLOATS else "*i32" if name in INTEGERS else f"*{dtype}"
    return "fp32" if name == "scale" else "i32"


def unwritten(sass: str) -> list[str]:
    """Uniform registers that are read before they are written, read from top to bottom; a loop's first pass runs so."""
    written: set[int] = set()
    found = []
    for operation, arguments in INSTRUCTION.findall(sass):
        reads, writes = _uniform(operation, arguments)
        found += [f"UR{register} ({operation})" for register in sorted(reads - written)]
        written |= writes | reads
    return found


def _uniform(operation: str, arguments: str) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction reads, and those it writes."""
    reads: set[int] = set()
    writes: set[int] = set()
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", arguments)]
    for place, part in enumerate(parts):
        for first in map(int, re.findall(r"gdesc\[UR(\d+)\]", part)):
            # Descriptors of both operands; only of the second if the first is in registers.
            in_registers = place == 2
            reads |= {first + 2, first + 3} | (set() if in_registers else {first, first + 1})
        for first in map(int, re.findall(r"(?<!g)desc\[UR(\d+)\]", part)):
            reads |= {first, first + 1}
        rest = re.sub(r"g?desc\[UR\d+\]", "", part)
        target = place == 0 and operation.startswith(WRITES_UNIFORM) and "[" not in rest
        wide = operation.startswith("U") and (".64" in operation or (target and ".WIDE" in operation))
        for first in map(int, re.findall(r"\bUR(\d+)\b", rest)):
            (writes if target else reads).update({first, first + 1} if wide else {first})
    return reads, writes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few sizes, strides that are no multiple of 16"
    )
    parser.add_argument("--append", action="store_true", help="append rows to evidence-machine-code.jsonl")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    counts: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    bad = 0
    for case in cases(quick=chosen.quick):
        found = unwritten(machine_code(case))
        columns = min(case.launch.columns, case.tile[1])
        launch = replace(case.launch, columns=columns)
        key = (case.kernel, case.dtype, case.tile[0], columns, launch, case.aligned, case.in_table)
        counts[key][0] += 1
        counts[key][1] += bool(found)
        if found:
            bad += case.in_table
            print(f"{'WRONG' if case.in_table else 'avoided'} {case}: {', '.join(found)}", flush=True)
    tool = knobs.nvidia.ptxas.version
    header = {"run": secrets.token_hex(4), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
              "commit": chosen.commit, "triton": triton.__version__, "ptxas": tool, "target": "sm_90a"}  # fmt: skip
    names = ("kernel", "dtype", "rows", "columns", "launch", "aligned", "in_table")
    rows = [
        {**header, **dict(zip(names, key, strict=True)), "launch": asdict(key[4]), "compiled": n, "wrong": m}
        for key, (n, m) in counts.items()
    ]
    if chosen.append:
        with (RESULTS / "evidence-machine-code.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    of_table = sum(row["compiled"] for row in rows if row["in_table"])
    print(f"Triton {triton.__version__}, ptxas {tool}: {of_table} kernels of the table, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
