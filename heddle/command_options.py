"""Arguments and options that several commands of `heddle` have, and what some may be."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


def example(*commands: str) -> str:
    """What stands below a command's help."""
    return "Example: " + "   |   ".join(f"[bold]{command}[/bold]" for command in commands)


class Phase(StrEnum):
    """What `heddle bench` times."""

    decode = "decode"
    prefill = "prefill"
    train = "train"
    both = "both"

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase.prefill, Phase.decode) if self is Phase.both else (self,)


class GraphForm(StrEnum):
    """How `heddle show --graph` draws."""

    text = "text"
    mermaid = "mermaid"
    svg = "svg"


class TableForm(StrEnum):
    """How `heddle report --table` writes."""

    csv = "csv"
    md = "md"
    latex = "latex"


class BatteryForm(StrEnum):
    """How much of the parity battery `heddle export` runs."""

    auto = "auto"
    full = "full"
    short = "short"
    none = "none"


SpecPath = Annotated[
    Path, typer.Argument(metavar="SPEC", help="Spec file, YAML or JSON.", show_default=False)
]
SpecToSearch = Annotated[
    Path | None,
    typer.Argument(metavar="[SPEC]", help="Spec file, YAML or JSON; none with --replay.", show_default=False),
]
Storage = Annotated[
    str | None, typer.Option(help="Optuna storage URL; a journal file in the run folder if not given.")
]
RayAddress = Annotated[str | None, typer.Option(help="Ray cluster to use; a local one if not given.")]
Replay = Annotated[
    Path | None,
    typer.Option(
        metavar="LOCK",
        help="Make the search of a heddle.lock again, its latencies as they were, and tell what differs.",
        show_default=False,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Deterministic kernels alone; timings at the end are told, and choose nothing.",
    ),
]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a search or training run.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens of context; the spec's context_length if not given.")
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences at once.")]
Curves = Annotated[
    Path | None, typer.Option(help="Folder for training curves as TensorBoard's files.", show_default=False)
]
