"""dynamic_conv where the contracts of ops do not look: images, tokens that are read alone, kernels of different sizes, tiles.

With TRITON_INTERPRET=1 the kernels run, interpreted (see test_interpreter.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from held import assert_held, compiled, over_settings
from torch import Tensor
from toys import mixer_of, noise, padded_call

from heddle.errors import HeddleError
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.configs.launch import Launch
from heddle.kernels.dynamic_conv import MAX_HEAD_SIZE, dynamic_conv, dynamic_conv_reference
from heddle.kernels.op import INTERPRETED, LIBRARY, force_path, watch_paths

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

Given = dict[str, Any]
B, H, D = 2, 2, 12
# Tokens, tokens before them, taps of tokens and of all, the width of images.
FORMS: dict[str, tuple[int, int, int, int, int | None]] = {
    "line": (21, 0, 5, 5, None),
    "alone": (21, 0, 4, 0, None),
    "long": (21, 0, 3, 7, None),
    "before": (9, 6, 7, 4, None),
    "step": (1, 15, 16, 16, None),
    "image": (24, 0, 9, 9, 6),
    "ragged": (13, 0, 9, 25, 5),
    "squares": (17, 0, 25, 1, 5),
    "made": (13, 0, 9, 0, 4),
    "column": (7, 0, 9, 9, 1),
    "small": (5, 0, 49, 0, 3),
}
FLOAT64 = EPSILON[torch.float64]
# Tiles of eight tokens and of four, of which a program goes through three.
_TILE = Launch(chunk=1, columns=128, warps=1, stages=1)
SMALL = {"dynamic_forward": _TILE, "dynamic_inputs": _TILE, "dynamic_taps": Launch(3, 64, 1, 1)}


def drawn(form: str, **sizes: int) -> Given:
    length, before, taps, fixed, width = FORMS[form]
    size = {"B": B, "H": H, "D": D, **sizes}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(3)
    return {
        "x": normal(size["B"], before + length, size["H"], size["D"]),
        "weight": torch.softmax(normal(size["B"], length, size["H"], taps), dim=-1),
        "static": normal(size["H"], size["D"], fixed) if fixed else None,
        "width": width,
    }


def results(
    function: Any, given: Given, dtype: torch.dtype, device: str, narrow: tuple[str, ...] = ("x",)
) -> dict[str, Tensor]:
    """Output and all gradients; what is not `narrow` is float32."""
    exact = function is dynamic_conv_reference
    leaves = dict(given)
    for name, x in given.items():
        if isinstance(x, Tensor):
            rounded = x.to(dtype if name in narrow or dtype == torch.float64 else torch.float32)
            leaves[name] = rounded.to(device, torch.float64 if exact else None).requires_grad_()
    wanted = [name for name, x in leaves.items() if isinstance(x, Tensor)]
    out = function(**leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(out, [leaves[name] for name in wanted], upstream.to(dtype).to(out))
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def held(given: Given, dtype: torch.dtype, device: str, *narrow: str, **overrides: Any) -> None:
    chosen = ("x", *narrow)
    exact = results(dynamic_conv_reference, given, dtype, "cpu", chosen)
    assert_held(
        exact, lambda: results(dynamic_conv, given, dtype, device, chosen), dtype, device, **overrides
    )


@over_settings
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    held(drawn(form), dtype, device, **SMALL)


@over_settings
@pytest.mark.parametrize("form", ["long", "ragged"])
def test_taps_may_be_rounded_too(form: str, device: str, dtype: torch.dtype) -> None:
    held(drawn(form), dtype, device, "weight", "static")
    found = results(dynamic_conv, drawn(form), dtype, device, ("x", "weight"))
    kept = {"out": dtype, "x": dtype, "weight": dtype, "static": torch.float32}
    assert {name: x.dtype for name, x in found.items()} == kept


@pytest.mark.parametrize("form", FORMS)
def test_in_float64_nothing_is_lost(form: str) -> None:
    given = drawn(form)
    found, exact = (
        results(one, given, torch.float64, "cpu") for one in (dynamic_conv, dynamic_conv_reference)
    )
    for name, x in exact.items():
        assert (found[name] - x).abs().max() < FLOAT64 * max(1.0, x.abs().max()), name


@over_settings
@pytest.mark.parametrize("form", ["before", "ragged"])
def test_two_runs_are_equal_to_the_bit(form: str, device: str, dtype: torch.dtype) -> None:
    first, second = (results(dynamic_conv, drawn(form), dtype, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pieces_that_are_told_what_came_before_are_the_whole(device: str) -> None:
    given = {name: x.float().to(device) for name, x in drawn("line").items() if isinstance(x, Tensor)}
    whole, reach = dynamic_conv(**given), given["weight"].shape[3] - 1
    for begin, end in ((0, 1), (1, 3), (3, 17), (17, 21)):
        x, weight = given["x"][:, max(0, begin - reach) : end], given["weight"][:, begin:end]
        assert torch.equal(dynamic_conv(x, weight, static=given["static"]), whole[:, begin:end])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_token_hears_later_ones_nor_what_lies_beyond_an_edge(device: str) -> None:
    for form, other, hears in (("line", 8, range(8, 13)), ("image", 12, (6, 7, 12, 13, 18, 19))):
        given = {
            name: x.float().to(device) if isinstance(x, Tensor) else x for name, x in drawn(form).items()
        }
        x = given["x"].clone()
        x[:, other] = torch.inf
        changed = dynamic_conv(**{**given, "x": x})
        assert [t for t in range(x.shape[1]) if not changed[:, t].isfinite().all()] == list(hears)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("grid", [None, {"width": 5, "small_taps": 1}], ids=["line", "grid"])
def test_a_mixer_gives_by_its_op_what_it_gives_in_float64(
    grid: Mapping[str, int] | None, device: str
) -> None:
    fields: Given = {} if grid is None else {"grid": grid}
    exact = mixer_of(24, "contmix", heads=2, taps=3, static_taps=5, summaries=2, **fields)
    mixer, x = copy.deepcopy(exact).to(device, torch.float32), noise(2, 23, 24)
    real, written = torch.ones(2, 23, dtype=torch.bool), torch.ones(2, 23)
    real[1, :6], written[:, 9:12] = False, 0.0
    found = []
    for module, given in ((exact, x), (mixer, x.float().to(device))):
        leaf, call = given.requires_grad_(), padded_call(real.to(given.device))
        call.written = written.to(given.device).requires_grad_()
        # The fixture forces kernels, which take no float64.
        with watch_paths() as seen, force_path("torch") if module is exact else nullcontext():
            y = module(leaf, call)
        wanted = [leaf, call.written, *module.parameters()]
        found.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert {one for one in seen if one[0] == "dynamic_conv"} == {
        ("dynamic_conv", "triton" if INTERPRETED or device == "cuda" else "torch")
    }
    for one, other in zip(*found, strict=True):
        is_padded = one.dim() == 3 and one.shape[1] == 23
        expected, told = (
            side.detach().cpu()[real] if is_padded else side.detach().cpu() for side in (one, other)
        )
        assert (told - expected).abs().max() <= 5 * EPSILON[torch.float32] * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [32, 128, 200, MAX_HEAD_SIZE])
def test_sizes_as_models_have_them_are_right(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for length, taps, width in ((300, 16, None), (23 * 16 - 5, 49, 23)):
        shape = {"B": 1, "T": length, "H": 2, "K": size, "W": taps}
        given = {**dynamic_conv.cases.inputs(shape, generator), "width": width}
        held(given, dtype, "cuda")
        first, second = (results(dynamic_conv, given, dtype, "cuda") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", ["before", "ragged"])
def test_it_compiles_whole_and_torch_knows_it(form: str, device: str) -> None:
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in drawn(form).items()}
    known = getattr(torch.ops, LIBRARY).dynamic_conv.default
    found, expected = (
        results(one, given, torch.float32, device) for one in (compiled(dynamic_conv), dynamic_conv)
    )
    for name, x in expected.items():
        assert (found[name] - x).abs().max() <= EPSILON[torch.float32] * x.abs().max(), name
    plain = [x.float() if isinstance(x, Tensor) else x for x in given.values()]
    assert torch.equal(known(*plain), expected["out"])


def test_the_gradient_of_a_gradient_is_refused_by_kernels_and_not_lost() -> None:
    given: Mapping[str, Any] = {
        name: x.float().requires_grad_() for name, x in drawn("alone").items() if isinstance(x, Tensor)
    }
    (gradient,) = torch.autograd.grad(dynamic_conv(**given).square().sum(), given["x"], create_graph=True)
    if not INTERPRETED:
        assert torch.autograd.grad(gradient.sum(), given["x"])[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(gradient.sum(), given["x"])


@pytest.mark.parametrize(
    ("form", "change", "told"),
    [
        ("line", {"x": torch.ones(2, 5, 3)}, r"x must be \[B, S, H, d\]"),
        ("line", {"weight": torch.ones(B, 22, H, 5)}, "T no more than S"),
        ("line", {"weight": torch.ones(B, 0, H, 5)}, "at least one token"),
        (
            "line",
            {"weight": torch.ones(B, 21, 4, 5)},
            r"weight has shape \[2, 21, 4, 5\], expected \[2, 21, 2, 5\]",
        ),
        ("line", {"weight": torch.ones(B, 21, H, 0)}, "weight has no taps"),
        ("line", {"static": torch.ones(H, 4, 5)}, r"static has shape \[2, 4, 5\], expected \[2, 12, 5\]"),
        ("line", {"static": torch.ones(H, D, 0)}, "static has no taps"),
        ("line", {"static": torch.tensor(1.0)}, r"static has shape \[\], expected \[2, 12, 1\]"),
        ("line", {"width": 3}, "weight has 5 taps, expected the square of an odd number"),
        ("image", {"static": torch.ones(H, D, 4)}, "static has 4 taps, expected the square of an odd number"),
        ("image", {"width": 0}, "an image of width 0 must have a positive one"),
        ("image", {"weight": torch.ones(B, 23, H, 9)}, "as many outputs as tokens, not 23 of 24"),
    ],
)
def test_what_does_not_fit_is_named(form: str, change: Given, told: str) -> None:
    given = {name: x.float() if isinstance(x, Tensor) else x for name, x in drawn(form).items()}
    with pytest.raises(HeddleError, match=f"^dynamic_conv: .*{told}") as error:
        dynamic_conv(**{**given, **change})
    assert error.value.code == "bad-argument"


def test_a_length_is_not_among_what_kernels_are_compiled_for() -> None:
    op = pytest.importorskip("heddle.kernels._dynamic_conv_op")
    kernels = pytest.importorskip("heddle.kernels._dynamic_conv_kernels")
    # Of squares their sides; the larger one is gone through.
    assert op.sizes(D, (9, 25), Launch(1, 4096, 4, 1), is_grid=True) == {
        "K": 12, "ROWS": 64, "COLUMNS": 16, "SIDE": 5, "TAPS": 3, "STATIC": 5, "GRID": True,
    }  # fmt: skip
    assert {"T", "S", "shift", "width", "tiles"} <= set(kernels.LENGTHS)
