"""Which servers take a model of a target, and what of it forbids that: read in their source, some run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from heddle.compose.targets import parts
from heddle.compose.targets.target import Model

VERSIONS: Mapping[str, str] = {"vllm": "vLLM 0.33", "sglang": "SGLang 0.5.23"}
READ = "read, not run"
# Classes that were served by vLLM on a CPU, as docs/serving.md tells; 0.33 is not in the package registry for CPUs.
RUN: Mapping[str, str] = {
    f"vllm {name}": "run in 0.32"
    for name in ("llama", "mistral", "qwen2", "qwen3", "granitemoehybrid", "smollm3", "falcon_h1")
}
# Classes with which a server was tried and did not start.
TRIED: Mapping[str, str] = {
    "vllm qwen3_5_text": (
        "tried in 0.32, did not start: its file of this class imports its vision model, which asks for torchvision"
    )
}


@dataclass(frozen=True, slots=True)
class Serves:
    """Whether a server takes a model, None if its source was not read for it; why not, and the field that forbids it.

    Of a `layer` the field forbids it wherever that layer stands, of an `order` only where the layers stand as they do. Without a
    field it is the class itself.
    """

    takes: bool | None
    note: str = ""
    path: str = ""
    scope: Literal["class", "model", "layer", "order"] = "class"

    def told(self) -> str:
        """Field and reason, or the reason alone."""
        return f"{self.path}: {self.note}" if self.path else self.note


YES, UNREAD = Serves(True), Serves(None, "not read")
_NO_CLASS, _REMOVED = Serves(False, "it has no such class"), Serves(False, "the class was removed after 0.23")
_BACKEND = Serves(True, "through its Transformers backend")
_GENERIC = Serves(None, "no file of its own; a generic fallback")
# Answers that hold for every model of a target, if the model has nothing that is told below: vLLM, SGLang.
ALWAYS: Mapping[str, tuple[Serves, Serves]] = {
    "llama": (YES, UNREAD),
    "qwen3": (YES, YES),
    "qwen2": (YES, YES),
    "mistral": (YES, UNREAD),
    "qwen3_5_text": (YES, YES),
    "qwen3_next": (YES, YES),
    "olmo_hybrid": (YES, _NO_CLASS),
    "granitemoehybrid": (YES, YES),
    "falcon_h1": (YES, YES),
    "bamba": (_REMOVED, _NO_CLASS),
    "olmo3": (_BACKEND, _GENERIC),
    "smollm3": (_BACKEND, _GENERIC),
    "gemma3_text": (YES, YES),
    "kimi_linear": (YES, YES),
    "minimax": (_REMOVED, _NO_CLASS),
}
# What the page says of targets whose answer depends on the model.
SOMETIMES: Mapping[str, tuple[str, str]] = {
    "qwen2": ("yes, but of full beside sliding layers", "yes without windows, which it ignores"),
    "qwen3": ("yes, but of full beside sliding layers", "yes without windows, which it ignores"),
    "qwen3_5_text": ("yes", "yes if every n-th layer is a full one, and no other"),
    "qwen3_next": ("yes with experts", "yes if every n-th layer is a full one, and no other"),
}
REMOTE = "remote"
# The linear mixers of classes that servers load as hybrids: without one nobody has read what they do.
LINEAR: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_next"), frozenset({"gated_deltanet"})),
    "granitemoehybrid": frozenset({"mamba2"}),
    "kimi_linear": frozenset({"kda"}),
}


def served(target: str, model: Model) -> dict[str, Serves]:
    """By server, whether it takes a model that fits `target`."""
    if target == REMOTE:
        return {"vllm": _remote(model), "sglang": _NO_CLASS}
    vllm, sglang = ALWAYS[target]
    if target in LINEAR and not LINEAR[target] & {layer["mixer"]["kind"] for layer in model["layers"]}:
        return {"vllm": _unread(vllm), "sglang": _unread(sglang)}
    if target in ("qwen2", "qwen3"):
        vllm, sglang = _windowed(model)
    elif target in ("qwen3_5_text", "qwen3_next"):
        vllm = _routed(model) if target == "qwen3_next" else vllm
        sglang = _periodic(model)
    return {"vllm": vllm, "sglang": sglang}


def checked(server: str, target: str) -> str:
    """How an answer is known."""
    asked = f"{server} {target}"
    return RUN.get(asked) or TRIED.get(asked, READ)


def classes_of(server: str) -> tuple[str, ...]:
    """The targets of which a server takes some models."""
    place = [*VERSIONS].index(server)
    return tuple(name for name, answers in ALWAYS.items() if answers[place].takes)


def _unread(answer: Serves) -> Serves:
    return Serves(None, "not read for a model without a linear layer") if answer.takes else answer


def _windowed(model: Model) -> tuple[Serves, Serves]:
    windows = [layer["mixer"]["window"] for layer in model["layers"]]
    first = next((at for at, window in enumerate(windows) if window is not None), None)
    if first is None:
        return YES, YES
    path, told = f"layers.{first}.mixer.window", f"is {windows[first]}"
    silent = f"{told}; it does not read windows, and computes full attention"
    mixed = Serves(False, f"{told}; it takes no full and sliding layers in one model", path, "model")
    return (mixed if None in windows else YES), Serves(False, silent, path, "layer")


def _routed(model: Model) -> Serves:
    kinds = [layer["channel"]["kind"] for layer in model["layers"]]
    if "moe" in kinds:
        return YES
    told = f"is {kinds[0]}, as in all layers; it wants one with experts (moe)"
    return Serves(False, told, "layers.0.channel.kind", "model")


def _periodic(model: Model) -> Serves:
    types = parts.placed(model)
    if parts.interval_of(types) is not None:
        return YES
    every = types.index(parts.FULL) + 1
    wrong = next(at for at, kind in enumerate(types) if (kind == parts.FULL) != ((at + 1) % every == 0))
    kind = model["layers"][wrong]["mixer"]["kind"]
    told = f"is {kind}; it takes layer {every} and every {every} after for full ones, and would load this model wrong"
    return Serves(False, told, f"layers.{wrong}.mixer.kind", "order")


def _remote(model: Model) -> Serves:
    for index, layer in enumerate(model["layers"]):
        kind = layer["mixer"]["kind"]
        if kind != "attention":
            told = f"is {kind}; a layer must go through its attention interface"
            return Serves(False, told, f"layers.{index}.mixer.kind", "layer")
    return Serves(False, "the code of the folder calls its attention itself, not through that interface")
