"""What is peculiar to gated_delta_rule: hard gates, repeated keys, CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heddle.kernels import gated_delta_rule
from heddle.kernels.accuracy import Sample, compare, draw, results
from heddle.kernels.gated_delta_rule import _unit_lower_inverse

SHAPE = {"B": 1, "H": 2, "HV": 4, "K": 16, "V": 16, "T": 200}


def _assert_right(sample: Sample) -> None:
    wrong = [str(one) for one in compare(gated_delta_rule, sample, "cpu") if not one.ok]
    assert not wrong, "\n".join(wrong)


def _changed(sample: Sample, **arguments: torch.Tensor) -> Sample:
    return replace(sample, arguments={**sample.arguments, **arguments})


def test_decays_from_none_to_all_at_once_are_right() -> None:
    sample = draw(gated_delta_rule, SHAPE, torch.float32)
    log_decay = sample.arguments["log_decay"]
    # Strong decays beside weak ones, so that sums of them hide the weak.
    choices = torch.tensor([0.0, -1e-4, -1.0, -20.0])
    pattern = choices[torch.randint(4, log_decay.shape, generator=torch.Generator().manual_seed(1))]
    _assert_right(_changed(sample, log_decay=pattern))


def _with_one_key(beta: float) -> Sample:
    sample = draw(gated_delta_rule, SHAPE, torch.float32)
    k = sample.arguments["k"][:, :1].expand_as(sample.arguments["k"]).contiguous()
    return _changed(sample, k=k, beta=torch.full_like(sample.arguments["beta"], beta))


@pytest.mark.parametrize("beta", [0.9, 1.0, 1.999])
def test_the_same_key_again_and_again_is_right(beta: float) -> None:
    measured = compare(gated_delta_rule, _with_one_key(beta), "cpu")
    # What is overwritten at once hardly depends on its gates: their gradients are differences of nearly equal numbers,
    # zero up to rounding, in any chunk form.
    wrong = [str(one) for one in measured if one.name not in ("d_log_decay", "d_beta") and not one.ok]
    assert not wrong, "\n".join(wrong)


def test_value_heads_share_their_key_head_in_groups() -> None:
    sample = draw(gated_delta_rule, SHAPE, torch.float64)
    grouped = results(gated_delta_rule, sample)
    spread = {name: sample.arguments[name].repeat_interleave(2, dim=2) for name in ("q", "k")}
    alone = results(gated_delta_rule, _changed(sample, **spread))
    assert torch.equal(grouped["out"], alone["out"])
    summed = alone["d_k"].unflatten(2, (2, 2)).sum(3)
    assert torch.allclose(grouped["d_k"], summed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_the_blockwise_inverse_is_the_inverse(size: int) -> None:
    strict = torch.rand(3, size, size, dtype=torch.float64).tril(-1)
    product = _unit_lower_inverse(strict) @ (strict + torch.eye(size))
    assert torch.allclose(product, torch.eye(size, dtype=torch.float64).expand_as(product), atol=1e-9)


@pytest.mark.gpu
def test_forward_and_backward_run_in_a_cuda_graph() -> None:
    sample = draw(gated_delta_rule, SHAPE, torch.float32).to("cuda")
    expected = results(gated_delta_rule, sample)
    arguments = {name: x.requires_grad_(name in sample.wanted) for name, x in sample.arguments.items()}

    def both() -> list[torch.Tensor]:
        found = gated_delta_rule(**arguments)
        return [
            *found,
            *torch.autograd.grad(found, [arguments[name] for name in sample.wanted], sample.upstream),
        ]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))
