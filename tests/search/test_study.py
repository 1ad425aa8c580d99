"""Optuna behind one driver: mended journals, adopted trials, told once, the same draws after a resume."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from heddle.errors import HeddleError
from heddle.search.study import JOURNAL_FILE, RunLock, Study, open_storage

TASKS = ("maximize", "minimize")
SAMPLERS = ("tpe", "random", "nsga2", "gp")


def study(folder: Path, sampler: str = "tpe", directions: tuple[str, ...] = TASKS) -> Study:
    return Study(open_storage(folder), "run", directions, sampler=sampler, seed=3, startup=3)


def draw(one: Study, number: int) -> tuple[int, str]:
    width = one.suggest(number, "width", lambda trial: trial.suggest_int("width", 1, 40))
    kind = one.suggest(number, "kind", lambda trial: trial.suggest_categorical("kind", ["a", "b", "c"]))
    return width, kind


def tell(one: Study, number: int, width: int) -> None:
    """Odd widths break the budget; the others score by their width."""
    if width % 2:
        one.tell_infeasible(number, {"decode": width / 40}, (0.0, 8.0))
    else:
        one.tell_complete(number, (width / 40, 8.0 - width / 40), {"decode": -0.1})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_study_draws_what_the_uninterrupted_one_drew(tmp_path: Path, sampler: str) -> None:
    whole, parts = study(tmp_path / "whole", sampler), study(tmp_path / "parts", sampler)
    drawn: dict[str, list[tuple[int, str]]] = {"whole": [], "parts": []}
    for _ in range(8):
        parts = study(tmp_path / "parts", sampler)
        for name, one in (("whole", whole), ("parts", parts)):
            number = one.ask()
            drawn[name].append(draw(one, number))
            tell(one, number, drawn[name][-1][0])
    assert drawn["whole"] == drawn["parts"]
    assert len(set(drawn["whole"])) > 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_trial_whose_driver_died_while_asking_is_adopted_with_the_same_values(
    tmp_path: Path, sampler: str
) -> None:
    whole, broken = study(tmp_path / "whole", sampler), study(tmp_path / "broken", sampler)
    for one in (whole, broken):
        for _ in range(4):
            number = one.ask()
            tell(one, number, draw(one, number)[0])
    number = broken.ask()
    broken.suggest(number, "width", lambda trial: trial.suggest_int("width", 1, 40))
    again = study(tmp_path / "broken", sampler)
    assert [trial.number for trial in again.trials if trial.state == TrialState.RUNNING] == [number]
    again.adopt(number)
    assert draw(again, number) == draw(whole, whole.ask())
    tell(again, number, 2)
    assert again.trials[number].state.is_finished()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_learn_which_specs_are_infeasible(tmp_path: Path, sampler: str) -> None:
    """Everything above 10 breaks the budget: after 30 trials few of those are asked for, unless at random."""
    one = Study(open_storage(tmp_path), "run", TASKS, sampler=sampler, seed=0, startup=6)
    widths = []
    for _ in range(30):
        number = one.ask()
        width, _kind = draw(one, number)
        widths.append(width)
        if width > 10:
            one.tell_infeasible(number, {"decode": width / 10 - 1}, (0.0, 8.0))
        else:
            one.tell_complete(number, (width / 40, 8.0 - width / 40), {"decode": width / 10 - 1})
    late = sum(width <= 10 for width in widths[15:])
    assert late >= (2 if sampler == "random" else 7), widths


def test_a_trial_is_told_once(tmp_path: Path) -> None:
    one = study(tmp_path)
    number = one.ask()
    draw(one, number)
    one.tell_complete(number, (0.5, 2.0), {"decode": -0.5})
    again = study(tmp_path)
    assert again.trials[number].values == [0.5, 2.0]
    assert again.trials[number].constraints == {"decode": -0.5}


def test_a_kill_between_constraint_and_state_is_mended(tmp_path: Path) -> None:
    one = study(tmp_path)
    number = one.ask()
    draw(one, number)
    one._constrain(number, {"decode": -0.5})
    again = study(tmp_path)
    again.adopt(number)
    again.tell_complete(number, (0.5, 2.0), {"decode": -0.5})
    assert again.trials[number].constraints == {"decode": -0.5}
    assert again.trials[number].state == TrialState.COMPLETE


def test_a_failed_trial_keeps_its_reason_and_does_not_disturb_the_sampler(tmp_path: Path) -> None:
    one = study(tmp_path)
    for _ in range(6):
        number = one.ask()
        draw(one, number)
        one.tell_failed(number, "text: loss-not-finite: the loss is nan")
    assert {trial.state for trial in one.trials} == {TrialState.FAIL}
    assert one.trials[0].user_attrs["reason"].startswith("text: loss-not-finite")


@pytest.mark.parametrize("cut", [1, 20, 90])
def test_a_torn_journal_is_mended_and_the_search_goes_on(tmp_path: Path, cut: int) -> None:
    one = study(tmp_path)
    for _ in range(3):
        number = one.ask()
        tell(one, number, draw(one, number)[0])
    journal = tmp_path / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-cut])
    again = study(tmp_path)
    assert journal.read_bytes().endswith(b"\n")
    assert (tmp_path / (JOURNAL_FILE + ".torn")).exists()
    for trial in again.trials:
        if trial.state == TrialState.RUNNING:
            again.adopt(trial.number)
            tell(again, trial.number, draw(again, trial.number)[0])
    again.ask()
    assert len(again.trials) == 4


def test_optuna_itself_still_refuses_a_torn_journal(tmp_path: Path) -> None:
    """The reason for the repair: when this fails, Optuna mends it and ours can go."""
    one = study(tmp_path)
    draw(one, one.ask())
    journal = tmp_path / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-20] + b"\n{")
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    with pytest.raises(ValueError):
        optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(backend)).ask()


def test_a_dead_drivers_lock_does_not_hold_up_the_next_one(tmp_path: Path) -> None:
    study(tmp_path)
    (tmp_path / (JOURNAL_FILE + ".lock")).write_text("")
    started = time.monotonic()
    study(tmp_path).ask()
    assert time.monotonic() - started < 5


def test_a_second_driver_is_refused_by_the_pid_of_the_first(tmp_path: Path) -> None:
    holder = f"""
import time
from pathlib import Path
from heddle.search.study import RunLock
with RunLock(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(HeddleError, match=f"pid {process.pid}") as caught, RunLock(tmp_path):
            pass
        assert caught.value.code == "run-locked"
    finally:
        process.kill()
        process.communicate()
    with RunLock(tmp_path):
        pass


def test_a_database_url_is_taken_as_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    one = Study(open_storage(tmp_path, url), "run", TASKS, sampler="tpe", seed=0, startup=2)
    number = one.ask()
    tell(one, number, draw(one, number)[0])
    again = Study(open_storage(tmp_path, url), "run", TASKS, sampler="tpe", seed=0, startup=2)
    assert len(again.trials) == 1
    assert not (tmp_path / JOURNAL_FILE).exists()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_has_its_values_and_the_others_are_drawn(tmp_path: Path, sampler: str) -> None:
    one = study(tmp_path, sampler)
    for number in range(6):
        assert one.ask({"width": 7} if number % 2 else None) == number
        width, _kind = draw(one, number)
        tell(one, number, width)
    assert [trial.params["width"] for trial in one.trials][1::2] == [7, 7, 7]
    assert len({trial.params["kind"] for trial in one.trials}) > 1


def test_a_seed_whose_driver_died_before_it_asked_is_asked_for_once(tmp_path: Path) -> None:
    whole, broken = study(tmp_path / "whole"), study(tmp_path / "broken")
    for one in (whole, broken):
        tell(one, one.ask(), draw(one, 0)[0])
    broken._study.enqueue_trial({"width": 7})
    again = study(tmp_path / "broken")
    assert (again.count, again.unfinished) == (1, [])
    assert again.ask({"width": 7}) == 1
    assert draw(again, 1) == draw(whole, whole.ask({"width": 7}))
    assert again.ask() == 2
    assert [trial.state for trial in again.trials][1:] == [TrialState.RUNNING] * 2
    # One that was asked for is adopted, with the values it was given.
    third = study(tmp_path / "broken")
    third.adopt(1)
    assert draw(third, 1)[0] == 7
