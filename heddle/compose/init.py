"""How weights begin. Fills go through `transformers.initialization`, which leaves loaded tensors alone."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn
from transformers import initialization


class Initialised(nn.Module):
    """A module that fills the parameters and buffers it holds itself, its children's excepted."""

    @abstractmethod
    def initialise(self, std: float) -> None:
        """Fills this module's own tensors; `std` is the standard deviation of a projection."""


def initialise(module: nn.Module, std: float) -> None:
    """Fills the tensors `module` holds itself: projections and embeddings N(0, std), norms 1, biases 0.

    Non-persistent buffers are filled here too: after loading through the meta device they hold garbage.
    """
    if isinstance(module, Initialised):
        module.initialise(std)
    elif isinstance(module, nn.Linear | nn.Embedding):
        initialization.normal_(module.weight, mean=0.0, std=std)
    elif type(module).__name__ in ("RMSNorm", "LayerNorm"):
        initialization.ones_(module.weight)
    if isinstance(getattr(module, "bias", None), Tensor):
        initialization.zeros_(module.bias)


def normal(tensor: Tensor, std: float) -> None:
    """Fills `tensor` with N(0, std)."""
    initialization.normal_(tensor, mean=0.0, std=std)


def uniform(tensor: Tensor, low: float, high: float) -> None:
    """Fills `tensor` evenly between `low` and `high`."""
    initialization.uniform_(tensor, low, high)


def fill(tensor: Tensor, values: Tensor) -> None:
    """Fills `tensor` with `values`."""
    initialization.copy_(tensor, values.to(tensor.device, tensor.dtype))
