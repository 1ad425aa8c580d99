"""Products of one input with several weights as one, in a graph on its way to a compiler.

Narrow models spend their time on many small products. One with the rows of all weights is one launch and reads its input once,
backward as well, where it also spares the sums of what each weight passes back.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

# Rows of a joint weight are filled up to a multiple: rows of results then begin where 16 bytes do, which fast products want.
MULTIPLE = 16
# The gradient of a weight is a product along all rows of the input, for which few programs find work: each takes so many.
PART_ROWS = 512


def join_products(module: GraphModule) -> GraphModule:
    """The same with one call of `products` for all products with one input; `module` itself, changed."""
    graph = module.graph
    place = {node: at for at, node in enumerate(graph.nodes)}
    of_input: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_plain_product(node):
            of_input[node.args[0]].append(node)
    for nodes in of_input.values():
        # The input may have been such a product itself, and be another node since.
        first, source = nodes[0], nodes[0].args[0]
        joined = [node for node in nodes if place[node.args[1]] < place[first]]
        with graph.inserting_before(first):
            made = graph.call_function(products, (source, *(node.args[1] for node in joined)))
            parts = [graph.call_function(operator.getitem, (made, at)) for at in range(len(joined))]
        for node, part in zip(joined, parts, strict=True):
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return module


def products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The products of `x` with each of `weights`.

    Gradients of weights are summed in parts of PART_ROWS rows, each rounded to the dtype of the product.

    Shapes:  x: [..., D];  weights: [rows, D] each;  out: [..., rows] each
    """
    *outer, width = x.shape
    sizes = [len(one) for one in weights]
    spare = -sum(sizes) % MULTIPLE if len(weights) > 1 else 0
    filling = (weights[0].new_zeros(spare, width),) if spare else ()
    weight = torch.cat((*weights, *filling)) if len(weights) > 1 else weights[0]
    rows = math.prod(outer)
    parts = rows // PART_ROWS if rows % PART_ROWS == 0 else 1
    if parts > 1:
        y = torch.bmm(x.reshape(parts, -1, width), weight.mT.expand(parts, -1, -1)).reshape(*outer, -1)
    else:
        y = torch.nn.functional.linear(x, weight)
    return torch.split(y, [*sizes, spare] if spare else sizes, dim=-1)[: len(weights)]


def _is_plain_product(node: Node) -> bool:
    """Whether it is a product with a weight and no bias."""
    is_linear: bool = node.op == "call_function" and node.target is torch.nn.functional.linear
    given: tuple[Any, ...] = (*node.args, *node.kwargs.values())
    return is_linear and all(isinstance(each, Node) for each in given[:2]) and given[2:] in ((), (None,))
