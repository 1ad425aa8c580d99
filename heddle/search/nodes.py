"""Whether the nodes of a cluster run the heddle of the driver: else a result would not be what its key says."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heddle.errors import HeddleError

# A node that has not answered by then is busy or about to end: its evaluations will tell.
PATIENCE_S = 60.0


def installed() -> dict[str, str]:
    """Versions of heddle and torch on this machine, and a digest of heddle's files; "none" for what is not there.

    It is sent by value to nodes that may have no heddle, and imports what it needs.
    """
    import hashlib
    import importlib.metadata
    import importlib.util
    from pathlib import Path

    found = {}
    for name in ("heddle-lm", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    package = importlib.util.find_spec("heddle")
    digest = hashlib.sha256()
    for folder in (package.submodule_search_locations or ()) if package else ():
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return {**found, "heddle's files": digest.hexdigest()[:12] if package else "none"}


class SameCode:
    """The nodes of a cluster that were asked whether their heddle and torch are the driver's."""

    def __init__(self) -> None:
        self._own = installed()
        self._asked, self._silent = set[str](), set[str]()

    def ask_again(self) -> None:
        """Those that did not answer are asked by the next `require`."""
        self._asked -= self._silent

    def require(self) -> None:
        """Raises HeddleError "bad-argument" for a node, not asked yet, whose heddle or torch is another, and names both."""
        new = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        new = {node: address for node, address in new.items() if node not in self._asked}
        if not new:
            return
        self._silent = set(new) - _compared(self._own, new)
        self._asked |= set(new)


def _compared(own: Mapping[str, str], nodes: Mapping[str, str]) -> set[str]:
    """Those of `nodes`, id -> address, that answered, and have what this machine has."""
    # By the name of a module that no node can import, the function itself travels.
    installed.__module__ = "__main__"
    ask = ray.remote(num_cpus=0, max_retries=0)(installed)
    asked = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in nodes
    }
    same = set()
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE_S)
    for reference in ready:
        try:
            _compare(own, ray.get(reference), nodes[asked[reference]])
            same.add(asked[reference])
        except RayError:
            # It ended meanwhile.
            continue
    return same


def _compare(own: Mapping[str, str], theirs: Mapping[str, str], node: str) -> None:
    other = [f"{name} {theirs[name]} instead of {own[name]}" for name in own if theirs.get(name) != own[name]]
    if other:
        hint = "install there what this machine has, start the node with the same PYTHONPATH, or take it out of the cluster"
        raise HeddleError("bad-argument", f"the Ray node {node} has {', '.join(other)}", hint=hint)
