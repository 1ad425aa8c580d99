"""What a person looks at: the report of a run, and its words. Reads run folders, never builds a model."""

from __future__ import annotations

from heddle.dashboards.report import write_report

__all__ = ["write_report"]
