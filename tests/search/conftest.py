"""One Ray for all search tests, and one tiny search whose folder serves many of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from heddle.search.latency import Effort
from heddle.search.record import Run
from heddle.search.run import search
from heddle.search.workers import Workers
from heddle.specs import SpecFile, loads

QUICK = Effort(warmup=1, least=3, most=5, seconds=0.2)

# 20 specs, more than the trials; attention of two windows, because it is quick on a CPU.
TINY = """
version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 256
  blocks:
    near: {{mixer: {{kind: attention, heads: 2, window: {{choice: [8, 16]}}}}, channel: {{kind: gelu, ratio: 1.0}}}}
    full: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: gelu, ratio: 1.0}}}}
  layers: {{placement: {{length: 4, of: [near, full], count: {{full: {{int: [1, 2]}}}}}}}}
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 8k, batch_tokens: 512, learning_rate: 3.0e-3}}
search:
  tasks: [{{mqar: {{pairs: 2, length: 16}}}}, text]
  trials: 6
  round: 2
  budgets: [{{decode_ms: {{at_most: {at_most}, relative_to: all-full, batch: 1, context: 64}}}}]
  confirm_seeds: 2
"""


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Ray workers; a search in this process uses them too, and leaves them running."""
    with Workers("cpu") as found:
        found.warm_up()
        yield found


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file large enough for the task's splits."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = (f"line {n}: the square of {n} is {n * n} and its cube {n**3}.\n" for n in range(12_000))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny_text(corpus: Path) -> str:
    """A spec whose search takes seconds; every model of it keeps the budget."""
    return TINY.format(corpus=corpus, at_most=1e6)


@pytest.fixture(scope="session")
def tiny_file(tiny_text: str) -> SpecFile:
    return loads(tiny_text, file="tiny.yaml")


@pytest.fixture(scope="session")
def tiny_run(tiny_file: SpecFile, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny search, run once to its end. Tests only read its folder."""
    assert workers.parallel
    return search(tiny_file, tmp_path_factory.mktemp("tiny") / "run", effort=QUICK)
