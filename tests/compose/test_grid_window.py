"""Windows along the axes of images and videos: which keys each query sees, its formula, padding, costs and what is refused."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, model_with, noise, padded_call, shaken

from heddle.compose.build import build
from heddle.compose.modules.grid_window import grid_keys
from heddle.specs import Site as SpecSite
from heddle.specs.grid import Grid
from heddle.specs.mixers.attention import Attention

HIDDEN = 24
IMAGE = {"width": 5, "row_window": 2, "column_window": 2}
VIDEO = {"width": 4, "height": 3, "row_window": 2, "column_window": 2, "frame_window": 2}
# As published: all frames.
ALL_FRAMES = {"width": 4, "height": 3, "row_window": 1, "column_window": 2}


def full(grid: dict[str, int]) -> dict[str, int | None]:
    return Grid.model_validate(grid).runtime()


def visible(place: int, length: int, grid: dict[str, Any], *, inward: bool) -> list[int]:
    """The keys of a query by the paper's formula with radii, axis by axis."""
    width, height = grid["width"], grid.get("height")
    frame = width * (height or 1)

    def at(j: int) -> tuple[int, ...]:
        return (j // width, j % width) if height is None else (j // frame, j % frame // width, j % width)

    sizes = (-(-length // width), width) if height is None else (-(-length // frame), height, width)
    names = ("frame_window", "row_window", "column_window")[-len(sizes) :]
    found = []
    for j in range(length):
        seen = True
        for q, k, size, name in zip(at(place), at(j), sizes, names, strict=True):
            if grid.get(name) is None:
                continue
            d = grid[name] - 1
            # What is missing on one side is added on the other.
            below, above = (max(0, q + d - size + 1), max(0, d - q)) if inward else (0, 0)
            seen = seen and q - d - below <= k <= q + d + above
        found += [j] if seen else []
    return found


@pytest.mark.parametrize("grid", [IMAGE, VIDEO, ALL_FRAMES, {"width": 3, "row_window": 9}, {"width": 1}])
@pytest.mark.parametrize("inward", [True, False])
def test_each_query_lists_the_keys_of_the_formula_once(grid: dict[str, int], inward: bool) -> None:
    for length in (1, 4, 15, 24, 37):
        index = grid_keys(call_at(0, length, rows=1), length, full(grid), inward=inward)
        for place in range(length):
            listed = sorted(j for j in index[0, place].tolist() if j >= 0)
            assert listed == visible(place, length, grid, inward=inward)
            assert place in listed


@pytest.mark.parametrize(("rows", "width", "frames"), [(6, 5, None), (3, 4, 5), (1, 9, 2), (2, 2, 1)])
def test_inward_every_query_sees_as_many_keys(rows: int, width: int, frames: int | None) -> None:
    for down, across, through in product((1, 2, 3, 9), (1, 2, 9), (1, 2, None)):
        grid = Grid(width=width, row_window=down, column_window=across)
        wanted = min(rows, 2 * down - 1) * min(width, 2 * across - 1)
        length = rows * width
        if frames is not None:
            grid = grid.model_copy(update={"height": rows, "frame_window": through})
            wanted, length = (
                wanted * (frames if through is None else min(frames, 2 * through - 1)),
                length * frames,
            )
        index = grid_keys(call_at(0, length, rows=1), length, grid.runtime(), inward=True)
        assert ((index >= 0).sum(-1) == wanted).all()
        assert grid.mean_keys_seen(length, slides=True) == wanted
        clipped = grid_keys(call_at(0, length, rows=1), length, grid.runtime(), inward=False)
        assert grid.mean_keys_seen(length, slides=False) == pytest.approx(
            (clipped >= 0).sum(-1).double().mean()
        )


def ready(grid: dict[str, int] | None, boundary: str = "inward", **fields: Any) -> Any:
    return mixer_of(
        HIDDEN, "attention", heads=4, kv_heads=2, causal=False, grid=grid, boundary=boundary, **fields
    )


def by_loop(mixer: Any, x: Tensor, grid: dict[str, int], *, inward: bool) -> Tensor:
    q, k, v = (getattr(mixer, f"{name}_proj")(x).unflatten(-1, (-1, 6)) for name in "qkv")
    out, length = torch.zeros_like(q), x.shape[1]
    for b, t in product(range(len(x)), range(length)):
        keys = visible(t, length, grid, inward=inward)
        for h in range(4):
            p = (k[b, keys, h // 2] @ q[b, t, h] / 6**0.5).softmax(0)
            out[b, t, h] = p @ v[b, keys, h // 2]
    y: Tensor = mixer.o_proj(out.flatten(2))
    return y


@pytest.mark.parametrize("grid", [IMAGE, VIDEO])
@pytest.mark.parametrize("boundary", ["inward", "clip"])
def test_it_equals_its_formula_and_so_do_its_gradients(grid: dict[str, int], boundary: str) -> None:
    # The last row, or frame, is not full.
    length = 28
    mixer, x = ready(grid, boundary, rope=None), noise(2, length, HIDDEN).requires_grad_()
    inputs, weight = [x, *mixer.parameters()], noise(2, length, HIDDEN, seed=4)
    y, expected = mixer(x, call_at(0, length)), by_loop(mixer, x, grid, inward=boundary == "inward")
    assert (y - expected).abs().max() < EXACT
    found, wanted = (torch.autograd.grad((one * weight).sum(), inputs) for one in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < EXACT


@torch.no_grad()
def test_one_row_is_a_line_and_wide_windows_see_all() -> None:
    x = noise(2, 12, HIDDEN)
    for boundary in ("inward", "clip"):
        line = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, causal=False, window=3, boundary=boundary)(
            x, call_at(0, 12)
        )
        for grid in ({"width": 12, "column_window": 3}, {"width": 1, "row_window": 3}):
            assert (ready(grid, boundary)(x, call_at(0, 12)) - line).abs().max() < EXACT
        every = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, causal=False)(x, call_at(0, 12))
        for grid in ({"width": 4, "row_window": 3, "column_window": 4}, {"width": 2, "height": 2}):
            assert (ready(grid, boundary)(x, call_at(0, 12)) - every).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("boundary", ["inward", "clip"])
def test_padding_on_either_side_is_no_place(boundary: str) -> None:
    mixer, x = ready(VIDEO, boundary), noise(2, 30, HIDDEN)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :3] = real[0, -2:] = False
    y = mixer(x, padded_call(real))
    assert y.isfinite().all()
    assert (y[:1, 3:-2] - mixer(x[:1, 3:-2], call_at(0, 25, rows=1))).abs().max() < EXACT
    assert (y[1] - mixer(x, call_at(0, 30))[1]).abs().max() < EXACT


@torch.no_grad()
def test_attention_rows_are_those_of_the_windows() -> None:
    mixer, x, seen = ready(VIDEO), noise(2, 36, HIDDEN), []
    mixer.rows_out.queries = (0, 17, -1)
    mixer.rows_out.register_forward_hook(lambda _, __, rows: seen.append(rows))
    mixer(x, call_at(0, 36))
    for row, place in zip(seen[0][0, 0], (0, 17, 35), strict=True):
        assert row.nonzero().flatten().tolist() == visible(place, 36, VIDEO, inward=True)
    assert (seen[0].sum(-1) - 1).abs().max() < EXACT


@torch.no_grad()
def test_an_encoder_with_it_is_built_and_saved(tmp_path: Any) -> None:
    mixer = {"kind": "attention", "heads": 4, "causal": False, "boundary": "inward", "grid": VIDEO}
    spec, ids = model_with(mixer, HIDDEN, kind="encoder"), torch.arange(60).view(2, 30) % 9
    model = shaken(build(spec))
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again(ids).logits, expected)
    on_meta = build(spec, device="meta")
    assert on_meta(ids.to("meta")).logits.shape == (2, 30, 9)


def test_what_it_costs_and_how_far_it_sees() -> None:
    site, weights = SpecSite(HIDDEN), 4 * HIDDEN * HIDDEN
    video = {"width": 52, "height": 30, "row_window": 8, "column_window": 13}
    spec = Attention(heads=4, causal=False, boundary="inward", grid=Grid.model_validate(video))
    # All of 20 frames, 15 rows and 25 columns of each.
    assert spec.prefill_flops(site, 20 * 30 * 52) == 2 * weights + 4 * HIDDEN * 20 * 15 * 25
    assert spec.states(site) == ()
    assert [one.window for one in spec.sights(site)] == [1, None]
    for boundary, far in (("clip", 5 + 1), ("inward", 2 * 5 + 2)):
        image = Attention(heads=4, causal=False, boundary=boundary, grid=Grid.model_validate(IMAGE))
        assert [one.window for one in image.sights(site)] == [1, far + 1]


def test_windows_as_wide_as_their_axis_are_none() -> None:
    site = SpecSite(HIDDEN)
    wide = Grid(width=5, height=3, row_window=3, column_window=9, frame_window=2)
    none = Grid(width=5, height=3, frame_window=2)
    hashes = [Attention(heads=4, causal=False, grid=one).canonical(site) for one in (wide, none)]
    assert hashes[0] == hashes[1]
    assert "grid" not in Attention(heads=4, causal=False).canonical(site)


def test_what_is_refused() -> None:
    site = SpecSite(HIDDEN)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"causal": True}, "grid"),
        ({"window": 4}, "grid"),
        ({"softcap": 5.0}, "grid"),
        ({"sinks": True}, "grid"),
        ({"grid": {"width": 4, "frame_window": 2}}, "grid.frame_window"),
    ]
    for fields, field in wrong:
        data = {"heads": 4, "causal": False, "grid": {"width": 4}, **fields}
        problems = Attention.model_validate(data).problems(site)
        assert [(one.field, one.code) for one in problems] == [(field, "conflicting-fields")]
    assert (
        Attention.model_validate({"heads": 4, "causal": False, "grid": IMAGE, "boundary": "inward"}).problems(
            site
        )
        == []
    )
