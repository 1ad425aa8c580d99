"""The quickstart's own search, with real timings and a score that is arithmetic: what its report shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from predicted_search import QUICK, scored

from heddle.dashboards.latency_section import expected_rows
from heddle.dashboards.report import page
from heddle.search.run import search
from heddle.specs import load

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_report_of_the_quickstart_sets_predicted_beside_measured_again(
    workers: object, tmp_path: Path
) -> None:
    assert workers is not None
    file = load(ROOT / "examples/quickstart.yaml")
    assert file.space.placement is not None
    run = search(file, tmp_path / "run", evaluate=scored, effort=QUICK)
    assert run.status == "finished"
    (budget,) = run.budgets
    rows = expected_rows(run)
    assert len(rows) == len(run.front) > 0
    report = page(run)
    assert "Predicted latencies" in report
    for name, label, predicted, measured, error in rows:
        assert label == budget.label
        assert float(str(predicted)) > 0 < float(str(measured))
        told = float(str(error).removesuffix(" %")) / 100
        assert told == pytest.approx(float(str(measured)) / float(str(predicted)) - 1, abs=0.02)
        assert all(str(one) in report for one in (name, predicted, measured, error))
