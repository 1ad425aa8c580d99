"""Modules of the kinds in `heddle.specs.optional`."""
