"""Attention maps that are brought nearer to the identity: against explicit maps, at both ends, with a cache, and for one row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, noise

from heddle.errors import HeddleError

HIDDEN, HEADS, LENGTH = 24, 4, 13
FORMS: list[dict[str, Any]] = [
    {"kind": "attention", "kv_heads": 2, "qk_norm": True, "gate": True},
    {"kind": "attention", "window": 4, "sinks": True, "softcap": 5.0},
    {"kind": "attention", "kv_heads": 1, "selection": {"block": 3, "count": 3}},
    {"kind": "mla", "kv_lora_rank": 9, "qk_nope_head_dim": 5, "v_head_dim": 4, "qk_rope_head_dim": 4},
]
SHARES = torch.tensor([0.0, 0.25, 0.7, 1.0], dtype=torch.float64)


def ready(form: dict[str, Any]) -> Any:
    return mixer_of(
        HIDDEN, form["kind"], heads=HEADS, **{name: one for name, one in form.items() if name != "kind"}
    )


def heads_of(mixer: Any, x: Tensor, share: Tensor | None, **given: Any) -> Tensor:
    seen: list[Tensor] = []
    hook = mixer.heads_out.register_forward_hook(lambda _, __, heads: seen.append(heads))
    mixer.head_mix.share = share
    mixer(x, call_at(0, x.shape[1], rows=len(x), **given))
    mixer.head_mix.share = None
    hook.remove()
    return seen[0]


def values_of(mixer: Any, x: Tensor) -> Tensor:
    """Each token's own value for each query head.  Shapes:  out: [B, T, H, V]"""
    if hasattr(mixer, "kv_up"):
        made = mixer.kv_up(mixer.kv_norm(mixer.kv_down(x)[..., : mixer.rank]))
        return made.unflatten(-1, (HEADS, -1))[..., mixer.plain :]
    return (
        mixer.v_proj(x).unflatten(-1, (mixer.kv_heads, -1)).repeat_interleave(HEADS // mixer.kv_heads, dim=2)
    )


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_heads_are_those_of_a_map_between_attention_and_the_identity(form: dict[str, Any]) -> None:
    mixer, x, rows = ready(form), noise(2, LENGTH, HIDDEN), []
    mixer.rows_out.queries = tuple(range(LENGTH))
    mixer.rows_out.register_forward_hook(lambda _, __, one: rows.append(one))
    plain = heads_of(mixer, x, None)
    mixed = heads_of(mixer, x, SHARES)
    mixer.rows_out.queries = None
    u, v = SHARES[:, None, None], values_of(mixer, x)
    maps = (1 - u) * rows[0] + u * torch.eye(LENGTH, dtype=x.dtype)
    expected = torch.einsum("bhts,bshd->bthd", maps, v)
    if form.get("gate"):
        gate = mixer.q_proj(x).unflatten(-1, (HEADS, 2, -1))[:, :, :, 1].sigmoid()
        expected, v = expected * gate, v * gate
    assert (mixed - expected).abs().max() < EXACT
    # Nothing is touched at 0, nothing mixed at 1.
    assert torch.equal(mixed[:, :, 0], plain[:, :, 0])
    assert torch.equal(heads_of(mixer, x, torch.zeros(HEADS)), plain)
    assert torch.equal(mixed[:, :, 3], v[:, :, 3])


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_perturbed_as_the_whole_and_a_row_as_it_alone(form: dict[str, Any]) -> None:
    mixer, x = ready(form), noise(2, LENGTH, HIDDEN)
    whole = heads_of(mixer, x, SHARES)
    each = torch.stack((SHARES, torch.zeros_like(SHARES)))
    of_rows = heads_of(mixer, x, each)
    assert (of_rows[0] - whole[0]).abs().max() < EXACT
    assert torch.equal(of_rows[1], heads_of(mixer, x, None)[1])
    cache = mixer.new_cache()
    mixer.head_mix.share = SHARES
    expected = mixer(x, call_at(0, LENGTH))
    for start, end in ((0, 5), (5, LENGTH - 1), (LENGTH - 1, LENGTH)):
        y = mixer(x[:, start:end], call_at(start, end - start, cache))
        cache.advance(end - start)
        assert (y - expected[:, start:end]).abs().max() < EXACT


@torch.no_grad()
def test_no_later_token_is_heard() -> None:
    mixer, x = ready(FORMS[0]), noise(2, LENGTH, HIDDEN)
    mixer.head_mix.share = SHARES
    other = x.clone()
    other[:, 7:] = noise(2, LENGTH - 7, HIDDEN, seed=9)
    one, two = mixer(x, call_at(0, LENGTH)), mixer(other, call_at(0, LENGTH))
    assert torch.equal(one[:, :7], two[:, :7])


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]])
def test_the_gradient_at_no_share_is_that_of_values_less_outputs(form: dict[str, Any]) -> None:
    mixer, x = ready(form), noise(2, LENGTH, HIDDEN)
    share = torch.zeros(HEADS, dtype=x.dtype, requires_grad=True)
    weight = noise(2, LENGTH, HEADS, 6 if form["kind"] == "attention" else 4, seed=4)
    (found,) = torch.autograd.grad((heads_of(mixer, x, share) * weight).sum(), share)
    own = heads_of(mixer, x, torch.ones(HEADS, dtype=x.dtype))
    expected = ((own - heads_of(mixer, x, None)) * weight).sum((0, 1, 3))
    assert (found - expected).abs().max() < EXACT


@pytest.mark.parametrize("shape", [(3,), (3, HEADS), (2, 3), (1, 2, HEADS)])
def test_a_share_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    mixer, x = ready(FORMS[0]), noise(2, LENGTH, HIDDEN)
    mixer.head_mix.share = torch.zeros(shape)
    with pytest.raises(HeddleError, match="there are 2 rows of 4 heads") as told:
        mixer(x, call_at(0, LENGTH))
    assert told.value.code == "bad-argument"
