"""The Optuna study of a run as a copy in memory, for programs that look at studies: the run itself is not touched."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from heddle.errors import HeddleError
from heddle.search.study import JOURNAL_FILE

# Where optuna-dashboard 0.21 looks for constraints; Optuna 5 keeps them by name elsewhere.
CONSTRAINTS_KEY = "constraints"


def copy_study(journal: Path, into: BaseStorage, name: str, objectives: list[str]) -> int:
    """Copy the study in the file `journal` to `into` under `name`, and give its id there. One of that name goes first.

    Constraints are also written as the list that optuna-dashboard reads, in the order of their names, so that it shows
    which trials are feasible. `objectives` names the study's values.

    Raises:
        HeddleError: "run-not-found" where the journal holds no study yet.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with TemporaryDirectory() as folder:
        # Optuna opens its journals for writing; a copy is all that it gets. A last line that is being written is left out.
        held = journal.read_bytes()
        (Path(folder) / JOURNAL_FILE).write_bytes(held[: held.rfind(b"\n") + 1])
        storage = JournalStorage(JournalFileBackend(str(Path(folder) / JOURNAL_FILE)))
        studies = storage.get_all_studies()
        if not studies:
            raise HeddleError("run-not-found", f"{journal} holds no study yet", hint="look again later")
        trials = storage.get_all_trials(studies[0]._study_id, deepcopy=False)
    for old in into.get_all_studies():
        if old.study_name == name:
            into.delete_study(old._study_id)
    study_id = into.create_new_study(studies[0].directions, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.load_study(study_name=name, storage=into).set_metric_names(objectives)
    for trial in trials:
        into.create_new_trial(study_id, template_trial=_with_list(trial))
    return study_id


def memory() -> BaseStorage:
    """A storage for copies."""
    return InMemoryStorage()


def _with_list(trial: FrozenTrial) -> FrozenTrial:
    found = trial.constraints
    if not found:
        return trial
    shown = copy.copy(trial)
    listed = {CONSTRAINTS_KEY: [found[name] for name in sorted(found)]}
    # Optuna has no public way to write a system attribute of a trial that has ended.
    shown._system_attrs = {**trial.system_attrs, **listed}
    return shown
