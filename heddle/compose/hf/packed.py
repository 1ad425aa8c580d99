"""Packed documents as a model is given them: `cu_seqlens`, or what transformers has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from heddle.compose.modules.packing import Packing
from heddle.errors import HeddleError

# What transformers' `DataCollatorWithFlattening` and its flash attention call it.
QUERIES, KEYS = "cu_seq_lens_q", "cu_seq_lens_k"
PACKED = ("cu_seqlens", QUERIES, KEYS)
# What the loss leaves out.
IGNORED = -100


def packing_of(
    x: Tensor,
    cu_seqlens: Tensor | None,
    given: Mapping[str, Any],
    *,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
) -> Packing | None:
    """Where the documents lie that are packed into `x` [B, T, D]; None if each row is one.

    `given` are further arguments of the forward: `cu_seq_lens_q` and `cu_seq_lens_k`, which must be equal, stand for
    `cu_seqlens`. So do `position_ids` of one row that begin again, as transformers reads them: if they do not rise, and
    there is no mask and no cache to go on from. The host looks at all of these, so on a GPU it waits.

    Raises:
        HeddleError: "bad-argument" also beside a mask or a cache.
    """
    cu_seqlens = _told(cu_seqlens, given)
    if cu_seqlens is None and attention_mask is None and past_key_values is None:
        cu_seqlens = _begun_again(position_ids)
    if cu_seqlens is None:
        return None
    if attention_mask is not None:
        what = "packed documents (cu_seqlens) take no attention_mask: there is no padding among them"
        raise HeddleError("bad-argument", what, hint="leave one of the two out")
    if past_key_values is not None or use_cache:
        what = "packed documents (cu_seqlens) take no cache: it would be of which of them?"
        raise HeddleError("bad-argument", what, hint="use_cache=False, without past_key_values")
    return Packing.of(cu_seqlens, x.shape[0], x.shape[1], x.device)


def _told(cu_seqlens: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
    told = [one for one in (cu_seqlens, *(given.get(name) for name in PACKED[1:])) if one is not None]
    for one in told[1:]:
        if one is not told[0] and not torch.equal(one.to(told[0].device, told[0].dtype), told[0]):
            what = f"{', '.join(PACKED)} differ: queries and keys are of the same documents"
            raise HeddleError("bad-argument", what)
    return told[0] if told else None


def _begun_again(positions: Tensor | None) -> Tensor | None:
    """The `cu_seqlens` of positions that begin again; None if they only rise."""
    if positions is None or positions.dim() != 2 or positions.is_meta or torch.compiler.is_compiling():
        return None
    begins = positions[:, 1:] <= positions[:, :-1]
    if not bool(begins.any()):
        return None
    if positions.shape[0] != 1:
        what = f"position_ids begin again within {positions.shape[0]} rows: packed documents lie in one row"
        raise HeddleError("bad-argument", what, hint="pack them into one row, or give an attention_mask")
    found = begins[0].nonzero().flatten() + 1
    ends = found.new_tensor([positions.shape[1]])
    return torch.cat((torch.zeros_like(ends), found, ends))


def labels_within(labels: Tensor, packing: Packing) -> Tensor:
    """`labels` [1, T] without the first token of each document, which no token of its own comes before."""
    labels = labels.clone()
    labels[:, packing.cu_seqlens[:-1].long()] = IGNORED
    return labels
