"""The machine and the packages a result was made with: part of every ledger key, and written into every
run."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from heddle.kernels.configs.found import running_digest
from heddle.search.cores import processor_name, usable_cores

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "optuna",
    "ray",
    "pydantic",
    "networkx",
    "safetensors",
)


def package_versions() -> dict[str, str]:
    """Installed versions of heddle and of what decides results; a package that is not installed is left
    out."""
    found = {}
    for name in ("heddle-lm", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def pick_device() -> str:
    """ "cuda" when a CUDA device can be used, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """The name on the box: of the GPU, or of the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else processor_name()


def driver_version() -> str | None:
    """The NVIDIA driver's version; None without one."""
    path = Path("/proc/driver/nvidia/version")
    if library := nvml():
        try:
            found = library.nvmlSystemGetDriverVersion()
            return found.decode() if isinstance(found, bytes) else str(found)
        finally:
            library.nvmlShutdown()
    if not path.exists():
        return None
    words = path.read_text().split()
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def foreign_processes() -> int | None:
    """How many processes that are not of this search use the current CUDA device; None where that cannot be
    seen.

    Ours are this process and the other workers of its raylet, which wait while one of them times.
    """
    library = nvml()
    if library is None or not torch.cuda.is_available():
        return None
    try:
        handle = nvml_handle(library)
        pids = {process.pid for process in library.nvmlDeviceGetComputeRunningProcesses(handle)}
    except library.NVMLError:
        return None
    finally:
        library.nvmlShutdown()
    # A container that hides its process numbers from the driver shows none of ours: nothing can be said then.
    return len([pid for pid in pids if not _ours(pid)]) if os.getpid() in pids else None


def describe(device: str) -> dict[str, Any]:
    """What run.json records of the machine."""
    return {
        "packages": package_versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device,
        "device_name": device_name(device),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cores": usable_cores(),
        "kernels": running_digest(),
    }


def deciding(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `describe` that a result depends on: what enters the keys of the ledger."""
    packages = machine["packages"]
    return {
        "device": machine["device_name"],
        "kind": machine["device"],
        "packages": {name: packages.get(name) for name in ("heddle-lm", "torch", "triton", "transformers")},
    }


def _ours(pid: int) -> bool:
    parent = os.getppid()
    if pid == os.getpid():
        return True
    try:
        under_raylet = Path(f"/proc/{parent}/comm").read_text().strip() == "raylet"
        return under_raylet and _parent_of(pid) == parent
    except OSError:
        return False


def _parent_of(pid: int) -> int:
    # The name before the state may hold spaces and brackets; the last bracket ends it.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def nvml_handle(library: Any) -> Any:
    """The current CUDA device, as the started NVML module knows it. Raises its NVMLError."""
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return library.nvmlDeviceGetHandleByUUID(uuid)


def nvml() -> Any:
    """The started NVML module; None when it is not installed or finds no driver. The caller shuts it down."""
    try:
        with warnings.catch_warnings():
            # The old package of this name warns when it is imported.
            warnings.simplefilter("ignore", FutureWarning)
            import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
