"""Which layer gets which block: exact solvers, and a model of this run's scores that tells them what to try next."""

from heddle.search.placement.counts import best_assignment
from heddle.search.placement.proposals import Question, propose
from heddle.search.placement.quality import QualityModel, Seen

__all__ = ["QualityModel", "Question", "Seen", "best_assignment", "propose"]
