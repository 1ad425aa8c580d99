"""The part of a spec that says what a search evaluates, and within which budgets."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag

from heddle.specs.base import Count, Duration, Schema


class MqarTask(Schema):
    """Multi-query associative recall (arXiv 2312.04927), generated as it is needed; scored by accuracy."""

    kind: Literal["mqar"] = "mqar"
    pairs: Annotated[int, Field(ge=1, le=65_536, description="Key-value pairs of a sequence (a count).")] = 8
    length: Annotated[int, Field(ge=4, le=10**6, description="Tokens of a sequence, at least 4 × pairs.")] = (
        64
    )
    tokens: Annotated[Count | None, Field(description="Tokens to train on; null: train.tokens.")] = None
    learning_rate: Annotated[
        float | None, Field(gt=0, le=10, description="Highest learning rate; null: train.learning_rate.")
    ] = None


class TextTask(Schema):
    """Language modelling on `data`; scored in bits per byte."""

    kind: Literal["text"] = "text"
    tokens: Annotated[Count | None, Field(description="Tokens to train on; null: train.tokens.")] = None
    learning_rate: Annotated[
        float | None, Field(gt=0, le=10, description="Highest learning rate; null: train.learning_rate.")
    ] = None


TaskSpec = Annotated[MqarTask | TextTask, Field(discriminator="kind")]
TASKS: dict[str, type[Schema]] = {"mqar": MqarTask, "text": TextTask}
Phase = Literal["decode_ms", "prefill_ms"]
PHASES: tuple[str, ...] = get_args(Phase)


class PerDevice(Schema):
    """A number for each kind of device."""

    cpu: Annotated[int, Field(ge=1, le=10**8, description="On a CPU.")]
    cuda: Annotated[int, Field(ge=1, le=10**8, description="On a CUDA GPU.")]


def _form(value: Any) -> str:
    return "devices" if isinstance(value, (dict, PerDevice)) else "number"


OnDevice = Annotated[
    Annotated[Annotated[int, Field(ge=1, le=10**8)], Tag("number")] | Annotated[PerDevice, Tag("devices")],
    Discriminator(_form),
]


class Budget(Schema):
    """A limit on a latency measured on the device present: milliseconds, or a ratio to another model's."""

    phase: Annotated[
        Phase,
        Field(
            description="decode_ms: one token after `context` tokens. prefill_ms: a pass over `context` tokens."
        ),
    ]
    at_most: Annotated[float, Field(gt=0, le=1e9, description="Milliseconds; with relative_to, a ratio.")]
    relative_to: Annotated[
        str | None,
        Field(
            max_length=80, description="all-<block>, the model with that block in every layer; null: none."
        ),
    ] = None
    batch: Annotated[OnDevice, Field(description="Sequences at once: a count, or {cpu: …, cuda: …}.")] = 1
    context: Annotated[OnDevice, Field(description="Tokens of a sequence: a count, or {cpu: …, cuda: …}.")]


# The names of `heddle.compose.targets.catalogue`, which this package may not read.
TargetName = Literal[
    "llama",
    "qwen3",
    "qwen2",
    "mistral",
    "qwen3_5_text",
    "qwen3_next",
    "olmo_hybrid",
    "granitemoehybrid",
    "falcon_h1",
    "bamba",
    "olmo3",
    "smollm3",
    "gemma3_text",
    "kimi_linear",
    "minimax",
]


class ExportSpec(Schema):
    """Where what is found must be able to live."""

    must_fit: Annotated[
        list[TargetName],
        Field(
            min_length=1,
            max_length=16,
            description="Classes of transformers that must each hold a spec exactly, or it is not tried; the winner is exported "
            "to the first.",
        ),
    ]


class SearchSpec(Schema):
    """What a search evaluates, how long, and within which budgets."""

    tasks: Annotated[
        list[TaskSpec], Field(min_length=1, max_length=16, description="Each task is an objective.")
    ]
    trials: Annotated[
        int, Field(ge=1, le=10**6, description="Specs to try in all, those over a budget included.")
    ] = 20
    time: Annotated[
        Duration | None,
        Field(description="No trial begins after it: seconds, or 90s, 5m, 2h; null: no limit."),
    ] = None
    sampler: Annotated[Literal["tpe", "nsga2", "gp", "random"], Field(description="Optuna's sampler.")] = (
        "tpe"
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="Seed of the search.")] = 0
    round: Annotated[
        int | None,
        Field(ge=1, le=10_000, description="Trials asked for at once (a count); null: by the workers."),
    ] = None
    budgets: list[Budget] = Field(
        default_factory=list, max_length=16, description="Limits that a winner keeps."
    )
    min_reach: Annotated[
        int | None,
        Field(
            ge=1,
            le=10**8,
            description="Specs whose windows carry a token's content less far, in tokens, are not tried; null: all are.",
        ),
    ] = None
    export: Annotated[
        ExportSpec | None, Field(description="What a spec must be exportable to; null: anything is tried.")
    ] = None
    confirm_seeds: Annotated[
        int,
        Field(
            ge=0, le=100, description="New seeds with which the winner and uniform placement are retrained."
        ),
    ] = 3
