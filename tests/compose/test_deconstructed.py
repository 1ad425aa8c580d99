"""What the forms of Deconstructing Attention (arXiv 2510.11602) learn: weak alone, and together what each of them lacks.

Pairs of a value and the key after it, then keys; the label is the value before each key. A layer must look one token back, and
a layer must find the key again.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.build import build
from heddle.specs import ModelSpec

KEYS, PAIRS, ASKED, BATCH = 12, 6, 4, 64
# To answer with the value that a sequence has most often is right 0.31 of the time.
SOLVED, GUESSED = 0.95, 0.4

POSITION = {"kind": "attention", "heads": 2, "qk_source": "position"}
CONSTANT = {"kind": "attention", "heads": 2, "qk_source": "constant", "qk_norm": True}
EMBEDDING = {"kind": "attention", "heads": 2, "qk_source": "embedding", "qk_norm": True}
ALONE = {"kind": "token_mlp"}
TAYLOR = {"kind": "linear_attention", "heads": 2, "head_dim": 8, "value_dim": 16, "qk_norm": True}


def drawn(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [count, 2 PAIRS + ASKED] and the labels of the last ASKED."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.randint(KEYS, (count, PAIRS), generator=generator) + KEYS
    asked = torch.randint(PAIRS, (count, ASKED), generator=generator)
    pairs = torch.stack((values, keys), dim=-1).flatten(1)
    return torch.cat((pairs, keys.gather(1, asked)), dim=1), values.gather(1, asked)


def accuracy(mixers: list[dict[str, Any]], steps: int) -> float:
    """Of a model of these mixers, after so many steps."""
    blocks = {f"b{index}": {"mixer": one, "channel": {"kind": "none"}} for index, one in enumerate(mixers)}
    sizes = {"vocab_size": 2 * KEYS, "hidden_size": 32, "tie_embeddings": False}
    model = build(ModelSpec.model_validate(sizes | {"blocks": blocks, "layers": [*blocks]})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids, labels = drawn(BATCH, generator)
        logits = model(ids, use_cache=False, logits_to_keep=ASKED).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ids, labels = drawn(1000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        guesses = model.eval()(ids, use_cache=False, logits_to_keep=ASKED).logits.argmax(-1)
    return float((guesses == labels).double().mean())


@pytest.mark.parametrize(
    ("mixers", "steps"),
    [
        ([POSITION, EMBEDDING], 200),
        ([POSITION, ALONE, EMBEDDING], 200),
        ([ALONE, CONSTANT, EMBEDDING], 200),
        ([ALONE, TAYLOR | {"short_conv": 2}], 400),
    ],
    ids=[
        "places then words",
        "with a layer that mixes nothing",
        "a constant stream then words",
        "second order",
    ],
)
def test_together_they_find_what_stood_before_a_token(mixers: list[dict[str, Any]], steps: int) -> None:
    assert accuracy(mixers, steps) > SOLVED


@pytest.mark.parametrize(
    "mixers",
    [[POSITION, POSITION], [CONSTANT, CONSTANT], [ALONE, EMBEDDING]],
    ids=["places alone", "a constant stream alone", "words alone"],
)
def test_without_one_of_the_two_they_guess(mixers: list[dict[str, Any]]) -> None:
    assert accuracy(mixers, 200) < GUESSED
