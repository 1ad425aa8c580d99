"""causal_conv1d where the contracts of ops do not look: every window, walks of few tokens, channels that lie in wider rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from held import assert_held, over_settings
from torch import Tensor

from heddle.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
from heddle.kernels.configs.launch import Launch

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

Given = dict[str, Any]
# An empty sequence, and some shorter than a window.
PACKED = (0, 3, 3, 4, 19)
# Walks of fewer tokens than a window has, whose tiles end in a sequence.
SHORT = {"conv_forward": Launch(2, 16, 1, 1), "conv_backward": Launch(2, 16, 1, 1), "conv_tokens": 4}


def drawn(taps: int, *, B: int = 1, T: int = 19, C: int = 20, bounds: tuple[int, ...] | None = None) -> Given:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    generator, count = torch.Generator().manual_seed(3), B if bounds is None else len(bounds) - 1
    return {
        "x": normal(B, T, C),
        "weight": normal(C, taps),
        "initial_state": normal(count, C, taps - 1),
        "cu_seqlens": None if bounds is None else torch.tensor(bounds),
    }


def results(
    function: Any, given: Given, dtype: torch.dtype, device: str, activation: str | None = "silu"
) -> dict[str, Tensor]:
    """Output and all gradients; x lies among NaN."""
    leaves: Given = {"cu_seqlens": given["cu_seqlens"]}
    wide = torch.float64 if function is causal_conv1d_reference else dtype
    for name in ("x", "weight", "initial_state"):
        leaves[name] = given[name].to(dtype).to(device, wide)
    if given["cu_seqlens"] is not None:
        leaves["cu_seqlens"] = given["cu_seqlens"].to(device)
    B, T, C = given["x"].shape
    among = torch.full((B, T + 9, C + 16), torch.nan, dtype=wide, device=device)
    among[:, 8 : 8 + T, 8 : 8 + C] = leaves["x"]
    leaves["x"] = among[:, 8 : 8 + T, 8 : 8 + C]
    wanted = [leaves[name].detach().requires_grad_() for name in ("x", "weight", "initial_state")]
    leaves |= dict(zip(("x", "weight", "initial_state"), wanted, strict=True))
    out = function(**leaves, activation=activation)[0]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(out, wanted, upstream.to(dtype).to(out))
    named = {"out": out.detach(), **dict(zip(("x", "weight", "initial_state"), found, strict=True))}
    return {name: x for name, x in named.items() if x.numel()}


@over_settings
@pytest.mark.parametrize("bounds", [None, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("taps", [1, 3, 4, 8])
def test_results_and_gradients_are_those_of_the_reference(
    taps: int, bounds: tuple[int, ...] | None, device: str, dtype: torch.dtype
) -> None:
    given = drawn(taps, bounds=bounds)
    exact = results(causal_conv1d_reference, given, dtype, "cpu")
    assert_held(exact, lambda: results(causal_conv1d, given, dtype, device), dtype, device, **SHORT)


@over_settings
def test_a_sum_without_activation_has_the_gradients_of_the_reference(device: str, dtype: torch.dtype) -> None:
    given = drawn(4, B=2, T=9, C=33)
    exact = results(causal_conv1d_reference, given, dtype, "cpu", None)
    assert_held(exact, lambda: results(causal_conv1d, given, dtype, device, None), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("channels", [2048, 2056, 1023])
def test_sizes_as_models_have_them_are_right(channels: int, taps: int, dtype: torch.dtype) -> None:
    for given in (
        drawn(taps, B=2, T=500, C=channels),
        drawn(taps, T=500, C=channels, bounds=(0, 1, 300, 300, 500)),
    ):
        exact = results(causal_conv1d_reference, given, dtype, "cpu")
        assert_held(exact, lambda given=given: results(causal_conv1d, given, dtype, "cuda"), dtype, "cuda")
        first, second = (results(causal_conv1d, given, dtype, "cuda") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
