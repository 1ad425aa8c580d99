"""From a model spec to a module: plan, configuration, weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, TypeVar

import torch

from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.encoder import HeddleForMaskedLM, HeddleForSequenceClassification
from heddle.compose.hf.model import HeddleForCausalLM, HeddlePreTrainedModel
from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.specs import ModelSpec
from heddle.specs.spec import VERSION

Draw = Literal["cpu", "device"]


def config_for(model: ModelSpec, *, name: str | None = None) -> HeddleConfig:
    """The configuration of a resolved model spec."""
    data = plan(model).runtime()
    data["tie_word_embeddings"] = data.pop("tie_embeddings")
    if model.kind == "encoder":
        data |= {"model_kind": data.pop("kind"), "use_cache": False}
    if model.readout is not None:
        data["num_labels"] = data["readout"].pop("classes")
    data["spec"] = {"version": VERSION, "model": model.written()}
    return HeddleConfig(**data, **({} if name is None else {"name_or_path": name}))


def build(
    model: ModelSpec,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    draw: Draw = "cpu",
) -> HeddlePreTrainedModel:
    """The model of a resolved spec, with random weights that depend on `seed` alone: a `HeddleForCausalLM`, or of an encoder a
    `HeddleForSequenceClassification` if it has a readout and else a `HeddleForMaskedLM`.

    Weights are drawn on the CPU in float32, then moved: the same model on every device. "meta" draws nothing. With
    `draw="device"` weights are drawn where they will be: in no time on a GPU, and others than on a CPU.

    Raises:
        HeddleError: what planning the spec raises.
    """
    kind: type[HeddlePreTrainedModel] = HeddleForCausalLM
    if model.kind == "encoder":
        kind = HeddleForMaskedLM if model.readout is None else HeddleForSequenceClassification
    return _made(kind, config_for(model), seed, device, dtype, draw=draw)


def build_causal_lm(
    model: ModelSpec,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    draw: Draw = "cpu",
) -> HeddleForCausalLM:
    """As `build`, for what works with causal language models alone.

    Raises:
        HeddleError: "bad-argument" for an encoder, and what planning the spec raises.
    """
    if model.kind == "encoder":
        raise HeddleError(
            "bad-argument", "a causal language model is needed here, and this spec is of an encoder"
        )
    return _made(HeddleForCausalLM, config_for(model), seed, device, dtype, draw=draw)


M = TypeVar("M", bound=HeddlePreTrainedModel)


def _made(
    kind: type[M],
    config: HeddleConfig,
    seed: int,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    draw: Draw = "cpu",
) -> M:
    there = torch.device(device)
    drawn = there if draw == "device" or there.type == "meta" else None
    on_gpu = [torch.cuda.current_device()] if drawn is not None and drawn.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu), drawn or nullcontext():
        torch.manual_seed(seed)
        module = kind(config)
    moved: M = module.to(device=device, dtype=dtype)
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
