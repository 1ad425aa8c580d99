"""Which ops are timed at which shapes: read off the ops themselves.

python tests/bench/cases.py        prints them
"""

from __future__ import annotations

import itertools

from heddle.kernels.bench import PHASES, TIMED, timed_as


def cases() -> list[tuple[str, str, dict[str, int]]]:
    """(op, phase, shape) of everything that `run.py` times on a GPU."""
    found = []
    for op in itertools.chain.from_iterable(map(timed_as, TIMED)):
        for phase in PHASES if op.step else PHASES[:2]:
            shapes = op.cases.decode_shapes if phase.startswith("decode") else op.cases.bench_shapes
            found += [(op.name, phase, dict(shape)) for shape in shapes]
    return found


if __name__ == "__main__":
    for name, phase, shape in cases():
        print(name, phase, shape)
