"""What is peculiar to gla and kda: hard gates of single channels, and the ops they are when all channels fade alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from heddle.errors import HeddleError
from heddle.kernels import Op, gated_delta_rule, gla, kda, simple_gla
from heddle.kernels.accuracy import EPSILON, Sample, compare, draw, results

SMALL = {"B": 1, "H": 2, "HV": 2, "K": 16, "V": 24}
CHUNK = 64
every_op = pytest.mark.parametrize("op", [gla, kda], ids=lambda op: op.name)


def with_decays(sample: Sample, *choices: float) -> Sample:
    """Log-decays drawn from a few, for each channel."""
    log_decay = sample.arguments["log_decay"]
    picked = torch.randint(len(choices), log_decay.shape, generator=torch.Generator().manual_seed(1))
    drawn = torch.tensor(choices, dtype=log_decay.dtype)[picked]
    return replace(sample, arguments={**sample.arguments, "log_decay": drawn})


@every_op
@pytest.mark.parametrize(
    "choices", [(0.0, -1e-6, -1e-3, -1.0, -20.0), (-1e-6, -1e4, -1e-2), (-20.0,)], ids=str
)
def test_strong_decays_beside_weak_ones_are_right(op: Op[..., Any], choices: tuple[float, ...]) -> None:
    sample = with_decays(draw(op, {**SMALL, "T": 130}, torch.float32), *choices)
    wrong = [str(one) for one in compare(op, sample, "cpu") if not one.ok]
    assert not wrong, "\n".join(wrong)


@every_op
@torch.no_grad()
def test_a_changed_token_moves_its_own_chunk_by_rounding_and_an_earlier_one_in_no_bit(
    op: Op[..., Any],
) -> None:
    """Kernels take a chunk's decays from its middle, so its earlier outputs are causal but for rounding."""
    place, begin = 80, 80 // CHUNK * CHUNK
    sample = with_decays(draw(op, {**SMALL, "T": 130}, torch.float32), -1e-3, -0.1)
    other = {name: tensor.clone() for name, tensor in sample.arguments.items()}
    other["log_decay"][:, place] *= 3.0
    exact = op.reference(**{name: tensor.double() for name, tensor in sample.arguments.items()})[0]
    before, after = (op(**arguments)[0] for arguments in (sample.arguments, other))
    assert torch.equal(before[:, :begin], after[:, :begin])
    assert not torch.equal(before[:, place], after[:, place])
    first, second, exact = (one[:, begin:place].double() for one in (before, after, exact))
    error = (first - exact).norm() / exact.norm()
    assert (second - first).norm() / first.norm() <= 2 * error + EPSILON[torch.float32]


@pytest.mark.parametrize(("op", "simple"), [(gla, simple_gla), (kda, gated_delta_rule)], ids=["gla", "kda"])
def test_channels_that_fade_alike_are_one_decay(op: Op[..., Any], simple: Op[..., Any]) -> None:
    sample = draw(simple, {**SMALL, "T": 130}, torch.float64)
    gate = sample.arguments["log_decay"]
    alike = gate[..., None].expand(*gate.shape, SMALL["K"])
    found = results(op, replace(sample, arguments={**sample.arguments, "log_decay": alike}))
    found["d_log_decay"] = found["d_log_decay"].sum(-1)
    for name, expected in results(simple, sample).items():
        assert (found[name] - expected).abs().max() <= 1e-9 * expected.abs().max(), name


@every_op
def test_a_gate_for_each_head_alone_is_refused(op: Op[..., Any]) -> None:
    arguments = draw(op, {**SMALL, "T": 4}, torch.float32).arguments
    with pytest.raises(
        HeddleError, match=rf"{op.name}: log_decay has shape \[1, 4, 2\], expected \[1, 4, 2, 16\]"
    ):
        op(**{**arguments, "log_decay": arguments["log_decay"][..., 0]})
