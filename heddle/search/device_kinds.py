"""Where the timings of a run are taken in a cluster of unlike machines: on nodes of one kind, whichever of them is free.

The kind of a node is what Ray calls its accelerator (the resource "accelerator_type:H100"), which an administrator may give to
nodes without any; of other nodes without GPU it is the model of their processor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heddle.errors import HeddleError
from heddle.search.cores import processor_name

ACCELERATOR = "accelerator_type:"
# A node that has not answered by then is not timed on; it is asked again for the next timing.
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Node:
    """A node that could be timed on; `size` is its CPUs, or its GPUs. `kind` is None where it has not told."""

    id: str
    kind: str | None
    size: int


class DeviceKind:
    """The kind of node that timings are bound to: `wanted` where the cluster has it, else that of which there is most.

    `name` is None where the GPUs of a cluster have no names: then nothing is bound.
    """

    def __init__(self, device: str, wanted: str | None = None) -> None:
        self._device = device
        # What processors are called, by the node.
        self._told: dict[str, str] = {}
        sizes = Counter[str]()
        for node in self._nodes():
            if node.kind is not None:
                sizes[node.kind] += node.size
        most = max(sorted(sizes), key=sizes.__getitem__, default=None)
        self.name = wanted if wanted in sizes else most

    def share(self) -> dict[str, Any]:
        """Options of a Ray call that bind it to the kind.

        Raises:
            HeddleError: "other-device" where no node of that processor is left. For a GPU Ray waits: a cluster may grow.
        """
        if self._device == "cuda":
            return {} if self.name is None else {"accelerator_type": self.name}
        return self._at_largest()[1]

    def whole(self) -> dict[str, Any]:
        """The same with a whole GPU, or with all CPUs of the largest node of the kind: no other would ever take so many."""
        if self._device == "cuda":
            return {"num_gpus": 1, **self.share()}
        node, bound = self._at_largest()
        return {"num_cpus": node.size, **bound}

    def _at_largest(self) -> tuple[Node, dict[str, Any]]:
        nodes = list(self._nodes())
        mine = [node for node in nodes if node.kind == self.name]
        if not mine:
            kinds = ", ".join(sorted({node.kind for node in nodes if node.kind})) or "none"
            what = f"no node of this cluster is of the kind this search is timed on, {self.name}; there are: {kinds}"
            raise HeddleError("other-device", what, hint="--resume goes on once one is back")
        largest = max(mine, key=lambda node: (node.size, node.id))
        if len(mine) == len(nodes):
            return largest, {}
        return largest, {"scheduling_strategy": NodeAffinitySchedulingStrategy(largest.id, soft=False)}

    def _nodes(self) -> Iterator[Node]:
        """Those of now that have something to time on."""
        unit = "GPU" if self._device == "cuda" else "CPU"
        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(unit, 0) >= 1]
        if unit == "CPU":
            self._ask([node["NodeID"] for node in alive if accelerator_of(node) is None])
        for node in alive:
            name = node["NodeID"]
            yield Node(name, accelerator_of(node) or self._told.get(name), int(node["Resources"][unit]))

    def _ask(self, nodes: list[str]) -> None:
        """Have those that have not told yet tell what their processors are called."""
        own, new = ray.get_runtime_context().get_node_id(), [node for node in nodes if node not in self._told]
        if own in new:
            self._told[own] = processor_name()
        ask = ray.remote(num_cpus=0, max_retries=0)(processor_name)
        asked = {
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
            for node in new
            if node != own
        }
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE_S) if asked else ([], [])
        for reference in ready:
            try:
                self._told[asked[reference]] = ray.get(reference)
            except RayError:
                # It ended meanwhile.
                continue


def accelerator_of(node: Mapping[str, Any]) -> str | None:
    """What Ray calls the accelerator of one of `ray.nodes()`."""
    found = sorted(
        name.removeprefix(ACCELERATOR) for name in node["Resources"] if name.startswith(ACCELERATOR)
    )
    return found[0] if found else None


def require_device(found: str, wanted: str | None) -> None:
    """Raises HeddleError "other-device" for a timing that was taken on `found`, of a run of `wanted`."""
    if wanted is not None and found != wanted:
        what = f"a spec was timed on {found}, and this search is of {wanted}; the timing is not kept"
        hint = "a node must have GPUs of one kind (CUDA_VISIBLE_DEVICES); --resume goes on"
        raise HeddleError("other-device", what, hint=hint)
