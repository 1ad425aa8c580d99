"""What is peculiar to ttt: each of its rules, padding, rates of zero, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from heddle.errors import HeddleError
from heddle.kernels import _ttt_torch
from heddle.kernels.accuracy import EPSILON, Sample, compare, draw
from heddle.kernels.op import INTERPRETED, TRITON_DTYPES, Op, force_path
from heddle.kernels.ttt import LOSSES, NORMALISE, ttt, ttt_reference

# Does nothing on a CPU.
pytestmark = pytest.mark.usefixtures("kernels_on_gpu")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
LINEAR, MLP = {"B": 2, "H": 2, "K": 5}, {"B": 2, "H": 2, "K": 5, "M": 7}
FLOAT64 = EPSILON[torch.float64]


def state_without_momentum(state: torch.Tensor) -> torch.Tensor:
    size = (state.shape[-1] - 2) // 3
    return torch.cat((state[..., :size], state[..., 2 * size :]), dim=-1)


@pytest.mark.parametrize("shape", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("has_momentum", [True, False])
def test_every_rule_is_that_of_the_reference(shape: dict[str, int], has_momentum: bool) -> None:
    given = draw(ttt, {**shape, "T": 31}, torch.float64).arguments
    # Of chunks of 6 tokens, of which 5 are read.
    given["initial_state"][..., -1] = 5 / 6
    if not has_momentum:
        given["momentum"] = None  # type: ignore[assignment]
        given["initial_state"] = state_without_momentum(given["initial_state"])
    seen: list[torch.Tensor] = []
    for loss, normalise in product(LOSSES, NORMALISE):
        rule: dict[str, Any] = {"chunk": 6, "loss": loss, "normalise": normalise}
        found, expected = ttt(**given, **rule), ttt_reference(**given, **rule)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() < FLOAT64 * other.abs().max()
        assert all((one - found[0]).abs().max() > 1e-6 for one in seen)
        seen.append(found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_inputs_and_outputs_alone(dtype: torch.dtype) -> None:
    sample = draw(ttt, {**MLP, "T": 130}, dtype)
    wrong = [str(one) for one in compare(ttt, sample, "cpu") if not one.ok]
    assert not wrong, "\n".join(wrong)


def test_padding_leaves_no_trace_and_takes_no_place() -> None:
    given = draw(ttt, {**MLP, "T": 23}, torch.float64).arguments
    state, sides = given["initial_state"], {name: given[name] for name in ttt.cases.sequence}
    state[..., -1] = torch.tensor([1 / 4, 2 / 4])[:, None]
    run = partial(ttt, weight=given["weight"], chunk=4)
    # Padding before, after and between.
    real = torch.ones(2, 23, dtype=torch.bool)
    real[0, :9] = real[1, 20:] = real[1, 3] = False
    out, after = run(**sides, initial_state=state, real=real)
    assert out.isfinite().all()
    for row in range(2):
        alone = {name: side[row : row + 1, real[row]] for name, side in sides.items()}
        expected, ended = run(**alone, initial_state=state[row : row + 1])
        assert (out[row, real[row]] - expected[0]).abs().max() < FLOAT64
        assert (after[row] - ended[0]).abs().max() < FLOAT64
    nothing, same = run(**sides, initial_state=state, real=torch.zeros_like(real))
    assert nothing.isfinite().all()
    assert torch.equal(same, state)


def test_at_a_rate_of_zero_it_reads_its_first_weights() -> None:
    given = draw(ttt, {**MLP, "T": 20}, torch.float64, initial_state=False).arguments
    given["rates"].zero_()
    out, state = ttt(**given, chunk=3, normalise="none")
    first = given["weight"]
    hidden = torch.nn.functional.silu(torch.einsum("bthd,hmd->bthm", given["q"], first[:, 0]))
    hidden = hidden * torch.einsum("bthd,hmd->bthm", given["q"], first[:, 1])
    expected = given["q"] + torch.einsum("bthm,hmd->bthd", hidden, first[:, 2])
    assert (out - expected).abs().max() < FLOAT64
    assert (state[..., :-2] == 0).all()


def without_momentum(sample: Sample) -> Sample:
    """The same sample, of an op that is told `momentum=None`."""
    arguments = {name: x for name, x in sample.arguments.items() if name != "momentum"}
    arguments["initial_state"] = state_without_momentum(arguments["initial_state"])
    wanted = tuple(name for name in sample.wanted if name != "momentum")
    upstream = (sample.upstream[0], state_without_momentum(sample.upstream[1]))
    return Sample(sample.dtype, arguments, wanted, upstream)


# Every loss, way to normalise, momentum and none, blocks that a chunk's end cuts, chunks longer than a block.
FORMS = [
    {"loss": "dot", "normalise": "after", "chunk": 7},
    {"loss": "l2", "normalise": "before", "chunk": 70},
    {"loss": "l2", "normalise": "after", "chunk": 70, "momentum": None},
    {"loss": "dot", "normalise": "none", "chunk": 7, "momentum": None},
    {"loss": "l2", "normalise": "none", "chunk": 700},
]


# In half precision the path in torch is the kernels' baseline itself.
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float16 if INTERPRETED else torch.float32),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in TRITON_DTYPES),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{form['loss']}-{form['normalise']}-{form['chunk']}"
)
def test_a_linear_memory_of_any_form_is_that_of_the_reference(
    form: dict[str, Any], packed: bool, device: str, dtype: torch.dtype
) -> None:
    # Of a size that no tile has, in chunks that earlier calls have begun.
    shape, ends = {"B": 1 if packed else 2, "H": 2, "K": 20, "T": 90}, [0, 1, 1, 40, 90] if packed else None
    sample = draw(ttt, shape, dtype, cu_seqlens=ends)
    state, chunk = sample.arguments["initial_state"], form["chunk"]
    state[..., -1] = (3 * torch.arange(state.shape[0]) % chunk / chunk)[:, None]
    sample = without_momentum(sample) if "momentum" in form else sample
    op = replace(ttt, fast=partial(ttt.fast, **form), reference=partial(ttt_reference, **form))
    measured = compare(op, sample, device)
    assert {one.path for one in measured} == {"triton" if INTERPRETED or device == "cuda" else "torch"}
    wrong = [str(one) for one in measured if not one.ok]
    assert not wrong, "\n".join(wrong)


@on_devices
def test_padding_of_a_linear_memory_leaves_no_trace_on_any_path(device: str) -> None:
    given = draw(ttt, {**LINEAR, "T": 23}, torch.float32).to(device).arguments
    given["initial_state"][..., -1] = torch.tensor([1 / 4, 2 / 4])[:, None]
    real = torch.ones(2, 23, dtype=torch.bool, device=device)
    real[0, :9] = real[1, 20:] = real[1, 3] = False
    found = []
    for path in ("torch", "triton" if INTERPRETED or device == "cuda" else "torch"):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
        with force_path(path):
            out, state = ttt(**leaves, chunk=4, real=real)
        (out[real].square().sum() + state.square().sum()).backward()
        found.append([out[real], state, *(x.grad for x in leaves.values())])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        assert (one - other).abs().max() < 20 * EPSILON[torch.float32] * other.abs().max()


def largest(shape: dict[str, int], dtype: torch.dtype, loss: str, normalise: str) -> list[float]:
    """The largest number of the state after each of 14 chunks, at a rate at which a write is as large as the weights."""
    given = draw(ttt, {**shape, "T": 14 * 4}, torch.float64, initial_state=False).arguments
    given = {name: x.to(dtype) for name, x in given.items()}
    given["rates"] = torch.ones_like(given["rates"])
    ends = range(4, 15 * 4, 4)
    cut = [
        {name: x[:, :end] if name in ttt.cases.sequence else x for name, x in given.items()} for end in ends
    ]
    states = [ttt(**one, chunk=4, loss=loss, normalise=normalise)[1] for one in cut]
    return [float(state.abs().max()) if state.isfinite().all() else torch.inf for state in states]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalise", ["before", "none"])
def test_writes_of_an_mlp_that_no_norm_follows_run_away_in_every_dtype(loss: str, normalise: str) -> None:
    narrow, wide = (largest(MLP, dtype, loss, normalise) for dtype in (torch.float32, torch.float64))
    assert wide[-1] == torch.inf
    # Float32 is right for as long as what stands there is within its range.
    for one, other in zip(narrow, wide, strict=True):
        assert one == torch.inf if other > 1e38 else abs(one / other - 1) < 1e-3
    large = [x for x in wide if 1e6 < x < torch.inf]
    assert large[-1] > large[-2] ** 1.9


@pytest.mark.parametrize("loss", LOSSES)
def test_writes_that_a_norm_follows_or_that_see_no_weights_stay_small(loss: str) -> None:
    for shape in (LINEAR, MLP):
        assert max(largest(shape, torch.float32, loss, "after")) < 30
    for normalise in NORMALISE:
        assert max(largest(LINEAR, torch.float32, "dot", normalise)) < 30


def test_what_a_chunk_makes_is_not_kept_for_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = _ttt_torch._written

    def counted(*args: Any) -> list[torch.Tensor]:
        made.append(1)
        return whole(*args)

    monkeypatch.setattr(_ttt_torch, "_written", counted)
    given = draw(ttt, {**MLP, "T": 20}, torch.float64, initial_state=False).arguments
    given["k"].requires_grad_()
    out, _ = ttt(**given, chunk=5)
    assert len(made) == 4
    out.sum().backward()
    # The last chunk is read by nobody who has gradients.
    assert len(made) == 8


def refused(**change: Any) -> str:
    given = draw(ttt, {**LINEAR, "T": 4}, torch.float32, initial_state=False).arguments
    with pytest.raises(HeddleError) as error:
        ttt(**{**given, **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


def test_what_does_not_fit_is_told() -> None:
    assert isinstance(ttt, Op)
    assert "no loss 'l1'" in refused(loss="l1")
    assert "no normalise 'always'" in refused(normalise="always")
    assert "a chunk of 0 tokens" in refused(chunk=0)
    assert "weight must be [2, 1, 5, 5] or [2, 3, M, 5], not [2, 2, 5, 5]" in refused(
        weight=torch.ones(2, 2, 5, 5)
    )
    assert "rates has shape [2, 4, 2, 3], expected [2, 4, 2, 1]" in refused(rates=torch.ones(2, 4, 2, 3))
    assert "k is float32, expected float16 as q" in refused(q=torch.ones(2, 4, 2, 5).half())
    assert "initial_state has shape" in refused(initial_state=torch.ones(2, 2, 52))
