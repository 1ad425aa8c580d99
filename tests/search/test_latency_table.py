"""The table of measurements: found again by what was measured, and taken over only where sentinels agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from heddle.kernels.configs.found import cache_folder
from heddle.search.latency_model.table import Table, code_digest, timing_environment

HERE = {"device": "A", "kind": "cpu", "dtype": "float32", "threads": 2, "torch": "1", "driver": None}
WANTED = [{"spec": f"s{number}", "phase": "decode"} for number in range(12)]


class Machine:
    """Measures what it is told, `factor` times slower, and counts."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.asked = factor, list[str]()

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(inputs["spec"])
        return {"median_ms": self.factor * (1 + int(inputs["spec"][1:])), "ratio": None}


def filled(folder: Path, environment: Mapping[str, Any] = HERE) -> Table:
    table, machine = Table(environment, folder), Machine()
    for inputs in WANTED:
        table.put(inputs, machine(inputs))
    return table


def test_a_row_is_found_by_what_was_measured_with_what(tmp_path: Path) -> None:
    filled(tmp_path)
    assert Table(HERE, tmp_path).get(WANTED[3]) == {"median_ms": 4.0, "ratio": None}
    assert Table(HERE, tmp_path).get({**WANTED[3], "phase": "prefill"}) is None
    assert Table({**HERE, "torch": "2"}, tmp_path).get(WANTED[3]) is None


def test_a_torn_row_is_no_row(tmp_path: Path) -> None:
    table = filled(tmp_path)
    for path in tmp_path.rglob("*.json"):
        path.write_bytes(path.read_bytes()[:20])
    assert table.get(WANTED[0]) is None
    assert Table({**HERE, "torch": "2"}, tmp_path).adopt(WANTED, Machine(), ("median_ms",)) == 0


def test_new_software_that_is_as_fast_takes_the_rows_over(tmp_path: Path) -> None:
    filled(tmp_path)
    table, machine = Table({**HERE, "torch": "2"}, tmp_path), Machine(1.015)
    assert table.adopt(WANTED, machine, ("median_ms", "ratio")) == 7
    assert machine.asked == ["s0", "s2", "s5", "s8", "s11"]
    assert table.get(WANTED[0]) == {"median_ms": 1.015, "ratio": None}
    assert table.get(WANTED[1]) == {"median_ms": 2.0, "ratio": None}
    assert table.adopt(WANTED, machine, ("median_ms",)) == 0


def test_new_software_that_is_slower_takes_nothing_over(tmp_path: Path) -> None:
    filled(tmp_path)
    table, machine = Table({**HERE, "torch": "2"}, tmp_path), Machine(1.03)
    assert table.adopt(WANTED, machine, ("median_ms",)) == 0
    assert machine.asked == ["s0"]
    assert table.get(WANTED[1]) is None


def test_another_machine_s_rows_are_never_taken_over(tmp_path: Path) -> None:
    filled(tmp_path)
    machine = Machine()
    for change in ({"device": "B"}, {"dtype": "bfloat16"}, {"threads": 4}):
        assert Table({**HERE, **change}, tmp_path).adopt(WANTED, machine, ("median_ms",)) == 0
    assert machine.asked == []


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEDDLE_CACHE", "/mine")
    assert cache_folder() == Path("/mine")
    monkeypatch.delenv("HEDDLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/heddle")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/one")
    assert cache_folder() == Path("/home/one/.cache/heddle")


def test_the_environment_names_device_software_and_code() -> None:
    found = timing_environment("cpu")
    assert set(found) == {*HERE, "cuda", "triton", "kernels", "modules"}
    assert found["kernels"] == code_digest("kernels") != code_digest("compose")
