"""span_attention: spans of clusters and of windows against the reference, equal bits, the mixer, paths, refusals.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from held import assert_held, by_columns, compiled, over_settings
from torch import Tensor
from toys import mixer_of, noise

from heddle.compose.cache import Call
from heddle.compose.modules.clusters import Members
from heddle.errors import HeddleError
from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import INTERPRETED, LIBRARY
from heddle.kernels.span_attention import TILE, span_attention, span_attention_reference

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

B, H = 2, 2
WANTED = ("q", "k", "v", "own", "weight")
Given = dict[str, Any]


def clustered(
    T: int = 90, kept: int = 0, d: int = 16, V: int = 16, width: int = 9, clusters: int = 3
) -> Given:
    """Arguments as the mixer gives them: some keys are no members, some queries see none, some clusters are empty."""
    generator = torch.Generator().manual_seed(T + kept)
    S = kept + T
    sides = {"q": (H, T, d), "k": (H, S, d), "v": (H, S, V), "own": (H, T, V)}
    made = {
        name: torch.randn(B, *size, generator=generator, dtype=torch.float64) for name, size in sides.items()
    }
    z = torch.randint(clusters, (B, H, S), generator=generator)
    is_member = torch.rand(B, H, S, generator=generator) > 0.2
    members = Members(z, is_member, clusters + 2, tile=TILE)
    first, last, queries = members.spans(z[..., kept:], width)
    weight = torch.ones(B, S, dtype=torch.float64)
    return {
        **made, "order": members.order, "first": first, "last": last, "queries": queries, "width": width, "weight": weight
    }  # fmt: skip


def windowed(T: int = 70, reach: int = 20) -> Given:
    """The order that is there, and no order of queries."""
    given = clustered(T)
    place = torch.arange(T)
    first = (place - reach).clamp(min=0, max=T - 2 * reach - 1)
    spans = {name: x.expand(B, H, -1) for name, x in (("order", place), ("first", first))}
    return {**given, **spans, "last": spans["first"] + 2 * reach + 1, "width": 2 * reach + 1, "queries": None}


FORMS: dict[str, Callable[[], Given]] = {
    "clusters": clustered,
    "ragged": lambda: clustered(T=65, d=20, V=12, width=64),
    "past": lambda: clustered(T=33, kept=40, width=70),
    "step": lambda: clustered(T=1, kept=50),
    "alone": lambda: clustered(T=1),
    # A gradient of logits is small beside what rounding takes from the output.
    "few": lambda: clustered(T=16, width=127, clusters=5),
    "window": windowed,
}


def at(given: Given, dtype: torch.dtype, device: str) -> Given:
    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: one(x) for name, x in given.items()}


def graded(function: Callable[..., Tensor], given: Given) -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in WANTED}}
    out = function(**leaves, scale=0.4)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(given["q"].dtype).to(out)
    found = torch.autograd.grad(out, [leaves[name] for name in WANTED], upstream, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(WANTED, found, strict=True))}


def held_to_reference(form: str, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    given = at(FORMS[form](), dtype, device)
    wide = {**given, **{name: given[name].double() for name in WANTED}}
    exact = {name: in_time(x) for name, x in graded(span_attention_reference, wide).items()}

    def run() -> dict[str, Tensor]:
        return {name: in_time(x) for name, x in graded(span_attention, given).items()}

    assert_held(exact, run, dtype, device, **overrides)


def in_time(x: Tensor) -> Tensor:
    return x.transpose(1, 2) if x.dim() == 4 else x


# The interpreter's maximum says so.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_what_is_no_number_gives_none() -> None:
    given = {name: x.float() if name in WANTED else x for name, x in windowed().items()}
    given["q"][0, 1, 30] = torch.nan
    out = span_attention(**given)
    assert out[0, 1, 30].isnan().all()
    assert int(out.isnan().any(dim=-1).sum()) == 1


@over_settings
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    held_to_reference(form, dtype, device)


@over_settings
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16)])
def test_tiles_of_any_size_give_the_same(queries: int, keys: int, device: str, dtype: torch.dtype) -> None:
    launch = Launch(chunk=queries, columns=keys, warps=4, stages=1)
    names = ("forward", "step", "queries", "keys")
    held_to_reference("clusters", dtype, device, **dict.fromkeys(names, launch))


@over_settings
def test_results_are_the_same_to_the_bit_every_time(device: str, dtype: torch.dtype) -> None:
    given = at(clustered(), dtype, device)
    if device == "cuda" or INTERPRETED:
        first, second = graded(span_attention, given), graded(span_attention, given)
        assert all(torch.equal(first[name], second[name]) for name in first)
    else:
        assert torch.equal(*(span_attention(**given) for _ in range(2)))


@over_settings
def test_what_later_tokens_say_and_where_they_go_changes_no_bit(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens from 50 on go to other clusters, with other keys: what was before them gets the same."""
    if INTERPRETED:
        monkeypatch.setattr(numpy, "matmul", by_columns)
    generator, clusters, width, T, t = torch.Generator().manual_seed(3), 3, 70, 120, 50
    given = clustered(T)
    z = torch.randint(clusters, (B, H, T), generator=generator)
    outs = []
    for other in (False, True):
        one, there = dict(given), z.clone()
        if other:
            there[..., t:] = torch.randint(clusters, (B, H, T - t), generator=generator)
            for name in ("q", "k", "v", "own"):
                one[name] = given[name].clone()
                one[name][:, :, t:] += 1.0
        members = Members(there, torch.ones_like(there, dtype=torch.bool), clusters, tile=TILE)
        first, last, queries = members.spans(there, width)
        spans = {"order": members.order, "first": first, "last": last, "queries": queries, "width": width}
        outs.append(span_attention(**at({**one, **spans}, dtype, device)))
    assert torch.equal(outs[0][:, :, :t], outs[1][:, :, :t])
    assert not torch.equal(outs[0][:, :, t:], outs[1][:, :, t:])


@over_settings
def test_fresh_memory_is_not_read(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given, make = at(clustered(), dtype, device), torch.empty
    expected = graded(span_attention, given)

    def spoilt(*args: Any, **rest: Any) -> Tensor:
        made = make(*args, **rest)
        return made.fill_(float("nan") if made.is_floating_point() else 1 << 30)

    monkeypatch.setattr(torch, "empty", spoilt)
    found = graded(span_attention, given)
    for name, x in expected.items():
        assert not found[name].isnan().any(), name
        torch.testing.assert_close(found[name], x)


@over_settings
def test_one_cluster_of_all_tokens_is_causal_attention_without_the_own_key(
    device: str, dtype: torch.dtype
) -> None:
    T = 70
    given = at(clustered(T), dtype, device)
    z = torch.zeros(B, H, T, dtype=torch.long, device=device)
    members = Members(z, torch.ones_like(z, dtype=torch.bool), 1, tile=TILE)
    first, last, queries = members.spans(z, T)
    spans = {"order": members.order, "first": first, "last": last, "queries": queries, "width": T}
    found = span_attention(**{**given, **spans}).double()
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril(-1)
    q, k, v = (given[name].double() for name in ("q", "k", "v"))
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, 1:], k, v, mask[1:])
    assert torch.equal(found[:, :, 0], given["own"][:, :, 0].double())
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (found[:, :, 1:] - dense).abs().max() < bound


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_mixer_has_the_gradients_of_plain_torch(device: str) -> None:
    mixer = mixer_of(32, "routing", heads=2, clusters=3, members=9).to(device, torch.float32)
    x = noise(2, 40, 32).to(device, torch.float32)
    results = []
    for path in ("torch", "triton" if device == "cuda" or INTERPRETED else "torch"):
        with force_path(path), watch_paths() as seen:
            leaf = x.clone().requires_grad_()
            y = mixer(leaf, Call(torch.arange(40, device=device).expand(2, -1)))
            grads = torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])
        assert ("span_attention", path) in seen
        results.append((y.detach(), *grads))
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_knows_the_op_and_its_gradients(device: str) -> None:
    given = at(clustered(T=9, kept=5), torch.float32, device)
    known = getattr(torch.ops, LIBRARY).span_attention.default
    q, k, v, own, weight = (given[name].requires_grad_() for name in WANTED)
    spans = [given[name] for name in ("order", "first", "last", "queries")]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(known, (q, k, v, *spans, own, weight, given["width"], 0.5), test_utils=checks)
    whole = compiled(span_attention)
    found, expected = (graded(one, given) for one in (whole, span_attention))
    assert all((found[name] - expected[name]).abs().max() <= EPSILON[torch.float32] for name in expected)


def test_what_does_not_fit_is_told() -> None:
    for change, told in (
        ({"own": torch.ones(B, H, 90, 16)}, "own is float32, expected float64 as q"),
        ({"order": torch.zeros(B, 90, dtype=torch.int64)}, "order .B, heads, places."),
        ({"first": torch.zeros(B, H, 3, dtype=torch.int64)}, "first has shape"),
        ({"weight": torch.ones(B, 3)}, "weight has shape"),
        ({"width": 0}, "width 0"),
        ({"scale": -1.0}, "scale -1.0"),
    ):
        with pytest.raises(HeddleError, match=told) as error:
            span_attention(**{**clustered(), **change})
        assert error.value.code == "bad-argument"
