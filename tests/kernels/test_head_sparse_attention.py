"""head_sparse_attention: chosen heads, padding and packing against the reference, decode, equal runs, paths, refusals.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from held import assert_held, compiled, over_settings
from torch import Tensor
from toys import mixer_of, noise

from heddle.compose.cache import Call
from heddle.errors import HeddleError
from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.dense_attention import dense_attention
from heddle.kernels.head_sparse_attention import head_sparse_attention, head_sparse_attention_reference
from heddle.kernels.op import INTERPRETED, LIBRARY

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

WANTED = ("q", "k", "v", "weights")
Given = dict[str, Any]


def drawn(
    *, B: int = 1, T: int = 75, S: int = 75, N: int = 2, G: int = 2, d: int = 16, V: int = 16, active: int = 2
) -> Given:  # fmt: skip
    """Arguments in float64; each token chose `active` heads, never the last one, in the second half the first one."""
    generator = torch.Generator().manual_seed(T + S + G)
    shapes = {"q": (B, N * G, T, d), "k": (B, N, S, d), "v": (B, N, S, V)}
    sides = {
        name: torch.randn(*one, generator=generator, dtype=torch.float64) for name, one in shapes.items()
    }
    worth = torch.rand(B, T, N * G, generator=generator, dtype=torch.float64) + 0.5
    worth[:, T // 2 :, 0] += 1.0
    worth[..., -1] = 0.0
    best = worth.topk(active, dim=-1)
    return {**sides, "weights": torch.zeros_like(worth).scatter(-1, best.indices, best.values)}


def padded(given: Given) -> Given:
    """The same with padding on the left of the first row and on the right of the last one."""
    real = torch.ones(len(given["k"]), given["k"].shape[2], dtype=torch.bool)
    real[0, :7] = False
    real[-1, -3:] = False
    return {**given, "real": real}


# Each road of the kernels: grouped heads, one head each, ragged heads and a group that is no power of two, fewer queries than
# keys, padding, packed sequences of which one is empty, lengths around a tile, weights of either sign.
FORMS: dict[str, Callable[[], Given]] = {
    "grouped": drawn,
    "single": lambda: drawn(B=2, N=4, G=1, active=1),
    "ragged": lambda: drawn(T=11, S=83, G=3, d=5, V=40, active=3),
    "padded": lambda: padded(drawn(T=70, S=80, B=2)),
    "packed": lambda: {**drawn(T=100, S=100), "cu_seqlens": torch.tensor([0, 1, 70, 70, 100])},
    "one": lambda: drawn(T=1, S=9),
    "63": lambda: drawn(T=63, S=63, N=1),
    "64": lambda: drawn(T=64, S=64, N=1),
    "65": lambda: drawn(T=65, S=65, N=1),
    "signs": lambda: signed(drawn(T=40, S=40)),
}


def signed(given: Given) -> Given:
    factor = torch.where(torch.arange(given["weights"].shape[1]) % 3 > 0, 1.0, -1e-3)
    return {**given, "weights": given["weights"] * factor[:, None]}


def results(
    function: Callable[..., Tensor], given: Given, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Output and every gradient, with heads behind time as `worst_error` wants them."""
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    there |= {name: there[name].to(wide if name == "weights" else dtype).requires_grad_() for name in WANTED}
    out = function(**there)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(out, [there[name] for name in WANTED], upstream.to(dtype).to(out))
    named = {"out": out.detach(), **dict(zip(WANTED, found, strict=True))}
    return {name: x[..., None] if name == "weights" else x.transpose(1, 2) for name, x in named.items()}


def rounded(given: Given, dtype: torch.dtype) -> Given:
    """The arguments as `results` hands them on, in float64."""
    sides = {name: given[name].to(dtype).double() for name in WANTED[:3]}
    return {**given, **sides, "weights": given["weights"].float().double()}


def assert_right(given: Given, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    """Every result within the tolerance of the exact one."""
    given = rounded(given, dtype)
    exact = results(head_sparse_attention_reference, given, torch.float64, "cpu")
    assert_held(
        exact, lambda: results(head_sparse_attention, given, dtype, device), dtype, device, **overrides
    )


@over_settings
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    assert_right(FORMS[form](), dtype, device)


@over_settings
@pytest.mark.parametrize(
    ("form", "apart", "descriptors"),
    [("ragged", 0, 0), ("ragged", 1, 1), ("packed", 1, 1), ("packed", 0, 0), ("64", 0, 1)],
)
def test_tiles_are_the_same_by_pointers_and_by_descriptors_and_in_two_loops(
    form: str, apart: int, descriptors: int, device: str, dtype: torch.dtype
) -> None:
    assert_right(FORMS[form](), dtype, device, descriptors=descriptors, apart=apart, sums=descriptors)


@over_settings
def test_launches_may_differ_from_kernel_to_kernel(device: str, dtype: torch.dtype) -> None:
    launches = {
        "forward": Launch(64, 16, 4, 1),
        "queries": Launch(16, 32, 4, 1),
        "keys": Launch(64, 16, 4, 1),
    }
    assert_right(drawn(T=150, S=160, active=1), dtype, device, **launches)


# The interpreter's maximum says so.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("splits", [1, 3])
def test_what_is_no_number_gives_none(splits: int, side: str) -> None:
    given = drawn(T=1, S=150)
    given = {name: x.float() for name, x in given.items()}
    chosen = int(given["weights"][0, 0].argmax())
    given[side][0, chosen if side == "q" else chosen // 2, 0] = torch.nan
    with tuning(splits=splits):
        out = head_sparse_attention(**given)
    assert out[0, chosen].isnan().all()


@over_settings
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("queries", [1, 20])
def test_few_queries_are_right_however_their_keys_are_split(
    queries: int, splits: int, device: str, dtype: torch.dtype
) -> None:
    assert_right(drawn(B=2, T=queries, S=150, G=3), dtype, device, splits=splits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(128, 128), (64, 64), (192, 128), (256, 256)], ids=str)
def test_heads_as_models_have_them_are_right(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    d, V = sizes
    assert_right(drawn(T=300, S=420, G=4, d=d, V=V, active=4), dtype, "cuda")
    assert_right(drawn(T=1000, S=1000, N=3, G=1, d=d, V=V), dtype, "cuda")
    assert_right(drawn(B=3, T=1, S=700, G=8, d=d, V=V, active=8), dtype, "cuda")


def test_all_heads_chosen_by_all_are_dense_attention() -> None:
    given = drawn(T=70, S=70)
    found = head_sparse_attention(**{**given, "weights": torch.ones_like(given["weights"])})
    dense = dense_attention(given["q"], given["k"], given["v"], is_causal=True)
    assert (found - dense).abs().max() < EPSILON[torch.float64]


@over_settings
def test_a_token_may_choose_all_heads_or_none(device: str, dtype: torch.dtype) -> None:
    given = drawn(T=40, S=40, G=1)
    assert_right({**given, "weights": torch.ones_like(given["weights"])}, dtype, device)
    none = results(
        head_sparse_attention, {**given, "weights": torch.zeros_like(given["weights"])}, dtype, device
    )
    assert all((found == 0).all() for found in none.values())


@over_settings
def test_of_one_key_alone_the_value_is_left(device: str, dtype: torch.dtype) -> None:
    given = rounded(drawn(T=1, S=1), dtype)
    found = results(head_sparse_attention, given, dtype, device)
    values = given["v"].repeat_interleave(2, dim=1) * given["weights"].mT[..., None]
    # The output is rounded once, which bfloat16 does by up to 0.4 %; all before it is float32.
    off = 2 * EPSILON[torch.float32] * values.abs().max()
    room = torch.finfo(dtype).eps / 2 * values.abs() + off
    assert ((found["out"].transpose(1, 2).cpu() - values).abs() <= room).all()
    # Rounded, but for a softmax of one there is nothing to learn.
    assert all(found[name].abs().max() < 10 * EPSILON[dtype] for name in ("q", "k"))


def test_what_is_not_chosen_is_0_and_has_no_gradient() -> None:
    given = drawn()
    for name, found in results(head_sparse_attention, given, torch.float64, "cpu").items():
        if name in ("out", "q", "weights"):
            assert (found[given["weights"] == 0] == 0).all()
            assert found[given["weights"] != 0].ne(0).any()


def test_steps_give_what_the_whole_gives() -> None:
    given = padded(drawn(B=2, T=30, S=30))
    whole = head_sparse_attention(**given)
    for t in (0, 3, 12, 29):
        sides = {name: given[name][:, :, : t + 1] for name in ("k", "v")}
        step = {
            "q": given["q"][:, :, t : t + 1], **sides, "real": given["real"][:, : t + 1],
            "weights": given["weights"][:, t : t + 1],
        }  # fmt: skip
        assert (head_sparse_attention(**step) - whole[:, :, t : t + 1]).abs().max() < EPSILON[torch.float64]


@over_settings
def test_later_tokens_change_no_bit(device: str, dtype: torch.dtype) -> None:
    given = {name: x.to(device, dtype) for name, x in drawn(T=90, S=90, active=3).items()}
    before = head_sparse_attention(**given)
    changed = {name: given[name].clone() for name in WANTED}
    for name in ("q", "k", "v"):
        changed[name][:, :, 60:] += 1.0
    changed["weights"][:, 60:] = changed["weights"][:, 60:].flip(-1)
    after = head_sparse_attention(**changed)
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert not torch.equal(before[:, :, 60:], after[:, :, 60:])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_runs_are_equal_to_the_bit_whatever_is_in_fresh_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = ((drawn(T=70, S=80), {}), (drawn(T=1, S=90), {"splits": 2}))

    def run() -> list[dict[str, Tensor]]:
        found = []
        for given, overrides in cases:
            with tuning(**overrides):
                found.append(results(head_sparse_attention, given, torch.float32, device))
        return found

    def spoilt(*args: Any, **rest: Any) -> Tensor:
        made = make(*args, **rest)
        return made.fill_(float("nan") if made.is_floating_point() else 1 << 30)

    clean, make = run(), torch.empty
    monkeypatch.setattr(torch, "empty", spoilt)
    assert torch.empty(3).isnan().all()
    for before, after in zip(clean, run(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "device", [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("shape", [(2, 300, 20), (1, 1, 1), (3, 256, 5)])
def test_a_list_has_those_that_chose_a_head_and_then_the_others(
    shape: tuple[int, int, int], device: str
) -> None:
    from heddle.kernels._head_sparse_attention_launch import make_lists

    weights = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    weights[weights < 0.6] = 0.0
    entries, before = (x.cpu() for x in make_lists(weights.to(device)))
    for b, h in ((b, h) for b in range(shape[0]) for h in range(shape[2])):
        on = weights[b, :, h] != 0
        places, others = on.nonzero().flatten(), (~on).nonzero().flatten()
        assert entries[b, h].tolist() == [*places.tolist(), *(-1 - others).flip(0).tolist()]
        assert before[b, h].tolist() == [0, *on.cumsum(0).tolist()]


@pytest.mark.gpu
def test_many_tiles_of_keys_add_no_error() -> None:
    for queries in (1, 70):
        given = drawn(T=queries, S=4000, d=128, V=128)
        assert_right(given, torch.float32, "cuda", splits=1)


def test_a_gpu_runs_the_kernels_unasked_in_every_dtype() -> None:
    assert not head_sparse_attention.unproven


def test_heads_too_large_for_the_kernels_are_refused_by_them() -> None:
    given = drawn(T=2, S=5, d=300)
    with force_path("triton"), pytest.raises(HeddleError, match="cannot run in Triton"):
        results(head_sparse_attention, given, torch.float32, "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_knows_the_op_and_its_gradients(device: str) -> None:
    given = padded(drawn(T=9, S=12))
    known = getattr(torch.ops, LIBRARY).head_sparse_attention.default
    sides = [given[name].to(device).float().requires_grad_() for name in WANTED]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(known, (*sides, given["real"].to(device), None, 0.5), test_utils=checks)
    whole = compiled(head_sparse_attention)
    found, expected = (results(one, given, torch.float32, device) for one in (whole, head_sparse_attention))
    assert all((found[name] - expected[name]).abs().max() <= EPSILON[torch.float32] for name in expected)


def mixed(moh: Any, x: Tensor, step: int | None = None) -> dict[str, Tensor]:
    """Output and gradients of the mixer; with `step`, the output after a prefill of so many tokens, token by token."""
    places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    if step is None:
        y = moh(x, Call(places))
        upstream = torch.linspace(-1, 1, y.numel(), device=x.device, dtype=y.dtype).view_as(y)
        parameters = dict(moh.named_parameters())
        found = torch.autograd.grad(y, [*parameters.values()], upstream, allow_unused=True)
        return {"y": y.detach(), **dict(zip(parameters, found, strict=True))}
    cache, parts = moh.new_cache(), []
    with torch.no_grad():
        for begin, end in pairwise([0, *range(step, x.shape[1] + 1)]):
            parts.append(moh(x[:, begin:end], Call(places[:, begin:end], cache=cache)))
            cache.advance(end - begin)
    return {"y": torch.cat(parts, dim=1)}


@over_settings
@pytest.mark.parametrize("router", ["learned", "norms"])
@pytest.mark.parametrize("step", [None, 20])
def test_the_mixer_gives_with_kernels_what_it_gives_without(
    step: int | None, router: str, device: str, dtype: torch.dtype
) -> None:
    inner = {"kind": "attention", "heads": 4, "kv_heads": 2, "gate": True}
    moh = mixer_of(32, "moh", mixer=inner, shared_heads=1, active=1, router=router).to(device, dtype).train()
    x = noise(2, 24, 32).to(device, dtype)
    with watch_paths() as seen:
        found = mixed(moh, x, step)
    # Straight through, heads that are off have gradients as well: then all are computed.
    routed = (INTERPRETED or device == "cuda") and not (router == "norms" and step is None)
    assert {path for name, path in seen if name == "head_sparse_attention"} == (
        {"triton"} if routed else set()
    )
    with force_path("torch"):
        plain = mixed(moh, x, step)
        exact = mixed(moh.double(), x.double(), step)
    for name, one in exact.items():
        if one is not None:
            allowed = 2 * (plain[name] - one).norm() + EPSILON[dtype] * one.norm()
            assert (found[name] - one).norm() <= allowed, name


def refused(**change: Any) -> str:
    with pytest.raises(HeddleError) as error:
        head_sparse_attention(**{**drawn(), **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


def test_what_does_not_fit_is_told() -> None:
    assert "no more than keys" in refused(q=torch.ones(1, 4, 76, 16))
    assert "2 key heads do not divide 3 query heads" in refused(q=torch.ones(1, 3, 75, 16))
    assert "scale 0 must be positive" in refused(scale=0)
    assert "k is float64, expected float32 as q" in refused(q=torch.ones(1, 4, 75, 16))
    assert "weights is bool, expected bfloat16, float16" in refused(weights=torch.ones(1, 75, 4) > 0)
    assert "weights has shape [1, 4, 75], expected [1, 75, 4]" in refused(weights=torch.ones(1, 4, 75))
    assert "real has shape [1, 74], expected [1, 75]" in refused(real=torch.ones(1, 74) > 0)
    assert "as many queries as keys" in refused(
        q=torch.ones(1, 4, 7, 16).double(), cu_seqlens=torch.tensor([0, 75])
    )
    assert "must rise from 0 to 75" in refused(cu_seqlens=torch.tensor([0, 7]))
