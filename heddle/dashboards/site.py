"""The runs that a dashboard shows: found under one folder, read as they grow, and nothing outside of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from heddle.dashboards.named_specs import NamedSpec, named_specs
from heddle.errors import HeddleError
from heddle.search.durable import is_name
from heddle.search.follow import Follower
from heddle.search.longer_results import LONGER_FILE
from heddle.search.record import CONFIRM_FILE, EVENTS_FILE, LEDGER_FOLDER, RUN_FILE, Run

# A page waits so long, or for so many lines of the record, for a large run; what was not read by then comes with the next
# looks, which are short, since a page that is asked for meanwhile waits for the one at work.
PATIENCE_S, PATIENCE_LINES, LOOK_S = 0.25, 1000, 0.1
# Pages asked for while a run is being read show what was read so short a time ago, and leave the reading to the looks.
RECENT_S = 1.0
LOGS = "logs"
# As in `heddle.search.training`, whose import brings PyTorch.
TRAIN_FILE = "train.json"
# As in `heddle.search.study`, whose import takes a second.
JOURNAL_FILE = "study.journal"
# As in `heddle.search.latency_model.find`, whose import brings PyTorch.
MODEL_FILE = "latency_model.json"
# What is read of a run, besides single logs.
READ = (RUN_FILE, EVENTS_FILE, CONFIRM_FILE, LONGER_FILE, LEDGER_FOLDER)
# A log is shown from its end, where the failure is told.
LOG_BYTES = 200_000
KEPT = 64


class Watched:
    """One run, and what was worked out from it as it stands."""

    def __init__(self, key: str, folder: Path) -> None:
        self.key, self.folder = key, folder
        self.follower = Follower(folder)
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, tuple[Run, Any]] = OrderedDict()

    def run(self, seconds: float = PATIENCE_S) -> Run:
        """The run, or as much of it as could be read in so many seconds.

        Raises:
            HeddleError: "run-not-found", also where the record is damaged.
        """
        return self.follower.recent(RECENT_S) or self._read(seconds, PATIENCE_LINES)

    def read_on(self) -> None:
        """Take up some more of a run that is not read to its end. Raises HeddleError as `run`."""
        self._read(LOOK_S, inf)

    def _read(self, seconds: float, lines: float) -> Run:
        inside = self.folder.resolve()
        for name in READ:
            if not (self.folder / name).resolve().is_relative_to(inside):
                told = f"{name} of {self.folder} is a link that leads out of it"
                raise HeddleError("run-not-found", told, hint="name the folder that it leads to")
        try:
            return self.follower.read(seconds, lines)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            told = f"{self.folder} cannot be read: {type(error).__name__}: {error}"
            raise HeddleError(
                "run-not-found", told, hint="heddle search SPEC --out DIR --resume mends a torn record"
            ) from None

    def once(self, run: Run, key: object, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for a `key` until the run changes."""
        held = self._kept.get(key)
        if held is None or held[0] is not run:
            held = (run, make())
            with self._lock:
                self._kept[key] = held
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return held[1]

    def version(self) -> str:
        """Another text whenever a page of the run may look different."""
        return repr(self.follower.stamp())

    def seen(self) -> str:
        """The version of what was read last."""
        return repr(self.follower.seen)

    def logs(self, number: int) -> list[str]:
        """The names of the logs of a trial."""
        folder = self.folder / LOGS
        return sorted(path.name for path in folder.glob(f"{number:04d}-*.log") if self._inside(path))

    def log(self, name: str) -> str | None:
        """The end of a log; None where the run has none of that name."""
        path = self.folder / LOGS / name
        if not (is_name(name) and name.endswith(".log") and self._inside(path)):
            return None
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read().decode("utf-8", "replace")

    def journal(self) -> Path | None:
        """Optuna's journal of the study; None where the run has none."""
        path = self.folder / JOURNAL_FILE
        return path if self._inside(path) else None

    def latency_model(self) -> str | None:
        """The latency model that the search goes by, as it was written; None where the run has none."""
        path = self.folder / MODEL_FILE
        return path.read_text("utf-8") if self._inside(path) else None

    def _inside(self, path: Path) -> bool:
        """Whether `path` is a file of the run itself, also when links are followed."""
        return path.is_file() and path.resolve().is_relative_to(self.folder.resolve())


class Site:
    """All runs under `root`, which is a run itself or holds runs; runs that appear later are found too.

    `specs` are files that the user named beside them.
    """

    def __init__(
        self, root: Path, bench: Path | None = None, specs: Mapping[str, NamedSpec] | None = None
    ) -> None:
        self.root, self.bench, self.specs = root, bench, dict(specs or {})
        self._known: dict[str, Watched] = {}

    @property
    def is_run(self) -> bool:
        """Whether `root` is a run itself, and no folder of runs."""
        return (self.root / RUN_FILE).is_file()

    def runs(self) -> dict[str, Watched]:
        """The runs by their keys, which are names of folders. A link that leads out of `root` is no run of it."""
        if self.is_run:
            found = {self.root.resolve().name: self.root}
        else:
            inside = self.root.resolve()
            folders = (path.parent for path in sorted(self.root.glob(f"*/{RUN_FILE}")))
            found = {path.name: path for path in folders if path.resolve().is_relative_to(inside)}
        for key, folder in found.items():
            self._known.setdefault(key, Watched(key, folder))
        return {key: self._known[key] for key in found}

    @property
    def is_training(self) -> bool:
        """Whether `root` is a finished training."""
        return not self.is_run and (self.root / TRAIN_FILE).is_file()

    def trainings(self) -> list[str]:
        """The finished trainings by their names; as with runs, no link leads out of `root`."""
        if self.is_training:
            return [self.root.resolve().name]
        inside = self.root.resolve()
        found = sorted(self.root.glob(f"*/{TRAIN_FILE}"))
        return [path.parent.name for path in found if path.resolve().is_relative_to(inside)]

    def training(self, key: str) -> Path:
        """The folder of that training. Raises HeddleError "run-not-found"."""
        if key not in self.trainings():
            raise HeddleError("run-not-found", f"there is no training {key!r} in {self.root}")
        return self.root if self.is_training else self.root / key

    def watched(self, key: str) -> Watched:
        """The run of that key. Raises HeddleError "run-not-found"."""
        known = self.runs()
        if key not in known:
            hint = "the front page, /, leads to the runs that there are"
            raise HeddleError("run-not-found", f"there is no run {key!r} in {self.root}", hint=hint)
        return known[key]


def open_site(root: Path, bench: Path | None = None, specs: Sequence[Path] = ()) -> Site:
    """The site of a run or of a folder, which may still be empty, and of some spec files.

    Raises:
        HeddleError: "run-not-found" where `root` is no folder; "bad-argument" where `bench` is none; what is wrong with a spec.
    """
    if not root.is_dir():
        hint = "heddle search SPEC --out DIR makes a run; runs/ holds those without --out"
        raise HeddleError("run-not-found", f"{root} is not a folder", hint=hint)
    if bench is not None and not bench.is_dir():
        raise HeddleError("bad-argument", f"{bench} is not a folder of benchmark rows")
    return Site(root, bench, named_specs(specs))
