"""The auxiliary losses of a forward, from what its layers told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def missed(targets: Sequence[tuple[str, Tensor, float, float]]) -> list[tuple[str, Tensor, float]]:
    """The losses of targets that hold for all layers together, one for each of equal name, target and factor."""
    shares: dict[tuple[str, float, float], list[Tensor]] = {}
    for name, share, target, factor in targets:
        shares.setdefault((name, target, factor), []).append(share)
    return [
        (name, (torch.stack(found).mean() - target).square(), factor)
        for (name, target, factor), found in shares.items()
    ]


def told(losses: Sequence[tuple[str, Tensor, float]]) -> dict[str, Any]:
    """The auxiliary losses of a forward, as the fields of its output."""
    if not losses:
        return {}
    kinds = dict.fromkeys(name for name, _, _ in losses)
    by_kind = {
        kind: torch.stack([value for name, value, _ in losses if name == kind]).mean() for kind in kinds
    }
    total = torch.stack([factor * value for _, value, factor in losses]).sum()
    return {"aux_loss": total, "aux_losses": {name: value.detach() for name, value in by_kind.items()}}
