"""What the GPU was doing while something was timed: clocks, power, temperature, and what held it back. Through NVML.

Ray's `num_gpus` is bookkeeping: it keeps nobody off a GPU, and a card that is hot or at its power cap is slower than it was a
minute ago. Nothing here changes a figure; it stands beside it, so that a reader knows when not to believe it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from heddle.search import environment

# Why clocks are lower than asked for, as bits of NVML's mask (nvml.h, nvmlClocksEventReasons).
REASONS: Mapping[int, str] = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}
# Those that make a figure slower than the next one may be; to be idle between two calls, or at clocks that a user set, is none.
THROTTLING = frozenset(REASONS.values()) - {"idle", "application clocks", "sync boost", "display clocks"}


def reasons_in(mask: int) -> list[str]:
    """The reasons in NVML's mask; a bit nobody here knows is told as its number."""
    bits = [1 << place for place in range(mask.bit_length()) if mask >> place & 1]
    return [REASONS.get(bit, hex(bit)) for bit in bits]


def gpu_state() -> dict[str, Any] | None:
    """Clocks (MHz), power and its cap (W), temperature (°C) and throttle reasons of the current CUDA device; None where NVML does
    not tell. What a card does not report is None."""
    nvml = environment.nvml()
    if nvml is None or not torch.cuda.is_available():
        return None
    try:
        handle = environment.nvml_handle(nvml)
        power, cap = (
            _asked(nvml, name, handle)
            for name in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit")
        )
        mask = _asked(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return {
            "sm_mhz": _asked(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": _asked(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
            "power_w": None if power is None else power / 1000,
            "power_cap_w": None if cap is None else cap / 1000,
            "temperature_c": _asked(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            "reasons": None if mask is None else reasons_in(mask),
        }
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def both(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """One state of two: the figures of the second, the reasons of either, and whether one of them throttles."""
    if before is None or after is None:
        return None
    known = [one["reasons"] for one in (before, after) if one["reasons"] is not None]
    reasons = sorted({reason for each in known for reason in each}) if known else None
    throttled = None if reasons is None else bool(THROTTLING & set(reasons))
    return {**after, "reasons": reasons, "throttled": throttled, "sm_mhz_before": before["sm_mhz"]}


def _asked(nvml: Any, name: str, *arguments: Any) -> Any:
    """What NVML answers; None where this card or this NVML has no such question."""
    try:
        return getattr(nvml, name)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None
