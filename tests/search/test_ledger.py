"""The ledger and the other files of a run: whole or absent after a crash, kept on a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heddle.errors import HeddleError
from heddle.search import durable
from heddle.search.durable import LineLog, cut_torn_tail, read_lines, write_whole
from heddle.search.ledger import Entry, Ledger, key_of


def entry(key: str = "00aa", result: dict[str, object] | None = None, **fields: object) -> Entry:
    return Entry("abcd", "mqar", key, {"seed": 0}, {"value": 0.5} if result is None else result, **fields)  # type: ignore[arg-type]


def test_a_key_depends_on_every_input_and_not_on_their_order() -> None:
    inputs = {"data": "d", "recipe": {"tokens": 1, "seed": 0}, "environment": {"torch": "2"}}
    assert key_of(inputs) == key_of(dict(reversed(inputs.items())))
    for change in ({"data": "e"}, {"recipe": {"tokens": 2, "seed": 0}}, {"environment": {}}):
        assert key_of({**inputs, **change}) != key_of(inputs)


def test_an_entry_comes_back_as_it_was_put(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.get("abcd", "mqar", "00aa") is None
    put = ledger.put(entry(attempts=2, wall_s=1.5))
    assert ledger.get("abcd", "mqar", "00aa") == put
    assert put.ok
    assert put.attempts == 2
    assert put.time


def test_the_first_result_of_a_key_stays(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = ledger.put(entry(result={"value": 1.0}))
    assert ledger.put(entry(result={"value": 2.0})) == first
    assert ledger.get("abcd", "mqar", "00aa") == first


def test_a_failure_keeps_its_reason(tmp_path: Path) -> None:
    reason = {"code": "loss-not-finite", "message": "the loss is nan at step 3 of 10"}
    Ledger(tmp_path).put(Entry("abcd", "text", "00aa", {}, None, reason))
    found = Ledger(tmp_path).get("abcd", "text", "00aa")
    assert found is not None
    assert not found.ok
    assert found.reason == reason


def test_leftovers_of_a_writer_that_died_are_passed_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.put(entry())
    (tmp_path / "abcd" / "mqar" / ".00bb.json.x1y2.tmp").write_text('{"half')
    assert [found.key for found in ledger.entries()] == ["00aa"]
    assert ledger.get("abcd", "mqar", "00bb") is None


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    writer = f"""
import json
from pathlib import Path
from heddle.search.durable import write_whole
for count in range(1_000_000):
    write_whole(Path({str(path)!r}), json.dumps([count] * 20_000).encode())
"""
    for pause in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", writer])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        values = json.loads(path.read_bytes())
        assert len(values) == 20_000
        assert len(set(values)) == 1


def test_a_full_disk_names_the_file_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    kept = ledger.put(entry())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(HeddleError, match="MB free") as caught:
        ledger.put(entry(key="00bb"))
    assert caught.value.code == "disk-full"
    assert str(ledger.path("abcd", "mqar", "00bb")) in caught.value.what
    assert list((tmp_path / "abcd" / "mqar").iterdir()) == [ledger.path("abcd", "mqar", "00aa")]
    assert ledger.get("abcd", "mqar", "00aa") == kept


def test_another_error_of_the_disk_is_not_called_full(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "file" / "inside.json", b"{}")


def test_a_torn_last_line_is_cut_and_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "one"}\n{"event": "tw')
    assert read_lines(path) == [{"event": "one"}]
    log = LineLog(path)
    log.write({"event": "two"})
    log.close()
    assert read_lines(path) == [{"event": "one"}, {"event": "two"}]
    assert (tmp_path / "events.jsonl.torn").read_text() == '{"event": "tw\n'
    assert cut_torn_tail(path) == b""


def test_a_line_that_found_no_space_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LineLog(tmp_path / "events.jsonl")
    log.write({"event": "one"})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(HeddleError, match=r"no space to write .*events\.jsonl"):
            log.write({"event": "two"})
    log.write({"event": "three"})
    log.close()
    assert [line["event"] for line in read_lines(tmp_path / "events.jsonl")] == ["one", "three"]
