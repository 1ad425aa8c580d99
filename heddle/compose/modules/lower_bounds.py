"""The lower bounds of forget gates: one table for a whole model, which tells every layer its row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.modules.precision import wide

# What the row of a layer is called in `Call.handed`, by that layer.
BOUNDS = "lower_bounds"
# So far a bound stays from 0 and 1, where its logarithms end.
LEAST = 1e-6


def hand_bounds(table: Tensor, call: Call) -> None:
    """Hands every layer but the first, which has no bound, its own.        (arXiv 2404.07904)

        b_l = Σ_{0 < j ≤ l} P_j,   P = softmax over layers(table)

    Shapes:  table: [layers, W];  each bound: [W], float32
    """
    shares = torch.softmax(wide(table), dim=0)
    bounds = (shares.cumsum(dim=0) - shares[:1]).clamp(LEAST, 1.0 - LEAST)
    call.handed.update({(BOUNDS, layer): row for layer, row in enumerate(bounds.unbind(0)) if layer > 0})


def bounded_log_forget(gate: Tensor, call: Call) -> Tensor:
    """log f, f = b + (1 - b) sigmoid(gate), with the bound b of the layer that is called; 0 if none was handed to it.

    A gate narrower than the table has the first of its columns.

    Shapes:  gate: [B, T, C];  out likewise, float32, at most 0
    """
    log_forget, bound = F.logsigmoid(wide(gate)), call.handed.get((BOUNDS, call.layer))
    if bound is None:
        return log_forget
    bound = bound[: gate.shape[-1]].to(log_forget.dtype)
    return torch.logaddexp(bound.log(), torch.log1p(-bound) + log_forget)
