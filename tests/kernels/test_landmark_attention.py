"""landmark_attention: results and gradients against the reference query by query, choice and ties, a step's parts, equal runs.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from held import assert_held, compiled, over_settings
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels import _block_attention_torch as parts
from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.common.tuning import tuning
from heddle.kernels.landmark_attention import landmark_attention, landmark_attention_reference
from heddle.kernels.op import INTERPRETED, LIBRARY

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

FLOAT64 = EPSILON[torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Given = dict[str, Any]


def drawn(
    *,
    B: int = 1,
    T: int = 11,
    S: int = 22,
    G: int = 2,
    d: int = 16,
    V: int = 16,
    block: int = 8,
    top: int | None = None,
    limited: bool = True,
) -> Given:
    """Arguments in float64; if `limited`, padding on both sides of the first row and tokens that are not written."""
    generator = torch.Generator().manual_seed(T + S + G)
    N, C = 2, -(-S // block)
    shapes = {"q": (B, N * G, T, d), "k": (B, N, S, d), "v": (B, N, S, V), "landmarks": (B, N, C, d)}
    given: Given = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    given |= {"start": torch.full((B,), S - T), "block": block, "top": top}
    if limited:
        real, written = torch.ones(B, S, dtype=torch.bool), torch.ones(B, S, dtype=torch.float64)
        real[0, max(1, S - 2) :] = False
        written[-1, 3:5] = 0.0
        # Nothing of this block is seen, and its landmark is not.
        written[-1, block : 2 * block] = 0.0
        given["start"][0] -= 2
        given |= {"real": real, "written": written}
    return given


def results(
    function: Callable[..., Tensor], given: Given, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Output and every gradient, with heads behind time as `worst_error` wants them."""
    leaves = {
        name: x.to(device=device, dtype=dtype if x.is_floating_point() else None)
        if isinstance(x, Tensor)
        else x
        for name, x in given.items()
    }
    wanted = [name for name, x in leaves.items() if isinstance(x, Tensor) and x.is_floating_point()]
    for name in wanted:
        leaves[name].requires_grad_()
    out = function(**leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(
        out, [leaves[name] for name in wanted], upstream.to(out), allow_unused=True, materialize_grads=True
    )
    named = {"out": out.detach(), **dict(zip(wanted, found, strict=True))}
    return {name: x.transpose(1, 2) if x.dim() == 4 else x for name, x in named.items()}


def outputs(
    function: Callable[..., Tensor], given: Given, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Output alone, with heads behind time."""
    there = {
        name: x.to(device=device, dtype=dtype if x.is_floating_point() else None)
        if isinstance(x, Tensor)
        else x
        for name, x in given.items()
    }
    return {"out": function(**there).transpose(1, 2)}


def rounded(given: Given, dtype: torch.dtype) -> Given:
    return {
        name: x.to(dtype).double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def assert_right(given: Given, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    """Every result within the tolerance of the exact one."""
    given = rounded(given, dtype)
    exact = results(landmark_attention_reference, given, torch.float64, "cpu")
    assert_held(exact, lambda: results(landmark_attention, given, dtype, device), dtype, device, **overrides)


@over_settings
@pytest.mark.parametrize("top", [None, 1, 2])
def test_results_and_gradients_are_those_of_the_reference(
    top: int | None, device: str, dtype: torch.dtype
) -> None:
    assert_right(drawn(B=2 if top is None else 1, T=12, S=29, top=top), dtype, device)


# A group that is no power of two, ragged heads and blocks; a tile of queries in many blocks; blocks wider than a tile of queries.
ODD = {
    "group": {"G": 3, "d": 5, "V": 40, "block": 3, "top": 2},
    "narrow": {"G": 1, "T": 37, "S": 37, "block": 2, "limited": False},
    "long": {"G": 1, "T": 12, "S": 83, "block": 70},
    "whole": {"G": 2, "T": 35, "S": 70, "block": 16, "limited": False},
}


@over_settings
@pytest.mark.parametrize("odd", ODD)
def test_odd_sizes_are_right(odd: str, device: str, dtype: torch.dtype) -> None:
    assert_right(drawn(**ODD[odd]), dtype, device)


@over_settings
@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_decode_step_is_right_however_its_blocks_are_split(
    splits: int, top: int | None, device: str, dtype: torch.dtype
) -> None:
    assert_right(drawn(B=2, T=1, S=43, top=top), dtype, device, splits=splits)
    assert_right(drawn(T=2, S=22, G=3, block=4, top=top, limited=False), dtype, device, splits=splits)


FUSED = {
    "limited": {"B": 2, "T": 1, "S": 43},
    "group": {"T": 2, "S": 22, "G": 3, "block": 4, "limited": False},
    "ragged": {"B": 2, "T": 1, "S": 29, "d": 5, "V": 40, "block": 3},
}


@over_settings
@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize(("splits", "listed"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("form", FUSED)
def test_a_step_that_merges_as_it_reads_is_right(
    form: str, splits: int, listed: bool, top: int | None, device: str, dtype: torch.dtype
) -> None:
    given = rounded(drawn(**FUSED[form], top=top), dtype)
    exact, found = (
        functools.partial(outputs, one, given) for one in (landmark_attention_reference, landmark_attention)
    )
    overrides = {"splits": splits, "fused": True, "listed": listed}
    assert_held(exact(torch.float64, "cpu"), lambda: found(dtype, device), dtype, device, **overrides)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(128, 128), (64, 64), (192, 128), (256, 256)], ids=str)
def test_heads_as_models_have_them_are_right(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    d, V = sizes
    assert_right(drawn(T=130, S=200, G=4, d=d, V=V, block=64, limited=False), dtype, "cuda")
    step = drawn(B=3, T=1, S=700, G=4, d=d, V=V, block=64, top=4)
    assert_right(step, dtype, "cuda")
    if dtype != torch.float32 and max(sizes) <= 128:
        assert_right(step, dtype, "cuda", fused=True)


@pytest.mark.parametrize("top", [None, 1])
def test_gradients_are_those_of_the_reference_in_float64(
    top: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "QUERIES", 4)
    given = drawn(B=2, T=7, S=11, block=3, top=top)
    found, exact = (
        results(one, given, torch.float64, "cpu")
        for one in (landmark_attention, landmark_attention_reference)
    )
    for name, tensor in exact.items():
        assert (found[name] - tensor).abs().max() < FLOAT64 * max(1.0, tensor.abs().max()), name


def test_landmarks_that_weigh_their_blocks_make_softmax_attention() -> None:
    given = drawn(T=11, S=11, block=1, limited=False)
    softmax = F.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], is_causal=True, enable_gqa=True
    )
    # A block of one key whose landmark is that key has the key's weight.
    assert (landmark_attention(**{**given, "landmarks": given["k"]}) - softmax).abs().max() < FLOAT64
    assert (landmark_attention(**given) - softmax).abs().max() > 1e-2
    # As many as there are is all of them.
    assert torch.equal(landmark_attention(**{**given, "top": 10}), landmark_attention(**given))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("T", "listed"), [(1, None), (1, False), (1, True), (11, None)])
def test_weights_sum_to_one_and_of_equal_landmarks_the_earlier_is_read(
    T: int, listed: bool | None, device: str
) -> None:
    with tuning(**({} if listed is None else {"fused": True, "listed": listed})):
        assert_sums_and_ties(T, device)


def assert_sums_and_ties(T: int, device: str) -> None:
    bound = EPSILON[torch.float32]
    given = {name: x for name, x in drawn(T=T, S=32, limited=False).items() if name != "top"}
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    given = {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()
    }
    for top in (None, 1, 2):
        ones = landmark_attention(**{**given, "v": torch.ones_like(given["v"]), "top": top})
        assert (ones - 1).abs().max() < bound
    # Zeros of either sign are equal. The last query is in block 3, and reads that and block 0 alone.
    marks = torch.zeros_like(given["landmarks"])
    marks[:, :, ::2] *= -1
    of = (torch.arange(32, device=device) // 8)[:, None].expand_as(given["v"])
    others = {**given, "landmarks": marks, "v": ((of == 1) | (of == 2)).float(), "top": 1}
    assert landmark_attention(**others)[:, :, -1].abs().max() == 0
    first = {**others, "v": (of == 0).float()}
    assert (landmark_attention(**first)[:, :, -1] > 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T", [1, 40])
def test_large_logits_leave_everything_finite(T: int, device: str) -> None:
    given = drawn(T=T, S=40)
    given |= {side: given[side] * 100 for side in ("q", "k", "landmarks")}
    for top in (None, 1):
        found = results(landmark_attention, {**given, "top": top}, torch.float32, device)
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("T", "fused"), [(1, False), (1, True), (12, False)])
def test_two_runs_are_equal_to_the_bit_whatever_is_in_fresh_memory(
    T: int, fused: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = drawn(T=T, S=30, top=1)
    with tuning(splits=2, fused=fused):
        before = results(landmark_attention, given, torch.float32, device)

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 30)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    assert torch.empty(3).isnan().all()
    with tuning(splits=2, fused=fused):
        after = results(landmark_attention, given, torch.float32, device)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not INTERPRETED, reason="the path in plain torch has no parts")
def test_many_queries_choose_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("heddle.kernels._landmark_attention_launch")
    given = drawn(T=20, S=40, top=2)
    whole = results(landmark_attention, given, torch.float32, "cpu")
    monkeypatch.setattr(launch, "MOST_LOGITS", 7 * 4 * 5)
    found = results(landmark_attention, given, torch.float32, "cpu")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


@pytest.mark.skipif(not INTERPRETED, reason="what the kernels round is seen where nothing else differs")
def test_the_gradient_of_landmarks_is_rounded_once() -> None:
    from heddle.kernels._landmark_attention_launch import launch_backward, launch_forward

    # Of 36 queries one alone has gradients, so that no errors cancel; what it came to is given unrounded.
    given = rounded(drawn(T=36, S=36, limited=False), torch.float16)
    sides = [given[name].half() for name in ("q", "k", "v", "landmarks")]
    numbers = (given["start"], None, None, 0.25, given["block"], None)
    d_out = torch.zeros(1, 4, 36, 16, dtype=torch.float16)
    d_out[:, ::2, -1] = torch.randn(2, 16, generator=torch.Generator().manual_seed(7)).half()
    leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v", "landmarks")}
    out = landmark_attention(**given, scale=0.25)
    (exact,) = torch.autograd.grad(out, leaves["landmarks"], d_out.double())
    lse = launch_forward(*sides, *numbers)[1]
    found = launch_backward(d_out, *sides, *numbers, out.detach().float(), lse)[3]
    # Halves lie so near to each other that float32 rarely rounds to another one.
    assert (found == exact.half()).double().mean() > 0.95


def test_what_no_gpu_has_held_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heddle.kernels.op._triton_runs", lambda *_: True)
    sizes = {"K": 128, "V": 128, "G": 4, "block": 64, "choice": 2048, "half_step": 1}
    waits = "triton" if INTERPRETED else "torch"
    assert landmark_attention.path("cuda", torch.bfloat16, **sizes) == "triton"
    many = sizes | {"choice": 2049}
    for shape in (many, sizes | {"choice": 33, "half_step": 0}):
        assert landmark_attention.path("cuda", torch.bfloat16, **shape) == waits
    with force_path("triton"):
        assert landmark_attention.path("cuda", torch.bfloat16, **many) == "triton"


def test_what_has_no_kernel_runs_in_torch() -> None:
    given = drawn(T=2, S=300, block=200, limited=False)
    with watch_paths() as seen:
        results(landmark_attention, given, torch.float32, "cpu")
    assert {path for _, path in seen} == {"torch"}, "a block is more than a program holds"
    with force_path("triton"), pytest.raises(HeddleError, match="cannot run in Triton"):
        results(landmark_attention, given, torch.float32, "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_torch_knows_the_op_and_its_gradients(device: str) -> None:
    given = drawn(T=5, S=9, G=1, top=1)
    known = getattr(torch.ops, LIBRARY).landmark_attention.default
    tensors = {name: x.to(device) for name, x in given.items() if isinstance(x, Tensor)}
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    arguments = {**tensors, "scale": 0.5, "block": given["block"], "top": 1}
    ordered = [arguments.get(argument.name) for argument in known._schema.arguments]
    ordered = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in ordered]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(known, tuple(ordered), test_utils=checks)
    whole = compiled(landmark_attention)
    found, expected = (results(one, given, torch.float32, device) for one in (whole, landmark_attention))
    assert all((found[name] - expected[name]).abs().max() <= EPSILON[torch.float32] for name in expected)


def refused(**change: Any) -> str:
    with pytest.raises(HeddleError) as error:
        landmark_attention(**{**drawn(), **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


def test_what_does_not_fit_is_told() -> None:
    assert "no more than keys" in refused(q=torch.ones(1, 4, 23, 16))
    assert "2 key heads do not divide 3 query heads" in refused(q=torch.ones(1, 3, 7, 16))
    assert "block 0 and top None must be positive" in refused(block=0)
    assert "block 8 and top 0 must be positive" in refused(top=0)
    assert "k is float64, expected float32 as q" in refused(q=torch.ones(1, 4, 7, 16))
    assert "landmarks has shape [1, 2, 2, 16], expected [1, 2, 3, 16]" in refused(
        landmarks=torch.ones(1, 2, 2, 16, dtype=torch.float64)
    )
