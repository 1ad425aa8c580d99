"""rat_scan: recurrences in chunks against the reference, whatever the length, the rotation and the packing; pieces, errors.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from held import assert_held, compiled, over_settings
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import LIBRARY
from heddle.kernels.rat_scan import rat_scan, rat_scan_reference

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

WANTED = ("q", "k", "x", "gate", "gate_bias", "past")
RESULTS = ("turned", "key", "value", "keys", "values", "running")
Given = dict[str, Any]


def drawn(
    *, B: int = 2, T: int = 37, H: int = 4, G: int = 2, d: int = 6, chunk: int = 5, turned: int = 4, start: int = 0,
    bounds: list[int] | None = None, bias: float = 0.0,
) -> Given:  # fmt: skip
    """Arguments in float64; `bounds` of packed sequences."""
    generator = torch.Generator().manual_seed(T + chunk + start)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    angles = normal(-(-(start % chunk + T) // chunk), turned // 2).repeat(1, 2)
    return {
        "q": normal(B, T, G, d), "k": normal(B, T, G, d), "x": normal(B, T, H, d), "gate": normal(B, T, H, d),
        "gate_bias": normal(H, d) + bias, "chunk": chunk, "start": start,
        "past": normal(B, 2, H, d) if start else None,
        "rotation": (angles.cos().float().double(), angles.sin().float().double()) if turned else None,
        "cu_seqlens": None if bounds is None else torch.tensor(bounds),
    }  # fmt: skip


# Each road of the kernels: chunks in one part and in several, no rotation and one of all channels, a chunk that an earlier call
# began, one that the call does not end, steps, packed sequences of which one is empty, gates near 0 and 1.
FORMS: dict[str, Callable[[], Given]] = {
    "plain": drawn,
    "still": lambda: drawn(turned=0, H=3, G=1, chunk=7),
    "one token": lambda: drawn(turned=6, chunk=1, T=20),
    "goes on": lambda: drawn(start=8),
    "at its beginning": lambda: drawn(start=10, T=9),
    "long chunk": lambda: drawn(H=2, G=1, start=7, chunk=20),
    "step": lambda: drawn(T=1, start=3, chunk=16),
    "step that ends": lambda: drawn(T=1, start=4),
    "packed": lambda: drawn(B=1, H=2, G=1, T=40, chunk=9, bounds=[0, 1, 14, 14, 40]),
    "shut": lambda: drawn(T=20, chunk=8, bias=-30.0),
    "open": lambda: drawn(T=20, chunk=8, bias=12.0),
}


def results(
    function: Callable[..., tuple[Tensor, ...]], given: Given, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Everything it gives and every gradient, heads behind time; what has no numbers is left out."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    if there["rotation"] is not None:
        there["rotation"] = tuple(side.to(device, wide) for side in there["rotation"])
    wanted = [name for name in WANTED if there[name] is not None]
    for name in wanted:
        kind = wide if name in ("gate_bias", "past") else dtype
        there[name] = there[name].detach().to(kind).requires_grad_()
    found = function(**there)
    generator = torch.Generator().manual_seed(7)
    # The same numbers in every dtype.
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x) for x in found
    ]
    # No summaries have no gradient.
    some = [(x, gradient) for x, gradient in zip(found, upstream, strict=True) if x.numel()]
    inputs = [there[name] for name in wanted]
    gradients = torch.autograd.grad(
        [x for x, _ in some], inputs, [gradient for _, gradient in some], materialize_grads=True
    )
    named = dict(zip(RESULTS, (x.detach() for x in found), strict=True))
    named |= {"keys": named["keys"].transpose(1, 2), "values": named["values"].transpose(1, 2)}
    named |= {f"d_{name}": x for name, x in zip(wanted, gradients, strict=True)}
    return {name: x for name, x in named.items() if x.numel()}


def rounded(given: Given, dtype: torch.dtype) -> Given:
    """Numbers that are the same in `dtype` and in float64."""
    kinds = {name: torch.float32 if name in ("gate_bias", "past") else dtype for name in WANTED}
    return given | {
        name: given[name].to(kind).double() for name, kind in kinds.items() if given[name] is not None
    }


def assert_right(given: Given, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    given = rounded(given, dtype)
    exact = results(rat_scan_reference, given, torch.float64, "cpu")
    assert_held(exact, lambda: results(rat_scan, given, dtype, device), dtype, device, **overrides)


@over_settings
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    assert_right(FORMS[form](), dtype, device)


@pytest.mark.parametrize("form", FORMS)
def test_plain_torch_is_exact_in_float64(form: str) -> None:
    given = FORMS[form]()
    exact, found = (results(one, given, torch.float64, "cpu") for one in (rat_scan_reference, rat_scan))
    assert exact.keys() == found.keys()
    assert all((found[name] - tensor).abs().max() < EPSILON[torch.float64] for name, tensor in exact.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_heads_as_models_have_them_are_right(length: int, dtype: torch.dtype) -> None:
    for d, chunk in ((128, 16), (64, 64), (100, 5), (256, 16)):
        assert_right(drawn(B=1, T=length, d=d, chunk=chunk, turned=d // 4 * 2), dtype, "cuda")


@over_settings
def test_pieces_give_what_the_whole_gives(device: str, dtype: torch.dtype) -> None:
    given = rounded(drawn(turned=6), dtype)
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    there |= {name: there[name].to(dtype) for name in ("q", "k", "x", "gate")}
    rotation = tuple(side.to(device).float() for side in given["rotation"])
    whole = rat_scan(**(there | {"rotation": rotation}))
    past, start, pieces = None, 0, []
    for end in (1, 4, 5, 6, 17, 37):
        sides = {name: there[name][:, start:end] for name in ("q", "k", "x", "gate")}
        numbers = slice(start // 5, (end - 1) // 5 + 1)
        tables = tuple(side[numbers] for side in rotation)
        *piece, past = rat_scan(**(there | sides | {"rotation": tables, "start": start, "past": past}))
        pieces.append(piece)
        start = end
    joined = [torch.cat(parts, dim=1 if at < 3 else 2) for at, parts in enumerate(zip(*pieces, strict=True))]
    for one, other in zip((*joined, past), whole, strict=True):
        assert one is not None
        assert (one - other).abs().max() <= EPSILON[dtype] * other.abs().max()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_runs_are_equal_to_the_bit_whatever_is_in_fresh_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (drawn(T=9), drawn(B=1, H=2, start=8, T=13, chunk=20), drawn(B=1, H=2, T=20, bounds=[0, 9, 20]))

    def run() -> list[dict[str, Tensor]]:
        return [results(rat_scan, given, torch.float32, device) for given in cases]

    clean, make = run(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **rest: make(*args, **rest).fill_(float("nan")))
    for before, after in zip(clean, run(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@over_settings
def test_tiles_of_any_size_are_right(device: str, dtype: torch.dtype) -> None:
    launch = Launch(chunk=16, columns=8, warps=4, stages=1)
    assert_right(
        drawn(B=1, H=2, G=1, T=17, start=8, chunk=7), dtype, device, scan_forward=launch, scan_backward=launch
    )


@over_settings
def test_sides_may_lie_apart_in_memory(device: str, dtype: torch.dtype) -> None:
    given = rounded(drawn(T=11), dtype)
    together = torch.cat([given[name].flatten(2) for name in ("x", "gate", "q", "k")], dim=-1)
    parts = together.to(device, dtype).split([24, 24, 12, 12], dim=-1)
    apart = dict(zip(("x", "gate", "q", "k"), (side.unflatten(-1, (-1, 6)) for side in parts), strict=True))
    rest = {"gate_bias": given["gate_bias"].to(device), "chunk": 5}
    dense = rat_scan(**{name: side.contiguous() for name, side in apart.items()}, **rest)
    assert all(torch.equal(one, other) for one, other in zip(rat_scan(**apart, **rest), dense, strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_knows_the_op_and_its_gradients(device: str) -> None:
    given = drawn(T=9, start=3, B=1)
    known = getattr(torch.ops, LIBRARY).rat_scan.default
    sides = [given[name].to(device).float().requires_grad_() for name in WANTED]
    rotation = [side.to(device).float() for side in given["rotation"]]
    arguments = (*sides[:5], *rotation, sides[5], None, given["chunk"], given["start"])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(known, arguments, test_utils=checks)
    whole = compiled(rat_scan)
    found, expected = (results(one, given, torch.float32, device) for one in (whole, rat_scan))
    assert all((found[name] - expected[name]).abs().max() <= EPSILON[torch.float32] for name in expected)


def refused(**change: Any) -> str:
    with pytest.raises(HeddleError) as error:
        rat_scan(**{**drawn(), **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


def test_what_does_not_fit_is_told() -> None:
    assert "at least one token" in refused(x=torch.ones(2, 0, 4, 6))
    assert "3 groups do not divide 4 heads" in refused(q=torch.ones(2, 37, 3, 6))
    assert "chunk 0 must be positive" in refused(chunk=0)
    assert "start -1 not negative" in refused(start=-1)
    assert "needs past" in refused(start=3, past=None)
    assert "k is float32, expected float64 as q" in refused(k=torch.ones(2, 37, 2, 6))
    assert "gate has shape [2, 36, 4, 6], expected [2, 37, 4, 6]" in refused(
        gate=torch.ones(2, 36, 4, 6).double()
    )
    assert "expected [8, 4]" in refused(rotation=drawn(T=3)["rotation"])
    assert "3 channels turn" in refused(rotation=(torch.ones(8, 3), torch.ones(8, 3)))
    assert "no start, no past" in refused(start=5, cu_seqlens=torch.tensor([0, 37]))
    assert "the batch 1, not 2" in refused(cu_seqlens=torch.tensor([0, 37]))
    with force_path("triton"), pytest.raises(HeddleError, match="cannot run in Triton"), tuning():
        results(rat_scan, drawn(T=2, d=300), torch.float32, "cpu")
