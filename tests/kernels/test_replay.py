"""Launchers that are recorded once and repeated do each time what they would do anew, and eager calls what dispatched ones do.

Kernels run here by Triton's interpreter (see test_interpreter.py) or on a GPU; what needs none is tested on any machine.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heddle.kernels import decay_attention, simple_gla
from heddle.kernels._decay_attention_fwd import launch_forward
from heddle.kernels._simple_gla_bwd import _sweep_back
from heddle.kernels.accuracy import draw, results
from heddle.kernels.common import ahead
from heddle.kernels.common.decay_step import launch_step
from heddle.kernels.common.replay import start_kernel
from heddle.kernels.common.tuning import tuning
from heddle.kernels.op import INTERPRETED

DEVICES = [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = {"B": 1, "H": 2, "K": 16, "V": 16}


def _plans(launcher: Any) -> dict[tuple[Any, ...], Any]:
    plans: dict[tuple[Any, ...], Any] = inspect.getclosurevars(launcher).nonlocals["plans"]
    return plans


def _one_token(device: str, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, 2, 16, generator=generator) for _ in range(3))
    state = torch.randn(1, 2, 16, 16, generator=generator)
    q, k, v, state = (x.to(device) for x in (q, k, v, state))
    return q, k, v, torch.tensor([-0.1, -0.7], device=device), state


@pytest.mark.parametrize("device", DEVICES)
def test_a_repeated_launch_reads_the_tensors_of_its_own_call(device: str) -> None:
    _plans(launch_step).clear()
    calls = [_one_token(device, seed) for seed in range(3)]
    repeated = [launch_step(*given, 0.5) for given in calls]
    assert [plan is not None for plan in _plans(launch_step).values()] == [True]
    for given, found in zip(calls, repeated, strict=True):
        expected = inspect.unwrap(launch_step)(*given, 0.5)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_laid_out_otherwise_is_recorded_anew(device: str) -> None:
    _plans(launch_step).clear()
    q, k, v, decay, state = _one_token(device, 0)
    wide = torch.cat((q, k, v), dim=-1)
    parts = wide.split(16, dim=-1)
    # The same values by other strides, another scale, and the same tensor in two places.
    calls = [(q, k, v, 0.5), (*parts, 0.5), (q, k, v, 0.25), (q, q, v, 0.5), (q, k, v, 0.5)]
    for *heads, scale in calls:
        found = launch_step(*heads, decay, state, scale)
        expected = inspect.unwrap(launch_step)(*heads, decay, state, scale)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert len(_plans(launch_step)) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_scratch_memory_are_found_again(device: str) -> None:
    _plans(_sweep_back).clear()
    # Two segments, so that the gradient of the decays reads what two of the roles left.
    samples = [
        draw(simple_gla, {**SHAPE, "T": 70}, torch.float32, initial_state=False, seed=seed).to(device)
        for seed in (1, 2)
    ]
    found = [results(simple_gla, sample) for sample in samples]
    assert [plan is not None for plan in _plans(_sweep_back).values()] == [True]
    _plans(_sweep_back).clear()
    anew = results(simple_gla, samples[1])
    assert all(torch.equal(found[1][name], anew[name]) for name in anew)


@pytest.mark.parametrize("device", DEVICES)
def test_a_launcher_that_copies_or_is_tuned_runs_each_time(device: str) -> None:
    _plans(launch_forward).clear()
    q, k, v, decay, _ = _one_token(device, 0)
    with tuning(segment=64):
        launch_forward(q, k, v, decay, 0.5, None, None)
    assert not _plans(launch_forward)
    ends = torch.tensor([0, 1], device=device)
    for _ in range(2):
        launch_forward(q, k, v, decay, 0.5, None, ends)
    assert list(_plans(launch_forward).values()) == [None]


@pytest.mark.gpu
def test_kernels_of_a_launcher_are_compiled_before_any_of_them_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Mode(triton.AsyncCompileMode):  # type: ignore[misc]
        def submit(self, key: Any, compile_fn: Any, finalize_fn: Any) -> Any:
            order.append("compiled")
            return super().submit(key, compile_fn, finalize_fn)

        def __exit__(self, *told: Any) -> None:
            super().__exit__(*told)
            order.append("all")

    monkeypatch.setattr(triton, "AsyncCompileMode", Mode)
    # A dtype and sizes that no other test asks for.
    sample = draw(
        simple_gla, {"B": 1, "T": 70, "H": 1, "HV": 1, "K": 48, "V": 80}, torch.float16, device="cuda"
    )
    found = results(simple_gla, sample)
    assert order.count("compiled") > 2
    assert order[0] == "compiled"
    assert order[-1] == "all"
    again = results(simple_gla, sample)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_launch_that_only_compiles_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Kernel:
        def warmup(self, *arguments: Any, grid: Any, **constants: Any) -> None:
            told.append((arguments, grid, constants))

    class Mode:
        def __init__(self, *_: Any, ignore_errors: bool) -> None:
            assert ignore_errors

        def __enter__(self) -> None: ...

        def __exit__(self, *told: object) -> None: ...

    monkeypatch.setattr(ahead, "INTERPRETED", False)
    monkeypatch.setattr(triton, "AsyncCompileMode", Mode)
    x = torch.ones(2)
    ahead.compile_side_by_side(lambda x: start_kernel(Kernel(), (3,), x, SIZE=4), (x,))
    assert told == [((x,), (3,), {"SIZE": 4})]
    assert not ahead.compiles_only()


class _Seen(TorchDispatchMode):
    """Names of the ops that torch dispatches inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_watches_torch_sees_the_op() -> None:
    sample = draw(decay_attention, {**SHAPE, "T": 5}, torch.float64)
    plain = results(decay_attention, sample)
    with _Seen() as seen:
        watched = results(decay_attention, sample)
    assert [name for name in seen.names if name.startswith("heddle.")] == [
        "heddle.decay_attention.default",
        "heddle.decay_attention_backward.default",
    ]
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_gradients_can_be_taken_twice_and_have_none_of_their_own() -> None:
    sample = draw(decay_attention, {**SHAPE, "T": 5}, torch.float64)
    given = {name: x.requires_grad_(name in sample.wanted) for name, x in sample.arguments.items()}
    out, _ = decay_attention(**given)
    first, again = (torch.autograd.grad(out.sum(), given["q"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (gradient,) = torch.autograd.grad(out.sum(), given["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()
