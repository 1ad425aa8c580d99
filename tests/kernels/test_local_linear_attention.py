"""local_linear_attention: the paper's form and its gradients, its limits, rounding, what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels import _local_linear_torch as blocks
from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.local_linear_attention import local_linear_attention, local_linear_attention_reference
from heddle.kernels.op import INTERPRETED, TRITON_DTYPES

# Does nothing on a CPU.
pytestmark = pytest.mark.usefixtures("kernels_on_gpu")
B, H, N, T, S, D, V = 2, 4, 2, 9, 13, 5, 6
FLOAT64 = EPSILON[torch.float64]


def drawn(seed: int = 0, queries: int = T, keys: int = S, **sizes: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    d, value = sizes.get("d", D), sizes.get("value", V)
    shapes = {"q": (H, queries, d), "k": (N, keys, d), "v": (N, keys, value)}
    return {name: torch.randn(B, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def masks(queries: int = T, keys: int = S) -> dict[str, Tensor]:
    """Padding at the left of one row, two tokens that are not written."""
    real, written = torch.ones(B, keys, dtype=torch.bool), torch.ones(B, keys, dtype=torch.float64)
    real[0, : keys - queries + 2] = False
    written[1, 4:6] = 0.0
    return {"real": real, "written": written}


def graded(function: Any, given: dict[str, Tensor], **rest: Any) -> dict[str, Tensor]:
    leaves = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in given.items()
    }
    out = function(**leaves, **rest)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # The same for the reference in float64 of what comes rounded.
    weight = weight.to(torch.bfloat16).to(out.device, out.dtype)
    (out * weight).sum().backward()
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


@pytest.mark.parametrize("ridge", [0.05, 10.0])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("is_masked", [False, True])
def test_results_and_gradients_are_those_of_the_paper(
    ridge: float, window: int | None, is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "QUERIES", 4)
    monkeypatch.setattr(blocks, "KEYS", 3)
    given, rest = drawn() | (masks() if is_masked else {}), {"ridge": ridge, "window": window}
    found, expected = (
        graded(one, given, **rest) for one in (local_linear_attention, local_linear_attention_reference)
    )
    assert found.keys() == expected.keys() >= {"out", "q", "k", "v"}
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < FLOAT64 * max(1.0, tensor.abs().max()), name


@pytest.mark.parametrize("is_masked", [False, True])
def test_with_a_slope_it_is_the_relative_without_a_solve(is_masked: bool) -> None:
    given = drawn() | (masks() if is_masked else {})
    given["slope"] = torch.randn(B, H, T, D, dtype=torch.float64)
    found, expected = (
        graded(one, given, scale=0.7) for one in (local_linear_attention, local_linear_attention_reference)
    )
    assert found.keys() == expected.keys() >= {"out", "q", "k", "v", "slope"}
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < FLOAT64 * max(1.0, tensor.abs().max()), name


def test_a_great_ridge_is_softmax_attention_and_a_line_is_met_without_one() -> None:
    given = drawn(queries=S)
    softmax = F.scaled_dot_product_attention(*given.values(), is_causal=True, enable_gqa=True)
    assert (local_linear_attention(**given, ridge=1e12) - softmax).abs().max() < 1e-9
    assert (local_linear_attention(**given, ridge=10.0) - softmax).abs().max() > 1e-2
    nothing = torch.zeros_like(given["q"])
    assert (local_linear_attention(**given, slope=nothing) - softmax).abs().max() < FLOAT64
    # Values on a line through the keys are told exactly, wherever the query is; softmax tells a mean of them.
    matrix = torch.randn(D, V, dtype=torch.float64)
    line = {**given, "v": given["k"] @ matrix + 1}
    exact = given["q"][:, :, -1] @ matrix + 1
    errors = [
        (local_linear_attention(**line, ridge=ridge)[:, :, -1] - exact).abs().max()
        for ridge in (1e12, 1e-2, 1e-4, 1e-6)
    ]
    assert all(later < earlier / 10 for earlier, later in pairwise(errors))
    # The first token has but one value to tell.
    found = local_linear_attention(**given)[:, :, 0]
    assert (found.unflatten(1, (N, -1)) - given["v"][:, :, None, 0]).abs().max() < FLOAT64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ridge", [1.0, 10.0])
def test_rounding_costs_no_more_than_inputs_and_outputs(dtype: torch.dtype, ridge: float) -> None:
    given = {name: x.to(dtype) for name, x in drawn(queries=130, keys=130, d=16, value=16).items()}
    exact = graded(
        local_linear_attention_reference, {name: x.double() for name, x in given.items()}, ridge=ridge
    )
    for name, found in graded(local_linear_attention, given, ridge=ridge).items():
        error, worst = worst_error(found.transpose(1, 2), exact[name].transpose(1, 2), timed=True)
        rounded = exact[name].to(dtype).transpose(1, 2)
        baseline, _ = worst_error(rounded, exact[name].transpose(1, 2), timed=True)
        assert error <= 2 * baseline + EPSILON[dtype], f"{name}: {error:.2e}, {worst}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["equal", "large", "peaked", "collinear"])
def test_hard_keys_leave_everything_finite(kind: str, dtype: torch.dtype) -> None:
    given = drawn(queries=70, keys=70)
    if kind == "equal":
        given["k"] = given["k"][:, :, :1].expand_as(given["k"]) * 30
    elif kind == "collinear":
        given["k"] = given["k"][:, :, :1] * torch.randn(B, N, 70, 1, dtype=torch.float64) * 30
    else:
        given["k" if kind == "large" else "q"] *= 1e3
    found = graded(local_linear_attention, {name: x.to(dtype) for name, x in given.items()}, ridge=1e-4)
    assert all(x.isfinite().all() for x in found.values())
    if kind == "equal":
        # There is no slope to be seen along keys that are one.
        mean = given["v"].to(dtype).double().cumsum(2) / torch.arange(1, 71)[:, None]
        error = (found["out"].double().unflatten(1, (N, -1)) - mean[:, :, None]).abs().max()
        assert error < 2 * torch.finfo(dtype).eps * mean.abs().max() + EPSILON[dtype]


KERNEL_DTYPES = [
    *([("cpu", torch.float32), ("cpu", torch.float16)] if INTERPRETED else []),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in TRITON_DTYPES),
]
# Two tiles of queries, two of keys; masks; with a slope and without, more or fewer steps to go.
FORMS: dict[str, dict[str, Any]] = {
    "masked": {"ridge": 10.0},
    "window": {"ridge": 1.0, "window": 30},
    "slope": {"ridge": 10.0, "window": 30},
    "step": {"ridge": 10.0},
    "peaked": {"ridge": 10.0},
    "peaked slope": {"ridge": 10.0, "window": 30},
}


@pytest.mark.parametrize(("device", "dtype"), KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_within_twice_the_error_of_plain_torch(
    form: str, device: str, dtype: torch.dtype
) -> None:
    tokens = 1 if form == "step" else 70
    given = drawn(queries=tokens, keys=90, d=20, value=24)
    if form == "masked":
        given |= masks(queries=tokens, keys=90)
    if "peaked" in form:
        # Logits of hundreds: x is large, and hardly any of it shows.
        given["q"] = given["q"] * 60
    if "slope" in form:
        given["slope"] = torch.randn(B, H, tokens, 20, dtype=torch.float64) / 3
    given = {name: x.to(dtype if x.is_floating_point() else x.dtype) for name, x in given.items()}
    given = {name: x.float() if name == "written" else x for name, x in given.items()}
    exact = graded(
        local_linear_attention_reference,
        {name: x.double() if x.is_floating_point() else x for name, x in given.items()},
        **FORMS[form],
    )
    there = {name: x.to(device) for name, x in given.items()}
    with watch_paths() as seen:
        found, again = (graded(local_linear_attention, there, **FORMS[form]) for _ in range(2))
    assert {path for _, path in seen} == {"triton"}
    with force_path("torch"):
        plain = graded(local_linear_attention, there, **FORMS[form])
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        assert torch.equal(found[name], again[name]), f"two runs differ in {name}"
        turned = [
            x[..., None].cpu() if x.dim() == 2 else x.transpose(1, 2).cpu()
            for x in (found[name], plain[name], tensor)
        ]
        (error, worst), (allowed, _) = (worst_error(x, turned[2], timed=True) for x in turned[:2])
        assert error <= 2 * allowed + EPSILON[dtype], f"{name}: {error:.2e}, {worst}"


@pytest.mark.parametrize(("device", "dtype"), KERNEL_DTYPES, ids=str)
def test_gradients_are_to_the_bit_those_of_a_solve_made_anew(device: str, dtype: torch.dtype) -> None:
    given = {n: x.to(device, dtype) for n, x in drawn(queries=20, keys=30, d=20, value=24).items()}
    from heddle.kernels._local_linear_launch import launch_backward

    q, k, v = (x.requires_grad_() for x in given.values())
    out = local_linear_attention(q, k, v, ridge=1.0)
    upstream = torch.ones_like(out)
    kept = torch.autograd.grad(out, (q, k, v), upstream)
    anew = launch_backward(
        upstream, (q.detach(), k.detach(), v.detach()), None, None, (20**-0.5, 1.0, None), None
    )
    assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=False))


def refused(**change: Any) -> str:
    with pytest.raises(HeddleError) as error:
        local_linear_attention(**{**drawn(), **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


@pytest.mark.parametrize("is_sloped", [False, True])
def test_packed_sequences_are_each_alone(is_sloped: bool) -> None:
    ends = [0, 1, 1, 9, 13]
    given = {name: x[:1] for name, x in (drawn(queries=13) | masks(queries=13)).items()}
    if is_sloped:
        given["slope"] = torch.randn_like(given["q"])
    rest = {"ridge": 0.5, "window": 4}
    found = graded(local_linear_attention, given, **rest, cu_seqlens=torch.tensor(ends))
    expected = graded(local_linear_attention_reference, given, **rest, cu_seqlens=torch.tensor(ends))
    for name, x in expected.items():
        assert worst_error(found[name], x, timed=False)[0] < FLOAT64, name
    for begin, end in ((0, 1), (1, 9), (9, 13)):
        own = {name: x[:, :, begin:end] if x.dim() == 4 else x[:, begin:end] for name, x in given.items()}
        alone = local_linear_attention(**own, **rest)
        assert torch.equal(found["out"][:, :, begin:end], alone)


def test_more_heads_of_all_rows_than_a_grid_has_places_for_run_in_plain_torch() -> None:
    assert local_linear_attention.kernel is not None
    for rows, takes in ((4095, True), (4096, False)):
        assert local_linear_attention.kernel({"K": 64, "V": 64, "B": rows, "H": 16}) == takes


def test_what_does_not_fit_is_told() -> None:
    assert "no more than keys" in refused(q=torch.ones(B, H, S + 1, D))
    assert "2 key heads do not divide 3 query heads" in refused(q=torch.ones(B, 3, T, D))
    assert "k is float64, expected float32 as q" in refused(q=torch.ones(B, H, T, D))
    assert "ridge 0 and window None must be positive" in refused(ridge=0)
    assert "ridge 10.0 and window 0 must be positive" in refused(window=0)
    assert "as many queries as keys" in refused(cu_seqlens=torch.tensor([0, S]))
    assert "real has shape [3, 13], expected [2, 13]" in refused(real=torch.ones(3, S, dtype=torch.bool))
