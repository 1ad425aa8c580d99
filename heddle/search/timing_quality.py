"""How far a set of timings is to be believed: widths of their intervals, and what was seen on the device beside them.

Needs only the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heddle.search.results import Latency

# Wider than this share of the median, an interval is counted as wide.
NARROW = 0.01


@dataclass(frozen=True, slots=True)
class TimingQuality:
    """Of `n` timings: the median width of the 95 % intervals as a share of their medians, and how many are wider than 1 %.

    `foreign` ran beside processes of others, `throttled` on a GPU that was held back, both also when measured again, as
    `repeated` were; of `unchecked` neither was to be seen.
    """

    n: int
    median_width: float
    wide: int
    foreign: int
    throttled: int
    unchecked: int
    repeated: int

    @property
    def told(self) -> list[str]:
        """The same in sentences."""
        wide = f"{self.wide} of {self.n} wider than {100 * NARROW:.0f} %"
        lines = [
            f"95 % intervals: {100 * self.median_width:.1f} % of their medians wide in the median, {wide}"
        ]
        if self.foreign or self.throttled:
            lines.append(
                f"disturbed also when measured again: {self.foreign} beside other processes on the device, {self.throttled} "
                "throttled"
            )
        if self.repeated:
            lines.append(f"{self.repeated} were measured again, since they were disturbed")
        if self.unchecked:
            lines.append(f"other processes and throttling: not checked for {self.unchecked} of {self.n}")
        return lines


def quality_of(timings: Sequence[Latency]) -> TimingQuality | None:
    """What is to be told of `timings`; None without any."""
    if not timings:
        return None
    widths = [width(one) for one in timings]
    throttles = [None if one.gpu is None else one.gpu.get("throttled") for one in timings]
    return TimingQuality(
        n=len(timings),
        median_width=median(widths),
        wide=sum(one > NARROW for one in widths),
        foreign=sum(bool(one.foreign) for one in timings),
        throttled=sum(bool(one) for one in throttles),
        unchecked=sum(
            one.foreign is None or held is None for one, held in zip(timings, throttles, strict=True)
        ),
        repeated=sum(one.repeated > 0 for one in timings),
    )


def width(one: Latency) -> float:
    """The width of the interval of the median over it, or of the ratio's where that is more."""
    found = (one.high_ms - one.low_ms) / one.median_ms
    if one.ratio is None or one.ratio_low is None or one.ratio_high is None:
        return found
    return max(found, (one.ratio_high - one.ratio_low) / one.ratio)


def from_data(data: dict[str, Any] | None) -> TimingQuality | None:
    """What `dataclasses.asdict` made of it."""
    return None if data is None else TimingQuality(**data)
