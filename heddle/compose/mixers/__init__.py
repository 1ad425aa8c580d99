"""Modules that mix along time, one file a kind: twins of `heddle.specs.mixers`, found by `compose.blocks`."""
