"""heddle.lock and its replay: the same trials and scores to the last bit, and what differs is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fast_search import scored

from heddle import folder_commands
from heddle.errors import HeddleError
from heddle.kernels.configs.found import running_digest
from heddle.search.latency import Effort
from heddle.search.lock import FOLLOWED_FILE, LOCK_FILE, Frozen, lock_of, plain, read_lock
from heddle.search.record import Run, read_run
from heddle.search.replay import Moved, Ratio, Replay, compare, replay
from heddle.search.run import search
from heddle.specs import SpecFile, loads

QUICK = Effort(warmup=1, least=3, most=5, seconds=0.2)


@pytest.fixture(scope="module")
def lock(tiny_run: Run) -> dict[str, Any]:
    return read_lock(tiny_run.path / LOCK_FILE)


@pytest.fixture(scope="module")
def replayed(tiny_run: Run, workers: object, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """The tiny search made again from its lockfile, which lies alone in a folder."""
    assert workers is not None
    alone = tmp_path_factory.mktemp("alone") / "any-name.json"
    alone.write_bytes((tiny_run.path / LOCK_FILE).read_bytes())
    return replay(alone, tmp_path_factory.mktemp("replay") / "run", deterministic=False)


def test_the_lockfile_is_the_run(tiny_run: Run, lock: dict[str, Any]) -> None:
    assert lock["run"]["status"] == "finished"
    assert [trial["hash"] for trial in lock["trials"]] == [trial.hash for trial in tiny_run.trials]
    assert lock["winner"] == {"number": tiny_run.best, "hash": tiny_run.trials[tiny_run.best or 0].hash}
    assert loads(lock["spec"]["text"]).spec.name == "tiny"
    assert set(lock["data"]) == {"mqar", "text"}
    assert lock["seeds"] == {"search": 0, "train": 0}
    assert lock["sampler"] == {"sampler": "tpe", "round": 2, "startup": 2}
    assert lock["environment"]["kernels"] == running_digest()
    assert {"python", "packages", "device", "device_name", "driver"} <= set(lock["environment"])
    assert plain(lock_of(tiny_run)) | {"time": 0} == lock | {"time": 0}


def test_every_latency_is_in_the_table(tiny_run: Run, lock: dict[str, Any]) -> None:
    frozen = Frozen(lock)
    for trial in tiny_run.trials:
        place = {"phase": "decode", "batch": 1, "context": 64, "beside": tiny_run.reference.hash}  # type: ignore[union-attr]
        row = frozen.row(trial.hash, place | {"purpose": "search"})
        assert row is not None
        assert row["result"]["median_ms"] == trial.latency["decode_ms@1x64"].median_ms
        again = frozen.row(trial.hash, place | {"purpose": "again"})
        assert (again is not None) == (trial.number in tiny_run.front)
        assert frozen.row(trial.hash, place | {"purpose": "search", "context": 65}) is None


@pytest.mark.slow
def test_a_replay_is_the_search_to_the_last_bit(tiny_run: Run, replayed: Replay) -> None:
    assert replayed.changes == ()
    assert replayed.same
    assert replayed.run.path != tiny_run.path
    for ours, theirs in zip(replayed.run.trials, tiny_run.trials, strict=True):
        assert (ours.params, ours.layers, ours.hash) == (theirs.params, theirs.layers, theirs.hash)
        assert {t: s.value for t, s in ours.scores.items()} == {t: s.value for t, s in theirs.scores.items()}
        assert ours.latency == theirs.latency
    assert (replayed.run.front, replayed.run.best) == (tiny_run.front, tiny_run.best)
    assert replayed.run.confirm == tiny_run.confirm


def test_a_replay_times_nothing_but_the_front_of_now(tiny_run: Run, replayed: Replay) -> None:
    timed = [e for e in replayed.run.events if e["event"] == "evaluation_started" and e["stage"] == "latency"]
    assert {event["number"] for event in timed} == {-1, *tiny_run.front}
    assert {moved.number for moved in replayed.moved} == {-1, *tiny_run.front}
    then = {trial.number: trial for trial in tiny_run.trials}
    for moved in replayed.moved:
        if moved.number >= 0:
            assert moved.then_ms == then[moved.number].latency[moved.label].median_ms
        assert moved.now_ms > 0
        # Both were timed in turns with the reference of the budget.
        assert moved.relative_to == "all-full"
        assert moved.then_ratio is not None
        assert moved.now_ratio is not None
        if moved.number >= 0:
            timed = then[moved.number].latency[moved.label]
            assert moved.then_ratio == (timed.ratio, timed.ratio_low, timed.ratio_high)
    assert lock_of(replayed.run)["latencies"] == lock_of(tiny_run)["latencies"]


@pytest.mark.usefixtures("workers")
def test_a_finished_replay_resumed_evaluates_nothing(replayed: Replay, tiny_file: SpecFile) -> None:
    before = len([e for e in replayed.run.events if e["event"] == "evaluation_started"])
    again = search(tiny_file, replayed.run.path, resume=True, effort=QUICK)
    assert len([e for e in again.events if e["event"] == "evaluation_started"]) == before
    assert (replayed.run.path / FOLLOWED_FILE).exists()


def test_what_differs_is_told_by_part(lock: dict[str, Any]) -> None:
    other = json.loads(json.dumps(lock))
    other["environment"]["packages"]["torch"] = "0.0"
    other["trials"][1]["scores"]["text"] += 1e-12
    other["trials"][2]["hash"] = "0" * 16
    other["winner"] = {"number": 5, "hash": "0" * 16}
    del other["trials"][3]
    found = list(compare(lock, other))
    assert {change.part for change in found} == {"environment", "scores", "trials", "winner"}
    assert "trial 3: " in "\n".join(map(str, found))
    assert f"environment: torch: {lock['environment']['packages']['torch']} then, 0.0 now" in map(str, found)
    assert list(compare(lock, lock)) == []


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"kind": "lock", "format": 99}', '{"kind": "lock", "format": 1}']
)
def test_a_broken_lockfile_is_bad_input(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    with pytest.raises(HeddleError, match=LOCK_FILE) as caught:
        replay(tmp_path / LOCK_FILE, tmp_path / "run")
    assert caught.value.code == "lock-broken"
    assert not (tmp_path / "run").exists()


def test_other_data_is_told_before_anything_runs(lock: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(json.dumps(lock | {"data": lock["data"] | {"text": "0" * 16}}))
    with pytest.raises(HeddleError, match="text") as caught:
        replay(tmp_path / LOCK_FILE, tmp_path / "run")
    assert caught.value.code == "run-mismatch"
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.usefixtures("workers")
def test_a_deterministic_search_is_chosen_by_its_first_timings(tiny_text: str, tmp_path: Path) -> None:
    """The first timings keep the budget; the second ones, which would unseat everybody, are told alone."""
    run = search(
        loads(tiny_text), tmp_path / "run", trials=2, deterministic=True, effort=QUICK, evaluate=scored
    )
    hashes = [trial.hash for trial in run.trials]
    assert run.best is not None
    assert all(
        "deterministic" in json.loads(path.read_bytes())["inputs"]
        for path in run.path.glob("ledger/*/text/*.json")
    )
    lock = read_lock(run.path)
    assert lock["deterministic"]
    slow = json.loads(json.dumps(lock))
    for row in slow["latencies"]:
        if row["purpose"] == "again":
            row["result"]["ratio"] = row["result"]["ratio_low"] = row["result"]["median_ms"] = 1e9
    (tmp_path / LOCK_FILE).write_text(json.dumps(slow))
    again = replay(tmp_path / LOCK_FILE, tmp_path / "again", evaluate=scored)
    assert (again.run.best, [trial.hash for trial in again.run.trials]) == (run.best, hashes)
    assert again.same
    assert read_run(tmp_path / "again").meta["deterministic"]


@pytest.mark.usefixtures("workers")
def test_a_run_begun_without_deterministic_does_not_become_so(tiny_run: Run, tiny_file: SpecFile) -> None:
    with pytest.raises(HeddleError, match="deterministic") as caught:
        search(tiny_file, tiny_run.path, resume=True, deterministic=True)
    assert caught.value.code == "run-mismatch"


@pytest.mark.parametrize(
    ("moved", "told"),
    [
        (
            Moved(
                3,
                "decode_ms@1x64",
                1.0,
                1.5,
                None,
                None,
                "all-full",
                Ratio(0.9, 0.88, 0.92),
                Ratio(0.945, None, None),
            ),
            "trial 3, decode_ms@1x64: 0.900 [0.880, 0.920] × all-full then, 0.945 now (+5.0%);"
            " 1 ms then, 1.5 ms now (+50.0%)",
        ),
        (
            Moved(-1, "decode_ms@1x64", 2.0, 1.0, 10_000, 20_000),
            "reference, decode_ms@1x64: 2 ms then, 1 ms now (-50.0%); peak 10,000 bytes then, 20,000 now",
        ),
    ],
)
def test_a_timing_of_now_is_told_in_ratios_where_a_reference_took_turns(moved: Moved, told: str) -> None:
    assert folder_commands._moved_text(moved) == told
