"""Spaces of searches that demand classes of transformers or servers."""

from __future__ import annotations

from heddle.specs import SpecFile, loads

TEXT = """
version: 1
name: served
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 256
{model}
data: {{source: python-stdlib, sequence_length: 32}}
search: {{tasks: [text], trials: 4, export: {{must_fit: [{targets}]}}}}
"""
HYBRID = """
  blocks:
    full: {mixer: {kind: attention, heads: 2, qk_norm: {choice: [false, true]}, gate: {choice: [true, false]}},
      channel: {kind: swiglu, ratio: 1.0}}
    linear:
      mixer:
        choice:
          - {kind: retnet, heads: 2}
          - {kind: gated_deltanet, heads: 2, short_conv: {int: [2, 2]}}
          - {kind: attention, heads: 2, qk_norm: true, gate: true, window: {choice: [null, 16]}}
      channel: {kind: {choice: [geglu, swiglu]}, width: 32}
    other: {mixer: {choice: [{kind: mamba2, heads: 2}, {kind: mamba2, heads: 4}]}, channel: {kind: swiglu, width: 32}}
  layers: {placement: {length: 3, of: [full, linear, other], count: {full: {int: [0, 2]}, linear: {int: [0, 3]}}}}
"""
# All windows of the class are equal, which no block alone can know.
WINDOWS = """
  blocks:
    near: {mixer: {kind: attention, heads: 2, qk_norm: true, window: {int: [1, 90]}}, channel: {kind: swiglu, ratio: 1.0}}
    far: {mixer: {kind: attention, heads: 2, qk_norm: true, window: WINDOW}, channel: {kind: swiglu, ratio: 1.0}}
  layers: [near, far]
"""


def file_of(model: str, targets: str) -> SpecFile:
    return loads(TEXT.format(model=model.strip("\n"), targets=targets), file="a.yaml")
