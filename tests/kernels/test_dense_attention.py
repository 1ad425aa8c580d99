"""dense_attention: the order of torch's backends, who may overrule it, what it gives plainly and compiled."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from chosen_keys import dense_plainly
from held import assert_near, over_settings
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from heddle.errors import HeddleError
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


# As many as cuDNN is asked for, and no whole tiles; fewer queries than keys; a step.
LENGTHS = {"causal": (577, 577), "plain": (577, 700), "step": (1, 700)}


@over_settings
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)], ids=str)
@pytest.mark.parametrize("kind", LENGTHS)
def test_heads_as_models_have_them_are_right(
    kind: str, sizes: tuple[int, int], device: str, dtype: torch.dtype
) -> None:
    (T, S), (d, V), generator = LENGTHS[kind], sizes, torch.Generator().manual_seed(0)
    shapes = {"q": (4, T, d), "k": (2, S, d), "v": (2, S, V), "upstream": (4, T, V)}
    given = {name: torch.randn(2, *size, generator=generator).to(dtype) for name, size in shapes.items()}

    def results(function: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        leaves = {name: given[name].detach().requires_grad_() for name in ("q", "k", "v")}
        out = function(**leaves, is_causal=kind == "causal")
        gradients = torch.autograd.grad(out, list(leaves.values()), given["upstream"])
        with torch.no_grad():
            alone = function(**leaves, is_causal=kind == "causal")
        named = {"out": out.detach(), "without gradients": alone, **dict(zip(leaves, gradients, strict=True))}
        return {name: x.transpose(1, 2) for name, x in named.items()}

    exact = results(dense_attention_reference, {name: x.double() for name, x in given.items()})
    there = {name: x.to(device) for name, x in given.items()}
    assert_near(exact, results(dense_attention, there), results(dense_plainly, there), dtype)


PACKED = [0, 1, 1, 41, 106]


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_sequences_are_each_alone(is_causal: bool) -> None:
    leaves = {name: x.requires_grad_() for name, x in packed_leaves(torch.float64).items()}
    rest = {"is_causal": is_causal, "scale": 0.3, "cu_seqlens": torch.tensor(PACKED)}
    told = []
    for function in (dense_attention, dense_attention_reference):
        out = function(**leaves, **rest)
        told.append([out, *torch.autograd.grad(out.sin().sum(), list(leaves.values()))])
    for found, wanted in zip(*told, strict=True):
        assert (found - wanted).abs().max() < EPSILON[torch.float64]
    rest["lengths"] = [end - begin for begin, end in pairwise(PACKED)]
    assert torch.equal(dense_attention(**leaves, **rest), told[0][0])


def packed_leaves(dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (4, 16), "k": (2, 16), "v": (2, 16)}
    return {
        name: torch.randn(1, heads, PACKED[-1], size, generator=generator, dtype=torch.float64).to(
            device, dtype
        )
        for name, (heads, size) in shapes.items()
    }


def test_packed_sequences_take_no_mask_and_no_keys_of_their_own() -> None:
    leaves, ends = packed_leaves(torch.float32), torch.tensor(PACKED)
    with pytest.raises(HeddleError, match="no mask"):
        dense_attention(**leaves, mask=torch.ones(1, 1, 106, 106, dtype=torch.bool), cu_seqlens=ends)
    with pytest.raises(HeddleError, match="as many queries as keys"):
        dense_attention(leaves["q"][:, :, :1], leaves["k"], leaves["v"], cu_seqlens=ends)
    with pytest.raises(HeddleError, match="must rise from 0 to 106"):
        dense_attention(**leaves, cu_seqlens=ends - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_sequences_go_through_flash_attention_in_one_call(dtype: torch.dtype, is_causal: bool) -> None:
    leaves = {name: x.requires_grad_() for name, x in packed_leaves(dtype, "cuda").items()}
    rest = {"is_causal": is_causal, "cu_seqlens": torch.tensor(PACKED, device="cuda")}
    with torch.profiler.profile(acc_events=True) as seen:
        out = dense_attention(**leaves, **rest)
    assert sum(event.name == "aten::_flash_attention_forward" for event in seen.events()) == 1
    found = [out, *torch.autograd.grad(out.float().sin().sum(), list(leaves.values()))]
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    wanted = dense_attention_reference(**exact, **rest)
    for one, other in zip(
        found, [wanted, *torch.autograd.grad(wanted.sin().sum(), list(exact.values()))], strict=True
    ):
        assert (one - other).norm() <= 2 * torch.finfo(dtype).eps * other.norm()


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
