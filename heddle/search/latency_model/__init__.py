"""Latency as a sum over layers: designed, measured, fitted, checked on stacks it has not seen, and asked by a search."""
