"""Where every value is one, softmax attention gives one, whatever its mixer hides, chooses or turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import mixer_of, noise

from heddle.compose.cache import Call
from heddle.kernels.accuracy import EPSILON

HIDDEN, LENGTH = 48, 75
GROUPED: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16}
CHOSEN: dict[str, Any] = {"block": 8, "count": 3}
CASES: dict[str, dict[str, Any]] = {
    "attention": GROUPED,
    "window": GROUPED | {"window": 9},
    "inward": GROUPED | {"window": 9, "causal": False, "boundary": "inward"},
    "grid": GROUPED | {"causal": False, "grid": {"width": 10, "row_window": 3, "column_window": 4}},
    "means": GROUPED | {"selection": CHOSEN},
    "kernels": GROUPED | {"selection": CHOSEN | {"scores": "kernels"}},
    "landmark": GROUPED | {"block": 8, "top": 2},
    "routing": {"heads": 4, "head_dim": 16, "clusters": 3, "members": 9},
    "mla": {"heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "liger": GROUPED | {"window": 9},
    "nats_l": {"heads": 2, "head_dim": 16, "value_dim": 16, "split": 2, "chunk": 16},
}
# Mixers of which attention is a part, or which make their values late: the method that attends, and where its values are.
INSIDE = {"mla": "_attend", "liger": "_window", "nats_l": "_attend"}


class Ones(nn.Module):
    """A projection whose every output is one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(*x.shape[:-1], self.size)


def attended(mixer: Any, name: str, x: Tensor, call: Call) -> Tensor:
    """What attention gives where every value is one."""
    seen: list[Tensor] = []
    if name not in INSIDE:
        mixer.v_proj = Ones(mixer.v_proj.out_features)
        mixer.heads_out.register_forward_hook(lambda _, __, out: seen.append(out))
    else:
        attend = getattr(mixer, INSIDE[name])

        def with_ones(*given: Any) -> Tensor:
            # The sides come one by one, or as the first argument.
            sides = list(given) if isinstance(given[0], Tensor) else list(given[0])
            sides[2] = torch.ones_like(sides[2])
            out: Tensor = attend(*sides) if isinstance(given[0], Tensor) else attend(tuple(sides), *given[1:])
            seen.append(out)
            return out

        setattr(mixer, INSIDE[name], with_ones)
    mixer(x, call)
    (out,) = seen
    return out


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), pytest.param("cuda", torch.float32, marks=pytest.mark.gpu)],
    ids=["cpu", "cuda"],
)
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_weights_of_every_row_sum_to_one(name: str, padding: int, device: str, dtype: torch.dtype) -> None:
    kind = name if name in ("landmark", "routing", *INSIDE) else "attention"
    mixer = mixer_of(HIDDEN, kind, **CASES[name]).to(device, dtype)
    x, real = noise(2, LENGTH, HIDDEN).to(device, dtype), torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :padding] = False
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    marks = [None, None] if padding == 0 else [real.to(device)] * 2
    out = attended(mixer, name, x, Call(positions.to(device), *marks))
    ones = out.transpose(1, 2) if name == "mla" else out
    assert ones.shape[:2] == (2, LENGTH)
    assert (ones[real] - 1).abs().max() <= EPSILON[dtype]
