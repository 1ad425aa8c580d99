"""A real search of a few small models, as a spec and as a command."""

from __future__ import annotations

import json
from pathlib import Path

TINY_SEARCH = """\
version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: 32
  blocks:
    linear:
      mixer: {choice: [{kind: gated_deltanet, heads: 2}, {kind: decay_attention, heads: 2}]}
      channel: {kind: swiglu}
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: swiglu}}
  layers:
    placement: {length: 3, of: [linear, full], count: {full: {int: [1, 2]}}}
tokenizer: bytes
data: {source: corpus.txt, sequence_length: 64}
train: {tokens: 8k, batch_tokens: 1024, learning_rate: 3.0e-3}
search:
  tasks: [{mqar: {pairs: 2, length: 16, tokens: 8k}}, text]
  trials: 4
  confirm_seeds: 2
  # Loose on purpose: a run of a few trials must have a winner on any machine.
  budgets:
    - decode_ms: {at_most: 5.0, relative_to: all-full, batch: 1, context: 256}
"""


# `heddle search`, but for a tenth of the time to take latencies, which no option asks for.
SEARCH = """
import functools, sys
from heddle import cli
from heddle.search import run
from heddle.search.latency import Effort
run.search = functools.partial(run.search, effort=Effort(warmup=1, least=3, most=10, seconds=0.2))
cli.main(sys.argv[1:])
"""


def small_corpus(path: Path) -> None:
    """Some of Python's own library as text."""
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    path.write_text("\n".join(source.read_text(encoding="utf-8") for source in sources) * 4)
