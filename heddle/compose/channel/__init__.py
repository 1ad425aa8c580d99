"""Modules that mix features, one file a kind: twins of `heddle.specs.channel`, found by `compose.blocks`."""
