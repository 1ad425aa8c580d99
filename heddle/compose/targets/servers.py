"""Which servers take a model of a target: read in their source, not run here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heddle.compose.targets import parts
from heddle.compose.targets.target import Model

VERSIONS: Mapping[str, str] = {"vllm": "vLLM 0.33", "sglang": "SGLang 0.5.23"}


@dataclass(frozen=True, slots=True)
class Serves:
    """Whether a server takes a model, None if its source was not read for it, and why not."""

    takes: bool | None
    note: str = ""


YES, UNREAD = Serves(True), Serves(None, "not read")
_NO_CLASS = Serves(False, "it has no such class")
# Answers that hold for every model of a target: vLLM, SGLang.
ALWAYS: Mapping[str, tuple[Serves, Serves]] = {
    "llama": (UNREAD, UNREAD),
    "qwen3_next": (Serves(False, "it wants a layer with experts"), UNREAD),
    "olmo_hybrid": (YES, _NO_CLASS),
    "granitemoehybrid": (YES, YES),
    "falcon_h1": (YES, YES),
    "bamba": (Serves(False, "removed after 0.23"), _NO_CLASS),
    "olmo3": (
        Serves(True, "through its Transformers backend"),
        Serves(None, "no file of its own; a generic fallback"),
    ),
    "smollm3": (
        Serves(True, "through its Transformers backend"),
        Serves(None, "no file of its own; a generic fallback"),
    ),
    "gemma3_text": (YES, YES),
    "kimi_linear": (YES, YES),
    "minimax": (Serves(False, "removed after 0.23"), _NO_CLASS),
    "remote": (
        Serves(False, "a layer must go through its attention interface"),
        Serves(False, "it has no such class"),
    ),
}

# What the page says of targets whose answer depends on the model.
SOMETIMES: Mapping[str, tuple[str, str]] = {
    "mistral": ("?: not read", "?: not read"),
    "qwen2": ("yes without windows", "yes without windows, which it ignores"),
    "qwen3": ("yes without windows", "yes without windows, which it ignores"),
    "qwen3_5_text": ("yes", "yes if every n-th layer is a full one, and no other"),
    "qwen3_next": (
        "no: it wants a layer with experts",
        "yes if every n-th layer is a full one, and no other",
    ),
}


def served(target: str, model: Model) -> dict[str, Serves]:
    """By server, whether it takes a model that fits `target`."""
    vllm, sglang = ALWAYS.get(target, (UNREAD, UNREAD))
    if target in ("qwen2", "qwen3"):
        vllm, sglang = _windowed(model)
    elif target in ("qwen3_5_text", "qwen3_next"):
        routed = any(layer["channel"]["kind"] == "moe" for layer in model["layers"])
        vllm = YES if target == "qwen3_5_text" or routed else vllm
        sglang = _periodic(model)
    return {"vllm": vllm, "sglang": sglang}


def _windowed(model: Model) -> tuple[Serves, Serves]:
    windows = {layer["mixer"]["window"] for layer in model["layers"]}
    if windows == {None}:
        return YES, YES
    silent = Serves(False, "it does not read the windows, and computes full attention")
    return (Serves(False, "no full and sliding layers in one model") if None in windows else UNREAD), silent


def _periodic(model: Model) -> Serves:
    types = parts.placed(model)
    if parts.interval_of(types) is None:
        return Serves(False, "it places full layers by an interval alone, and would load this one wrong")
    return YES
