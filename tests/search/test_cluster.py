"""`--ray-address`: a search runs on the cluster it names and leaves it running; a wrong one is told in seconds."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import clusters
import pytest
from clusters import Head, free_port

from heddle import cli
from heddle.search import watch
from heddle.search.record import read_run

CORES = 2


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A private cluster, gone after the tests."""
    with clusters.head(CORES) as found:
        yield found


# A search whose models are scored without training: what counts is where that was done.
SEARCH = """
import os, sys
from pathlib import Path
from heddle.search.evaluate import Evaluation
from heddle.search.latency import Effort
from heddle.search.run import search
from heddle.search.workers import Workers
from heddle.specs import load

def scored(training, task):
    result = {"task": task.name, "metric": task.metric, "value": task.best, "se": 0.0, "n": 1, "normalised": 1.0}
    result |= {"seed": 0, "steps": os.getppid(), "tokens": 1, "wall_s": 0.0, "losses": [(1, 1.0)]}
    return Evaluation(result)

effort = Effort(warmup=1, least=2, most=2, seconds=0.1, builds=1)
search(load(sys.argv[1]), Path(sys.argv[2]), trials=1, ray_address=sys.argv[3], evaluate=scored, effort=effort)
with Workers("cpu", address=sys.argv[3]) as workers:
    print(workers.parallel, workers.call(os.getppid))
"""
JOIN = "import sys; from heddle.search.cluster import join; join(sys.argv[1], {})"


def done(script: str, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_search_runs_on_the_cluster_it_names_and_leaves_it_running(
    head: Head, tiny_text: str, tmp_path: Path
) -> None:
    before = head.family()
    spec, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    spec.write_text(tiny_text.replace("confirm_seeds: 2", "confirm_seeds: 0"))
    searched = done(SEARCH, spec, folder, head.address, env=head.env)
    assert searched.returncode == 0, searched.stderr
    run = read_run(folder)
    assert run.count("complete") == 1
    (raylet,) = (pid for pid, row in watch._table().items() if pid in before and row.name == "raylet")
    assert {score.steps for score in run.trials[0].scores.values()} == {raylet}
    # The same processes, and they took work after the search.
    assert before.items() <= head.family().items()
    assert searched.stdout.split() == [str(CORES), str(raylet)]


@pytest.mark.slow
def test_another_token_is_told_as_such(head: Head) -> None:
    began = time.monotonic()
    refused = done(JOIN, head.address, env={**head.env, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    assert f"the Ray cluster at {head.address} refuses this token" in refused.stderr
    assert "RAY_AUTH_TOKEN" in refused.stderr
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no-such-host.invalid:6379", "here:99999"]
)
def test_an_address_without_a_cluster_is_told_within_seconds(
    address: str, tiny_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    spec.write_text(tiny_text)
    address, began = address.format(port=free_port()), time.monotonic()
    with pytest.raises(SystemExit) as left:
        cli.main(["search", str(spec), "--out", str(folder), "--ray-address", address])
    assert left.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"no Ray cluster at {address}: nothing answers there" in told
    assert "bad-argument" in told
    assert time.monotonic() - began < 20
    assert not folder.exists()
