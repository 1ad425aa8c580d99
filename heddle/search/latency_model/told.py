"""What the latency model of a search is worth, in a line or two for its terminal and its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def no_better_than(mape: float, constant_mape: float, flops_mape: float) -> str | None:
    """The simpler model whose held-out error is no larger; None where the fit beats both."""
    least, name = min((flops_mape, "a line in FLOPs"), (constant_mape, "one number for all"))
    return name if mape >= least else None


def which(fits: Sequence[Mapping[str, Any]], device: str) -> str:
    """The fits that run.json has: on what they were made, and their errors on stacks they had not seen."""
    return f"latency model of {device}: {'; '.join(map(_fit, fits))}"


def doubts(fits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each fit that is no better than a simpler model."""
    for fit in fits:
        seen = fit["held_out"]
        simpler = no_better_than(seen["mape"], seen["constant_mape"], seen["flops_mape"])
        if simpler is not None:
            other = min(seen["constant_mape"], seen["flops_mape"])
            yield (
                f"at {fit['label']} the latency model is no better than {simpler} "
                f"(held-out error {_percent(seen['mape'])}, and {_percent(other)}): do not go by it there"
            )


def _fit(fit: Mapping[str, Any]) -> str:
    seen = fit["held_out"]
    margin = "no margin" if seen["margin"] is None else f"margin {_percent(seen['margin'])}"
    errors = (
        f"error {_percent(seen['mape'])} on {seen['n']} others (worst {_percent(seen['worst'])}), {margin}"
    )
    return f"{fit['label']} fitted on {fit['measured']} stacks, {errors}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
