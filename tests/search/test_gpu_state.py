"""What held a GPU back, read from NVML's mask, and one state made of two."""

from __future__ import annotations

import pytest
import torch

from heddle.search.gpu_state import both, gpu_state, reasons_in


def test_reasons_are_the_bits_of_the_mask() -> None:
    assert reasons_in(0) == []
    assert reasons_in(0x4 | 0x40) == ["power cap", "hardware thermal slowdown"]
    assert reasons_in(0x1 | 0x4000) == ["idle", "0x4000"]


@pytest.mark.parametrize(
    ("first", "second", "throttled"),
    [
        (["idle"], [], False),
        (["power cap"], ["idle"], True),
        ([], ["application clocks"], False),
        (None, ["power brake"], True),
        (None, None, None),
    ],
)
def test_either_state_may_say_that_it_throttles(
    first: list[str] | None, second: list[str] | None, throttled: bool | None
) -> None:
    states = [{"sm_mhz": clock, "reasons": one} for clock, one in ((1000, first), (1900, second))]
    found = both(*states)
    assert found is not None
    assert (found["throttled"], found["sm_mhz"], found["sm_mhz_before"]) == (throttled, 1900, 1000)
    assert both(None, states[1]) is None


def test_without_a_gpu_nothing_is_told() -> None:
    assert torch.cuda.is_available() or gpu_state() is None
