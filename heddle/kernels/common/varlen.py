"""The time axis: cut into chunks of one length, or packed with sequences of many.

`cu_seqlens` holds where each packed sequence begins, and at last where the last one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError

# Runs one sequence: (its slice of every tensor, its initial state or None) -> (output, final state)
RunOne = Callable[[list[Tensor], Tensor | None], tuple[Tensor, Tensor]]
# Of `each_alone`: nothing is cut into other parts than sequences.
_AS_TOKENS: Mapping[str, Sequence[int]] = MappingProxyType({})


def check_packing(
    name: str, batch: int, length: int, cu_seqlens: Tensor | None, *, keys: int | None = None
) -> None:
    """Raises "bad-argument" unless `cu_seqlens` rises from 0 to `length`, the batch is 1, and `keys`, if given, are as many.

    The values are looked at only where that is free: not on a GPU, not while compiling.
    """
    if cu_seqlens is None:
        return
    if keys is not None and keys != length:
        raise HeddleError(
            "bad-argument",
            f"{name}: with cu_seqlens there are as many queries as keys, not {length} and {keys}",
        )
    if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise HeddleError("bad-argument", f"{name}: cu_seqlens must be [N + 1], and the batch 1, not {batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        known_lengths(name, cu_seqlens, length)


def known_lengths(name: str, cu_seqlens: Tensor, length: int) -> list[int]:
    """The tokens of each packed sequence. The host reads them, so a GPU is waited for.

    Raises:
        HeddleError: "bad-argument" unless `cu_seqlens` rises from 0 to `length`.
    """
    found: list[int] = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(found)]
    if found[0] != 0 or found[-1] != length or min(lengths) < 0:
        raise HeddleError("bad-argument", f"{name}: cu_seqlens must rise from 0 to {length}, got {found}")
    return lengths


def own_begins(cu_seqlens: Tensor, length: int) -> Tensor:
    """Where the sequence of each token begins; nothing waits for the device.  Shapes:  out: [T] int64"""
    cu_seqlens = cu_seqlens.long()
    token = torch.arange(length, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens[1:], token, right=True)]


def each_alone(
    run: Callable[..., Tensor],
    sides: Mapping[str, Tensor | None],
    lengths: Sequence[int],
    parts: Mapping[str, Sequence[int]] = _AS_TOKENS,
) -> Tensor:
    """What `run` gives for every packed sequence alone, called with its part of all `sides` by name, one behind the other.

    Heads stand before tokens: a side is cut along its third axis, or the last of fewer, into `lengths`, or `parts` by name. Of
    empty sequences nothing is asked.

    Shapes:  out: [1, H, T, *], as each of `run`
    """
    cut = {
        # Of slices each gradient would be as long as the whole.
        name: x.split_with_sizes(list(parts.get(name, lengths)), min(x.dim() - 1, 2))
        for name, x in sides.items()
        if x is not None
    }
    outputs = [
        run(**{name: cut[name][number] if name in cut else None for name in sides})
        for number, length in enumerate(lengths)
        if length > 0
    ]
    return torch.cat(outputs, dim=2)


def each_sequence(
    run: RunOne, tensors: list[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs every packed sequence alone. The host must know where they end, so a GPU is waited for.

    Shapes:  tensors, out: [1, T, ...];  states: [N, ...];  cu_seqlens: [N + 1], integers
    """
    places: list[int] = cu_seqlens.tolist()
    outputs, states = [], []
    for index, (begin, end) in enumerate(pairwise(places)):
        before = None if initial_state is None else initial_state[index : index + 1]
        output, state = run([tensor[:, begin:end] for tensor in tensors], before)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def in_chunks(x: Tensor, size: int) -> Tensor:
    """The time axis in chunks, at least one, with zeros after the last token.

    Shapes:  x: [B, T, H, *];  out: [B, H, N, C, *]
    """
    missing = -x.shape[1] % size if x.shape[1] else size
    padded = F.pad(x, (0, 0, 0, 0, 0, missing))
    return padded.view(x.shape[0], -1, size, *x.shape[2:]).permute(0, 3, 1, 2, 4)


@dataclass(frozen=True, slots=True)
class Packing:
    """Packed sequences in chunks of which none holds two, laid out on the device: shapes do not depend on values.

    Shapes:  token: [M, C], the token in each place;  present: [M, C], whether there is one;  sequence: [M];
             first: [M], whether a sequence begins;  last: [N], its last chunk;  place: [T], of each token in [M C]
    """

    token: Tensor
    present: Tensor
    sequence: Tensor
    first: Tensor
    last: Tensor
    place: Tensor

    def chunks(self, x: Tensor) -> Tensor:
        """Shapes:  x: [1, T, H, *];  out: [1, H, M, C, *], zeros where there is no token"""
        taken = x[0, self.token] * self.present[..., None, None].to(x.dtype)
        return taken.permute(2, 0, 1, 3)[None]

    def unpack(self, chunks: Tensor) -> Tensor:
        """Shapes:  chunks: [1, H, M, C, *];  out: [1, T, H, *]"""
        return chunks.flatten(2, 3)[:, :, self.place].transpose(1, 2)


def pack(cu_seqlens: Tensor, length: int, size: int) -> Packing:
    """The packing of `length` tokens into chunks of `size`; one chunk for an empty sequence."""
    device, sequences = cu_seqlens.device, cu_seqlens.shape[0] - 1
    cu_seqlens = cu_seqlens.long()
    counts = ((cu_seqlens.diff() + size - 1) // size).clamp_min(1)
    ends = counts.cumsum(0)
    starts = ends - counts
    # Whatever the lengths are, there are at most this many chunks.
    chunk = torch.arange(length // size + sequences, device=device)
    sequence = torch.searchsorted(ends, chunk, right=True)
    used = sequence < sequences
    sequence = sequence.clamp_max(sequences - 1)
    row = torch.arange(size, device=device)
    token = (cu_seqlens[sequence] + (chunk - starts[sequence]) * size)[:, None] + row
    present = used[:, None] & (token < cu_seqlens[sequence + 1][:, None])
    at = torch.arange(length, device=device)
    own = torch.searchsorted(cu_seqlens[1:], at, right=True)
    place = starts[own] * size + at - cu_seqlens[own]
    first = used & (chunk == starts[sequence])
    return Packing(token.clamp_max(length - 1), present, sequence, first, ends - 1, place)
