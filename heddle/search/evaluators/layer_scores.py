"""How much each layer's mixer matters to a trained model, by the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heddle.compose.hf.model import HeddleForCausalLM
from heddle.errors import HeddleError

TOKENS_AT_ONCE = 1 << 12


@dataclass(frozen=True, slots=True)
class LayerScores:
    """Of each layer, in nats a token.

    ablation[i] = KL(teacher ‖ teacher with mixer i replaced): what the layer alone is worth to the whole.
    restoration[i] = KL(teacher ‖ all mixers replaced) - KL(teacher ‖ all but i replaced): what it gives to the rest alone.
    """

    ablation: tuple[float, ...]
    restoration: tuple[float, ...]
    all_replaced: float


@torch.no_grad()
def layer_scores(
    teacher: HeddleForCausalLM, inputs: Tensor, *, student: HeddleForCausalLM | None = None
) -> LayerScores:
    """Scores of the mixers of `teacher` on token ids [B, T], which may be of any task or text.

    A mixer is replaced by that of the same layer of `student`, a model of the same width and depth, or without one by
    nothing: the layer then adds 0. The other layers stay as they are, so what they take from a replaced one is what
    that one had handed on. A shared layer is replaced in all its places.

    Raises `bad-argument` for a student of another width or depth.
    """
    layers = len(teacher.model.layers)
    if student is not None:
        _check_alike(teacher, student)
    everywhere = frozenset(range(layers))

    def divergence(replaced: frozenset[int]) -> float:
        return _divergence(teacher, inputs, student, replaced)

    whole = divergence(everywhere)
    return LayerScores(
        ablation=tuple(divergence(frozenset({index})) for index in range(layers)),
        restoration=tuple(whole - divergence(everywhere - {index}) for index in range(layers)),
        all_replaced=whole,
    )


def _check_alike(teacher: HeddleForCausalLM, student: HeddleForCausalLM) -> None:
    sizes = [(one.config.hidden_size, one.config.num_hidden_layers) for one in (teacher, student)]
    if sizes[0] != sizes[1]:
        told = " and ".join(f"{width} wide with {depth} layers" for width, depth in sizes)
        raise HeddleError("bad-argument", f"teacher and student are not alike: {told}")


def _divergence(
    teacher: HeddleForCausalLM, inputs: Tensor, student: HeddleForCausalLM | None, replaced: frozenset[int]
) -> float:
    """Mean KL in nats of the teacher's next-token probabilities from those of the changed model."""
    rows, total = max(1, TOKENS_AT_ONCE // inputs.shape[1]), 0.0
    training = teacher.training
    teacher.eval()
    for start in range(0, len(inputs), rows):
        piece = inputs[start : start + rows]
        wanted = teacher(input_ids=piece, use_cache=False).logits.float().log_softmax(dim=-1)
        with _replaced(teacher, student, replaced):
            found = teacher(input_ids=piece, use_cache=False).logits.float().log_softmax(dim=-1)
        total += float((wanted.exp() * (wanted - found)).sum(dim=-1).double().sum())
    teacher.train(training)
    return total / inputs.numel()


@contextmanager
def _replaced(
    teacher: HeddleForCausalLM, student: HeddleForCausalLM | None, layers: frozenset[int]
) -> Iterator[None]:
    hooks = []
    for mixer, other in {_mixer(teacher, index): _mixer(student, index) for index in layers}.items():
        hooks.append(mixer.register_forward_hook(_hook(other)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mixer(model: HeddleForCausalLM | None, index: int) -> Any:
    return None if model is None else model.model.layer_at(index).mixer


def _hook(other: nn.Module | None) -> Any:
    def replace(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:  # noqa: ARG001
        found: Tensor = torch.zeros_like(out) if other is None else other(*given)
        return found

    return replace
