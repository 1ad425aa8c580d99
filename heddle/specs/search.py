"""The part of a spec that says what a search evaluates, and within which budgets."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag

from heddle.specs.base import CountText, Duration, Schema, count_of
from heddle.specs.search_longer import LongerSpec
from heddle.specs.search_rungs import RungsSpec
from heddle.specs.tasks import TaskSpec

# How a candidate is judged by name; any other is module:function.
EVALUATORS = ("train", "supernet", "random_features", "reach")
# Those that score right and wrong answers alone.
OF_ANSWERS = ("random_features", "reach")
OWN_EVALUATOR = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
Phase = Literal["decode_ms", "prefill_ms", "train_ms"]


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


RelativeTo = Annotated[
    str | None,
    Field(
        max_length=1024,
        description="all-<block>, the model with that block in every layer, or a spec file beside this one; null: none.",
    ),
]
Batch = Annotated[OnDevice, Field(description="Sequences at once: a count, or {cpu: …, cuda: …}.")]
Context = Annotated[OnDevice, Field(description="Tokens of a sequence: a count, or {cpu: …, cuda: …}.")]
# `64M` as well as 64000000; with relative_to it is a ratio, so it need not be whole.
Amount = Annotated[
    float,
    Field(gt=0, le=1e15),
    BeforeValidator(count_of, json_schema_input_type=Annotated[float, Field(gt=0, le=1e15)] | CountText),
]


class Budget(Schema):
    """A limit on a latency measured on the device present: milliseconds, or a ratio to another model's."""

    phase: Annotated[
        Phase,
        Field(
            description="decode_ms: one token after `context` tokens. prefill_ms: a pass over `context` tokens. train_ms: "
            "forward and backward of `context` tokens, without the optimizer."
        ),
    ]
    at_most: Annotated[float, Field(gt=0, le=1e9, description="Milliseconds; with relative_to, a ratio.")]
    relative_to: RelativeTo = None
    batch: Batch = 1
    context: Context


class PeakBudget(Schema):
    """A limit on the most bytes of tensors at one time, weights and caches included: measured on the device present, beside the
    time."""

    phase: Literal["peak_bytes"]
    of: Annotated[
        Literal["decode", "prefill", "train"],
        Field(
            description="decode: one token after `context` tokens. prefill: a pass over `context` tokens. train: forward and "
            "backward of `context` tokens; states of the optimizer are not in it."
        ),
    ] = "prefill"
    at_most: Annotated[Amount, Field(description="Bytes; with relative_to, a ratio.")]
    relative_to: RelativeTo = None
    batch: Batch = 1
    context: Context


class CacheBudget(Schema):
    """A limit on what decoding holds in memory besides the weights, computed from the spec: caches and states, in bfloat16."""

    phase: Literal["cache_bytes"]
    at_most: Annotated[Amount, Field(description="Bytes of the whole batch; with relative_to, a ratio.")]
    relative_to: RelativeTo = None
    batch: Batch = 1
    context: Context


class ParameterBudget(Schema):
    """A limit on the parameters of the whole model, computed from the spec; a tied head has none of its own."""

    phase: Literal["parameters"]
    at_most: Annotated[Amount, Field(description="Parameters; with relative_to, a ratio.")]
    relative_to: RelativeTo = None


BudgetSpec = Annotated[Budget | PeakBudget | CacheBudget | ParameterBudget, Field(discriminator="phase")]
# What a budget is written under -> its schema.
BUDGETS: dict[str, type[Schema]] = {
    **dict.fromkeys(get_args(Phase), Budget),
    "peak_bytes": PeakBudget,
    "cache_bytes": CacheBudget,
    "parameters": ParameterBudget,
}
SPEC_FILES = (".yaml", ".yml", ".json")


def names_file(relative_to: str) -> bool:
    """Whether it is a spec file that a budget is relative to, not a block of this one."""
    return relative_to.lower().endswith(SPEC_FILES)


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
ServerName = Literal["vllm", "sglang"]


class ExportSpec(Schema):
    """Where what is found must be able to live."""

    must_fit: Annotated[
        list[TargetName | ServerName],
        Field(
            min_length=1,
            max_length=16,
            description="Classes of transformers that must each hold a spec exactly, and servers that must take it as one of "
            "them, or it is not tried; the winner is exported to the first.",
        ),
    ]


class SearchSpec(Schema):
    """What a search evaluates, how long, and within which budgets."""

    tasks: Annotated[
        list[TaskSpec], Field(min_length=1, max_length=16, description="Each task is an objective.")
    ]
    evaluator: Annotated[
        str,
        Field(
            max_length=200,
            description="How a spec is judged at a task: train, or by weights that all specs share supernet, or without training "
            "random_features or reach, or a function of yours as module:function.",
        ),
    ] = "train"
    rungs: Annotated[
        RungsSpec | None,
        Field(
            description="Shorter trainings, after each of which only the best go on; null: each is trained in full."
        ),
    ] = None
    trials: Annotated[
        int, Field(ge=1, le=10**6, description="Specs to try in all, those over a budget included.")
    ] = 20
    time: Annotated[
        Duration | None,
        Field(description="No trial begins after it: seconds, or 90s, 5m, 2h; null: no limit."),
    ] = None
    timeout: Annotated[
        Duration | None,
        Field(
            description="An evaluation that takes longer is ended and made again, twice: as `time`; "
            "null: 20 times the longest one of its kind, 10m at least."
        ),
    ] = None
    sampler: Annotated[
        Literal["tpe", "nsga2", "gp", "random", "grid", "all"],
        Field(
            description="Optuna's sampler; grid: each combination of open values once; all: each spec once, brute force."
        ),
    ] = "tpe"
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="Seed of the search.")] = 0
    round: Annotated[
        int | None,
        Field(ge=1, le=10_000, description="Trials asked for at once (a count); null: by the workers."),
    ] = None
    per_gpu: Annotated[
        int,
        Field(
            ge=1,
            le=16,
            description="Trainings side by side on one GPU (a count); one that runs out of memory there is made again alone.",
        ),
    ] = 4
    budgets: list[BudgetSpec] = Field(
        default_factory=list, max_length=16, description="Limits that a winner keeps."
    )
    latency: Annotated[
        Literal["measure", "model"],
        Field(
            description="measure: every spec is timed. model: one that the model of `heddle bench SPEC --fit` puts over a budget "
            "by more than its margin is not."
        ),
    ] = "measure"
    latency_model: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=4096,
            description="File of that model, beside this one; null: what was fitted last for this space on this machine.",
        ),
    ] = None
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
    confirm_longer: Annotated[
        LongerSpec | None,
        Field(
            description="The best trials are trained again for longer at the end, which changes no winner; null: they are not."
        ),
    ] = None
