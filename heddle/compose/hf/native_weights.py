"""Weights of ours under the names of a class of transformers, and back: nothing but cuts, joins and, of some norms, less 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from heddle.compose.targets.target import Key


@dataclass(frozen=True, slots=True)
class Names:
    """Tensors that were not to be found, and those that nothing asked for."""

    missing: tuple[str, ...]
    left: tuple[str, ...]


def to_theirs(keys: Iterable[Key], ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Names]:
    """Their tensors by name; a tensor that lacks some of ours is left out."""
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    for key in keys:
        used |= {*key.ours}
        lacking = [name for name in key.ours if name not in ours]
        missing += lacking
        if not lacking:
            made.update(zip(key.theirs, _there(key, [ours[name] for name in key.ours]), strict=True))
    return made, Names(tuple(missing), tuple(sorted(ours.keys() - used)))


def to_ours(keys: Iterable[Key], theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Names]:
    """Our tensors by name; a tensor that lacks some of theirs is left out."""
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    for key in keys:
        used |= {*key.theirs}
        lacking = [name for name in key.theirs if name not in theirs]
        missing += lacking
        if not lacking:
            made.update(zip(key.ours, _back(key, [theirs[name] for name in key.theirs]), strict=True))
    return made, Names(tuple(missing), tuple(sorted(theirs.keys() - used)))


def their_shapes(keys: Iterable[Key], ours: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of their tensors, from ours on any device."""
    on_meta = {name: one.detach().to("meta") for name, one in ours.items()}
    return {name: one.shape for name, one in to_theirs(keys, on_meta)[0].items()}


def _there(key: Key, tensors: Sequence[Tensor]) -> list[Tensor]:
    tensors = [one.flatten(0, 1) for one in tensors] if key.stacked else tensors
    if key.pieces:
        cut = [
            piece
            for one, rows in zip(tensors, key.pieces, strict=True)
            for piece in torch.split(one, list(rows))
        ]
        tensors = [_joined([cut[number] for number in numbers], key.groups) for numbers in key.made]
    tensors = [one.unsqueeze(1) for one in tensors] if key.middle else tensors
    before, after = key.around
    tensors = [one[(None,) * before + (...,) + (None,) * after] for one in tensors]
    return [shifted(one, -key.less).contiguous() for one in tensors]


def _back(key: Key, tensors: Sequence[Tensor]) -> list[Tensor]:
    before, after = key.around
    tensors = [one[(0,) * before + (...,) + (0,) * after] for one in tensors]
    tensors = [one.squeeze(1) for one in tensors] if key.middle else tensors
    if key.pieces:
        rows = [size for sizes in key.pieces for size in sizes]
        cut: dict[int, Tensor] = {}
        for one, numbers in zip(tensors, key.made, strict=True):
            pieces = _taken_apart(one, [rows[number] for number in numbers], key.groups)
            cut.update(zip(numbers, pieces, strict=True))
        ends = [sum(len(sizes) for sizes in key.pieces[:index]) for index in range(len(key.pieces) + 1)]
        tensors = [
            torch.cat([cut[number] for number in range(first, last)]) for first, last in pairwise(ends)
        ]
    tensors = [torch.unflatten(one, 0, (key.stacked, -1)) for one in tensors] if key.stacked else tensors
    return [shifted(one, key.less).contiguous() for one in tensors]


def _joined(pieces: Sequence[Tensor], groups: int) -> Tensor:
    """The first part of each piece, then the second, ….  Shapes:  pieces: [rows, …];  out: [all rows, …]"""
    parts = [torch.unflatten(piece, 0, (groups, -1)) for piece in pieces]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _taken_apart(joined: Tensor, rows: Sequence[int], groups: int) -> list[Tensor]:
    sizes = [size // groups for size in rows]
    return [
        part.flatten(0, 1) for part in torch.split(torch.unflatten(joined, 0, (groups, -1)), sizes, dim=1)
    ]


def shifted(weight: Tensor, by: float) -> Tensor:
    """`weight` + `by`, in its own type where that loses nothing, else in float32.

    A gain from 1/2 to 2 less 1 is exact in every type; one of 0.01 in bfloat16 would come back with a fifth of itself gone.
    """
    if by == 0.0:
        return weight
    exact = weight.double() + by
    narrow = exact.to(weight.dtype)
    # On meta there are no values, and types do not matter.
    kept = weight.is_meta or torch.equal(narrow.double() - by, weight.double())
    return narrow if kept else exact.float()
