"""Pass: what the kind of the model allows.

Needs: `resolve_layers`.
Gives: the same graph; after it no mixer of a causal language model sees later tokens, and only an encoder has a readout.
"""

from __future__ import annotations

from heddle.compose.passes.graph import Failures, Graph, Locate, MixerBlock, model_of, nodes_of
from heddle.specs.constant_stream import encoder_problems
from heddle.specs.model_kind import causality_problems, readout_problems


def check_kind(graph: Graph, locate: Locate) -> Graph:
    """The graph, unchanged.

    Raises:
        HeddleErrors: not-causal for a mixer that sees later tokens in a causal language model, once for each block, at its
        first layer; conflicting-fields for a readout there, and for one whose token hears nothing.
    """
    model, failures = model_of(graph), Failures("check_kind", locate)
    mixers = [(name, node) for name, node in nodes_of(graph) if isinstance(node, MixerBlock)]
    is_deaf = all(node.spec.is_causal for _, node in mixers)
    if model.kind == "causal_lm":
        for problem in readout_problems({"kind": model.kind, "readout": model.readout}):
            failures.add(problem.code, problem.what, problem.field, problem.hint)
    elif model.readout is not None and model.readout.kind == "cls" and is_deaf:
        what = "the token stands first, and where all mixers are causal the first token hears no other"
        failures.add("conflicting-fields", what, "readout.kind", "last, or a mixer that is not causal")
    told: set[tuple[str, str]] = set()
    of_kind = causality_problems if model.kind == "causal_lm" else encoder_problems
    for name, node in mixers:
        for problem in of_kind(node.spec, name):
            mistake = (node.block, problem.field.removeprefix(name))
            if mistake not in told:
                told.add(mistake)
                failures.add(problem.code, problem.what, problem.field, problem.hint)
    failures.check()
    return graph
