"""dense_attention: the order of torch's backends, who may overrule it, what it gives plainly and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from heddle.kernels.accuracy import EPSILON
from heddle.kernels.configs.dense_attention import HOPPER, rules
from heddle.kernels.dense_attention import dense_attention, dense_attention_reference, in_order

CALL: dict[str, Any] = {"queries": 4096, "size": 128, "masked": False, "training": False}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def first_of(**change: Any) -> str | None:
    return next((rule.order[0] for rule in HOPPER if rule.holds(**{**CALL, **change})), None)


def test_on_hopper_cudnn_comes_first_where_a_plan_is_worth_its_while() -> None:
    assert first_of() == first_of(queries=512, training=True) == first_of(size=256) == "cudnn"
    assert {first_of(queries=1), first_of(queries=512), first_of(masked=True), first_of(size=512)} == {None}
    assert rules((9, 0)) is HOPPER
    assert rules((8, 0)) == rules((10, 0)) == ()
    assert all(len(set(rule.order)) == 4 for rule in HOPPER), "where one does not apply the next one is taken"


def test_the_order_holds_inside_and_gives_way_to_a_wish() -> None:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with in_order(("cudnn", "math")):
        inside = _cur_sdpa_kernel_backends(with_priority=True)
    assert inside[:2] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before != inside
    wish = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(wish, set_priority=True), in_order(("cudnn",)):
        assert _cur_sdpa_kernel_backends(with_priority=True) == wish
    with sdpa_kernel(SDPBackend.MATH), in_order(("cudnn",)):
        assert _cur_sdpa_kernel_backends() == [SDPBackend.MATH], "what is switched off stays off"
    with pytest.raises(ZeroDivisionError), in_order(("cudnn",)):
        _ = 1 // 0
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["causal", "plain", "bool", "bias"])
def test_results_and_gradients_are_those_of_the_reference_plainly_and_compiled(
    kind: str, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = dense_attention.cases.inputs(dense_attention.cases.test_shapes[0], generator)
    T = drawn["q"].shape[2]
    mask = torch.rand(2, 1, T, T, generator=generator, dtype=torch.float64)
    mask = {"bool": (mask > 0.4) | torch.eye(T, dtype=torch.bool), "bias": mask}.get(kind)
    mask = None if mask is None else mask.to(device)
    leaves = {name: x.to(device).requires_grad_() for name, x in drawn.items()}

    def results(function: Any) -> list[torch.Tensor]:
        out = function(**leaves, mask=mask, is_causal=kind == "causal", scale=0.3)
        return [out, *torch.autograd.grad(out.sin().sum(), list(leaves.values()))]

    exact = results(dense_attention_reference)
    compiled = torch.compile(dense_attention, fullgraph=True, backend="aot_eager")
    # A compile takes a second: one with a mask, one without.
    for function in (dense_attention, compiled) if kind in ("causal", "bias") else (dense_attention,):
        for found, wanted in zip(results(function), exact, strict=True):
            assert (found - wanted).abs().max() < EPSILON[torch.float64]


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_hopper_runs_cudnn(training: bool) -> None:
    q = torch.randn(1, 4, 2048, 128, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    compiled = torch.compile(dense_attention, fullgraph=True, backend="aot_eager")
    for function in (dense_attention, compiled):
        # Else torch 2.11 warns that it keeps the events of one cycle, of which there is one.
        with torch.profiler.profile(acc_events=True) as seen:
            function(q, q, q, is_causal=True)
        names = " ".join(event.name for event in seen.events())
        assert "_scaled_dot_product_cudnn_attention" in names or torch.cuda.get_device_capability()[0] != 9
