"""What is peculiar to simple_gla: hard gates, grouped heads, odd sizes, segments, strides, its table of launches."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from heddle.errors import HeddleError
from heddle.kernels import decay_attention, simple_gla, simple_gla_step
from heddle.kernels.accuracy import Sample, compare, draw, results
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.simple_gla import HOPPER, OTHER
from heddle.kernels.op import INTERPRETED

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = {"B": 1, "H": 2, "HV": 2, "K": 16, "V": 16}


def _assert_right(sample: Sample, device: str, **overrides: Any) -> None:
    with tuning(**overrides):
        measured = compare(simple_gla, sample, device)
    wrong = [str(one) for one in measured if not one.ok]
    assert not wrong, "\n".join(wrong)


def _changed(sample: Sample, **arguments: torch.Tensor) -> Sample:
    return replace(sample, arguments={**sample.arguments, **arguments})


def _with_decays(sample: Sample, *choices: float) -> Sample:
    """Log-decays drawn from a few: strong ones beside weak ones, so that sums of them hide the weak."""
    log_decay = sample.arguments["log_decay"]
    picked = torch.randint(len(choices), log_decay.shape, generator=torch.Generator().manual_seed(1))
    return _changed(sample, log_decay=torch.tensor(choices, dtype=log_decay.dtype)[picked])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(3))
def test_strong_decays_do_not_hide_weak_ones(device: str, seed: int) -> None:
    sample = draw(simple_gla, {**SMALL, "T": 200}, torch.float32, seed=seed)
    _assert_right(_with_decays(sample, 0.0, -1e-6, -1e-3, -1.0, -20.0), device)


def test_strong_decays_do_not_hide_weak_ones_in_one_segment() -> None:
    # On a GPU products are less exact, and the launcher makes its segments shorter.
    sample = draw(simple_gla, {**SMALL, "T": 200}, torch.float32)
    _assert_right(_with_decays(sample, 0.0, -1e-6, -1e-3, -1.0, -20.0), "cpu", segment=512)


@pytest.mark.parametrize("device", DEVICES)
def test_what_underflows_is_zero_and_not_nan(device: str) -> None:
    sample = draw(simple_gla, {**SMALL, "T": 130}, torch.float32)
    _assert_right(_with_decays(sample, -1e-6, -1e4, -1e-2), device, segment=64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(1, 1), (17, 3), (40, 24), (33, 64)])
def test_any_head_sizes_are_right(device: str, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(simple_gla, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 70}, torch.float32)
    _assert_right(sample, device, segment=32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "sizes", [(100, 72), (128, 256), (256, 128), (256, 256), (128, 32), (24, 40), (40, 24)]
)
def test_large_and_ragged_heads_are_right(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(simple_gla, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 300}, dtype)
    _assert_right(sample, "cuda", segment=128)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("segment", [64, 1000])
def test_segments_change_nothing(device: str, segment: int) -> None:
    _assert_right(draw(simple_gla, {**SMALL, "B": 2, "T": 150}, torch.float32), device, segment=segment)
    packed = draw(simple_gla, {**SMALL, "T": 150}, torch.float32, cu_seqlens=[0, 1, 1, 90, 150])
    _assert_right(packed, device, segment=segment)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("segment", [64, 1000])
@pytest.mark.parametrize("sizes", [(16, 16), (40, 24)])
def test_roles_launched_apart_are_right(device: str, sizes: tuple[int, int], segment: int) -> None:
    shape = {**SMALL, "K": sizes[0], "V": sizes[1], "T": 150}
    half = torch.float16 if INTERPRETED or device == "cuda" else torch.float32
    packed = draw(simple_gla, {**shape, "HV": 4}, half, cu_seqlens=[0, 1, 1, 90, 150])
    _assert_right(packed, device, apart=1, segment=segment)
    for dtype in (half, torch.float32):
        mixed = _with_decays(draw(simple_gla, shape, dtype), 0.0, -1e-6, -1e-3, -1.0, -20.0)
        # In float32 its launcher makes segments of 64 on a GPU, whose products are less exact than the interpreter's.
        longest = 64 if device == "cuda" and dtype == torch.float32 else segment
        _assert_right(mixed, device, apart=1, segment=longest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("apart", [0, 1])
@pytest.mark.parametrize("segment", [64, 1000])
def test_strong_decays_alone_are_right(device: str, segment: int, apart: int) -> None:
    half = torch.float16 if INTERPRETED or device == "cuda" else torch.float32
    packed = draw(simple_gla, {**SMALL, "H": 1, "T": 150}, half, cu_seqlens=[0, 1, 1, 66, 150])
    _assert_right(_with_decays(packed, -3.0, -5.0, -20.0), device, apart=apart, segment=segment)
    for dtype in (half, torch.float32):
        sample = draw(simple_gla, {**SMALL, "H": 1, "HV": 1, "T": 130}, dtype)
        # In float32 its launcher makes no longer segments.
        longest = 64 if dtype == torch.float32 else segment
        for choices in ((-20.0,), (-3.0, -200.0), (-1e4,)):
            _assert_right(_with_decays(sample, *choices), device, apart=apart, segment=longest)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(128, 128), (64, 64), (100, 72), (128, 256), (256, 256)])
def test_roles_launched_apart_are_right_at_the_sizes_of_models(
    dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    shape = {"B": 1, "H": 1, "HV": 2, "K": sizes[0], "V": sizes[1], "T": 300}
    for segment in (128, 1000):
        _assert_right(draw(simple_gla, shape, dtype), "cuda", apart=1, segment=segment)
        if dtype != torch.float32:
            strong = _with_decays(draw(simple_gla, shape, dtype), -5.0, -20.0)
            _assert_right(strong, "cuda", apart=1, segment=segment)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(16, 16), (40, 24)])
@pytest.mark.parametrize("segment", [64, 1000])
def test_strong_decays_launched_apart_are_right(device: str, sizes: tuple[int, int], segment: int) -> None:
    half = torch.float16 if INTERPRETED or device == "cuda" else torch.float32
    shape = {**SMALL, "K": sizes[0], "V": sizes[1]}
    packed = draw(simple_gla, {**shape, "HV": 4, "T": 290}, half, cu_seqlens=[0, 1, 1, 90, 290])
    # All or no segments of a head are strong, or some of one head.
    for choices in ((-1e-3, -0.1), (-3.0, -20.0), (0.0, -1e-6, -1.0, -2.0, -20.0)):
        sample = _with_decays(packed, *choices)
        _assert_right(sample, device, apart=1, segment=segment)


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_of_a_state_add_up(device: str) -> None:
    narrow = Launch(chunk=32, columns=16, warps=4, stages=1)
    sample = draw(simple_gla, {**SMALL, "HV": 4, "K": 32, "V": 48, "T": 70}, torch.float32)
    _assert_right(sample, device, output=narrow, backward=narrow, state=narrow, segment=32)


@pytest.mark.parametrize("device", DEVICES)
def test_value_heads_share_their_key_head_in_groups(device: str) -> None:
    sample = draw(simple_gla, {**SMALL, "HV": 6, "T": 100}, torch.float32)
    grouped = results(simple_gla, sample.to(device))
    spread = {name: sample.arguments[name].repeat_interleave(3, dim=2) for name in ("q", "k")}
    alone = results(simple_gla, _changed(sample, **spread).to(device))
    assert torch.equal(grouped["out"], alone["out"])
    assert torch.equal(grouped["d_log_decay"], alone["d_log_decay"])


@pytest.mark.parametrize("device", DEVICES)
def test_heads_of_one_projection_need_no_copy(device: str) -> None:
    sample = draw(simple_gla, {**SMALL, "B": 2, "T": 40}, torch.float32).to(device)
    names = ("q", "k", "v")
    fused = torch.stack([sample.arguments[name] for name in names], dim=2)
    views = dict(zip(names, fused.unbind(2), strict=True))
    views["log_decay"] = sample.arguments["log_decay"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(view.is_contiguous() for view in views.values())
    out, state = simple_gla(**{**sample.arguments, **views})
    expected = results(simple_gla, sample)
    assert torch.equal(out, expected["out"])
    assert torch.equal(state, expected["final_state"])


@pytest.mark.parametrize("device", DEVICES)
def test_one_decay_for_all_tokens_is_decay_attention(device: str) -> None:
    sample = draw(decay_attention, {"B": 2, "H": 3, "K": 16, "V": 16, "T": 150}, torch.float64).to(device)
    fixed = results(decay_attention, sample)
    spread = sample.arguments["log_decay"].expand(2, 150, 3)
    each = results(simple_gla, _changed(sample, log_decay=spread))
    assert all(torch.allclose(each[name], fixed[name], rtol=1e-9, atol=1e-12) for name in fixed)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_of_the_decays_of_a_long_sequence_keeps_its_precision(device: str) -> None:
    shape = {**SMALL, "K": 32, "V": 32, "T": 300 if INTERPRETED else 3000}
    sample = draw(simple_gla, shape, torch.float16 if INTERPRETED else torch.float32)
    _assert_right(sample, device)


def test_a_head_count_that_does_not_divide_and_two_tokens_a_step_are_refused() -> None:
    arguments = draw(simple_gla, {**SMALL, "T": 2}, torch.float32).arguments
    with pytest.raises(HeddleError, match="do not divide"):
        simple_gla(**{**arguments, "v": arguments["v"].repeat_interleave(3, 2)[:, :, :3]})
    with pytest.raises(HeddleError, match="k is float32, expected float16 as q"):
        simple_gla(**{**arguments, "q": arguments["q"].half()})
    state = arguments.pop("initial_state")
    with pytest.raises(HeddleError, match="takes one token"):
        simple_gla_step(**arguments, state=state)


@pytest.mark.parametrize("table", [HOPPER, OTHER], ids=["hopper", "other"])
def test_launches_of_the_table_are_legal(table: Any) -> None:
    launches = [getattr(table, field.name) for field in fields(table)]
    for launch in (launch for launch in launches if isinstance(launch, Launch)):
        for size in (launch.chunk, launch.columns):
            # Products want at least 16 rows and columns, and tiles are powers of two.
            assert size >= 16
            assert size & (size - 1) == 0
        assert launch.warps in (1, 2, 4, 8)
