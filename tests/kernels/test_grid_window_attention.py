"""grid_window_attention: images and videos against the reference, boxes of all shapes, padding, the mixer, paths, refusals.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from held import assert_held, compiled, over_settings, settings
from torch import Tensor
from toys import mixer_of, noise

from heddle.compose.cache import Call
from heddle.errors import HeddleError
from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.configs.launch import Launch
from heddle.kernels.grid_window_attention import (
    HAS_KERNELS,
    grid_window_attention,
    grid_window_attention_reference,
)
from heddle.kernels.op import INTERPRETED, LIBRARY

if HAS_KERNELS:
    from heddle.kernels._grid_window_attention_launch import Axis, box_columns

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

B = 2
WANTED = ("q", "k", "v")
Given = dict[str, Any]
IMAGE = {"width": 9, "row_window": 3, "column_window": 2}
VIDEO = {"width": 5, "height": 4, "row_window": 2, "column_window": 2, "frame_window": 2}
INWARD = {"boundary": "inward"}


def drawn(T: int, K: int = 16, V: int = 16, heads: tuple[int, int] = (2, 2), **numbers: Any) -> Given:
    generator = torch.Generator().manual_seed(T + K)
    (H, N), made = heads, dict[str, Any]()
    for name, shape in {"q": (H, T, K), "k": (N, T, K), "v": (N, T, V)}.items():
        made[name] = torch.randn(B, *shape, generator=generator, dtype=torch.float64)
    return {**made, **numbers}


def behind_padding(T: int) -> Tensor:
    """One row with padding at both ends, one with none."""
    real = torch.ones(B, T, dtype=torch.bool)
    real[0, : T // 5] = real[0, -(T // 7) :] = False
    return real


FORMS: dict[str, Callable[[], Given]] = {
    # The last row is not full.
    "image": lambda: drawn(76, **IMAGE, **INWARD),
    "clipped": lambda: drawn(76, **IMAGE),
    "ragged": lambda: drawn(65, K=20, V=12, heads=(4, 2), **IMAGE, **INWARD),
    "padded": lambda: drawn(76, **IMAGE, **INWARD, real=behind_padding(76)),
    # The last frame is not full.
    "video": lambda: drawn(93, **VIDEO, **INWARD),
    "padded clipped video": lambda: drawn(93, heads=(4, 1), **VIDEO, real=behind_padding(93)),
    "all frames": lambda: drawn(60, **{**VIDEO, "frame_window": None, "row_window": 1}, **INWARD),
    "line": lambda: drawn(70, width=70, column_window=11, **INWARD),
    "column": lambda: drawn(40, width=1, row_window=6, **INWARD),
    "whole rows": lambda: drawn(50, width=8, row_window=2),
    # A gradient of logits is small beside what rounding takes from the output.
    "few": lambda: drawn(40, width=5, row_window=2, column_window=1, **INWARD),
    "itself": lambda: drawn(10, width=5, row_window=1, column_window=1),
    "alone": lambda: drawn(1, **IMAGE, **INWARD),
}


def at(given: Given, dtype: torch.dtype, device: str) -> Given:
    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: one(x) for name, x in given.items()}


def _scale(given: Given) -> float:
    """Not the usual one, and logits of the same size for all heads."""
    return float(1.6 * given["q"].shape[-1] ** -0.5)


def graded(function: Callable[..., Tensor], given: Given) -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in WANTED}}
    out = function(**leaves, scale=_scale(given))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(given["q"].dtype).to(out)
    found = torch.autograd.grad(out, [leaves[name] for name in WANTED], upstream)
    return {"out": out.detach(), **dict(zip(WANTED, found, strict=True))}


def held_to_reference(given: Given, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    given = at(given, dtype, device)
    wide = {**given, **{name: given[name].double() for name in WANTED}}
    exact = {name: x.transpose(1, 2) for name, x in graded(grid_window_attention_reference, wide).items()}
    # What is 0 has no relative error.
    nothing = {name for name, x in exact.items() if x.abs().max() < 1e-13}

    def run() -> dict[str, Tensor]:
        found = {name: x.transpose(1, 2) for name, x in graded(grid_window_attention, given).items()}
        assert all(found[name].abs().max() <= EPSILON[dtype] for name in nothing)
        return found

    assert_held(
        {name: x for name, x in exact.items() if name not in nothing}, run, dtype, device, **overrides
    )


def each(values: Iterable[Any], thorough: tuple[Any, ...]) -> list[Any]:
    """Each value on all devices in all dtypes; on a GPU, which compiles each, dtypes beside bfloat16 for the thorough alone."""
    return [
        pytest.param(value, *one.values, id=f"{value}-{one.id}", marks=one.marks)
        for value in values
        for one in settings()
        if one.values[0] == "cpu" or one.values[1] == torch.bfloat16 or value in thorough
    ]


@pytest.mark.parametrize(("form", "device", "dtype"), each(FORMS, ("ragged", "padded clipped video")))
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    held_to_reference(FORMS[form](), dtype, device)


@pytest.mark.parametrize(("size", "device", "dtype"), each((64, 96, 128, 256), (256,)))
def test_heads_of_every_size_are_right(size: int, device: str, dtype: torch.dtype) -> None:
    heads = (4, 2) if device == "cuda" else (1, 1)
    held_to_reference(drawn(93, size, size, heads, **VIDEO, **INWARD), dtype, device)


# The interpreter's maximum says so.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_what_is_no_number_gives_none() -> None:
    given = {name: x.float() if isinstance(x, Tensor) else x for name, x in FORMS["image"]().items()}
    given["q"][0, 1, 30] = torch.nan
    out = grid_window_attention(**given)
    assert out[0, 1, 30].isnan().all()
    assert int(out.isnan().any(dim=-1).sum()) == 1


@over_settings
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16), (32, 128)])
def test_boxes_of_any_size_give_the_same(queries: int, keys: int, device: str, dtype: torch.dtype) -> None:
    launch = Launch(chunk=queries, columns=keys, warps=4, stages=1)
    launches = dict.fromkeys(("forward", "queries", "keys"), launch)
    held_to_reference(FORMS["image"](), dtype, device, **launches)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "numbers",
    [
        {"width": 40, "row_window": 8, "column_window": 5, **INWARD},
        {"width": 14, "height": 9, "row_window": 4, "column_window": 6, "frame_window": 3, **INWARD},
        {"width": 21, "column_window": 9},
    ],
)
def test_whole_boxes_and_parts_of_them_are_right(numbers: Given, dtype: torch.dtype) -> None:
    held_to_reference(drawn(1100, 128, 128, (4, 2), **numbers), dtype, "cuda")


@over_settings
def test_results_are_the_same_to_the_bit_every_time(device: str, dtype: torch.dtype) -> None:
    given = at(FORMS["video"](), dtype, device)
    if device == "cuda" or INTERPRETED:
        first, second = graded(grid_window_attention, given), graded(grid_window_attention, given)
        assert all(torch.equal(first[name], second[name]) for name in first)
    else:
        assert torch.equal(*(grid_window_attention(**given) for _ in range(2)))


@over_settings
def test_padding_gets_nothing_and_changes_nothing(device: str, dtype: torch.dtype) -> None:
    given = at(FORMS["padded"](), dtype, device)
    found, real = graded(grid_window_attention, given), given["real"]
    for x in found.values():
        assert not x.transpose(1, 2)[~real].any()
    alone = {name: given[name][:1, :, real[0]] for name in WANTED}
    out = grid_window_attention(**{**given, **alone, "real": None}, scale=_scale(given))
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (found["out"][:1, :, real[0]] - out).abs().max() < bound
    nothing = {**given, "real": torch.zeros_like(real)}
    assert all(not x.any() for x in graded(grid_window_attention, nothing).values())


@pytest.mark.skipif(not HAS_KERNELS, reason="boxes are those of the kernels")
def test_boxes_are_as_few_as_they_can_be() -> None:
    def walked(axis: Axis, held: int, other: int) -> int:
        """Boxes along an axis for each box that is held, from the lists of what is seen."""
        found = 0
        for begin in range(0, axis.size, held):
            seen = set[int]()
            for place in range(begin, min(begin + held, axis.size)):
                first = min(max(place - axis.reach, 0), max(axis.size - 2 * axis.reach - 1, 0))
                seen |= {key for key in range(first, first + 2 * axis.reach + 1) if key < axis.size}
            found += len(range(min(seen), max(seen) + 1, other))
        return found

    for size, reach, wide in ((1, 0, 50), (30, 1, 5), (30, 7, 64), (64, 15, 9)):
        down, across = Axis(size, reach, True), Axis(wide, min(reach, wide - 1), True)
        chosen = box_columns(32, 16, down, across)
        counts = {
            (held, other): walked(down, 32 // held, 16 // other) * walked(across, held, other)
            for held, other in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16))
        }
        assert counts[chosen] == min(counts.values())
    assert box_columns(64, 64, Axis(64, 7, True), Axis(64, 7, True)) == (8, 8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_mixer_has_the_gradients_of_plain_torch(device: str) -> None:
    fields = {"heads": 4, "kv_heads": 2, "causal": False, **INWARD, "grid": VIDEO}
    mixer = mixer_of(32, "attention", **fields).to(device, torch.float32)
    x = noise(2, 50, 32).to(device, torch.float32)
    results = []
    for path in ("torch", "triton" if device == "cuda" or INTERPRETED else "torch"):
        with force_path(path), watch_paths() as seen:
            leaf = x.clone().requires_grad_()
            y = mixer(leaf, Call(torch.arange(50, device=device).expand(2, -1)))
            grads = torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])
        assert ("grid_window_attention", path) in seen
        results.append((y.detach(), *grads))
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_knows_the_op_and_its_gradients(device: str) -> None:
    given = at(drawn(20, **VIDEO, **INWARD, real=behind_padding(20)), torch.float32, device)
    known = getattr(torch.ops, LIBRARY).grid_window_attention.default
    q, k, v = (given[name] for name in WANTED)
    numbers = (
        VIDEO["height"],
        VIDEO["width"],
        VIDEO["frame_window"],
        VIDEO["row_window"],
        VIDEO["column_window"],
    )
    rest = (given["real"], *numbers, True, 0.5)
    torch.library.opcheck(known, (q, k, v, *rest), test_utils=("test_schema", "test_faketensor"))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(known, (*leaves, *rest), test_utils="test_autograd_registration")
    whole = compiled(grid_window_attention)
    found, expected = (graded(one, given) for one in (whole, grid_window_attention))
    assert all((found[name] - expected[name]).abs().max() <= EPSILON[torch.float32] for name in expected)


def test_what_does_not_fit_is_told() -> None:
    for change, told in (
        ({"k": torch.ones(B, 3, 93, 16, dtype=torch.float64)}, "3 key heads do not divide 2 query heads"),
        ({"v": torch.ones(B, 2, 92, 16, dtype=torch.float64)}, "v has shape"),
        ({"q": torch.ones(B, 2, 93)}, "must be"),
        ({"real": torch.ones(B, 92, dtype=torch.bool)}, "real has shape"),
        ({"width": 0}, "width 0 must be positive"),
        ({"height": 0}, "height 0 must be positive"),
        ({"row_window": -1}, "row_window -1 must be positive"),
        ({"scale": 0.0}, "scale 0.0 must be positive"),
        ({"height": None}, "frame_window 2 without a height"),
        ({"boundary": "slide"}, "boundary 'slide' is none of clip, inward"),
    ):
        with pytest.raises(HeddleError, match=told) as error:
            grid_window_attention(**{**drawn(93, **VIDEO), **change})
        assert error.value.code == "bad-argument"
