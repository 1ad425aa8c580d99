"""What is peculiar to delta_rule: beta up to 2, keys written twice, orthogonal keys, the gated rule without its gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from held import over_settings
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels import delta_rule, delta_rule_step, gated_delta_rule
from heddle.kernels.accuracy import Sample, compare, draw, results
from heddle.kernels.common.tuning import tuning

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = {"B": 1, "H": 2, "HV": 4, "K": 64, "V": 16, "T": 130}


def _changed(sample: Sample, **arguments: Tensor) -> Sample:
    return replace(sample, arguments={**sample.arguments, **arguments})


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_by_two_kernels_are_right(device: str) -> None:
    sample = draw(delta_rule, SHAPE, torch.float32)
    with tuning(split=1):
        wrong = [str(one) for one in compare(delta_rule, sample, device) if not one.ok]
    assert not wrong, "\n".join(wrong)


@over_settings
@pytest.mark.parametrize("sizes", [(100, 72), (128, 256), (256, 128), (256, 256)])
def test_large_and_ragged_heads_are_right(sizes: tuple[int, int], device: str, dtype: torch.dtype) -> None:
    K, V = sizes
    sample = draw(delta_rule, {"B": 1, "H": 1, "HV": 2, "K": K, "V": V, "T": 200}, dtype)
    with tuning(segment=128):
        wrong = [str(one) for one in compare(delta_rule, sample, device) if not one.ok]
    assert not wrong, "\n".join(wrong)


def test_a_key_written_twice_reads_the_second_value() -> None:
    key = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1)
    v = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    keys = key.expand(1, 2, 1, 8)
    out, _ = delta_rule(keys, keys, v, torch.ones(1, 2, 1, dtype=torch.float64), scale=1.0)
    assert torch.allclose(out, v, atol=1e-9)


def test_with_orthogonal_keys_it_is_linear_attention() -> None:
    k = torch.eye(8, dtype=torch.float64)[None, :, None, :]
    q, v = torch.randn(2, 1, 8, 1, 8, dtype=torch.float64)
    out, _ = delta_rule(q, k, v, torch.ones(1, 8, 1, dtype=torch.float64), scale=1.0)
    scores = (q[0, :, 0] @ k[0, :, 0].T).tril()
    assert torch.allclose(out[0, :, 0], scores @ v[0, :, 0], atol=1e-9)


def test_it_is_the_gated_rule_without_decay() -> None:
    sample = draw(delta_rule, SHAPE, torch.float64)
    gated = _changed(sample, log_decay=torch.zeros_like(sample.arguments["beta"]))
    found, expected = results(delta_rule, sample), results(gated_delta_rule, gated)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_mixed_dtypes_and_two_tokens_a_step_are_refused() -> None:
    arguments = draw(delta_rule, {**SHAPE, "T": 2}, torch.float32).arguments
    with pytest.raises(HeddleError, match="k is float32, expected float16 as q"):
        delta_rule(**{**arguments, "q": arguments["q"].half()})
    state = arguments.pop("initial_state")
    with pytest.raises(HeddleError, match="takes one token"):
        delta_rule_step(**arguments, state=state)
