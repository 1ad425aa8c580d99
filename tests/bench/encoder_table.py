"""Writes the table of docs/performance.md that tells what encoders of each kind learn, from committed rows.

    python tests/bench/encoder_table.py

The rows are those of evidence-encoders.jsonl (tests/bench/evidence.py with encoders.yaml and encoders_masked.yaml) of the device
that has most; what it did not train is told from other devices, marked, where the training was as long. Of the trainings of a
kind at a task the best learning rate is told. `--check` writes nothing and exits with 1 if the page says something else.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from generated_page import between, write_page

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "evidence-encoders.jsonl"
BEGIN, END = "<!-- encoders: begin -->", "<!-- encoders: end -->"
# A task, whether a readout answers it, and the plain rule beside it.
COLUMNS = {
    "topic of a document, accuracy": ("paragraph_topic", True, "word_count_accuracy"),
    "one masked byte, bits": ("masked_bytes", True, "unigram_bits_per_byte"),
    "all masked bytes, bits per byte": ("masked_bytes", False, "unigram_bits_per_byte"),
}


def of_column(rows: list[Row], task: str, has_readout: bool) -> list[Row]:
    """The trainings at a task that ended with a score."""
    found = [row for row in rows if row["task"] == task and ("readout" in row) is has_readout]
    return [row for row in found if row["score"] is not None]


def best(rows: list[Row]) -> Row | None:
    """The training of the best learning rate."""
    sign = -1.0 if rows and rows[0]["task"] == "paragraph_topic" else 1.0
    return min(rows, key=lambda row: sign * row["score"], default=None)


def cells(row: Row | None, device: str) -> list[str]:
    """The score and its learning rate; one of another device is marked."""
    if row is None:
        return ["", ""]
    digits = 3 if row["task"] == "paragraph_topic" else 2
    mark = "" if row["device"] == device else "†"
    return [f"{row['score']:.{digits}f} ± {row['se']:.{digits}f}{mark}", f"{row['lr']:g}"]


def as_long(rows: list[Row], found: list[Row]) -> list[Row]:
    """Of the trainings on other devices those of kinds that the table lacks, with as many steps as its own."""
    kinds, steps = {row["kind"] for row in found}, {row["steps"] for row in found}
    return [row for row in rows if row["kind"] not in kinds and row["steps"] in steps]


def made_on(rows: list[Row]) -> str:
    """The devices, each with its commits."""
    devices = dict.fromkeys(row["device"] for row in rows)
    commits = {
        device: ", ".join(dict.fromkeys(f"`{row['commit']}`" for row in rows if row["device"] == device))
        for device in devices
    }
    return "; † on ".join(f"{device} at {told}" for device, told in commits.items())


def plain(rows: list[Row], rule: str) -> tuple[str, str]:
    """Chance, and what the plain rule scores."""
    if not rows:
        return "", ""
    return f"{rows[0]['chance']:.3g}", f"{rows[0]['extras'][rule]:.3g}"


def text() -> str:
    """The table, and what the trainings were."""
    if not RESULTS.exists():
        return "There is no row yet."
    every = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    device = Counter(row["device"] for row in every).most_common(1)[0][0]
    rows = [row for row in every if row["device"] == device]
    others = [row for row in every if row["device"] != device]
    columns = []
    for task, has_readout, rule in COLUMNS.values():
        found = of_column(rows, task, has_readout)
        more = as_long(of_column(others, task, has_readout), found)
        columns.append((task, has_readout, rule, [*found, *more]))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = [
        f"| kind | {' | '.join(f'{name} | at' for name in COLUMNS)} |",
        "|---" * (1 + 2 * len(COLUMNS)) + "|",
    ]
    for kind in kinds:
        of_kind = [best([row for row in found if row["kind"] == kind]) for *_, found in columns]
        lines.append(f"| `{kind}` | {' | '.join(cell for row in of_kind for cell in cells(row, device))} |")
    rules = [plain(found, rule) for _, _, rule, found in columns]
    lines.append(f"| chance | {' | '.join(f'{chance} | ' for chance, _ in rules)} |")
    lines.append(f"| words counted, or the unigram | {' | '.join(f'{rule} | ' for _, rule in rules)} |")
    steps = [sorted({row["steps"] for row in found}) for *_, found in columns]
    told_steps = (" or ".join(f"{count:,}" for count in counts) for counts in steps)
    lines.append(f"| steps of 4,096 tokens | {' | '.join(f'{one} | ' for one in told_steps)} |")
    told = f"On {made_on(rows + [row for *_, found in columns for row in found])}."
    failed = [row for row in rows if row["score"] is None]
    told += "".join(f" `{row['kind']}` failed at {row['lr']:g}: {row['error']}." for row in failed)
    return "\n".join([told, "", *lines])


def main() -> int:
    return write_page(__doc__, lambda page: between(page, BEGIN, END, text()))


if __name__ == "__main__":
    sys.exit(main())
