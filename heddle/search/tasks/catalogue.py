"""From a spec's words to a task and a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from heddle.compose.train import Recipe
from heddle.search.tasks.common_words import CommonWords
from heddle.search.tasks.copying import Copying
from heddle.search.tasks.corpus import load_corpus
from heddle.search.tasks.frequent_words import FrequentWords
from heddle.search.tasks.fuzzy_recall import FuzzyRecall
from heddle.search.tasks.generated import Generated
from heddle.search.tasks.in_context_recall import InContextRecall
from heddle.search.tasks.in_context_regression import InContextRegression
from heddle.search.tasks.induction_heads import InductionHeads
from heddle.search.tasks.masked_bytes import MaskedBytes
from heddle.search.tasks.memorization import Memorization
from heddle.search.tasks.modular_arithmetic import ModularArithmetic
from heddle.search.tasks.mqar import Mqar
from heddle.search.tasks.multi_hop_recall import MultiHopRecall
from heddle.search.tasks.niah import Niah
from heddle.search.tasks.paragraph_topic import ParagraphTopic
from heddle.search.tasks.parity import Parity
from heddle.search.tasks.selective_copying import SelectiveCopying
from heddle.search.tasks.task import Task
from heddle.search.tasks.text import Text
from heddle.search.tasks.tokens import tokens_of
from heddle.search.tasks.variable_tracking import VariableTracking
from heddle.search.tasks.word_problem import WordProblem
from heddle.specs import DataSpec, MaskedBytesTask, MqarTask, Spec, TaskSpec, TextTask, TrainSpec

# The tasks whose examples are drawn, by name; `mqar` and those of text are made in their own way.
GENERATED: dict[str, Callable[..., Generated[Any]]] = {
    one.name: one
    for one in (
        InContextRecall,
        FuzzyRecall,
        SelectiveCopying,
        Memorization,
        InductionHeads,
        Copying,
        Parity,
        WordProblem,
        ModularArithmetic,
        Niah,
        VariableTracking,
        MultiHopRecall,
        CommonWords,
        FrequentWords,
        InContextRegression,
        ParagraphTopic,
    )
}


def make_task(
    task: TaskSpec,
    data: DataSpec,
    *,
    vocab_size: int,
    tokenizer: str = "bytes",
    of_readout: bool = False,
) -> Task:
    """The task that `search.tasks` or `heddle train` names; a task of text reads its corpus here, once.

    `of_readout`: the model has a readout, so `masked_bytes` asks it for one byte of a window.

    Raises what `load_corpus`, `tokens_of` and the tasks raise: `corpus-missing`, `corpus-too-small`,
    `tokenizer-mismatch`, `out-of-range` …
    """
    if isinstance(task, MqarTask):
        return Mqar(
            vocab_size=vocab_size,
            pairs=task.pairs,
            length=task.length,
            easy_first=task.easy_first,
            overwritten=task.overwritten,
            key_tokens=task.key_tokens,
        )
    if not isinstance(task, TextTask | MaskedBytesTask):
        return GENERATED[task.kind](task, vocab_size=vocab_size)
    corpus = load_corpus(data.source, text_field=data.text_field)
    tokens = tokens_of(corpus, tokenizer, vocab_size)
    if isinstance(task, TextTask):
        return Text(tokens, sequence_length=data.sequence_length, vocab_size=vocab_size)
    return MaskedBytes(
        task, tokens, sequence_length=data.sequence_length, vocab_size=vocab_size, of_readout=of_readout
    )


def task_of(task: TaskSpec, spec: Spec) -> Task:
    """The task as the spec's model, data and tokenizer have it."""
    model = spec.model
    return make_task(
        task,
        spec.data,
        vocab_size=model.vocab_size,
        tokenizer=spec.tokenizer,
        of_readout=model.readout is not None,
    )


def recipe_for(task: TaskSpec, train: TrainSpec, *, seed: int | None = None) -> Recipe:
    """The recipe of `train`, with the tokens and the learning rate that the task may name for itself."""
    return Recipe(
        tokens=task.tokens if task.tokens is not None else train.tokens,
        batch_tokens=train.batch_tokens,
        learning_rate=task.learning_rate if task.learning_rate is not None else train.learning_rate,
        weight_decay=train.weight_decay,
        warmup=train.warmup,
        grad_clip=train.grad_clip,
        seed=train.seed if seed is None else seed,
        precision=train.precision,
    )


def recipes_for(task: TaskSpec, train: TrainSpec) -> tuple[Recipe, ...]:
    """A recipe for each of the task's `learning_rates`; without those the one of `recipe_for`."""
    recipe = recipe_for(task, train)
    rates = task.learning_rates or [recipe.learning_rate]
    return tuple(replace(recipe, learning_rate=rate) for rate in rates)
