"""taylor_attention: tokens without weight, the two forms of its state, the mixer, paths.

Lengths, states, packed sequences and gradients are those of all ops, tests/contracts/test_ops.py. On a CPU the path in plain
torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU the real ones.
"""

from __future__ import annotations

import pytest
import torch
from held import assert_held, over_settings
from torch import Tensor
from toys import mixer_of

from heddle.compose.cache import Call
from heddle.kernels import taylor_attention, taylor_attention_reference, watch_paths
from heddle.kernels._taylor_attention_torch import gathered, spread, taylor2
from heddle.kernels.accuracy import draw
from heddle.kernels.op import INTERPRETED

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

SHAPE = {"B": 2, "T": 90, "H": 2, "K": 16, "V": 24}


def graded(function: object, given: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    leaves = {name: given[name].detach().requires_grad_() for name in ("q", "k", "v")}
    out, state = function(**{**given, **leaves})  # type: ignore[operator]
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
    named = {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "state": state.detach().flatten(0, 1), **named}


@over_settings
@pytest.mark.parametrize("begins", [0, 3], ids=["written", "begins_unwritten"])
def test_tokens_without_weight_are_not_there(begins: int, device: str, dtype: torch.dtype) -> None:
    given = draw(taylor_attention, SHAPE, dtype, initial_state=False).arguments
    weight = (torch.arange(SHAPE["T"]) % 7 != 5).to(torch.float32).expand(2, -1).clone()
    weight[:, :begins] = 0.0
    upstream = torch.randn(2, 90, 2, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = {name: x.double() for name, x in given.items()}
    exact = graded(taylor_attention_reference, {**wide, "weight": weight.double()}, upstream)
    assert exact["out"][:, :begins].abs().max() == 0 if begins else True
    there = {name: x.to(device) for name, x in (*given.items(), ("weight", weight))}

    def run() -> dict[str, Tensor]:
        return graded(taylor_attention, there, upstream.to(device))

    assert_held(exact, run, dtype, device)


@over_settings
@pytest.mark.parametrize("size", [4.0, 16.0])
def test_keys_of_one_direction_and_queries_across_it_are_right(
    size: float, device: str, dtype: torch.dtype
) -> None:
    # Sums over pairs of dimensions cancel: a state that is rounded to eight bits gave weights below 0. Of features in float32
    # five digits are left.
    if device == "cpu" and not INTERPRETED:
        dtype = torch.float64
    given = draw(taylor_attention, {**SHAPE, "T": 256}, torch.float64, initial_state=False).arguments
    along = torch.nn.functional.normalize(torch.arange(1.0, 17.0, dtype=torch.float64), dim=0)
    q = given["q"] - (given["q"] @ along)[..., None] * along
    q = size * torch.nn.functional.normalize(q, dim=-1)
    sides = {"q": q, "k": size * along + 0.3 * given["k"], "v": given["v"] + 1.0}
    rounded = {name: x.to(dtype) for name, x in sides.items()}
    upstream = torch.randn(2, 256, 2, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = graded(taylor_attention_reference, {name: x.double() for name, x in rounded.items()}, upstream)
    there = {name: x.to(device) for name, x in rounded.items()}
    assert_held(
        exact, lambda: graded(taylor_attention, there, upstream.to(device)), dtype, device, segment=64
    )


def test_a_call_under_inference_mode_leaves_later_trainings_as_they_are() -> None:
    given = draw(taylor_attention, SHAPE, torch.float32, initial_state=False).arguments
    with torch.inference_mode():
        taylor_attention(**given)
    upstream = torch.ones(2, 90, 2, 24)
    assert all(x.isfinite().all() for x in graded(taylor_attention, given, upstream).values())


def test_weights_and_states_are_those_of_features() -> None:
    q, k = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = q @ k.mT / 3
    torch.testing.assert_close(taylor2(q) @ taylor2(k).mT, 1 + y + y**2 / 2)
    # As kernels have it: each pair twice, behind zeros for dimensions that are not there.
    sums = torch.einsum("tf,tv->fv", taylor2(k), torch.randn(5, 3, dtype=torch.float64))[None, None]
    wide = spread(sums, 9, 16)
    padded = torch.nn.functional.pad(q, (0, 7))
    pairs = (padded[:, :, None] * padded[:, None]).flatten(1)
    factors = torch.cat((pairs / 18, padded / 3, torch.ones(5, 1, dtype=torch.float64)), dim=1)
    torch.testing.assert_close(factors @ wide[0, 0], taylor2(q) @ sums[0, 0])
    torch.testing.assert_close(gathered(wide, 9, 16), sums)


@over_settings
def test_the_mixer_runs_on_it(device: str, dtype: torch.dtype) -> None:
    mixer = mixer_of(32, "linear_attention", heads=2, head_dim=8, value_dim=16)
    mixer = mixer.to(device, dtype)
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with watch_paths() as seen, torch.no_grad():
        mixer(x, Call(torch.arange(20, device=device)[None]))
    path = "triton" if INTERPRETED or device == "cuda" else "torch"
    assert ("taylor_attention", path) in seen


def test_more_dimensions_than_kernels_take_run_as_features() -> None:
    given = draw(taylor_attention, {**SHAPE, "K": 20}, torch.float32, initial_state=False).arguments
    with watch_paths() as seen:
        out, state = taylor_attention(**given)
    assert ("taylor_attention", "torch") in seen
    exact, _ = taylor_attention_reference(**given)
    assert (out - exact).abs().max() < 1e-5
    assert state.shape == (2, 2, 231, 25)
