"""ptxas leaves nothing out of the kernels for Hopper that Triton here compiles: found without a GPU, in the machine code."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "machine_code.py"

# From the launch of decision 0005, shortened; the copy of UR48 to UR46 is what was missing.
WHOLE = """
        /*1420*/                   ULDC.64 UR28, c[0x0][0x208] ;
        /*1430*/                   USHF.R.U32.HI UR48, URZ, 0x4, UR25 ;
        /*1440*/                   UMOV UR49, 0x40000040 ;
        /*1450*/                   UMOV UR46, UR48 ;
        /*1460*/                   UMOV UR44, UR48 ;
        /*1470*/                   UMOV UR45, UR49 ;
        /*15b0*/                   UIADD3 UR46, UP0, UR46, 0x40, URZ ;
        /*1710*/                   UIADD3.X UR47, URZ, -0x7fffffe0, URZ, UP0, !UPT ;
        /*1b30*/              @!P0 BRA `(.L_x_0) ;
        /*5900*/               @P1 LDG.E.U16 R87, desc[UR28][R38.64] ;
        /*7690*/                   HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR44].tnspB, R24 ;
        /*7dc0*/                   HGMMA.64x32x16.F32.BF16 R56, gdesc[UR44].tnspA.tnspB, R56 ;
"""


def _script() -> ModuleType:
    found = importlib.util.spec_from_file_location("machine_code", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["machine_code"] = module
    found.loader.exec_module(module)
    return module


def test_a_read_without_a_write_is_found() -> None:
    unwritten = _script().unwritten
    # UR25 comes from above what is shown.
    assert unwritten(WHOLE) == ["UR25 (USHF.R.U32.HI)"]
    without = "\n".join(line for line in WHOLE.splitlines() if "UMOV UR46" not in line)
    assert unwritten(without)[1:] == ["UR46 (UIADD3)"]
    without = "\n".join(line for line in WHOLE.splitlines() if "ULDC.64" not in line)
    assert unwritten(without)[1:] == ["UR28 (LDG.E.U16)", "UR29 (LDG.E.U16)"]
    without = "\n".join(line for line in WHOLE.splitlines() if "UR46" not in line)
    assert unwritten(without)[1:] == ["UR46 (HGMMA.64x32x16.F32.BF16)"]


@pytest.mark.slow
def test_no_launch_of_the_table_reads_what_nothing_wrote(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
