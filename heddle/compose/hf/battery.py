"""`heddle verify`: the parity battery on a folder that is there already, whoever wrote it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heddle.compose.hf.card import ParityRow
from heddle.compose.hf.checkpoint import CONFIG, open_checkpoint, require_trust
from heddle.compose.hf.verify import (
    FULL,
    HIDDEN,
    clean_row,
    fixed_inputs,
    parity_rows,
    reload_in_clean_process,
)
from heddle.errors import HeddleError, Where

HEADS = ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification")


@dataclass(frozen=True, slots=True)
class Battery:
    """What every check of a folder found, and where: `device` is the processor's name; `note` is what else to tell."""

    folder: Path
    auto_class: str
    rows: tuple[ParityRow, ...]
    device: str
    transformers: str
    torch: str
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether no check failed that should not."""
        return not any(row.verdict == "fail" for row in self.rows)


def run_battery(
    folder: Path | str, *, trusted: bool = False, hidden: Sequence[str] = HIDDEN, path: Sequence[str] = ()
) -> Battery:
    """Every check of the battery, in a process where `hidden` packages cannot be imported, without a network.

    Files are checked before anything loads them; the folder's own code runs only if it is `trusted`. Packages in the
    folders `path` come before those of this process, so that another transformers can be asked.

    Raises:
        HeddleError: what `open_checkpoint` raises; "untrusted-code"; "bad-argument" for a model without a head;
            "export-mismatch" if it does not load.
    """
    folder = Path(folder).resolve()
    checkpoint = open_checkpoint(folder)
    require_trust(folder, trusted=trusted)
    head = auto_class_of(checkpoint.config, folder)
    inputs = fixed_inputs(_vocabulary(checkpoint.config, folder))
    with tempfile.TemporaryDirectory(prefix="heddle-verify-") as scratch:
        task: dict[str, Any] = {
            "auto_class": head,
            "folder": str(folder),
            "hidden": [*hidden],
            "battery": FULL,
        }
        task |= {"trusted": trusted, "first": [*path]}
        found, _ = reload_in_clean_process(task, inputs, Path(scratch))
    rows = (clean_row(found, hidden), *parity_rows(found["battery"]["rows"]))
    note = "" if trusted else checkpoint.unused_code
    return Battery(folder, head, rows, found["device"], found["transformers"], found["torch"], note)


def auto_class_of(config: Any, folder: Path) -> str:
    """The automatic class of transformers that loads a folder with its head.

    Raises:
        HeddleError: "bad-argument".
    """
    named = [*config.get("auto_map", {}), *(config.get("architectures") or [])]
    for head in HEADS:
        if any(str(name).endswith(head) for name in named):
            return f"AutoModel{head}"
    raise HeddleError(
        "bad-argument",
        f"neither auto_map nor architectures names a class that ends with {', '.join(HEADS)}",
        where=Where(file=str(folder / CONFIG)),
    )


def _vocabulary(config: Any, folder: Path) -> int:
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int) or size < 2:
        where = Where(file=str(folder / CONFIG), path="vocab_size")
        raise HeddleError("bad-argument", f"vocab_size is {size!r}", where=where)
    return size
