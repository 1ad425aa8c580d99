"""HOW: from a spec to a plan, from a plan to a module. Imports nothing by itself; name the file you need.

`compose.plan` needs no torch; `compose.build`, `compose.train` and `compose.hf` do.
"""
