"""Tensors that a class of transformers keeps in its checkpoints though they follow from its configuration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from heddle.compose.mixers.lightning import log_decays
from heddle.compose.modules.site import Site
from heddle.compose.targets import parts
from heddle.compose.targets.target import Config

# Tokens that MiniMax's class computes together, if its configuration does not say.
BLOCK = 256


def tables(model_type: str, config: Config) -> dict[str, Tensor]:
    """By name, what a checkpoint of that class may hold beside its weights."""
    if model_type != "minimax":
        return {}
    layers = [index for index, kind in enumerate(config["layer_types"]) if kind == parts.LINEAR]
    return {
        f"model.layers.{index}.self_attn.{name}": one.float()
        for index in layers
        for name, one in _decays(config, index).items()
    }


def _decays(config: Config, layer: int) -> dict[str, Tensor]:
    """What fades in a block of C tokens of a lightning layer: by s from token to token in each head.

        query e^(-s (i + 1)),   key e^(-s (C - 1 - i)),   diagonal e^(-s (i - j)) for j <= i, else 0

    Shapes:  slope_rate: [H, 1, 1];  query_decay, key_decay: [H, C, 1];  diagonal_decay: [1, H, C, C]
    """
    site = Site(config["hidden_size"], layer, config["num_hidden_layers"])
    log_decay = log_decays("geometric", config["num_attention_heads"], site)[:, None, None]
    token = torch.arange(config.get("block_size", BLOCK), dtype=torch.float64)[:, None]
    apart = token - token.T
    return {
        "slope_rate": -log_decay,
        "query_decay": torch.exp(log_decay * (token + 1)),
        "key_decay": torch.exp(log_decay * (len(token) - 1 - token)),
        "diagonal_decay": torch.exp(torch.where(apart < 0, -torch.inf, log_decay * apart))[None],
    }


def wrong_table(made: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str | None:
    """The name of a stored table that is another than the one that follows from the configuration.

    All are at most 1, so that what they were rounded by is at most their type's ε; the class computes them in float32.
    """
    for name, one in stored.items():
        apart = (one.float() - made[name]).abs().max()
        if not apart <= 4 * torch.finfo(one.dtype).eps:
            return name
    return None
