"""Packed documents in a layer: the call as each of them sees it, and mixers that run them one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call
from heddle.compose.modules.packing import Packing
from heddle.errors import HeddleError
from heddle.kernels.op import SlowPathWarning

# The axis of tokens in what layers hand on, by what it is; of all else there is one for each document, or one for all.
TOKENS = {"stream": 1, "keys": 2, "values": 2}
# The mixers of which it was said that they take documents one by one.
_told: set[str] = set()


def mixed(mixer: nn.Module, x: Tensor, call: Call) -> Tensor:
    """What `mixer` gives. Packed documents go through it together if it `takes_packed`, else each on its own.

    Shapes:  x, out: [B, T, D]
    """
    if call.packing is None or takes_packed(mixer):
        y: Tensor = mixer(x, call)
        return y
    tell_one_by_one(type(mixer).__name__, x.device)
    calls = each_document(call)
    outputs = [mixer(own, one) for own, one in zip(call.packing.each(x, 1), calls, strict=True)]
    _gather(call, calls)
    return torch.cat(outputs, dim=1)


def takes_packed(mixer: nn.Module) -> bool:
    """Whether packed documents go through it together: its own class must say so, for a subclass may mix otherwise."""
    return "takes_packed" in vars(type(mixer)) and bool(mixer.takes_packed)


def tell_one_by_one(mixer: str, device: torch.device) -> None:
    """Warns, once for each class of mixers, that a GPU is given one document after the other."""
    if device.type == "cpu" or mixer in _told:
        return
    _told.add(mixer)
    what = f"{mixer} takes packed documents one after the other on {device}"
    hint = "where documents are short, batches of padded rows may be faster"
    warnings.warn(str(HeddleError("slow-path", what, hint=hint)), SlowPathWarning, stacklevel=2)


def each_document(call: Call) -> list[Call]:
    """A packed call as each document alone sees it. What is told to it stays there."""
    packing = call.packing
    assert packing is not None
    made = [
        Call(own, memo=memo, wanted=call.wanted, layer=call.layer)
        for own, memo in zip(packing.each(call.positions, 1), packing.memos, strict=True)
    ]
    gates, written = call.head_gates, call.written
    if gates is not None:
        for one, own in zip(made, packing.each(gates, 1), strict=True):
            one.head_gates = own
    if written is not None:
        for one, own in zip(made, packing.each(written, 1), strict=True):
            one.written = own
    for (what, layer), value in call.handed.items():
        for one, own in zip(made, _of_each(what, value, packing), strict=True):
            one.handed[what, layer] = own
    return made


def _of_each(what: str, value: Any, packing: Packing) -> Sequence[Any]:
    if isinstance(value, list):
        return value
    return packing.each(value, TOKENS[what]) if what in TOKENS else [value] * len(packing.bounds)


def _gather(call: Call, calls: Sequence[Call]) -> None:
    """Takes over what documents told: losses weigh by tokens, shares with a target alike, counts are added up."""
    tokens = [one.positions.shape[1] for one in calls]
    weights = [count / sum(tokens) for count in tokens]
    for told in zip(*(one.losses for one in calls), strict=True):
        terms = [weight * value for weight, (_, value, _) in zip(weights, told, strict=True)]
        call.losses.append((told[0][0], torch.stack(terms).sum(), told[0][2]))
    for asked in zip(*(one.targets for one in calls), strict=True):
        name, _, target, factor = asked[0]
        call.targets.append((name, torch.stack([share for _, share, _, _ in asked]).mean(), target, factor))
    call.loads += [torch.stack(counts).sum(0) for counts in zip(*(one.loads for one in calls), strict=True)]
    call.members += [torch.stack(sums).sum(0) for sums in zip(*(one.members for one in calls), strict=True)]
    # With `decode_only` documents of one token choose blocks and the others none.
    for what in dict.fromkeys(name for one in calls for name in one.given):
        values: list[Any] = [one.given.get(what) for one in calls]
        call.given[what] = torch.cat(values, dim=TOKENS[what]) if what in TOKENS else values
