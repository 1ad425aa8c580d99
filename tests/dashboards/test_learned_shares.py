"""The trial's page tells what the routers of each layer learned, where there are any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from latency_models import TRIAL
from seen import client, get

from heddle.dashboards.report import page
from heddle.search.record import read_run


def test_learned_shares_stand_on_the_trials_page_by_layer(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    at = f"/run/run/trial/{TRIAL}"
    assert "Learned share" not in get(client(folder), at).text
    trial = read_run(folder).trial(TRIAL)
    for path in folder.glob(f"ledger/{trial.hash}/mqar/*.json"):
        entry = json.loads(path.read_bytes())
        entry["result"]["learned_share"] = [[0, 0.125], [1, 0.75]]
        path.write_text(json.dumps(entry))
    assert read_run(folder).trial(TRIAL).scores["mqar"].learned_share == ((0, 0.125), (1, 0.75))
    text = get(client(folder), at).text
    assert "Learned share" in text
    assert "12.5 %" in text
    assert "75.0 %" in text


def test_a_report_tells_what_tokens_and_weights_a_routed_model_was_timed_with(
    make_run: Callable[..., Path],
) -> None:
    folder = make_run()
    assert "task tokens" not in page(read_run(folder))
    trial = read_run(folder).trial(TRIAL)
    for path in folder.glob(f"ledger/{trial.hash}/latency/*.json"):
        entry = json.loads(path.read_bytes())
        entry["result"] |= {"inputs": "task", "weights": "trained", "learned_share": [[1.0, 0.25]]}
        path.write_text(json.dumps(entry))
    assert "task tokens, trained weights" in page(read_run(folder))
