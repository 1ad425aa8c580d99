"""Kernels for Hopper are launched so that ptxas 12.8 gets them right: held without a GPU, in the PTX that Triton writes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "machine_code.py"

# From the kernel of decision 0005.
WRONG = """
    shr.u32         %r75, %r74, 4;
    or.b64          %rd266, %rd180, 4611686293305294848;
    or.b64          %rd267, %rd181, 4611686293305294848;
    add.s64         %rd268, %rd180, 4611686293305294850;
    or.b64          %rd289, %rd180, -9223371899415822336;
    add.s64         %rd291, %rd180, -9223371899415822272;
    add.s64         %rd300, %rd180, 64;
"""


def _script() -> ModuleType:
    found = importlib.util.spec_from_file_location("machine_code", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["machine_code"] = module
    found.loader.exec_module(module)
    return module


def test_two_layouts_of_one_address_are_found() -> None:
    layouts_of_one_address = _script().layouts_of_one_address
    assert layouts_of_one_address(WRONG) == ["%rd180: 0x40000040, 0x80000020"]
    assert layouts_of_one_address(WRONG.replace("%rd180, -9", "%rd182, -9")) == []


@pytest.mark.slow
def test_an_unchanged_maximum_fades_no_sums(tmp_path: Path) -> None:
    # The interpreter fuses nothing. A product less itself rounded, in one instruction, is not 0: only logits may be fused.
    code = (
        "import machine_code as it",
        "it.knobs.runtime.add_stages_inspection_hook = it.without_machine_code",
        "form = {'aligned': True, 'many': False, 'backward': False}",
        "print(it.ptx(it.Case('head_sparse_attention', 'step', 'fp32', 128, 128, **form))[0])",
    )
    paths = os.pathsep.join((str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, "-c", "\n".join(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made_by = {name: by for by, name in re.findall(r"^\s*(\S+)\s+(%r\d+), .*;$", done.stdout, re.MULTILINE)}
    exponents = re.findall(r"ex2\.approx\S*\s+%r\d+, (%r\d+);", done.stdout)
    # Logits of four keys, and the maxima of two queries, before and after a tile.
    assert sorted(made_by[name] for name in exponents) == ["fma.rn.f32"] * 4 + ["sub.f32"] * 2


@pytest.mark.slow
def test_no_kernel_is_launched_that_ptxas_may_get_wrong(
    tmp_path: Path, full_counts: bool, random_seed: int
) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        str(SCRIPT),
        "--quick",
        *([] if full_counts else ["--drawn", str(random_seed)]),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command[1:]}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"


def test_each_kernel_is_drawn_in_each_direction() -> None:
    script = _script()
    every = list(script.cases(quick=True))
    drawn = script.drawn_cases(every, seed=0)
    kernels = [{(case.op, case.kernel, case.backward) for case in some} for some in (every, drawn)]
    assert kernels[0] == kernels[1]
    assert set(drawn) < set(every)


@pytest.mark.slow
def test_a_step_of_landmarks_loads_sixteen_bytes_at_a_time() -> None:
    # The compiler loses what it knows of addresses if a loop's bounds come from a sum: docs/decisions/0020-landmark-kernels.md.
    script = _script()
    step = [case for case in script.landmark_cases(quick=True) if case.kernel == "step"]
    text, _ = script.ptx(step[0])
    assert text.count("ld.global.v4.b32") >= 16
    # But for the query.
    assert text.count("ld.global.b16") <= 2


@pytest.mark.slow
def test_taps_of_a_dynamic_convolution_do_not_go_through_shared_memory() -> None:
    # Each thread reads those of its tokens itself, and channels sixteen bytes at a time.
    script = _script()
    cases = [case for case in script.conv_cases(quick=True) if case.kernel != "taps"]
    for case in [*cases, *(replace(case, K=16, V=16) for case in cases)]:
        text, _ = script.ptx(case)
        assert "shared" not in text, case
        assert text.count("ld.global.v4.b32") >= 2, case
        assert "ld.global.b16" not in text, case


@pytest.mark.slow
def test_a_fused_step_of_landmarks_asks_for_blocks_ahead() -> None:
    # Keys and values of two blocks before the loop, and of one in it: docs/decisions/0020-landmark-kernels.md.
    script = _script()
    read = [case for case in script.landmark_cases(quick=True) if case.kernel == "read"]
    text, _ = script.ptx(read[0])
    assert text.count("cp.async.cg.shared.global") == 3 * 16
