"""From a model spec to a module: plan, configuration, weights."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.plan import plan
from heddle.specs import ModelSpec


def config_for(model: ModelSpec, *, name: str | None = None) -> HeddleConfig:
    """The configuration of a resolved model spec."""
    data = plan(model).runtime()
    data["tie_word_embeddings"] = data.pop("tie_embeddings")
    return HeddleConfig(**data, **({} if name is None else {"name_or_path": name}))


def build(
    model: ModelSpec,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HeddleForCausalLM:
    """The model of a resolved spec, with random weights that depend on `seed` alone.

    Weights are drawn on the CPU in float32, then moved: the same model on every device. "meta" draws nothing.

    Raises:
        HeddleError: what planning the spec raises.
    """
    config = config_for(model)
    on_meta = torch.device(device).type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta") if on_meta else nullcontext():
        torch.manual_seed(seed)
        module = HeddleForCausalLM(config)
    moved: HeddleForCausalLM = module.to(device=device, dtype=dtype)
    return moved


def kernel_paths(model: ModelSpec, device: str | torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which code runs each kind of mixer: "triton", "torch" or "sdpa"; two of them where layers of a kind differ."""
    module = build(model, device="meta", dtype=dtype)
    where = torch.device(device)
    kinds = [layer["mixer"]["kind"] for layer in module.config.layers]
    mixers = [module.model.layer_at(index).mixer for index in range(len(kinds))]
    found: dict[str, set[str]] = {}
    for kind, mixer in zip(kinds, mixers, strict=True):
        found.setdefault(kind, set()).add(mixer.kernel_path(where, dtype))
    return {kind: " and ".join(sorted(paths)) for kind, paths in found.items()}
