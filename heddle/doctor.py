"""What this machine has and whether it computes right: versions, devices, imports, kernel self-test."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import heddle
from heddle.search.cores import usable_cores
from heddle.specs.mixers import BROKEN

# What a search rests on, each imported for real: a version on disk says nothing about a broken library.
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "optuna",
    "ray",
    "pydantic",
    "networkx",
    "safetensors",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: whether it is well, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Device:
    """A device models can run on. `memory` is in bytes."""

    name: str
    kind: str
    memory: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that `heddle doctor` found; `ok` when every check is."""

    versions: dict[str, str]
    devices: list[Device] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def diagnose() -> Diagnosis:
    """Versions, devices and checks of this machine; takes seconds, as it imports all and runs the kernels."""
    versions = {
        "heddle": heddle.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    checks = [_import(name, versions) for name in PACKAGES]
    checks += [Check(f"mixer {one.kind}", False, f"of {one.package}: {one.why}") for one in BROKEN]
    broken = any(check.name == "torch" and not check.ok for check in checks)
    if broken:
        return Diagnosis(versions, [_cpu()], checks)
    devices = [_cpu(), *_gpus()]
    checks.append(_compiler())
    checks.append(_nvml(has_gpu=any(device.kind == "cuda" for device in devices)))
    checks.extend(_kernels())
    return Diagnosis(versions, devices, checks)


def _import(name: str, versions: dict[str, str]) -> Check:
    try:
        versions[name] = importlib.metadata.version(name)
        importlib.import_module(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, f"not installed; pip install {name}")
    except Exception as error:
        return Check(name, False, f"{versions[name]} is installed but does not import: {error}")
    return Check(name, True, versions[name])


def _nvml(*, has_gpu: bool) -> Check:
    """Whether timings can be checked for other processes and throttling; without it they are taken all the same."""
    if not has_gpu:
        return Check("NVML", True, "no CUDA device to ask about")
    try:
        found = importlib.metadata.version("nvidia-ml-py")
    except importlib.metadata.PackageNotFoundError:
        told = "not installed: timings are not checked for other processes and throttling; pip install 'heddle-lm[gpu]'"
        return Check("NVML", True, told)
    return Check("NVML", True, f"nvidia-ml-py {found}")


def _cpu() -> Device:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(model, "cpu", memory, f"{usable_cores()} cores usable")


def _gpus() -> list[Device]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        found.append(
            Device(
                seen.name,
                "cuda",
                seen.total_memory,
                f"compute capability {seen.major}.{seen.minor}, CUDA {torch.version.cuda}",
            )
        )
    return found


def _compiler() -> Check:
    import torch

    path = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if path is None and torch.cuda.is_available():
        return Check(
            "C compiler",
            False,
            "none found; Triton needs one to launch kernels (apt-get install gcc libc6-dev)",
        )
    return Check("C compiler", True, path or "none; only needed beside a GPU")


def _kernels() -> list[Check]:
    from heddle.kernels.selftest import self_test

    return [Check(f"kernel {row.op}", row.ok, row.detail) for row in self_test()]
