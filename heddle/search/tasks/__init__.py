"""What models are trained for and judged by."""

from heddle.search.tasks.catalogue import GENERATED, make_task, recipe_for, recipes_for, task_of
from heddle.search.tasks.corpus import Corpus, load_corpus
from heddle.search.tasks.mqar import Mqar
from heddle.search.tasks.task import Score, Task, batches
from heddle.search.tasks.text import Text

__all__ = [
    "GENERATED",
    "Corpus",
    "Mqar",
    "Score",
    "Task",
    "Text",
    "batches",
    "load_corpus",
    "make_task",
    "recipe_for",
    "recipes_for",
    "task_of",
]
