"""THE CATALOGUE of targets: one line a class of transformers, and those that no spec can become yet, with the reason."""

from __future__ import annotations

from heddle.compose.targets.llama import Llama, Mistral
from heddle.compose.targets.mamba import Bamba, FalconH1, Granite
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
)
BY_NAME = {target.name: target for target in TARGETS}

# What is asked for and not written yet.
NOT_YET = {
    "kimi_linear": "its attention is multi-head latent attention, which the language has not",
    "minimax": "its dense experts and decay tables are not written yet; transformers' class also fails its own cache test "
    "where the first layer is linear",
}
