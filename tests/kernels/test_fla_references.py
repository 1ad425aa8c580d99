"""Our ops beside the references of flash-linear-attention, plain PyTorch that goes token by token: outputs, states, gradients."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heddle.kernels import Op, decay_attention, delta_rule, gated_delta_rule, gla, kda, simple_gla
from heddle.kernels.accuracy import compare, draw, is_timed, oracle, results, worst_error

AnyOp = Op[..., Any]
Function = Callable[..., tuple[Tensor, Tensor]]
SHAPE = {"B": 2, "T": 100, "H": 2, "HV": 2, "K": 64, "V": 32}
# They go token by token in float32: each rounds the state twice, half a unit at most, once it fades and once it is added to.
THEIRS = SHAPE["T"] * torch.finfo(torch.float32).eps
# Where each is, under fla.ops, and what it calls our gate.
REFERENCES = {
    simple_gla: ("simple_gla.naive", "naive_recurrent_simple_gla", "g"),
    decay_attention: ("simple_gla.naive", "naive_recurrent_simple_gla", "g"),
    gla: ("gla.naive", "naive_recurrent_gla", "gk"),
    gated_delta_rule: ("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule", "g"),
    delta_rule: ("delta_rule.naive", "delta_rule_recurrence", ""),
    kda: ("kda.naive", "naive_recurrent_kda", "g"),
}


def _reference(op: AnyOp) -> Function:
    """That of the package, with our names and shapes."""
    module, name, gate = REFERENCES[op]
    with warnings.catch_warnings():
        # It tells of what it has not.
        warnings.simplefilter("ignore")
        theirs = getattr(importlib.import_module(f"fla.ops.{module}"), name)

    def run(
        *, initial_state: Tensor, log_decay: Tensor | None = None, **given: Tensor
    ) -> tuple[Tensor, Tensor]:
        if op is delta_rule:
            # Its heads stand before time.
            out, state = theirs(
                **{side: x.transpose(1, 2) for side, x in given.items()}, initial_state=initial_state
            )
            return out.transpose(1, 2), state
        assert log_decay is not None
        if op is decay_attention:
            log_decay = log_decay.expand(*given["v"].shape[:3])
        found: tuple[Tensor, Tensor] = theirs(
            **given, **{gate: log_decay}, initial_state=initial_state, output_final_state=True
        )
        return found

    return run


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels_on_gpu")
@pytest.mark.parametrize("op", REFERENCES, ids=lambda op: op.name)
def test_theirs_and_ours_are_near_to_our_reference(op: AnyOp) -> None:
    sample = draw(op, SHAPE, torch.float32)
    ours, exact = compare(op, sample, "cuda"), oracle(op, sample)
    theirs = results(_reference(op), sample.to("cuda"))
    assert {one.path for one in ours} == {"triton"}
    for one in ours:
        error, worst = worst_error(theirs[one.name], exact[one.name], timed=is_timed(one.name))
        assert one.ok, str(one)
        assert error <= one.bound + THEIRS, f"{one.name}: {error:.2e}, {one.bound:.2e} is ours, {worst}"
