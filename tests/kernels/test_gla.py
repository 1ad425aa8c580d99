"""What is peculiar to the kernels of gla: two ways through a chunk, tiles of channels, segments, its table of launches."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from heddle.kernels import gla
from heddle.kernels.accuracy import Sample, compare, draw, results
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.gla import HOPPER, OTHER
from heddle.kernels.configs.launch import Launch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = {"B": 1, "H": 2, "HV": 2, "K": 16, "V": 16}
WEAK, STRONG = (0.0, -1e-6, -1e-3, -0.1), (0.0, -1e-6, -1e-3, -1.0, -20.0)


def _assert_right(sample: Sample, device: str, **overrides: Any) -> None:
    with tuning(**overrides):
        measured = compare(gla, sample, device)
    wrong = [str(one) for one in measured if not one.ok]
    assert not wrong, "\n".join(wrong)


def _with_decays(sample: Sample, *choices: tuple[float, ...]) -> Sample:
    """Log-decays drawn from a few for each channel: head after head from other ones."""
    log_decay = sample.arguments["log_decay"].clone()
    generator = torch.Generator().manual_seed(1)
    for head in range(log_decay.shape[2]):
        few = torch.tensor(choices[head % len(choices)], dtype=log_decay.dtype)
        log_decay[:, :, head] = few[torch.randint(len(few), log_decay[:, :, head].shape, generator=generator)]
    return replace(sample, arguments={**sample.arguments, "log_decay": log_decay})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choices", [(WEAK,), (STRONG,), (WEAK, STRONG)], ids=["weak", "strong", "both"])
def test_chunks_that_fade_little_and_far_are_right(
    device: str, choices: tuple[tuple[float, ...], ...]
) -> None:
    _assert_right(_with_decays(draw(gla, {**SMALL, "T": 100}, torch.float32), *choices), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chunks_that_fade_little_and_far_are_right_in_half_precision(dtype: torch.dtype) -> None:
    sample = draw(gla, {**SMALL, "K": 128, "V": 128, "T": 300}, dtype)
    _assert_right(_with_decays(sample, WEAK, STRONG), "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_what_underflows_is_zero_and_not_nan(device: str) -> None:
    sample = draw(gla, {**SMALL, "T": 70}, torch.float32)
    _assert_right(_with_decays(sample, (-1e-6, -1e4, -1e-2)), device, segment=64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(1, 1), (80, 24)])
def test_any_head_sizes_are_right(device: str, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(gla, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 70}, torch.float32)
    _assert_right(sample, device, segment=64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(100, 72), (128, 256), (256, 128), (256, 256), (128, 32), (24, 40)])
def test_large_and_ragged_heads_are_right(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(gla, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 300}, dtype)
    _assert_right(sample, "cuda", segment=128)


@pytest.mark.parametrize("device", DEVICES)
def test_segments_change_nothing(device: str) -> None:
    packed = draw(gla, {**SMALL, "T": 150}, torch.float32, cu_seqlens=[0, 1, 1, 90, 150])
    _assert_right(packed, device, segment=64)


@pytest.mark.parametrize("device", DEVICES)
def test_value_heads_share_their_key_head_in_groups(device: str) -> None:
    sample = draw(gla, {**SMALL, "HV": 6, "T": 70}, torch.float32)
    grouped = results(gla, sample.to(device))
    spread = {name: sample.arguments[name].repeat_interleave(3, dim=2) for name in ("q", "k", "log_decay")}
    alone = replace(sample, arguments={**sample.arguments, **spread})
    assert torch.equal(grouped["out"], results(gla, alone.to(device))["out"])


@pytest.mark.parametrize("table", [HOPPER, OTHER], ids=["hopper", "other"])
def test_launches_of_the_table_are_legal(table: Any) -> None:
    for plan in (getattr(table, field.name) for field in fields(table)):
        launches = [getattr(plan, field.name) for field in fields(plan)]
        assert all(isinstance(launch, Launch) for launch in launches)
        # All kernels walk in the chunks of the first; products want at least 16 rows and columns, tiles are powers of two.
        assert {launch.chunk for launch in launches} == {plan.chunk}
        sizes = [size for launch in launches for size in (launch.chunk, launch.columns)]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
