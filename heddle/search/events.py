"""events.jsonl: everything a search does, one JSON line an event, for dashboards while it runs and for
resuming."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heddle.search.durable import LineLog, read_lines
from heddle.search.record import EVENTS_FILE


class EventLog:
    """The events of a run, old and new. `session` names one process's part of them."""

    def __init__(self, folder: Path) -> None:
        self._log = LineLog(folder / EVENTS_FILE)
        self.events: list[dict[str, Any]] = read_lines(folder / EVENTS_FILE)
        self.session = secrets.token_hex(4)
        self._started = time.monotonic()

    @property
    def clock_s(self) -> float:
        """Seconds since this session began."""
        return time.monotonic() - self._started

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append an event, durably, and give it back as it was written. Raises HeddleError "disk-full"."""
        return self.write_all(event, [fields])[0]

    def write_all(self, event: str, each: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`write` of several events of one name, the fields of each given; the disk is waited for once."""
        common = {
            "event": event,
            "time": datetime.now(UTC).isoformat(),
            "session": self.session,
            "clock_s": round(self.clock_s, 3),
        }
        lines = [{**common, **fields} for fields in each]
        self._log.write(*lines)
        self.events += lines
        return lines

    def last(self, event: str) -> dict[str, Any]:
        """The newest event of that name. Raises KeyError when there is none."""
        found = [line for line in self.events if line["event"] == event]
        if not found:
            raise KeyError(event)
        return found[-1]

    def close(self) -> None:
        self._log.close()
