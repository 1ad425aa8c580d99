"""What a recorded spec costs, layer by layer, and its graph as a picture: by the plan alone, no model is built."""

from __future__ import annotations

from typing import Any

from heddle import specs
from heddle.compose.picture import svg
from heddle.compose.plan import plan


def layer_costs(text: str, *, context: int, batch: int) -> list[dict[str, Any]]:
    """Names, parameters, FLOPs and bytes of each layer of the spec in `text`, as `heddle show` tells them.

    Raises:
        HeddleErrors: where this heddle cannot read or plan the spec.
    """
    file = specs.loads(text)
    planned = plan(file.spec.model, where=file.where)
    return [layer.summary(context, batch) for layer in planned.layers]


def graph_picture(text: str) -> str:
    """The graph of the spec in `text`, with its shared blocks and what layers take from each other, as SVG.

    Raises:
        HeddleErrors: as `layer_costs`.
    """
    file = specs.loads(text)
    return svg(plan(file.spec.model, where=file.where))


def model_costs(text: str, *, context: int, batch: int) -> dict[str, float]:
    """Parameters, FLOPs and bytes of the whole model of the spec in `text`, its embeddings and head included.

    Raises:
        HeddleErrors: as `layer_costs`.
    """
    file = specs.loads(text)
    planned = plan(file.spec.model, where=file.where)
    return {"parameters": planned.parameters, **planned.cost(context, batch)}
