"""token_split_attention: its formula by masks, its limits, calls that go on, padding, marks, what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels import _token_split_attention_torch as chunks
from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.sliding_window_attention import sliding_window_attention
from heddle.kernels.token_split_attention import token_split_attention, token_split_attention_reference

B, H, N, D, V, FEATURES, CHUNK, KEEP = 2, 4, 2, 5, 6, 3, 4, 2
SIZES = {"chunk": CHUNK, "keep": KEEP}
FLOAT64 = EPSILON[torch.float64]
# Of arguments, which axis is that of the tokens.
TOKENS = {**dict.fromkeys(("q", "k", "v", "kept", "gate", "phi_q", "phi_k"), 2), "written": 1}


def drawn(tokens: int = 27, *, held: int = 0, rows: int = B, seed: int = 0) -> dict[str, Tensor]:
    """Of `tokens` queries behind so many earlier keys, with marks at random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, dtype=torch.float64, generator=generator)

    keys = tokens + held
    return {
        "q": normal(H, tokens, D),
        "k": normal(N, keys, D),
        "v": normal(N, keys, V),
        "kept": (normal(N, keys) > 0.3).double(),
        "gate": normal(H, tokens, V).sigmoid(),
        "phi_q": normal(H, tokens, FEATURES).softmax(-1),
        "phi_k": normal(N, keys, FEATURES).exp(),
        "written": (normal(keys) > -1.0).double(),
        "initial_state": normal(N, FEATURES, V + 1).square(),
    }


def with_far(given: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (len(given["q"]), N, count)
    far_k, far_v = (torch.randn(*shape, size, dtype=torch.float64, generator=generator) for size in (D, V))
    seen = (torch.rand(shape, dtype=torch.float64, generator=generator) > 0.3).double()
    return {**given, "far_k": far_k, "far_v": far_v, "far_written": seen}


def graded(function: Any, given: dict[str, Tensor], **rest: Any) -> dict[str, Tensor]:
    """Both results, and the gradient of all that has one."""
    leaves = {
        name: x.detach().clone().requires_grad_(name != "kept") if x.is_floating_point() else x
        for name, x in given.items()
    }
    found = function(**leaves, **{**SIZES, **rest})
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found]
    sum((x * weight).sum() for x, weight in zip(found, weights, strict=True)).backward()
    grads = {f"d_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return {"out": found[0].detach(), "state": found[1].detach(), **grads}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < FLOAT64 * max(1.0, tensor.abs().max()), name


def assert_formula(given: dict[str, Tensor], **rest: Any) -> dict[str, Tensor]:
    found, expected = (
        graded(one, given, **rest) for one in (token_split_attention, token_split_attention_reference)
    )
    assert_same(found, expected)
    return found


# One group of chunks, whose weights are kept, or many that are worked out again.
@pytest.mark.parametrize("together", [99, 2])
@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 1, 27])
def test_results_and_gradients_are_those_of_the_reference(
    tokens: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNKS", together)
    found = assert_formula(drawn(tokens), scale=0.7)
    assert len(found) == 10
    # Bool marks say the same; those without a number say nothing.
    given = drawn(tokens)
    bare = {name: x for name, x in given.items() if name not in ("written", "initial_state")}
    assert_formula({**bare, "kept": given["kept"] > 0.5})


@pytest.mark.parametrize("keep", [0, 1, CHUNK])
def test_of_a_chunk_with_more_the_first_are_kept_and_every_token_counts_once(keep: int) -> None:
    given = drawn()
    given["kept"] = torch.ones_like(given["kept"])
    given["written"] = torch.ones_like(given["written"])
    assert_formula(given, keep=keep)
    # Equal weights for all: logits and features of 0 and 1 count tokens.
    one = {name: torch.ones_like(x) for name, x in given.items() if name != "initial_state"}
    one |= {"q": torch.zeros_like(one["q"]), "phi_q": one["phi_q"] / FEATURES}
    one["v"] = torch.arange(27, dtype=torch.float64)[:, None].expand(B, N, 27, V)
    out, _ = token_split_attention(**one, **{**SIZES, "keep": keep})
    assert (out - torch.arange(27)[:, None] / 2).abs().max() < FLOAT64


@pytest.mark.parametrize(("held", "begin", "tokens"), [(7, 13, 9), (7, 13, 1), (4, 8, 1), (11, 12, 14)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_call_that_goes_on_is_that_of_the_reference(
    held: int, begin: int, tokens: int, is_padded: bool
) -> None:
    given = with_far(drawn(tokens, held=held), 5)
    if is_padded:
        # A row whose first queries are none.
        given["padding"] = torch.tensor([begin + held + tokens // 2, 3])
    found = assert_formula(given, begin=begin)
    if is_padded:
        assert (found["out"][0, :, : tokens // 2] == 0).all()
    assert found["d_far_written"].abs().max() > 0
    without = {name: x for name, x in given.items() if name != "far_written"}
    assert_formula(without, begin=begin)


def in_pieces(given: dict[str, Tensor], ends: list[int]) -> tuple[Tensor, Tensor]:
    """Calls that go on, with no more keys than they need."""
    outputs, state = [], given["initial_state"]
    for a, b in pairwise([0, *ends]):
        chunk = a // CHUNK
        first = max(0, chunk - 1) * CHUNK
        begins = {name: a if name in ("q", "gate", "phi_q") else first for name in TOKENS}
        own = {name: given[name].narrow(TOKENS[name], one, b - one) for name, one in begins.items()}
        stays = given["kept"][:, :, :first].unflatten(2, (-1, CHUNK)) > 0.5
        stays = (stays & (stays.cumsum(-1) <= KEEP)).flatten(2).double()
        far = {
            "far_k": given["k"][:, :, :first],
            "far_v": given["v"][:, :, :first],
            "far_written": stays * given["written"][:, None, :first],
        }
        o, state = token_split_attention(**own, **far, **SIZES, begin=first, initial_state=state)
        outputs.append(o)
    return torch.cat(outputs, dim=2), state


@pytest.mark.parametrize("ends", [list(range(1, 28)), [2, 3, 8, 9, 24, 27], [16, 27]])
def test_pieces_and_steps_are_the_whole(ends: list[int]) -> None:
    given = drawn()
    whole = token_split_attention(**given, **SIZES)
    for found, expected in zip(in_pieces(given, ends), whole, strict=True):
        assert (found - expected).abs().max() < FLOAT64


def test_who_keeps_every_token_is_softmax_attention_and_who_keeps_none_without_a_state_a_window() -> None:
    given = drawn()
    given |= {"kept": torch.ones_like(given["kept"]), "written": torch.ones_like(given["written"])}
    sides = (given["q"], given["k"], given["v"])
    del given["initial_state"]
    softmax = F.scaled_dot_product_attention(*sides, is_causal=True, enable_gqa=True)
    out, state = token_split_attention(**given, chunk=CHUNK, keep=CHUNK)
    assert (out - softmax).abs().max() < FLOAT64
    assert (state == 0).all()
    given["phi_q"] = torch.zeros_like(given["phi_q"])
    out, _ = token_split_attention(**given, chunk=CHUNK, keep=0)
    # Of a chunk's last query the window is whole.
    window = sliding_window_attention(*sides, window=2 * CHUNK)
    last = slice(CHUNK - 1, None, CHUNK)
    assert (out - window)[:, :, last].abs().max() < FLOAT64
    assert (out - softmax)[:, :, 2 * CHUNK :].abs().max() > 1e-2


def test_padding_is_as_if_it_were_not_there() -> None:
    given = drawn(rows=1)
    alone = token_split_attention(**given, **SIZES)
    padded = {
        name: torch.cat((torch.full_like(x.narrow(TOKENS[name], 0, 6), 9.0), x), dim=TOKENS[name])
        if name in TOKENS
        else x
        for name, x in given.items()
    }
    out, state = token_split_attention(**padded, **SIZES, padding=torch.tensor([6]))
    assert (out[:, :, :6] == 0).all()
    assert (out[:, :, 6:] - alone[0]).abs().max() < FLOAT64
    assert (state - alone[1]).abs().max() < FLOAT64


def test_later_tokens_change_no_bit() -> None:
    given, changed = drawn(), drawn(seed=1)
    cut = 14
    mixed = {
        name: torch.cat(
            (x.narrow(TOKENS[name], 0, cut), changed[name].narrow(TOKENS[name], cut, 27 - cut)), TOKENS[name]
        )
        if name in TOKENS
        else x
        for name, x in given.items()
    }
    # What is kept of the chunk that the change is in is asked for later.
    one, other = (token_split_attention(**x, **SIZES)[0][:, :, :cut] for x in (given, mixed))
    assert torch.equal(one, other)


def test_packed_sequences_are_each_alone() -> None:
    ends = [0, 1, 1, 14, 27]
    given = drawn(rows=1)
    given["initial_state"] = drawn(rows=4)["initial_state"]
    found = assert_formula(given, cu_seqlens=torch.tensor(ends))
    for i, (a, b) in enumerate(pairwise(ends)):
        if a == b:
            continue
        own = {name: given[name].narrow(axis, a, b - a) for name, axis in TOKENS.items()}
        out, state = token_split_attention(**own, **SIZES, initial_state=given["initial_state"][i : i + 1])
        assert torch.equal(found["out"][:, :, a:b], out)
        assert torch.equal(found["state"][i : i + 1], state)


def test_it_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    # With a part that is worked out again.
    monkeypatch.setattr(chunks, "CHUNKS", 2)
    given = {name: x.requires_grad_(name != "kept") for name, x in drawn(3 * CHUNK).items()}

    def call(**given: Tensor) -> Tensor:
        return 2 * token_split_attention(**given, **SIZES)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    wanted = [x for x in given.values() if x.requires_grad]
    found, expected = (one(**given) for one in (compiled, call))
    assert torch.allclose(found, expected)
    both = (torch.autograd.grad(one.square().sum(), wanted) for one in (found, expected))
    for one, other in zip(*both, strict=True):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision_are_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many chunks read what is kept and what is far, in groups.
    monkeypatch.setattr(chunks, "CHUNKS", 2)
    narrow = ("q", "k", "v", "far_k", "far_v")
    given = {name: x.float() for name, x in with_far(drawn(60), 5).items()}
    given |= {name: given[name].to(dtype) for name in narrow}

    def gradients(given: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: x.requires_grad_(name in narrow) for name, x in given.items()}
        with force_path("torch"):
            out, _ = token_split_attention(**leaves, **SIZES)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype).to(out.dtype)
        return [x.to(dtype) for x in torch.autograd.grad(out, [leaves[name] for name in narrow], upstream)]

    found = gradients(given)
    wide = gradients({name: x.detach().float() for name, x in given.items()})
    assert all(torch.equal(one, other) for one, other in zip(found, wide, strict=True))


def test_no_table_of_all_tokens_by_all_tokens_is_held_for_the_gradient() -> None:
    length, held = 512, [0]
    given = {name: x[:1].float().requires_grad_(name != "kept") for name, x in drawn(length).items()}

    def weigh(one: Tensor) -> Tensor:
        held[0] = max(held[0], one.untyped_storage().nbytes() // one.element_size())
        return one

    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda one: one):
        token_split_attention(**given, chunk=8, keep=1)[0].sum().backward()
    assert held[0] < length * length / 16


def refused(**change: Any) -> str:
    with pytest.raises(HeddleError) as error:
        token_split_attention(**{**with_far(drawn(), 3), **SIZES, **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


def test_what_does_not_fit_is_told() -> None:
    assert "no more than keys" in refused(q=torch.ones(B, H, 28, D))
    assert "2 key heads do not divide 3 query heads" in refused(q=torch.ones(B, 3, 27, D))
    assert "keep 5 between 0 and that" in refused(keep=5)
    assert "chunk 0 must be positive" in refused(chunk=0, keep=0)
    assert "begin -1 not negative" in refused(begin=-1)
    assert "far_k and far_v come together" in refused(far_k=None)
    assert "far_written with both" in refused(far_k=None, far_v=None)
    assert "k is float32, expected float64 as q" in refused(k=torch.ones(B, N, 27, D, dtype=torch.float32))
    wide = {"dtype": torch.float64}
    assert "kept has shape [2, 2, 26], expected [2, 2, 27]" in refused(kept=torch.ones(B, N, 26, **wide))
    assert "gate has shape [2, 4, 27, 5], expected [2, 4, 27, 6]" in refused(gate=torch.ones(B, H, 27, D))
    assert "phi_k has shape [2, 2, 27, 4], expected [2, 2, 27, 3]" in refused(phi_k=torch.ones(B, N, 27, 4))
    assert "far_v has shape [2, 2, 3, 5], expected [2, 2, 3, 6]" in refused(
        far_v=torch.ones(B, N, 3, D, **wide)
    )
    assert "padding has shape [3], expected [2]" in refused(padding=torch.zeros(3, dtype=torch.int64))
    told = refused(initial_state=torch.ones(B, N, FEATURES, V, **wide))
    assert "initial_state has shape [2, 2, 3, 6], expected [2, 2, 3, 7]" in told
    ends = torch.tensor([0, 27])
    one = {**drawn(rows=1), **SIZES, "cu_seqlens": ends, "begin": 4}
    with pytest.raises(HeddleError, match="no begin, padding or far_k"):
        token_split_attention(**one)
