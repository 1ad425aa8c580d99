"""Which layer gets which block: exact solvers, and a model of this run's scores that tells them what to try next."""

from heddle.search.placement.counts import best_assignment
from heddle.search.placement.curve import Point, curve
from heddle.search.placement.dp import Answer, Certificate, solve
from heddle.search.placement.history import History, Seen
from heddle.search.placement.limits import Timed
from heddle.search.placement.nearest import nearest
from heddle.search.placement.problem import Budget, Problem, Solution, count_budget
from heddle.search.placement.proposals import Question, propose
from heddle.search.placement.quality import QualityModel

__all__ = [
    "Answer",
    "Budget",
    "Certificate",
    "History",
    "Point",
    "Problem",
    "QualityModel",
    "Question",
    "Seen",
    "Solution",
    "Timed",
    "best_assignment",
    "count_budget",
    "curve",
    "nearest",
    "propose",
    "solve",
]
