"""What is peculiar to the kernels of kda: two ways through a chunk, segments, groups of heads, the table of launches."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from heddle.kernels import kda
from heddle.kernels.accuracy import Sample, compare, draw, results
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.kda import HOPPER, OTHER, Family
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import INTERPRETED

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Where the kernels can run.
KERNEL_DEVICES = [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = {"B": 1, "H": 2, "HV": 2, "K": 16, "V": 16}
WEAK, STRONG = (0.0, -1e-6, -1e-3, -0.1), (0.0, -1e-6, -1e-3, -1.0, -20.0)
VANISHING = (-1e-6, -1e4, -1e-2)


def _assert_right(sample: Sample, device: str, **overrides: Any) -> None:
    with tuning(**overrides):
        measured = compare(kda, sample, device)
    expected = "triton" if INTERPRETED or device == "cuda" else "torch"
    assert {one.path for one in measured} == {expected}
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
@pytest.mark.parametrize("choices", [(WEAK,), (WEAK, STRONG)], ids=["weak", "both"])
def test_chunks_that_fade_little_and_far_are_right(
    device: str, choices: tuple[tuple[float, ...], ...]
) -> None:
    _assert_right(_with_decays(draw(kda, {**SMALL, "T": 100}, torch.float32), *choices), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_channel_that_vanishes_hides_no_other_in_half_precision(device: str) -> None:
    sample = draw(kda, {**SMALL, "T": 130}, torch.float16)
    _assert_right(_with_decays(sample, VANISHING), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("choices", [(WEAK, STRONG), (VANISHING,)], ids=["both", "vanishing"])
def test_chunks_that_fade_little_and_far_are_right_in_half_precision(
    choices: tuple[tuple[float, ...], ...], dtype: torch.dtype
) -> None:
    sample = draw(kda, {**SMALL, "K": 128, "V": 128, "T": 300}, dtype)
    _assert_right(_with_decays(sample, *choices), "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(1, 1), (80, 24)])
def test_any_head_sizes_are_right(device: str, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(kda, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 70}, torch.float32)
    _assert_right(sample, device, segment=64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(100, 72), (128, 256), (256, 128), (256, 256), (128, 32), (24, 40)])
def test_large_and_ragged_heads_are_right(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    K, V = sizes
    sample = draw(kda, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 300}, dtype)
    _assert_right(sample, "cuda", segment=128)


@pytest.mark.parametrize("device", DEVICES)
def test_segments_change_nothing(device: str) -> None:
    whole = draw(kda, {**SMALL, "T": 200}, torch.float32)
    _assert_right(whole, device, segment=64)
    packed = draw(kda, {**SMALL, "T": 150}, torch.float32, cu_seqlens=[0, 1, 1, 140, 150])
    _assert_right(packed, device, segment=64)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_by_two_kernels_are_right(dtype: torch.dtype, device: str) -> None:
    shape = {"B": 1, "H": 1, "HV": 2, "K": 80, "V": 24}
    packed = draw(kda, {**shape, "T": 150}, dtype, cu_seqlens=[0, 1, 1, 140, 150])
    _assert_right(packed, device, split=1)
    _assert_right(_with_decays(draw(kda, {**shape, "T": 70}, dtype), WEAK, STRONG), device, split=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (100, 72), (128, 128), (128, 256), (256, 256)])
def test_gradients_by_two_kernels_are_right_in_large_heads(
    dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    K, V = sizes
    sample = draw(kda, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 300}, dtype)
    _assert_right(sample, "cuda", split=1)


@pytest.mark.parametrize("device", DEVICES)
def test_value_heads_share_their_key_head_in_groups(device: str) -> None:
    sample = draw(kda, {**SMALL, "HV": 6, "T": 70}, torch.float32)
    grouped = results(kda, sample.to(device))
    spread = {name: sample.arguments[name].repeat_interleave(3, dim=2) for name in ("q", "k")}
    alone = results(kda, replace(sample, arguments={**sample.arguments, **spread}).to(device))
    assert torch.equal(grouped["out"], alone["out"])
    summed = alone["d_k"].unflatten(2, (2, 3)).sum(3)
    assert torch.allclose(grouped["d_k"], summed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_heads_of_one_projection_are_read_as_they_lie(device: str) -> None:
    sample = draw(kda, {**SMALL, "T": 20}, torch.float32).to(device)
    names = ("q", "k", "v", "log_decay")
    fused = torch.stack([sample.arguments[name] for name in names], dim=2)
    views = dict(zip(names, fused.unbind(2), strict=True))
    assert not any(view.is_contiguous() for view in views.values())
    out, state = kda(**{**sample.arguments, **views})
    expected = results(kda, sample)
    assert torch.equal(out, expected["out"])
    assert torch.equal(state, expected["final_state"])


@pytest.mark.parametrize("table", [HOPPER, OTHER], ids=["hopper", "other"])
def test_nothing_is_loaded_ahead_where_loops_follow_each_other(table: Family) -> None:
    # docs/decisions/0008-loops-in-a-row.md
    assert {getattr(table, field.name).gradient.stages for field in fields(table)} == {1}


@pytest.mark.parametrize("table", [HOPPER, OTHER], ids=["hopper", "other"])
def test_launches_of_the_table_are_legal(table: Family) -> None:
    for plan in (getattr(table, field.name) for field in fields(table)):
        launches = [getattr(plan, field.name) for field in fields(plan)]
        launches = [launch for launch in launches if isinstance(launch, Launch)]
        # All kernels walk in the chunks of the first; products want at least 16 rows and columns, tiles are powers of two.
        assert {launch.chunk for launch in launches} == {plan.chunk}
        sizes = [size for launch in launches for size in (launch.chunk, launch.columns)]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_torch_library_knows_the_opaque_op(device: str, packed: bool) -> None:
    ends = [0, 3, 3, 20] if packed else None
    sample = draw(kda, {**SMALL, "T": 20}, torch.float32, cu_seqlens=ends).to(device)
    given = {name: x.requires_grad_(name in sample.wanted) for name, x in sample.arguments.items()}
    inputs = [given[name] for name in ("q", "k", "v", "log_decay", "beta")]
    inputs += [0.25, given["initial_state"], given.get("cu_seqlens")]
    torch.library.opcheck(torch.ops.heddle.kda_kernels.default, tuple(inputs))
