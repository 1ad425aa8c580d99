"""From the hidden states of a sequence to one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from heddle.compose.init import Initialised
from heddle.compose.modules.precision import wide


class Readout(Initialised):
    """z = pool(x), of the tokens that are no padding; `width` is the number of its features.

    Shapes:  x: [B, T, D];  real: [B, T] bool, True for a token, or None if all are;  z: [B, width]
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def opened(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The embedded tokens as the model shall see them, and which of them are no padding."""
        return x, real

    def initialise(self, std: float) -> None:
        """Fills its parameters, if it has any."""


class LastReadout(Readout):
    """z = x_t of the last token t.        Shapes:  as `Readout`"""

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        return x[:, -1] if real is None else _at(x, (real * _counted(real)).argmax(dim=1))


class MeanReadout(Readout):
    """z = mean_t x_t.        Shapes:  as `Readout`"""

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        y = wide(x)
        if real is None:
            return y.mean(dim=1).to(x.dtype)
        shown = real.to(y.dtype)[..., None]
        return ((y * shown).sum(dim=1) / shown.sum(dim=1).clamp(min=1)).to(x.dtype)


class ClsReadout(Readout):
    """z = x_0, where token 0 is a learned vector right before the first token of the sequence        (arXiv 1810.04805)

    It takes position 0 and the others move up by one. With padding on the left it stands after the padding, so that
    nothing lies between it and the sequence.

    Shapes:  as `Readout`; `opened` gives one token more
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.token = nn.Parameter(torch.empty(width))

    def opened(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        token = self.token.to(x.dtype).expand(x.shape[0], 1, -1)
        if real is None:
            return torch.cat((token, x), dim=1), None
        # One place further right for all; the place before the first token is padding then, and taken.
        place = torch.arange(x.shape[1] + 1, device=x.device) == _first(real)[:, None]
        moved = torch.cat((x[:, :1], x), dim=1)
        shown = torch.cat((torch.zeros_like(real[:, :1]), real), dim=1)
        return torch.where(place[..., None], token, moved), shown | place

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        return x[:, 0] if real is None else _at(x, _first(real))

    def initialise(self, std: float) -> None:
        initialization.normal_(self.token, mean=0.0, std=std)


class EfficientProbing(Readout):
    """M learned queries, each of which pools a slice of the values of its own.        (arXiv 2506.10178)

        A = softmax(U xᵀ / sqrt(C)),   z = concat_m (A_m x) W_v^(m),   W_v^(m): C x C/(rM)

    Keys are the tokens themselves. Each pooled token is projected, not each token: the same, since W_v is linear and the
    rows of A sum to 1. The softmax is in float32, padding left out of it.

    Shapes:  as `Readout`, with C = D and width C/r;  U: [M, C]
    """

    def __init__(self, size: int, *, queries: int, reduction: int) -> None:
        super().__init__(size // reduction)
        self.queries = nn.Parameter(torch.empty(queries, size))
        self.value = nn.Linear(size, self.width, bias=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        y = wide(x)
        scores = wide(self.queries) @ y.transpose(1, 2) * x.shape[-1] ** -0.5  # [B, M, T]
        if real is not None:
            # Not minus infinity: a row of padding alone would have no softmax.
            scores = scores.masked_fill(~real[:, None], torch.finfo(scores.dtype).min)
        pooled = (scores.softmax(dim=-1).to(y.dtype) @ y).to(x.dtype)
        slices = self.value.weight.view(*self.queries.shape[:1], -1, x.shape[-1])  # [M, width / M, C]
        return torch.einsum("bmc,mvc->bmv", pooled, slices).flatten(1)

    def initialise(self, std: float) -> None:
        initialization.normal_(self.queries, mean=0.0, std=std)


def readout_module(size: int, readout: Mapping[str, Any]) -> Readout:
    """The readout of plain data, as it stands in a configuration; `size` is the width of the hidden states."""
    if readout["kind"] == "ep":
        return EfficientProbing(size, queries=readout["queries"], reduction=readout["reduction"])
    plain: dict[str, type[Readout]] = {"last": LastReadout, "mean": MeanReadout, "cls": ClsReadout}
    return plain[readout["kind"]](size)


def _counted(real: Tensor) -> Tensor:
    """1, 2, 3 … for the places of a row.  Shapes:  real: [B, T];  out: [T]"""
    return torch.arange(1, real.shape[1] + 1, device=real.device)


def _first(real: Tensor) -> Tensor:
    """Where the first token of each row stands, 0 in a row of padding alone.  Shapes:  real: [B, T];  out: [B]"""
    return (real * _counted(real).flip(0)).argmax(dim=1)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """One token of each row.  Shapes:  x: [B, T, D];  places: [B];  out: [B, D]"""
    return x[torch.arange(x.shape[0], device=x.device), places]
