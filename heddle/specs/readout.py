"""What an encoder says of a whole sequence: how its hidden states become one vector, and that the scores of classes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from heddle.specs.base import Schema
from heddle.specs.kinds import Problem, divisors_near

Classes = Annotated[int, Field(ge=2, le=2**20, description="Classes to tell apart (a count).")]


class ReadoutSpec(Schema):
    """One vector from the hidden states after the last norm, and a linear classifier of it, with a bias."""

    kind: str
    classes: Classes

    def width(self, hidden_size: int) -> int:
        """Features of the vector."""
        return hidden_size

    def problems(self, hidden_size: int) -> list[Problem]:  # noqa: ARG002
        """What cannot be built at this hidden size."""
        return []

    def runtime(self) -> dict[str, Any]:
        """Plain data for the torch module."""
        return self.plain()

    def params(self, hidden_size: int) -> int:  # noqa: ARG002
        """Parameters, those of the classifier left out."""
        return 0

    def flops(self, hidden_size: int, length: int) -> int:
        """FLOPs of reading out a sequence of `length` tokens and of classifying it."""
        return self.pooling_flops(hidden_size, length) + 2 * self.width(hidden_size) * self.classes

    def pooling_flops(self, hidden_size: int, length: int) -> int:  # noqa: ARG002
        """Those of the vector alone."""
        return 0


class LastReadout(ReadoutSpec):
    """The last token that is no padding: it alone has seen all when mixers are causal."""

    kind: Literal["last"] = "last"


class MeanReadout(ReadoutSpec):
    """The mean of all tokens that are no padding."""

    kind: Literal["mean"] = "mean"

    def pooling_flops(self, hidden_size: int, length: int) -> int:
        return hidden_size * length


class ClsReadout(ReadoutSpec):
    """A learned token before the first one, which hears the others through mixers that are not causal (BERT)."""

    kind: Literal["cls"] = "cls"

    def params(self, hidden_size: int) -> int:
        return hidden_size


class EpReadout(ReadoutSpec):
    """Efficient Probing (arXiv 2506.10178): M learned queries, each of which pools a slice of the values of its own.

    A = softmax(U xᵀ / sqrt(C)),   z = concat_m (A_m x) W_v^(m)
    """

    kind: Literal["ep"] = "ep"
    queries: Annotated[int, Field(ge=1, le=4096, description="Queries, each with a slice of the values.")] = (
        32
    )
    reduction: Annotated[
        int, Field(ge=1, le=4096, description="The vector has hidden_size / reduction features.")
    ] = 1

    def width(self, hidden_size: int) -> int:
        return hidden_size // self.reduction

    def problems(self, hidden_size: int) -> list[Problem]:
        if hidden_size % self.reduction:
            what = f"{self.reduction} does not divide hidden_size {hidden_size}"
            return [Problem("reduction", what, divisors_near(self.reduction, hidden_size))]
        width = self.width(hidden_size)
        if width % self.queries == 0:
            return []
        told = f"hidden_size {hidden_size}" if self.reduction == 1 else f"hidden_size / reduction, {width}"
        return [
            Problem("queries", f"{self.queries} does not divide {told}", divisors_near(self.queries, width))
        ]

    def params(self, hidden_size: int) -> int:
        return hidden_size * (self.queries + self.width(hidden_size))

    def pooling_flops(self, hidden_size: int, length: int) -> int:
        # Scores and pooling for each token, the values once: the pooled vectors are projected, not the tokens.
        return 2 * hidden_size * (2 * self.queries * length + self.width(hidden_size))


Readout = Annotated[LastReadout | MeanReadout | ClsReadout | EpReadout, Field(discriminator="kind")]
