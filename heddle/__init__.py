"""Heddle designs, searches and exports hybrid language models under a measured latency budget.

`heddle.api` holds one function for each command, `heddle.specs` reads and writes spec files.
"""

from __future__ import annotations

__version__ = "0.1.0"
