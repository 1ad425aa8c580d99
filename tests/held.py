"""Results of an op held to its reference on each device and dtype: for ops whose contract is not that of tests/contracts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.common.tuning import tuning
from heddle.kernels.op import INTERPRETED

Results = Mapping[str, Tensor]


def settings() -> list[Any]:
    """Devices and dtypes: on a CPU those of plain torch, or of the interpreter; on a GPU all."""
    here = (torch.float32, torch.float16) if INTERPRETED else (torch.float32,)
    gpu = (torch.float32, torch.float16, torch.bfloat16)
    return [pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in here] + [
        pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in gpu
    ]


over_settings = pytest.mark.parametrize(("device", "dtype"), settings())


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """All ops are called by one code object, which has been compiled for others: their sizes must not be taken for any size."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def by_columns(a: Any, b: Any, dtype: Any) -> Any:
    """A product whose rows do not depend on where they stand, as on a GPU; those of numpy's library do."""
    out = numpy.zeros((a.shape[0], b.shape[1]), dtype)
    for j in range(a.shape[1]):
        out += a[:, j : j + 1].astype(dtype) * b[j : j + 1].astype(dtype)
    return out


def fill_fresh_memory_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated from here on, for numbers that someone is to write, holds NaN until then."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for holder, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(holder, name, poisoned(getattr(holder, name)))
    assert torch.empty(3).isnan().all()


def assert_held(
    exact: Results,
    run: Callable[[], Results],
    dtype: torch.dtype,
    device: str,
    has_kernels: bool = True,
    **overrides: Any,
) -> None:
    """Every result of `run` within twice the error of plain torch, or of the exact one once it is rounded."""
    with watch_paths() as seen, tuning(**overrides):
        found = run()
    path = seen[-1][1]
    assert path == ("triton" if has_kernels and (INTERPRETED or device == "cuda") else "torch")
    with force_path("torch"):
        plain = run()
    baseline = plain if path == "triton" else {name: x.to(dtype) for name, x in exact.items()}
    assert_near(exact, found, baseline, dtype)


def assert_near(exact: Results, found: Results, baseline: Results, dtype: torch.dtype) -> None:
    """Every result within twice the error of the baseline."""
    for name, tensor in exact.items():
        timed = tensor.dim() == 4
        error, worst = worst_error(found[name], tensor, timed=timed)
        allowed, _ = worst_error(baseline[name], tensor, timed=timed)
        assert error <= 2 * allowed + EPSILON[dtype], f"{name}: {error:.2e}, {allowed:.2e}, {worst}"
