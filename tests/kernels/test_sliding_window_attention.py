"""sliding_window_attention: windows, sinks, packing and padding against the reference, decode, equal runs, paths, refusals.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from held import assert_held, compiled, over_settings
from torch import Tensor
from toys import mixer_of, noise, padded_call

from heddle.compose.cache import Call
from heddle.compose.modules import in_view
from heddle.compose.modules.sliding import has_kernels
from heddle.errors import HeddleError
from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.sliding_window_attention import HOPPER
from heddle.kernels.op import LIBRARY
from heddle.kernels.sliding_window_attention import (
    sliding_window_attention,
    sliding_window_attention_reference,
)

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

WANTED = ("q", "k", "v")
Given = dict[str, Any]


def drawn(
    *, B: int = 1, T: int = 75, S: int = 75, G: int = 2, d: int = 16, V: int = 16, window: int = 20, sinks: int = 0
) -> Given:  # fmt: skip
    """Arguments in float64."""
    generator = torch.Generator().manual_seed(T + S + G)
    shapes = {"q": (B, 2 * G, T, d), "k": (B, 2, S, d), "v": (B, 2, S, V)}
    sides = {
        name: torch.randn(*one, generator=generator, dtype=torch.float64) for name, one in shapes.items()
    }
    return {**sides, "window": window, "sinks": sinks}


def padded(given: Given) -> Given:
    """The same with padding on the left of the first row and on the right of the last one."""
    real = torch.ones(len(given["k"]), given["k"].shape[2], dtype=torch.bool)
    real[0, :7] = False
    real[-1, -3:] = False
    return {**given, "real": real}


# Each road of the kernels: a window alone, with sinks that fill one tile and two, ragged heads and a group that is no power of
# two, fewer queries than keys, padding, packed sequences of which one is empty, a window wider than all.
FORMS: dict[str, Callable[[], Given]] = {
    "window": drawn,
    "sinks": lambda: drawn(sinks=3, B=2),
    "many sinks": lambda: drawn(T=150, S=150, sinks=70, window=9, G=1),
    "ragged": lambda: drawn(T=9, S=83, G=3, d=5, V=40, sinks=2),
    "padded": lambda: padded(drawn(T=70, S=80, sinks=4, B=2, G=1)),
    "packed": lambda: {**drawn(T=100, S=100, sinks=2), "cu_seqlens": torch.tensor([0, 1, 70, 70, 100])},
    "wide": lambda: drawn(T=20, S=20, window=100, G=1),
}


def results(
    function: Callable[..., Tensor], given: Given, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Output and every gradient, with heads behind time as `worst_error` wants them."""
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    there |= {name: there[name].to(dtype).requires_grad_() for name in WANTED}
    out = function(**there)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(out, [there[name] for name in WANTED], upstream.to(dtype).to(out))
    named = {"out": out.detach(), **dict(zip(WANTED, found, strict=True))}
    return {name: x.transpose(1, 2) for name, x in named.items()}


def assert_right(given: Given, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    """Every result within the tolerance of the exact one."""
    given = given | {name: given[name].to(dtype).double() for name in WANTED}
    exact = results(sliding_window_attention_reference, given, torch.float64, "cpu")
    assert_held(
        exact, lambda: results(sliding_window_attention, given, dtype, device), dtype, device, **overrides
    )


@over_settings
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    assert_right(FORMS[form](), dtype, device)


@over_settings
@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("form", ["sinks", "ragged", "packed"])
def test_tiles_are_the_same_by_pointers_and_by_descriptors(
    form: str, descriptors: int, device: str, dtype: torch.dtype
) -> None:
    assert_right(FORMS[form](), dtype, device, descriptors=descriptors, sums=descriptors)


@over_settings
@pytest.mark.parametrize("splits", [1, 3])
def test_a_decode_step_is_right_however_its_keys_are_split(
    splits: int, device: str, dtype: torch.dtype
) -> None:
    given = drawn(B=2, T=1, S=150, G=3, window=130, sinks=4)
    assert_right(given, dtype, device, splits=splits)


# The interpreter's maximum says so.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("side", ["q", "k"])
def test_what_is_no_number_gives_none(side: str) -> None:
    given = drawn(T=70, S=80, window=9, sinks=2, G=1)
    given[side][0, 1, -20] = torch.nan
    out = sliding_window_attention(**given)
    # The query there, or those that have the key in view.
    seen = range(-20, -19 if side == "q" else -11)
    assert out[0, 1].isnan().any(dim=-1).nonzero().flatten().tolist() == [place + 70 for place in seen]
    assert not out[0, 0].isnan().any()


def test_steps_give_what_the_whole_gives() -> None:
    given = padded(drawn(B=2, T=30, S=30, window=7, sinks=2))
    whole = sliding_window_attention(**given)
    for t in (0, 3, 12, 29):
        sides = {name: given[name][:, :, : t + 1] for name in ("k", "v")}
        step = {"q": given["q"][:, :, t : t + 1], **sides, "real": given["real"][:, : t + 1]}
        found = sliding_window_attention(**{**given, **step})
        assert (found - whole[:, :, t : t + 1]).abs().max() < EPSILON[torch.float64]


def test_narrow_windows_have_launches_of_their_own_where_a_table_has_any() -> None:
    few, some = (replace(HOPPER.half, keys=Launch(rows, 64, 4, 2)) for rows in (16, 48))
    table = replace(HOPPER, narrow=((128, few), (1024, some)))
    assert [table.within(window, 2, 128) for window in (1, 128, 129, 1024)] == [few, few, some, some]
    assert table.within(1025, 2, 128) is table.half
    assert table.within(128, 2, 256) is table.half_tall
    assert table.within(128, 4, 128) is table.wide


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_mixer_with_sink_tokens_gives_behind_padding_and_in_pieces_what_it_gives_in_float64(
    device: str,
) -> None:
    mixer = mixer_of(24, "attention", heads=4, kv_heads=2, window=7, sink_tokens=5)
    real = torch.arange(50) >= torch.tensor([9, 0, 30])[:, None]
    x, exact, mixer = noise(3, 50, 24), copy.deepcopy(mixer), mixer.float().to(device)
    leaves = [x.clone().requires_grad_(), x.float().to(device).requires_grad_()]
    both = []
    for module, leaf in zip((exact, mixer), leaves, strict=True):
        with force_path("torch") if module is exact else contextlib.nullcontext():
            o = module(leaf, padded_call(real.to(leaf.device))).double().cpu() * real[..., None]
        both.append((o, torch.autograd.grad(o.sin().sum(), leaf)[0].double().cpu()))
    for found, wanted in zip(both[1], both[0], strict=True):
        assert worst_error(found, wanted, timed=True)[0] <= 5 * EPSILON[torch.float32]
    cache, pieces, start, row = mixer.new_cache(), [], 0, leaves[1].detach()[1:2]
    for end in (20, 40, 41, 50):
        positions = torch.arange(start, end, device=device)[None]
        pieces.append(mixer(row[:, start:end], Call(positions, cache=cache)))
        cache.advance(end - start)
        start = end
    whole = both[0][0][1:2]
    assert worst_error(torch.cat(pieces, dim=1), whole, timed=True)[0] <= 5 * EPSILON[torch.float32]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_a_mixer_spares_large_masks_and_gives_what_it_gives_in_float64(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_view, "MOST", 100)
    mixer, x = mixer_of(24, "attention", heads=4, kv_heads=2), noise(2, 50, 24)
    real = torch.arange(50) >= torch.tensor([9, 0])[:, None]
    with force_path("torch"):
        wanted = mixer(x, padded_call(real)) * real[..., None]
    mixer, x = mixer.float().to(device), x.float().to(device)
    with watch_paths() as seen:
        found = mixer(x, padded_call(real.to(device))).double().cpu() * real[..., None]
        cache, later = mixer.new_cache(), []
        for start, end in ((0, 20), (20, 50)):
            call = Call(torch.arange(start, end, device=device)[None], cache=cache)
            later.append(mixer(x[1:, start:end], call))
            cache.advance(end - start)
    assert worst_error(found, wanted, timed=True)[0] <= 5 * EPSILON[torch.float32]
    assert worst_error(torch.cat(later, dim=1), wanted[1:], timed=True)[0] <= 5 * EPSILON[torch.float32]
    runs = has_kernels(x.device, x.dtype, 6, 2)
    assert [name for name, _ in seen].count("sliding_window_attention") == (2 if runs else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(128, 128), (64, 64), (192, 128), (256, 256)], ids=str)
def test_heads_as_models_have_them_are_right(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    d, V = sizes
    assert_right(drawn(T=300, S=420, G=4, d=d, V=V, window=140, sinks=4), dtype, "cuda")
    assert_right(drawn(B=3, T=1, S=700, G=8, d=d, V=V, window=512, sinks=4), dtype, "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_runs_are_equal_to_the_bit_whatever_is_in_fresh_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = ((drawn(T=70, S=80, sinks=2), {}), (drawn(T=1, S=90, window=80), {"splits": 2}))

    def run() -> list[dict[str, Tensor]]:
        found = []
        for given, overrides in cases:
            with tuning(**overrides):
                found.append(results(sliding_window_attention, given, torch.float32, device))
        return found

    clean, make = run(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **rest: make(*args, **rest).fill_(float("nan")))
    assert torch.empty(3).isnan().all()
    for before, after in zip(clean, run(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_later_tokens_and_those_out_of_the_window_change_nothing() -> None:
    given = drawn(T=90, S=90, window=20, sinks=2, G=1)
    before = sliding_window_attention(**given)
    for token, untouched in ((60, [*range(60), *range(80, 90)]), (1, [0])):
        changed = {name: given[name].clone() for name in ("k", "v")}
        for x in changed.values():
            x[:, :, token] += 1.0
        after = sliding_window_attention(**{**given, **changed})
        assert torch.equal(before[:, :, untouched], after[:, :, untouched])
        assert not torch.equal(before[:, :, token], after[:, :, token])


def test_heads_too_large_for_the_kernels_are_refused_by_them() -> None:
    given = drawn(T=2, S=5, d=300)
    with force_path("triton"), pytest.raises(HeddleError, match="cannot run in Triton"):
        results(sliding_window_attention, given, torch.float32, "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_knows_the_op_and_its_gradients(device: str) -> None:
    given = padded(drawn(T=9, S=12, window=4, sinks=1, G=1))
    known = getattr(torch.ops, LIBRARY).sliding_window_attention.default
    sides = [given[name].to(device).float().requires_grad_() for name in WANTED]
    arguments = (*sides, given["real"].to(device), None, 0.5, given["window"], given["sinks"])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(known, arguments, test_utils=checks)
    whole = compiled(sliding_window_attention)
    found, expected = (
        results(one, given, torch.float32, device) for one in (whole, sliding_window_attention)
    )
    assert all((found[name] - expected[name]).abs().max() <= EPSILON[torch.float32] for name in expected)


def refused(**change: Any) -> str:
    with pytest.raises(HeddleError) as error:
        sliding_window_attention(**{**drawn(), **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


def test_what_does_not_fit_is_told() -> None:
    assert "no more than keys" in refused(q=torch.ones(1, 4, 76, 16))
    assert "2 key heads do not divide 3 query heads" in refused(q=torch.ones(1, 3, 75, 16))
    assert "window 0 and scale None must be positive" in refused(window=0)
    assert "sinks -1 not negative" in refused(sinks=-1)
    assert "k is float64, expected float32 as q" in refused(q=torch.ones(1, 4, 75, 16))
    assert "real has shape [1, 74], expected [1, 75]" in refused(real=torch.ones(1, 74) > 0)
    assert "as many queries as keys" in refused(
        q=torch.ones(1, 4, 7, 16).double(), cu_seqlens=torch.tensor([0, 75])
    )
    assert "must rise from 0 to 75" in refused(cu_seqlens=torch.tensor([0, 7]))
