"""From a spec's words to a task and a recipe."""

from __future__ import annotations

from heddle.compose.train import Recipe
from heddle.search.tasks.corpus import load_corpus
from heddle.search.tasks.mqar import Mqar
from heddle.search.tasks.task import Task
from heddle.search.tasks.text import Text
from heddle.search.tasks.tokens import tokens_of
from heddle.specs import DataSpec, MqarTask, TextTask, TrainSpec


def make_task(
    task: MqarTask | TextTask, data: DataSpec, *, vocab_size: int, tokenizer: str = "bytes"
) -> Task:
    """The task that `search.tasks` or `heddle train` names; the text task reads its corpus here, once.

    Raises what `load_corpus`, `tokens_of` and the tasks raise: `corpus-missing`, `corpus-too-small`,
    `tokenizer-mismatch` …
    """
    if isinstance(task, MqarTask):
        return Mqar(vocab_size=vocab_size, pairs=task.pairs, length=task.length)
    corpus = load_corpus(data.source, text_field=data.text_field)
    tokens = tokens_of(corpus, tokenizer, vocab_size)
    return Text(tokens, sequence_length=data.sequence_length, vocab_size=vocab_size)


def recipe_for(task: MqarTask | TextTask, train: TrainSpec, *, seed: int | None = None) -> Recipe:
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
