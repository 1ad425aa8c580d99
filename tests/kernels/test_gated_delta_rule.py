"""What is peculiar to gated_delta_rule: hard gates, repeated keys, segments, the opaque op, its table, CUDA graphs."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import bfloat16
import pytest
import torch
from held import over_settings
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels import _gated_delta_rule_launch, force_path, gated_delta_rule
from heddle.kernels._gated_delta_rule_op import longest_chunk
from heddle.kernels._gated_delta_rule_torch import _unit_lower_inverse
from heddle.kernels.accuracy import Sample, compare, draw, results
from heddle.kernels.common.layout import LEAST_HEAD
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.gated_delta_rule import HOPPER, OTHER, PAIRS, TOKENS, Family, Plan
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import INTERPRETED

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Where the kernels can run.
KERNEL_DEVICES = [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = {"B": 1, "H": 2, "HV": 4, "K": 16, "V": 16, "T": 200}


def _assert_right(sample: Sample, device: str = "cpu", apart: tuple[str, ...] = ()) -> None:
    measured = compare(gated_delta_rule, sample, device)
    expected = "triton" if INTERPRETED or device == "cuda" else "torch"
    assert {one.path for one in measured} == {expected}
    wrong = [str(one) for one in measured if one.name not in apart and not one.ok]
    assert not wrong, "\n".join(wrong)


def _changed(sample: Sample, **arguments: Tensor) -> Sample:
    return replace(sample, arguments={**sample.arguments, **arguments})


@pytest.mark.parametrize("device", DEVICES)
def test_decays_from_none_to_all_at_once_are_right(device: str) -> None:
    sample = draw(gated_delta_rule, SHAPE, torch.float32)
    log_decay = sample.arguments["log_decay"]
    # Strong decays beside weak ones, so that sums of them hide the weak.
    choices = torch.tensor([0.0, -1e-6, -1e-4, -1.0, -20.0])
    pattern = choices[torch.randint(5, log_decay.shape, generator=torch.Generator().manual_seed(1))]
    _assert_right(_changed(sample, log_decay=pattern), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("log_decay", [-1e-6, -20.0])
def test_one_decay_throughout_is_right(device: str, log_decay: float) -> None:
    sample = draw(gated_delta_rule, {**SHAPE, "T": 130}, torch.float32)
    even = torch.full_like(sample.arguments["log_decay"], log_decay)
    _assert_right(_changed(sample, log_decay=even), device)


def _with_one_key(beta: float) -> Sample:
    sample = draw(gated_delta_rule, SHAPE, torch.float32)
    k = sample.arguments["k"][:, :1].expand_as(sample.arguments["k"]).contiguous()
    return _changed(sample, k=k, beta=torch.full_like(sample.arguments["beta"], beta))


@pytest.mark.parametrize("beta", [0.9, 1.0, 1.999])
def test_the_same_key_again_and_again_is_right(beta: float) -> None:
    # What is overwritten at once hardly depends on its gates: their gradients are differences of nearly equal numbers,
    # zero up to rounding, in any chunk form.
    _assert_right(_with_one_key(beta), apart=("d_log_decay", "d_beta"))


@pytest.mark.parametrize("device", DEVICES)
def test_segments_change_nothing(device: str) -> None:
    with tuning(segment=64):
        _assert_right(draw(gated_delta_rule, {**SHAPE, "T": 150}, torch.float32), device)
        packed = draw(gated_delta_rule, {**SHAPE, "T": 150}, torch.float32, cu_seqlens=[0, 1, 1, 140, 150])
        _assert_right(packed, device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_packed_groups_of_heads_in_segments_are_right(dtype: torch.dtype, device: str) -> None:
    packed = draw(gated_delta_rule, {**SHAPE, "T": 150}, dtype, cu_seqlens=[0, 1, 1, 140, 150])
    decays = torch.tensor([0.0, -1e-6, -1e-4, -1.0, -20.0])
    picked = torch.randint(5, packed.arguments["log_decay"].shape, generator=torch.Generator().manual_seed(1))
    with tuning(segment=64):
        _assert_right(packed, device)
        _assert_right(_changed(packed, log_decay=decays[picked]), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_by_two_kernels_are_right(dtype: torch.dtype, device: str) -> None:
    # On a CPU three tiles of keys, the last half empty; on a GPU none is narrower than a head.
    tile = 16 if device == "cpu" else LEAST_HEAD
    shape = {"B": 1, "H": 1, "HV": 2, "K": 40, "V": 24}
    packed = draw(gated_delta_rule, {**shape, "T": 80}, dtype, cu_seqlens=[0, 1, 1, 71, 80])
    whole = draw(gated_delta_rule, {**shape, "T": 70}, dtype)
    choices = torch.tensor([0.0, -1e-6, -1e-4, -1.0, -20.0], dtype=whole.arguments["log_decay"].dtype)
    picked = torch.randint(5, whole.arguments["log_decay"].shape, generator=torch.Generator().manual_seed(1))
    with tuning(split=1, tile=tile, segment=64):
        _assert_right(packed, device)
        _assert_right(_changed(whole, log_decay=choices[picked]), device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("sizes", [(16, 32), (24, 64)])
def test_launches_of_narrow_heads_are_right(
    sizes: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(_gated_delta_rule_launch, "_family", lambda _: HOPPER)
    K, V = sizes
    shape = {"B": 2, "H": 1, "HV": 2, "K": K, "V": V}
    sample = draw(gated_delta_rule, {**shape, "T": 90}, torch.float16)
    _assert_right(sample, device)
    with tuning(segment=32):
        _assert_right(sample, device)


def test_narrow_heads_have_launches_of_their_own() -> None:
    narrow = HOPPER.half_narrow
    assert HOPPER.of_heads(2, 32, 64) is narrow
    wider = [HOPPER.of_heads(2, 64, 64), HOPPER.of_heads(2, 32, 128), HOPPER.of_heads(4, 32, 64)]
    assert not any(each is narrow for each in wider)
    assert OTHER.of_heads(2, 32, 64) is OTHER.half
    # Products of a warpgroup begin at four warps.
    launches = (getattr(narrow, each.name) for each in fields(Plan))
    assert all(each.warps < 4 for each in launches if isinstance(each, Launch))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (100, 72), (128, 128), (128, 256), (256, 256)])
def test_gradients_by_two_kernels_are_right_in_large_heads(
    dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    K, V = sizes
    with tuning(split=1, gradient=TOKENS, pairs=PAIRS):
        _assert_right(draw(gated_delta_rule, {**SHAPE, "K": K, "V": V, "T": 300}, dtype), "cuda")


@over_settings
@pytest.mark.parametrize("sizes", [(100, 72), (128, 256), (256, 128), (256, 256)])
def test_large_and_ragged_heads_are_right(sizes: tuple[int, int], device: str, dtype: torch.dtype) -> None:
    K, V = sizes
    with tuning(segment=128):
        _assert_right(
            draw(gated_delta_rule, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 200}, dtype), device
        )


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("split", [0, 1])
def test_log_decays_of_a_short_last_chunk_are_right_in_bfloat16(
    split: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        bfloat16.make_right(monkeypatch)
        monkeypatch.setattr(_gated_delta_rule_launch, "_family", lambda _: HOPPER)
    # Nothing fades between what its tokens write and the gradient of the final state.
    shape = {"B": 1, "H": 1, "HV": 2, "K": 128, "V": 256, "T": 200}
    with tuning(split=split):
        _assert_right(draw(gated_delta_rule, shape, torch.bfloat16), device)


@pytest.mark.parametrize("device", DEVICES)
def test_heads_of_one_projection_are_read_as_they_lie(device: str) -> None:
    sample = draw(gated_delta_rule, {**SHAPE, "HV": 2, "T": 20}, torch.float32).to(device)
    names = ("q", "k", "v")
    fused = torch.stack([sample.arguments[name] for name in names], dim=2)
    views = dict(zip(names, fused.unbind(2), strict=True))
    assert not any(view.is_contiguous() for view in views.values())
    out, state = gated_delta_rule(**{**sample.arguments, **views})
    expected = results(gated_delta_rule, sample)
    assert torch.equal(out, expected["out"])
    assert torch.equal(state, expected["final_state"])


def test_mixed_dtypes_are_refused() -> None:
    arguments = draw(gated_delta_rule, {**SHAPE, "T": 4}, torch.float32).arguments
    with pytest.raises(HeddleError, match="k is float32, expected float16 as q"):
        gated_delta_rule(**{**arguments, "q": arguments["q"].half()})


def test_a_vector_is_no_row_of_heads() -> None:
    arguments = draw(gated_delta_rule, {**SHAPE, "T": 4}, torch.float32).arguments
    with pytest.raises(HeddleError, match="must be"):
        gated_delta_rule(**{**arguments, "q": arguments["q"].flatten()})


def test_the_path_follows_device_dtype_and_shape() -> None:
    on_gpu_kernels = "triton" if INTERPRETED else "torch"
    assert gated_delta_rule.path("cpu", torch.float32, K=64, V=64) == on_gpu_kernels
    assert gated_delta_rule.path("cpu", torch.float64, K=64, V=64) == "torch"
    assert gated_delta_rule.path("cpu", torch.float32, K=257, V=64) == "torch"
    with force_path("triton"), pytest.raises(HeddleError, match="cannot run in Triton"):
        gated_delta_rule.path("cpu", torch.float64, K=64, V=64)


def test_what_no_gpu_has_held_to_the_reference_runs_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("heddle.kernels.op._triton_runs", lambda *_: True)
    new = replace(gated_delta_rule, unproven=(torch.float16,))
    assert new.path("cuda", torch.bfloat16, K=64, V=64) == "triton"
    assert new.path("cuda", torch.float16, K=64, V=64) == ("triton" if INTERPRETED else "torch")
    with force_path("triton"):
        assert new.path("cuda", torch.float16, K=64, V=64) == "triton"


@pytest.mark.parametrize("table", [HOPPER, OTHER], ids=["hopper", "other"])
def test_nothing_is_loaded_ahead_where_loops_follow_each_other(table: Family) -> None:
    # docs/decisions/0008-loops-in-a-row.md
    assert {getattr(table, field.name).gradient.stages for field in fields(table)} == {1}


@pytest.mark.parametrize("table", [HOPPER, OTHER], ids=["hopper", "other"])
def test_launches_of_the_table_are_legal(table: Family) -> None:
    plans = [getattr(table, field.name) for field in fields(table)]
    for plan in plans:
        launches = [getattr(plan, field.name) for field in fields(plan)]
        launches = [launch for launch in launches if isinstance(launch, Launch)]
        # What one kernel leaves for the next is cut into chunks.
        assert {launch.chunk for launch in launches} == {plan.chunk}
        for size in (plan.chunk, *(launch.columns for launch in launches)):
            # Products want at least 16 rows and columns, and tiles are powers of two.
            assert size >= 16
            assert size & (size - 1) == 0
        assert {launch.warps for launch in launches} <= {1, 2, 4, 8}


def _opaque(
    device: str, *, packed: bool = False, routed: bool = False
) -> tuple[tuple[Tensor | float | None, ...], Sample]:
    ends = [0, 3, 3, 20] if packed else None
    sample = draw(gated_delta_rule, {**SHAPE, "T": 20}, torch.float32, cu_seqlens=ends).to(device)
    given = {name: x.requires_grad_(name in sample.wanted) for name, x in sample.arguments.items()}
    inputs = [given[name] for name in ("q", "k", "v", "log_decay", "beta")]
    routes = None
    if routed:
        chunks = -(-20 // longest_chunk(torch.device(device), 4, SHAPE["K"]))
        size = (SHAPE["B"] * chunks, SHAPE["HV"])
        routes = torch.linspace(0, 1, math.prod(size), device=device).view(size).requires_grad_()
    return (*inputs, 0.25, given["initial_state"], given.get("cu_seqlens"), routes), sample


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("form", [None, "packed", "routed"])
def test_torch_library_knows_the_opaque_op(device: str, form: str | None) -> None:
    inputs, _ = _opaque(device, **({} if form is None else {form: True}))
    torch.library.opcheck(torch.ops.heddle.gated_delta_rule_kernels.default, (*inputs, True))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("routed", [False, True])
def test_a_backward_pass_for_which_nothing_was_kept_runs_forward_again(device: str, routed: bool) -> None:
    inputs, sample = _opaque(device, routed=routed)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    found = []
    for keep in (True, False):
        out, state, *_ = torch.ops.heddle.gated_delta_rule_kernels(*inputs, keep)
        found.append(torch.autograd.grad((out, state), leaves, sample.upstream))
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


def test_value_heads_share_their_key_head_in_groups() -> None:
    sample = draw(gated_delta_rule, SHAPE, torch.float64)
    grouped = results(gated_delta_rule, sample)
    spread = {name: sample.arguments[name].repeat_interleave(2, dim=2) for name in ("q", "k")}
    alone = results(gated_delta_rule, _changed(sample, **spread))
    assert torch.equal(grouped["out"], alone["out"])
    summed = alone["d_k"].unflatten(2, (2, 2)).sum(3)
    assert torch.allclose(grouped["d_k"], summed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_the_blockwise_inverse_is_the_inverse(size: int) -> None:
    strict = torch.rand(3, size, size, dtype=torch.float64).tril(-1)
    product = _unit_lower_inverse(strict) @ (strict + torch.eye(size))
    assert torch.allclose(product, torch.eye(size, dtype=torch.float64).expand_as(product), atol=1e-9)


@pytest.mark.gpu
def test_forward_and_backward_run_in_a_cuda_graph() -> None:
    sample = draw(gated_delta_rule, SHAPE, torch.float32).to("cuda")
    expected = results(gated_delta_rule, sample)
    arguments = {name: x.requires_grad_(name in sample.wanted) for name, x in sample.arguments.items()}

    def both() -> list[torch.Tensor]:
        found = gated_delta_rule(**arguments)
        return [
            *found,
            *torch.autograd.grad(found, [arguments[name] for name in sample.wanted], sample.upstream),
        ]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))
