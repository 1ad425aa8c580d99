"""The kernels of token_split_attention beside the reference: forms that contracts do not have, tiles, equal bits, a mixer.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from held import assert_held, by_columns, compiled, fill_fresh_memory_with_nan, over_settings
from torch import Tensor
from toys import mixer_of, noise

from heddle.compose.cache import Call
from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import INTERPRETED, LIBRARY, wide_dtype
from heddle.kernels.token_split_attention import token_split_attention, token_split_attention_reference

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

ROUNDED = ("q", "k", "v", "far_k", "far_v")
WANTED = (*ROUNDED, "gate", "phi_q", "phi_k", "written", "far_written", "initial_state")
# Results and arguments with heads before tokens.
IN_HEADS = ("out", *ROUNDED, "gate", "phi_q", "phi_k")
Given = dict[str, Any]


def drawn(
    tokens: int = 75, *, held: int = 0, begin: int = 0, far: int = 0, rows: int = 2, **sizes: int
) -> Given:
    """`tokens` queries behind so many keys from the place `begin` on, and `far` keys of before; marks at random."""
    size = {"H": 4, "N": 2, "K": 16, "V": 16, "F": 6, "chunk": 8, "keep": 2} | sizes
    H, N, K, V, F = (size[name] for name in ("H", "N", "K", "V", "F"))
    generator, keys = torch.Generator().manual_seed(tokens + held + far), tokens + held

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)

    given: Given = {
        "q": normal(H, tokens, K),
        "k": normal(N, keys, K),
        "v": normal(N, keys, V),
        "kept": (normal(N, keys) > 0.5).double(),
        "gate": normal(H, tokens, V).sigmoid(),
        "phi_q": normal(H, tokens, F).softmax(-1),
        "phi_k": normal(N, keys, F).softmax(-1),
        "written": (normal(keys) > -1.0).double(),
        "initial_state": normal(N, F, V + 1).square(),
    }
    if far:
        given |= {
            "far_k": normal(N, far, K),
            "far_v": normal(N, far, V),
            "far_written": (normal(N, far) > -0.5).double(),
        }
    return {**given, "begin": begin, "chunk": size["chunk"], "keep": size["keep"], "scale": 0.4}


def padded(given: Given, *padding: int) -> Given:
    return {**given, "padding": torch.tensor(padding)}


def bare(given: Given) -> Given:
    return {name: x for name, x in given.items() if name not in ("written", "far_written", "initial_state")}


def packed(*ends: int) -> Given:
    state = drawn(1, rows=len(ends) - 1)["initial_state"]
    return {**drawn(ends[-1], rows=1), "initial_state": state, "cu_seqlens": torch.tensor(ends)}


FORMS: dict[str, Callable[[], Given]] = {
    "marked": drawn,
    # No marks and no state; heads and features that no tile is as large as, chunks that lie across tiles.
    "ragged": lambda: bare(drawn(65, K=20, V=12, F=5, chunk=7, keep=3)),
    "past": lambda: drawn(50, held=11, begin=24, far=40),
    # The first row's first queries are none.
    "padded": lambda: padded(drawn(45, held=9, begin=8, far=5), 30, 3),
    "short": lambda: drawn(5),
    "single": lambda: drawn(1, held=9, begin=16, far=9),
    "window": lambda: drawn(keep=0),
    "every": lambda: drawn(40, keep=8),
    # Of each query head its own keys; a chunk of more keys than a tile.
    "wide": lambda: drawn(130, rows=1, H=2, N=2, chunk=48, keep=3),
    "packed": lambda: packed(0, 1, 1, 20, 45),
}


def at(given: Given, dtype: torch.dtype, device: str) -> Given:
    def one(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        own = dtype if name in ROUNDED else wide_dtype(dtype)
        return x.to(device, own) if x.is_floating_point() else x.to(device)

    return {name: one(name, x) for name, x in given.items()}


def graded(function: Callable[..., tuple[Tensor, Tensor]], given: Given) -> dict[str, Tensor]:
    """Output, state and gradients, with time before heads."""
    wanted = [name for name in WANTED if name in given]
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in wanted}}
    out, state = function(**leaves)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (out, state)]
    found = torch.autograd.grad(
        (out, state), [leaves[name] for name in wanted], upstream, materialize_grads=True
    )
    named = {"out": out.detach(), **dict(zip(wanted, found, strict=True))}
    turned = {name: x.transpose(1, 2) if name in IN_HEADS else x.flatten(0, 1) for name, x in named.items()}
    return {**turned, "state": state.detach().flatten(0, 1)}


def assert_as_near(
    found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """All that is found within twice the error of plain torch, as house.md has it."""
    for name, tensor in exact.items():
        (error, worst), (allowed, _) = (
            worst_error(x[name], tensor, timed=tensor.dim() > 2) for x in (found, plain)
        )
        assert error <= 2 * allowed + EPSILON[dtype], f"{name}: {error:.2e}, {allowed:.2e}, {worst}"


def held_to_reference(form: str, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    given = at(FORMS[form](), dtype, "cpu")
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }
    exact, there = graded(token_split_attention_reference, wide), at(given, dtype, device)
    assert_held(exact, lambda: graded(token_split_attention, there), dtype, device, **overrides)


@over_settings
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    held_to_reference(form, dtype, device)


@over_settings
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16)])
def test_tiles_of_any_size_give_the_same(queries: int, keys: int, device: str, dtype: torch.dtype) -> None:
    launch = Launch(chunk=queries, columns=keys, warps=4, stages=1)
    held_to_reference("past", dtype, device, **dict.fromkeys(("forward", "queries", "near", "far"), launch))


@over_settings
@pytest.mark.parametrize("form", ["past", "padded"])
def test_two_runs_are_equal_to_the_bit_whatever_is_in_fresh_memory(
    form: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = at(FORMS[form](), dtype, device)
    first = graded(token_split_attention, given)
    fill_fresh_memory_with_nan(monkeypatch)
    second = graded(token_split_attention, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@over_settings
def test_later_tokens_change_no_bit(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(numpy, "matmul", by_columns)
    given, t = drawn(120), 53
    other = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
    for name in ("q", "k", "v", "gate", "phi_q", "phi_k"):
        other[name][:, :, t:] += 1.0
    other["kept"][:, :, t:] = 1.0 - other["kept"][:, :, t:]
    other["written"][:, t:] = 1.0
    one, changed = (token_split_attention(**at(x, dtype, device))[0] for x in (given, other))
    assert torch.equal(one[:, :, :t], changed[:, :, :t])
    assert not torch.equal(one[:, :, t:], changed[:, :, t:])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_state_behind_all_does_not_hold_those_before_each_chunk(device: str) -> None:
    state = token_split_attention(**at(drawn(), torch.float32, device))[1]
    assert state.untyped_storage().nbytes() == state.nbytes


@over_settings
def test_of_equal_logits_the_first_key_has_the_gradient_of_the_largest(
    device: str, dtype: torch.dtype
) -> None:
    # All keys are one: where each has its part of it, or one has it all, their sum is the same.
    given = drawn(30)
    given["k"] = given["k"][:, :, :1].expand_as(given["k"]).contiguous()
    found = graded(token_split_attention, at(given, dtype, device))
    with force_path("torch"):
        plain = graded(token_split_attention, at(given, dtype, device))
        exact = graded(token_split_attention, at(at(given, dtype, "cpu"), torch.float64, "cpu"))
    assert_as_near(*({"k": x["k"].double().sum(1, keepdim=True)} for x in (found, plain, exact)), dtype)
    # No query changes anything: what is left of its gradient is the rounding of terms as large as those of keys.
    assert found["q"].abs().max() <= 2 * EPSILON[dtype] * exact["k"].abs().max()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_without_gradients_runs_in_torch(device: str) -> None:
    given = at(FORMS["single"](), torch.float32, device)
    with watch_paths() as seen, torch.no_grad():
        out, state = token_split_attention(**given)
    assert seen == []
    with force_path("torch"):
        expected = token_split_attention(**given)
    assert torch.equal(out, expected[0])
    assert torch.equal(state, expected[1])


@pytest.mark.parametrize(
    "device", [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_a_mixer_has_gradients_as_near_as_those_of_plain_torch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "chunk": 8,
        "keep": 2,
        "features": 6,
        "chosen_by": "group",
    }
    exact = mixer_of(32, "still", **sizes)
    mixer, x = copy.deepcopy(exact).to(device, torch.float32), noise(2, 150, 32)
    # Pieces that are worked out again, the last of a part of a chunk.
    monkeypatch.setattr("heddle.compose.modules.salient.MOST_FEATURES", 1)
    results = []
    for path, module in (("triton", mixer), ("torch", mixer), ("torch", exact)):
        weight = next(module.parameters())
        with force_path(path), watch_paths() as seen:
            leaf = x.to(weight).requires_grad_()
            y = module(leaf, Call(torch.arange(150, device=leaf.device).expand(2, -1)))
            named = dict(module.named_parameters())
            grads = torch.autograd.grad(y.square().sum(), [leaf, *named.values()])
        assert set(seen) == {("token_split_attention", path)}
        results.append({"y": y.detach(), **dict(zip(("x", *named), grads, strict=True))})
    assert_as_near(*results, torch.float32)


# Elsewhere the path in plain torch compiles: test_token_split_attention.py.
@pytest.mark.parametrize(
    "device", [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_torch_knows_the_kernels_and_they_compile_without_a_break(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = at(FORMS["short"](), torch.float32, device)
    found, expected = (graded(one, given) for one in (compiled(token_split_attention), token_split_attention))
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max()))
        assert (found[name] - tensor).abs().max() <= EPSILON[torch.float32] * scale, name
    known, told = getattr(torch.ops, LIBRARY).token_split_attention_kernels.default, []
    monkeypatch.setattr(
        "heddle.kernels._token_split_attention_op._kernels",
        lambda *arguments: told.extend(arguments) or known(*arguments),
    )
    with torch.no_grad():
        token_split_attention(**given)
    # With gradients, for float tensors but the places among them.
    leaves = [
        x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in told[:-1]
    ]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(known, (*leaves, True), test_utils=checks)
