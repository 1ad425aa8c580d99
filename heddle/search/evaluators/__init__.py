"""How a candidate is judged, from what costs nothing to a training of its own."""

from heddle.search.evaluators.evaluator import NAMED, Scored, evaluator_of, own_evaluator
from heddle.search.evaluators.head_scores import HeadScores, head_scores
from heddle.search.evaluators.layer_profile import Blocks, LayerProfile, layer_profile
from heddle.search.evaluators.layer_scores import LayerScores, layer_scores
from heddle.search.evaluators.random_features import random_feature_score
from heddle.search.evaluators.reach import reach_score

__all__ = [
    "NAMED",
    "Blocks",
    "HeadScores",
    "LayerProfile",
    "LayerScores",
    "Scored",
    "evaluator_of",
    "head_scores",
    "layer_profile",
    "layer_scores",
    "own_evaluator",
    "random_feature_score",
    "reach_score",
]
