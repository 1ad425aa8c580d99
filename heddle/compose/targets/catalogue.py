"""THE CATALOGUE of targets: one line a class of transformers."""

from __future__ import annotations

from heddle.compose.targets.kimi import KimiLinear
from heddle.compose.targets.llama import Llama, Mistral
from heddle.compose.targets.mamba import Bamba, FalconH1, Granite
from heddle.compose.targets.minimax import MiniMax
from heddle.compose.targets.olmo import Olmo3, OlmoHybrid
from heddle.compose.targets.qwen import Qwen2, Qwen3
from heddle.compose.targets.qwen_hybrid import Qwen3_5, Qwen3Next
from heddle.compose.targets.sliding import Gemma3, SmolLM3
from heddle.compose.targets.target import Target

# Of several that fit, `auto` takes the first.
TARGETS: tuple[Target, ...] = (
    Llama(),
    Qwen3(),
    Qwen2(),
    Mistral(),
    Qwen3_5(),
    Qwen3Next(),
    OlmoHybrid(),
    Granite(),
    FalconH1(),
    Bamba(),
    Olmo3(),
    SmolLM3(),
    Gemma3(),
    KimiLinear(),
    MiniMax(),
)
BY_NAME = {target.name: target for target in TARGETS}
