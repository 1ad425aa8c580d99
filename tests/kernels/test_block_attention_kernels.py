"""The kernels of block_attention: the forms they take against the reference, tiles and lists, split lists, equal runs, paths.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from held import assert_held, by_columns, compiled, over_settings
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels import force_path, watch_paths
from heddle.kernels._block_attention_lists import Choice, Tiling, gate_marks, marks
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.block_attention import block_attention, block_attention_reference
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import INTERPRETED, LIBRARY

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

FORMS = ("listed", "chosen", "gates")
Given = dict[str, Any]


def drawn(
    form: str, *, B: int = 1, T: int = 11, S: int = 22, G: int = 2, d: int = 16, V: int = 16, block: int = 8
) -> Given:
    """Arguments in float64, padding on both sides of the first row and tokens that are not written."""
    generator = torch.Generator().manual_seed(T + S + G)
    N, C = 2, -(-S // block)
    shapes = {"q": (B, N * G, T, d), "k": (B, N, S, d), "v": (B, N, S, V)}
    given: Given = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    read = torch.rand(B, N, T, C, generator=generator) > 0.4
    real, written = torch.ones(B, S, dtype=torch.bool), torch.ones(B, S, dtype=torch.float64)
    start = torch.full((B,), S - T)
    real[0, max(1, S - 2) :] = False
    written[-1, 3:5] = 0.0
    start[0] -= 2
    given |= {"start": start, "real": real, "written": written, "block": block}
    listed = torch.where(read, torch.arange(C), -1)
    return given | {form: {"listed": listed, "chosen": read, "gates": read[:, :, 0].double()}[form]}


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


def rounded(given: Given, dtype: torch.dtype) -> Given:
    return {
        name: x.to(dtype).double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def assert_right(given: Given, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    """Every result within the tolerance of the exact one."""
    given = rounded(given, dtype)
    exact = results(block_attention_reference, given, torch.float64, "cpu")
    assert_held(exact, lambda: results(block_attention, given, dtype, device), dtype, device, **overrides)


@over_settings
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    assert_right(drawn(form, B=2 if form == "chosen" else 1), dtype, device)


# A group that is no power of two, ragged heads, blocks of more keys than are treated at a time, and of a single key.
ODD = {
    "group": {"G": 3, "d": 5, "V": 40, "block": 3},
    "long": {"G": 1, "T": 5, "S": 83, "block": 70},
    "token": {"T": 1, "S": 19},
    "keys": {"T": 9, "S": 21, "block": 1},
}


@over_settings
@pytest.mark.parametrize("odd", ODD)
def test_odd_sizes_are_right(odd: str, device: str, dtype: torch.dtype) -> None:
    assert_right(drawn("listed", **{"G": 2, **ODD[odd]}), dtype, device)


@over_settings
@pytest.mark.parametrize("is_limited", [False, True])
def test_gated_tiles_that_see_a_block_whole_are_right(
    is_limited: bool, device: str, dtype: torch.dtype
) -> None:
    given = drawn("gates", T=41, S=56, G=1)
    if not is_limited:
        given = {name: x for name, x in given.items() if name not in ("real", "written")}
    assert_right(given, dtype, device, gated=Launch(chunk=16, columns=16, warps=4, stages=1))


@over_settings
@pytest.mark.parametrize("length", [26, 27, 28])
def test_a_gate_has_its_gradient_where_those_of_its_logits_cancel(
    length: int, device: str, dtype: torch.dtype
) -> None:
    # With a δ of the rounded output it was nine times as far off in float16 as in plain torch.
    assert_right(drawn("gates", T=length, S=length), dtype, device)


@over_settings
@pytest.mark.parametrize("block", [16, 32])
def test_gated_tiles_are_the_same_by_descriptors(block: int, device: str, dtype: torch.dtype) -> None:
    given = drawn("gates", B=2, T=41, S=75, G=1, V=24, block=block)
    launch = Launch(chunk=32, columns=16, warps=4, stages=1)
    assert_right(given, dtype, device, gated=launch, gate_descriptors=1)


@over_settings
def test_a_query_that_reads_one_key_has_no_gradient_but_rounding(device: str, dtype: torch.dtype) -> None:
    given = rounded(drawn("listed", T=1, S=3), dtype)
    assert not results(block_attention_reference, given, torch.float64, "cpu")["k"].any()
    found = results(block_attention, given, dtype, device)
    for name in ("q", "k"):
        assert float(found[name].abs().max()) <= EPSILON[dtype], name


@over_settings
@pytest.mark.parametrize("form", ["listed", "chosen"])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_decode_step_is_right_however_its_list_is_split(
    form: str, splits: int, device: str, dtype: torch.dtype
) -> None:
    assert_right(drawn(form, B=2, T=1, S=41), dtype, device, splits=splits)


@over_settings
@pytest.mark.parametrize("form", ["listed", "chosen"])
def test_what_later_queries_of_a_tile_read_changes_no_bit_however_lists_are_split(
    form: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETED:
        monkeypatch.setattr(numpy, "matmul", by_columns)
    given, outs = drawn(form, T=8, S=40, block=4), []
    every = {"listed": torch.arange(10), "chosen": torch.ones(10, dtype=torch.bool)}[form]
    none = {"listed": -1, "chosen": False}[form]
    for later in (given[form][:, :, 5:], every, torch.full_like(every, none)):
        read = given[form].clone()
        read[:, :, 5:] = later
        with tuning(splits=3):
            outs.append(results(block_attention, {**given, form: read}, dtype, device)["out"][:, :5])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(128, 128), (64, 64), (192, 128), (256, 256)], ids=str)
def test_heads_as_models_have_them_are_right(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    d, V = sizes
    assert_right(drawn("listed", T=37, S=200, G=16, d=d, V=V, block=64), dtype, "cuda")
    assert_right(drawn("chosen", B=3, T=1, S=700, G=16, d=d, V=V, block=64), dtype, "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_runs_are_equal_to_the_bit_whatever_is_in_fresh_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = drawn("chosen", T=3, S=12)
    clean = [results(block_attention, given, torch.float32, device)]
    with tuning(splits=2):
        clean.append(results(block_attention, given, torch.float32, device))

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            # No list goes on with what stands behind it.
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 30)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    assert torch.empty(3).isnan().all()
    for before, overrides in zip(clean, ({}, {"splits": 2}), strict=True):
        with tuning(**overrides):
            after = results(block_attention, given, torch.float32, device)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_lists_and_marks_say_the_same_as_the_table() -> None:
    given, dtype = drawn("chosen", G=1), torch.float64
    with_list = {**given, "listed": torch.where(given["chosen"], torch.arange(3), -1)}
    found, same = results(block_attention, given, dtype, "cpu"), {**with_list}
    del same["chosen"]
    listed = results(block_attention, same, dtype, "cpu")
    assert all(torch.equal(found[name], listed[name]) for name in found)
    tiling = Tiling(given["start"], 2, 11, 4, 8, 3)
    told = [marks(Choice(one.get("listed"), one.get("chosen"), None), tiling) for one in (same, given)]
    assert torch.equal(*told)
    # Query 5 is the second of the second tile; it is at place 5 + 11 - 2.
    bits = (told[0][0, :, 1] >> 1) & 1
    assert torch.equal(bits[:, :2].bool(), given["chosen"][0, :, 5, :2])
    assert not told[0][0, :, 0, 2:].any(), "the first tile ends at place 12"


def test_gates_mark_blocks_for_all_queries_and_the_own_one_for_its_own() -> None:
    gates = torch.tensor([[[0.0, 1.0, 0.0]]])
    tiling = Tiling(torch.tensor([0]), 1, 6, 4, 2, 3)
    found = marks(Choice(None, None, gates), tiling)[0, 0]
    assert found.tolist() == [[0b0011, 0b1111, 0], [0, 0b1111, 0b1111 & found[1, 2].item()]]
    assert found[1, 2].item() & 0b11 == 0b11
    # For as many queries as a tile may have: 1 for the gate, 2 where the block is some query's own.
    assert gate_marks(gates, tiling)[0, 0].tolist() == [[2, 3, 0], [0, 1, 2 | found[1, 2].item() & 1 << 1]]


def test_what_has_no_kernel_runs_in_torch() -> None:
    given = {name: x for name, x in drawn("listed", T=2, S=5).items() if name != "listed"}
    with watch_paths() as seen:
        results(block_attention, given, torch.float32, "cpu")
    assert {path for _, path in seen} == {"torch"}, "without a choice there are no lists"
    with force_path("triton"), pytest.raises(HeddleError, match="cannot run in Triton"):
        results(block_attention, given, torch.float32, "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_knows_the_op_and_its_gradients(device: str) -> None:
    given = drawn("listed", T=5, S=9, G=1)
    known = getattr(torch.ops, LIBRARY).block_attention.default
    tensors = {name: x.to(device) for name, x in given.items() if isinstance(x, Tensor)}
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    arguments = {**tensors, "scale": 0.5, "block": given["block"]}
    ordered = [arguments.get(argument.name) for argument in known._schema.arguments]
    ordered = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in ordered]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(known, tuple(ordered), test_utils=checks)
    whole = compiled(block_attention)
    found, expected = (results(one, given, torch.float32, device) for one in (whole, block_attention))
    assert all((found[name] - expected[name]).abs().max() <= EPSILON[torch.float32] for name in expected)


def test_lists_that_do_not_fit_are_told() -> None:
    given = drawn("listed")
    with pytest.raises(HeddleError, match="listed has shape") as error:
        block_attention(**{**given, "listed": given["listed"][:, :, :3]})
    assert error.value.code == "bad-argument"
