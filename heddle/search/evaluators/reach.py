"""What a model's masks alone let it answer, whatever its weights (arXiv 2502.01951)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.errors import HeddleError, Where
from heddle.search.tasks.scoring import ratio_with_error
from heddle.search.tasks.task import Score, Task
from heddle.specs import ModelSpec, Site
from heddle.specs.pattern import layers_of
from heddle.specs.sight import first_seen, reach


def reach_score(model: ModelSpec, task: Task) -> Score:
    """The accuracy of a model that answers all that its layers let it hear of, and guesses the rest.

        s = share of the held-out answers whose `reach` is at most Σ (window - 1) over the layers, or that stand among the
            sink tokens of one
        score = s + (1 - s) · chance

    An upper bound but for luck; `normalised` of it is s. Sliding windows that are trained reach it: two layers of window 8
    answer those queries of MQAR whose key stands at most 14 tokens back. A layer that sees all, and every recurrent one,
    makes it 1. No weights are made, and nothing runs.

    Raises `bad-argument` for a task that is not scored by accuracy.
    """
    if task.metric != "accuracy":
        what = f"reach bounds an accuracy, and {task.name} is scored by {task.metric}"
        raise HeddleError("bad-argument", what, where=Where(path="search.tasks"))
    layers = layers_of(model)
    site = Site(model.hidden_size, 0, len(layers), model.norm_eps, model.context_length)
    seen = reach(layers, site)
    inputs, targets = task.held_out("cpu")
    asked = targets >= 0
    heard = asked if seen is None else asked & _heard(task.reach(inputs), seen, first_seen(layers, site))
    counts = asked.sum(dim=1)
    expected = heard.sum(dim=1) + (counts - heard.sum(dim=1)) * task.chance
    value, se = ratio_with_error(expected.tolist(), counts.tolist())
    extras = {} if seen is None else {"tokens_back": float(seen)}
    return Score(value, se, len(inputs), extras)


def _heard(back: Tensor, seen: int, first: int) -> Tensor:
    """Which answers rest on what stands at most `seen` tokens back, or among the `first` tokens.  Shapes:  back, out: [B, T]"""
    return (back <= seen) | (torch.arange(back.shape[1]) - back < first)
