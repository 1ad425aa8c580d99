"""rat_attention: summaries and own keys against the reference, in pieces and packed; its two limits, steps, errors.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from held import assert_held, compiled, over_settings
from torch import Tensor
from toys import call_at

from heddle.compose.init import initialise
from heddle.compose.mixers.rat import RatModule
from heddle.compose.modules.site import Site as RuntimeSite
from heddle.errors import HeddleError
from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.dense_attention import dense_attention_reference
from heddle.kernels.op import LIBRARY
from heddle.kernels.rat_attention import rat_attention, rat_attention_reference
from heddle.kernels.rat_scan import rat_scan
from heddle.specs import Site
from heddle.specs.mixers import Rat

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

WANTED = ("q", "key", "value", "keys", "values")
Given = dict[str, Any]


def drawn(
    *, B: int = 2, T: int = 37, H: int = 4, G: int = 2, d: int = 6, chunk: int = 5, start: int = 0, more: int = 0,
    bounds: list[int] | None = None,
) -> Given:  # fmt: skip
    """Arguments in float64, with `more` summaries than there are chunks; `bounds` of packed sequences."""
    generator = torch.Generator().manual_seed(T + chunk + start)
    sums = (start + T) // chunk + more if bounds is None else -(-T // chunk)
    sizes = {"q": (B, T, G, d), "key": (B, T, H, d), "value": (B, T, H, d)}
    sizes |= {"keys": (B, H, sums, d), "values": (B, H, sums, d)}
    sides = {
        name: torch.randn(*size, generator=generator, dtype=torch.float64) for name, size in sizes.items()
    }
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    return {**sides, "chunk": chunk, "start": start, "cu_seqlens": cu_seqlens}


# Each road of the kernels: tiles that all queries see and such that some do, one group and several, earlier tokens, more
# summaries than are seen, none at all, every token a chunk, packed sequences of which one is empty.
FORMS: dict[str, Callable[[], Given]] = {
    "plain": drawn,
    "many": lambda: drawn(B=1, T=150, chunk=2, G=1, d=24),
    "goes on": lambda: drawn(T=80, start=13, chunk=3, more=2),
    "no summary": lambda: drawn(chunk=100),
    "one token": lambda: drawn(T=70, chunk=1, G=4),
    "packed": lambda: drawn(B=1, T=100, chunk=4, bounds=[0, 1, 70, 70, 100]),
}


def results(
    function: Callable[..., Tensor], given: Given, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Output and every gradient, heads behind time; what has no numbers is left out."""
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    there |= {name: there[name].detach().to(dtype).requires_grad_() for name in WANTED}
    out = function(**there)
    # The same numbers in every dtype.
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(
        out, [there[name] for name in WANTED], upstream.bfloat16().to(out), materialize_grads=True
    )
    named = {"out": out.detach(), **{f"d_{name}": x for name, x in zip(WANTED, found, strict=True)}}
    named |= {name: named[name].transpose(1, 2) for name in ("d_keys", "d_values")}
    return {name: x for name, x in named.items() if x.numel()}


def assert_right(given: Given, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    given = given | {name: given[name].to(dtype).double() for name in WANTED}
    exact = results(rat_attention_reference, given, torch.float64, "cpu")
    assert_held(exact, lambda: results(rat_attention, given, dtype, device), dtype, device, **overrides)


@over_settings
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    assert_right(FORMS[form](), dtype, device)


@pytest.mark.parametrize("form", FORMS)
def test_plain_torch_is_exact_in_float64(form: str) -> None:
    given = FORMS[form]()
    exact, found = (
        results(one, given, torch.float64, "cpu") for one in (rat_attention_reference, rat_attention)
    )
    assert exact.keys() == found.keys()
    assert all((found[name] - tensor).abs().max() < EPSILON[torch.float64] for name, tensor in exact.items())


@over_settings
@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("form", ["many", "packed"])
def test_tiles_are_the_same_by_pointers_and_by_descriptors(
    form: str, descriptors: int, device: str, dtype: torch.dtype
) -> None:
    launch = Launch(chunk=32, columns=16, warps=4, stages=1)
    names = ("rat_forward", "rat_queries", "rat_keys")
    assert_right(FORMS[form](), dtype, device, descriptors=descriptors, **dict.fromkeys(names, launch))


@over_settings
@pytest.mark.parametrize("splits", [1, 3])
def test_a_decode_step_is_right_however_its_summaries_are_split(
    splits: int, device: str, dtype: torch.dtype
) -> None:
    assert_right(drawn(T=1, start=301, chunk=2, d=16), dtype, device, splits=splits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_heads_as_models_have_them_are_right(length: int, dtype: torch.dtype) -> None:
    for d, chunk in ((128, 16), (64, 1), (100, 5), (256, 4)):
        assert_right(drawn(B=1, T=length, d=d, chunk=chunk), dtype, "cuda")


def test_with_chunks_of_one_token_it_is_causal_attention() -> None:
    given = drawn(chunk=1)
    given |= {"keys": given["key"].transpose(1, 2), "values": given["value"].transpose(1, 2)}
    q, key, value = (given[name].transpose(1, 2) for name in ("q", "key", "value"))
    expected = dense_attention_reference(q.repeat(1, 2, 1, 1), key, value, is_causal=True).transpose(1, 2)
    assert (rat_attention(**given) - expected).abs().max() < EPSILON[torch.float64]


@over_settings
def test_in_the_first_chunk_each_query_gives_its_own_value(device: str, dtype: torch.dtype) -> None:
    given = drawn(chunk=37)
    sides = {name: given[name].to(device, dtype) for name in WANTED}
    assert torch.equal(rat_attention(**{**given, **sides}), sides["value"])


def test_steps_give_what_the_whole_gives() -> None:
    given = drawn(T=30)
    whole = rat_attention(**given)
    for t in (0, 4, 5, 6, 29):
        step = {name: given[name][:, t : t + 1] for name in ("q", "key", "value")}
        sums = {name: given[name][:, :, : t // 5] for name in ("keys", "values")}
        found = rat_attention(**{**given, **step, **sums, "start": t})
        assert (found - whole[:, t : t + 1]).abs().max() < EPSILON[torch.float64]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_runs_are_equal_to_the_bit_whatever_is_in_fresh_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (
        (drawn(T=70, chunk=3), {}),
        (drawn(T=1, start=190, chunk=2), {"splits": 2}),
        (FORMS["packed"](), {}),
    )

    def run() -> list[dict[str, Tensor]]:
        found = []
        for given, overrides in cases:
            with tuning(**overrides):
                found.append(results(rat_attention, given, torch.float32, device))
        return found

    clean, make = run(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **rest: make(*args, **rest).fill_(float("nan")))
    for before, after in zip(clean, run(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_chunks_that_are_not_complete_change_nothing() -> None:
    given = drawn(T=40, B=1)
    before = rat_attention(**given)
    changed = {name: given[name].clone() for name in ("keys", "values")}
    for x in changed.values():
        x[:, :, 4] += 1.0
    after = rat_attention(**{**given, **changed})
    # Chunk 4 ends with token 24.
    assert torch.equal(before[:, :25], after[:, :25])
    assert ((before - after)[:, 25:].abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_knows_the_op_and_its_gradients(device: str) -> None:
    given = drawn(T=12, B=1)
    known = getattr(torch.ops, LIBRARY).rat_attention.default
    sides = [given[name].to(device).float().requires_grad_() for name in WANTED]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(known, (*sides, None, 0.5, 5, 0), test_utils=checks)
    whole = compiled(rat_attention)
    found, expected = (results(one, given, torch.float32, device) for one in (whole, rat_attention))
    assert all((found[name] - expected[name]).abs().max() <= EPSILON[torch.float32] for name in expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_a_mixer_gives_by_its_ops_what_it_gives_in_float64(device: str) -> None:
    torch.manual_seed(0)
    mixer = RatModule(
        RuntimeSite(24, 0, 1), heads=4, head_dim=6, groups=2, chunk=5, rope={"theta": 100.0, "fraction": 1.0}
    )
    for module in mixer.modules():
        initialise(module, std=0.4)
    u = torch.randn(2, 17, 24, dtype=torch.float64)
    exact, mixer = copy.deepcopy(mixer).double(), mixer.to(device)
    with force_path("torch"):
        expected = exact(u, call_at(0, 17))
    whole = mixer(u.float().to(device), call_at(0, 17))
    cache, pieces, start = mixer.new_cache(), [], 0
    for end in (7, 8, 9, 10, 16, 17):
        pieces.append(mixer(u[:, start:end].float().to(device), call_at(start, end - start, cache)))
        cache.advance(end - start)
        start = end
    for found in (whole, torch.cat(pieces, dim=1)):
        error, worst = worst_error(found, expected, timed=True)
        assert error <= 5 * EPSILON[torch.float32], worst


def test_both_ops_run_unasked_in_every_dtype() -> None:
    # In one of them alone a layer would pass from one path to the other.
    assert rat_scan.unproven == rat_attention.unproven == ()


@pytest.mark.parametrize(("length", "start"), [(1, 4096), (1000, 0), (64, 0), (37, 5)])
def test_a_spec_counts_the_work_of_the_ops(length: int, start: int) -> None:
    spec, site = Rat(heads=16), Site(hidden_size=2048)
    shape = {"B": 1, "T": length, "start": start, "H": 16, "G": 2, "K": 128, "chunk": 16}
    counted = [one.cases.work for one in (rat_attention, rat_scan)]
    found = sum(work(shape, "fwd", 2).flops for work in counted if work is not None)
    projections = 2 * (spec.params(site) - 2048) * length
    expected = sum(spec.flops(site, start + t) for t in range(length))
    assert found + projections == expected
    if start == 0:
        assert spec.prefill_flops(site, length) * length == pytest.approx(expected)


def refused(**change: Any) -> str:
    with pytest.raises(HeddleError) as error:
        rat_attention(**{**drawn(), **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


def test_what_does_not_fit_is_told() -> None:
    assert "at least one token" in refused(q=torch.ones(2, 0, 2, 6))
    assert "3 groups do not divide 4 heads" in refused(q=torch.ones(2, 37, 3, 6))
    assert "chunk 0 and scale None must be positive" in refused(chunk=0)
    assert "start -1 not negative" in refused(start=-1)
    assert "value is float32, expected float64 as q" in refused(value=torch.ones(2, 37, 4, 6))
    assert "7 summaries, and queries see up to 12" in refused(start=25)
    assert "values has shape [2, 4, 6, 6], expected [2, 4, 7, 6]" in refused(
        values=drawn()["values"][:, :, 1:]
    )
    assert "no start" in refused(start=5, cu_seqlens=torch.tensor([0, 37]))
    assert "the batch 1, not 2" in refused(cu_seqlens=torch.tensor([0, 37]))
    with force_path("triton"), pytest.raises(HeddleError, match="cannot run in Triton"):
        results(rat_attention, drawn(T=2, d=300), torch.float32, "cpu")
