"""The tasks that a search may name: what each asks, how large it is, and what its fields must keep."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from heddle.specs.tasks.base import TaskSchema
from heddle.specs.tasks.copying import CopyingTask, InductionHeadsTask, SelectiveCopyingTask
from heddle.specs.tasks.encoders import MaskedBytesTask, ParagraphTopicTask
from heddle.specs.tasks.recall import (
    FuzzyRecallTask,
    InContextRecallTask,
    MqarTask,
    MultiHopRecallTask,
    NiahTask,
    VariableTrackingTask,
)
from heddle.specs.tasks.states import GROUP_ORDERS, ModularArithmeticTask, ParityTask, WordProblemTask
from heddle.specs.tasks.statistics import (
    CommonWordsTask,
    FrequentWordsTask,
    InContextRegressionTask,
    MemorizationTask,
    TextTask,
)

Generated = (
    InContextRecallTask
    | FuzzyRecallTask
    | SelectiveCopyingTask
    | MemorizationTask
    | InductionHeadsTask
    | CopyingTask
    | ParityTask
    | WordProblemTask
    | ModularArithmeticTask
    | NiahTask
    | VariableTrackingTask
    | MultiHopRecallTask
    | CommonWordsTask
    | FrequentWordsTask
    | InContextRegressionTask
    | ParagraphTopicTask
)
TaskSpec = Annotated[MqarTask | TextTask | MaskedBytesTask | Generated, Field(discriminator="kind")]
TASKS: dict[str, type[TaskSchema]] = {
    "mqar": MqarTask,
    "text": TextTask,
    "in_context_recall": InContextRecallTask,
    "fuzzy_recall": FuzzyRecallTask,
    "selective_copying": SelectiveCopyingTask,
    "memorization": MemorizationTask,
    "induction_heads": InductionHeadsTask,
    "copying": CopyingTask,
    "parity": ParityTask,
    "word_problem": WordProblemTask,
    "modular_arithmetic": ModularArithmeticTask,
    "niah": NiahTask,
    "variable_tracking": VariableTrackingTask,
    "multi_hop_recall": MultiHopRecallTask,
    "common_words": CommonWordsTask,
    "frequent_words": FrequentWordsTask,
    "in_context_regression": InContextRegressionTask,
    "masked_bytes": MaskedBytesTask,
    "paragraph_topic": ParagraphTopicTask,
}

__all__ = [
    "GROUP_ORDERS",
    "TASKS",
    "CommonWordsTask",
    "CopyingTask",
    "FrequentWordsTask",
    "FuzzyRecallTask",
    "Generated",
    "InContextRecallTask",
    "InContextRegressionTask",
    "InductionHeadsTask",
    "MaskedBytesTask",
    "MemorizationTask",
    "ModularArithmeticTask",
    "MqarTask",
    "MultiHopRecallTask",
    "NiahTask",
    "ParagraphTopicTask",
    "ParityTask",
    "SelectiveCopyingTask",
    "TaskSchema",
    "TaskSpec",
    "TextTask",
    "VariableTrackingTask",
    "WordProblemTask",
]
