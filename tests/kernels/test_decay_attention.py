"""What is peculiar to decay_attention: extreme decays, odd sizes, segments, strides, its table of launches."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from heddle.errors import HeddleError
from heddle.kernels import decay_attention, decay_attention_step, force_path
from heddle.kernels.accuracy import Sample, _measure, compare, draw, oracle, results
from heddle.kernels.common.segments import cut, lay_out
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.decay_attention import HOPPER, OTHER
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import INTERPRETED

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = {"B": 1, "H": 3, "K": 16, "V": 16}


def _assert_right(sample: Sample, device: str, **overrides: Any) -> None:
    with tuning(**overrides):
        measured = compare(decay_attention, sample, device)
    expected = "triton" if INTERPRETED or device == "cuda" else "torch"
    assert {one.path for one in measured} == {expected}
    wrong = [str(one) for one in measured if not one.ok]
    assert not wrong, "\n".join(wrong)


def _with_decay(sample: Sample, *slopes: float) -> Sample:
    log_decay = -torch.tensor(slopes, dtype=sample.arguments["log_decay"].dtype)
    return replace(sample, arguments={**sample.arguments, "log_decay": log_decay})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("segment", [64, 512])
def test_extreme_decays_are_right(device: str, segment: int) -> None:
    sample = draw(decay_attention, {**SMALL, "T": 200}, torch.float32)
    _assert_right(_with_decay(sample, 1e-9, 0.84, 7.75), device, segment=segment)


@pytest.mark.parametrize("device", DEVICES)
def test_what_underflows_is_zero_and_not_nan(device: str) -> None:
    sample = draw(decay_attention, {**SMALL, "T": 130}, torch.float32)
    _assert_right(_with_decay(sample, 90.0, 1e4, 0.0), device, segment=64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(1, 1), (17, 3), (40, 24), (33, 64)])
def test_any_head_sizes_are_right(device: str, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(decay_attention, {"B": 1, "H": 2, "K": K, "V": V, "T": 70}, torch.float32)
    _assert_right(sample, device, segment=32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(100, 72), (128, 256), (256, 128), (256, 256)])
def test_large_heads_are_right(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(decay_attention, {"B": 1, "H": 2, "K": K, "V": V, "T": 300}, dtype)
    _assert_right(sample, "cuda", segment=128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(24, 40), (40, 24), (24, 64), (48, 32), (40, 40), (56, 8), (64, 24)])
def test_heads_that_leave_tiles_partly_empty_are_right(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(decay_attention, {"B": 1, "H": 2, "K": K, "V": V, "T": 200}, dtype)
    _assert_right(sample, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(64, 32), (32, 64), (64, 16), (64, 64), (40, 24), (128, 32), (128, 128)])
def test_heads_that_lie_apart_are_right(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    def with_gaps(**arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A head stride that is no multiple of 16 takes another way through the compiler.
        views = {
            name: pad(arguments[name], (0, 8))[..., : arguments[name].shape[-1]] for name in ("q", "k", "v")
        }
        return decay_attention(**{**arguments, **views})

    K, V = sizes
    sample = draw(decay_attention, {"B": 1, "H": 16, "K": K, "V": V, "T": 200}, dtype).to("cuda")
    found, exact = results(with_gaps, sample), oracle(decay_attention, sample)
    with force_path("torch"):
        baseline = results(decay_attention, sample)
    measured = [_measure(name, "triton", found[name], baseline[name], exact[name], dtype) for name in found]
    wrong = [str(one) for one in measured if not one.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("segment", [16, 48, 1000])
def test_segments_change_nothing(device: str, segment: int) -> None:
    _assert_right(draw(decay_attention, {**SMALL, "B": 2, "T": 150}, torch.float32), device, segment=segment)
    packed = draw(decay_attention, {**SMALL, "T": 150}, torch.float32, cu_seqlens=[0, 1, 1, 90, 150])
    _assert_right(packed, device, segment=segment)


@pytest.mark.parametrize("device", DEVICES)
def test_heads_of_one_projection_need_no_copy(device: str) -> None:
    sample = draw(decay_attention, {**SMALL, "B": 2, "T": 40}, torch.float32).to(device)
    names = ("q", "k", "v")
    fused = torch.stack([sample.arguments[name] for name in names], dim=2)
    views = dict(zip(names, fused.unbind(2), strict=True))
    assert not any(view.is_contiguous() for view in views.values())
    out, state = decay_attention(**{**sample.arguments, **views})
    expected = results(decay_attention, sample)
    assert torch.equal(out, expected["out"])
    assert torch.equal(state, expected["final_state"])


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_final_state_may_want_a_gradient(device: str) -> None:
    sample = draw(decay_attention, {**SMALL, "T": 20}, torch.float64).to(device)
    k = sample.arguments["k"].requires_grad_()
    _, state = decay_attention(**{**sample.arguments, "k": k})
    (found,) = torch.autograd.grad(state.sum(), [k])
    v, decay = sample.arguments["v"], sample.arguments["log_decay"].exp()
    left = decay ** torch.arange(19, -1, -1, device=device)[:, None]
    expected = (left[None, :, :, None] * v.sum(-1, keepdim=True)).expand_as(k)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_a_decay_that_wants_a_gradient_is_refused() -> None:
    arguments = draw(decay_attention, {**SMALL, "T": 4}, torch.float32).arguments
    arguments["log_decay"].requires_grad_()
    with pytest.raises(HeddleError, match="gets no gradient"):
        decay_attention(**arguments)


def test_mixed_dtypes_and_two_tokens_a_step_are_refused() -> None:
    arguments = draw(decay_attention, {**SMALL, "T": 2}, torch.float32).arguments
    with pytest.raises(HeddleError, match="k is float32, expected float16 as q"):
        decay_attention(**{**arguments, "q": arguments["q"].half()})
    state = arguments.pop("initial_state")
    with pytest.raises(HeddleError, match="takes one token"):
        decay_attention_step(**arguments, state=state)


def test_the_path_follows_device_dtype_and_shape() -> None:
    on_gpu_kernels = "triton" if INTERPRETED else "torch"
    assert decay_attention.path("cpu", torch.float32, K=64, V=64) == on_gpu_kernels
    assert decay_attention.path("cpu", torch.float64, K=64, V=64) == "torch"
    assert decay_attention.path("cpu", torch.float32, K=257, V=64) == "torch"
    with force_path("torch"):
        assert decay_attention.path("cpu", torch.float32, K=64, V=64) == "torch"
    with force_path("triton"), pytest.raises(HeddleError, match="cannot run in Triton"):
        decay_attention.path("cpu", torch.float64, K=64, V=64)


def test_segments_are_cut_only_where_programs_are_few() -> None:
    assert cut(65536, 1, 32, 264, 256) == 8192
    assert cut(4096, 8, 32, 264, 256) == 4096
    assert cut(100, 1, 32, 264, 256) == 100
    assert cut(1, 1, 1, 264, 256) == 1


@pytest.mark.parametrize("ends", [[0, 0, 7, 100], [0, 64, 128], [0, 1], [0, 5, 5, 5, 6]])
@pytest.mark.parametrize("size", [16, 64])
def test_packed_segments_cover_each_token_once(ends: list[int], size: int) -> None:
    segments = lay_out(ends[-1], len(ends) - 1, size, torch.tensor(ends))
    assert segments.table is not None
    covered = []
    for sequence, index in segments.table.tolist():
        if sequence >= 0:
            begin = ends[sequence] + index * size
            covered += range(begin, min(begin + size, ends[sequence + 1]))
    assert covered == list(range(ends[-1]))


@pytest.mark.parametrize("table", [HOPPER, OTHER], ids=["hopper", "other"])
def test_launches_of_the_table_are_legal(table: Any) -> None:
    launches = [getattr(table, field.name) for field in fields(table)]
    for launch in (launch for launch in launches if isinstance(launch, Launch)):
        for size in (launch.chunk, launch.columns):
            # Products want at least 16 rows and columns, and tiles are powers of two.
            assert size >= 16
            assert size & (size - 1) == 0
        assert launch.warps in (1, 2, 4, 8)
