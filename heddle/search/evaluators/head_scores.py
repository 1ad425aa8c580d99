"""How much each head's mixing of tokens matters to a trained model, by its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.modules.head_mix import HeadMix
from heddle.compose.modules.precision import wide
from heddle.errors import HeddleError

TOKENS_AT_ONCE = 1 << 12
# Labels of tokens that are not scored.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class HeadScores:
    """Of the layers of softmax attention, in order; `layers` are their numbers in the model. All in nats a token.

    change[i][h] = loss with head h of layer i perturbed, less `loss`;   slope[i][h] = its derivative at no perturbation, so that
    share · slope is the first order of the change;   whole[i] = the change with all heads of layer i perturbed.
    """

    layers: tuple[int, ...]
    change: tuple[tuple[float, ...], ...]
    slope: tuple[tuple[float, ...], ...]
    whole: tuple[float, ...]
    loss: float


def head_scores(
    model: HeddleForCausalLM, inputs: Tensor, labels: Tensor | None = None, *, share: float = 1.0
) -> HeadScores:
    """What the next-token loss on `inputs` [B, T] does where attention maps are brought nearer to the identity.

        A_u = (1 - u) A + u I,   u = share        (SoftPAG, arXiv 2506.10978; on language models it is ours)

    One pass for each head and layer, and one with gradients for all slopes. `labels` [B, T] are `inputs` where None; -100 is left
    out. A shared layer is perturbed in all its places, and counted once.

    Raises `bad-argument` for a share outside of 0 to 1, and for a model without softmax attention.
    """
    if not 0.0 <= share <= 1.0:
        raise HeddleError("bad-argument", f"share {share:g} is not between 0 and 1")
    mixes = _mixes(model)
    if not mixes:
        raise HeddleError("bad-argument", "no layer of this model has softmax attention")
    given, training = (inputs, inputs if labels is None else labels), model.training
    model.eval()
    slope = {
        layer: torch.zeros(heads, dtype=torch.float64, requires_grad=True)
        for layer, (_, heads) in mixes.items()
    }
    loss, found = _slopes(model, given, mixes, slope)
    change: list[tuple[float, ...]] = []
    whole = []
    for layer, (_, heads) in mixes.items():
        rows = [*torch.eye(heads), torch.ones(heads)]
        *single, every = (_loss(model, given, mixes, {layer: share * row}) - loss for row in rows)
        change.append(tuple(single))
        whole.append(every)
    model.train(training)
    return HeadScores(tuple(mixes), tuple(change), tuple(found), tuple(whole), loss)


def _mixes(model: HeddleForCausalLM) -> dict[int, tuple[HeadMix, int]]:
    """The point of each layer that is attention, and how many heads it has; of a shared layer once."""
    found: dict[int, tuple[HeadMix, int]] = {}
    for index in range(model.config.num_hidden_layers):
        mixer: Any = model.model.layer_at(index).mixer
        point = getattr(mixer, "head_mix", None)
        if point is not None and all(point is not other for other, _ in found.values()):
            found[index] = (point, mixer.heads)
    return found


@contextmanager
def _perturbed(mixes: Mapping[int, tuple[HeadMix, int]], shares: Mapping[int, Tensor]) -> Iterator[None]:
    for layer, share in shares.items():
        mixes[layer][0].share = share
    try:
        yield
    finally:
        for layer in shares:
            mixes[layer][0].share = None


def _losses(model: HeddleForCausalLM, given: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    """The summed loss of rows that go through the model together, in float64."""
    inputs, labels = given
    rows = max(1, TOKENS_AT_ONCE // inputs.shape[1])
    for start in range(0, len(inputs), rows):
        logits = model(input_ids=inputs[start : start + rows], use_cache=False).logits[:, :-1]
        wanted = labels[start : start + rows, 1:].flatten()
        each = F.cross_entropy(wide(logits).flatten(0, 1), wanted, ignore_index=IGNORED, reduction="none")
        yield each.double().sum()


def _scored(given: tuple[Tensor, Tensor]) -> int:
    return max(1, int((given[1][:, 1:] != IGNORED).sum()))


@torch.no_grad()
def _loss(
    model: HeddleForCausalLM,
    given: tuple[Tensor, Tensor],
    mixes: Mapping[int, tuple[HeadMix, int]],
    shares: Mapping[int, Tensor],
) -> float:
    with _perturbed(mixes, shares):
        return sum(float(one) for one in _losses(model, given)) / _scored(given)


def _slopes(
    model: HeddleForCausalLM,
    given: tuple[Tensor, Tensor],
    mixes: Mapping[int, tuple[HeadMix, int]],
    shares: Mapping[int, Tensor],
) -> tuple[float, list[tuple[float, ...]]]:
    """The loss without a perturbation, and its derivatives by the share of each head."""
    total, count = 0.0, _scored(given)
    sums = [torch.zeros_like(one) for one in shares.values()]
    with _perturbed(mixes, shares), torch.enable_grad():
        for loss in _losses(model, given):
            for held, one in zip(sums, torch.autograd.grad(loss, list(shares.values())), strict=True):
                held += one
            total += float(loss.detach())
    return total / count, [tuple((one / count).tolist()) for one in sums]
