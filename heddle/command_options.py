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


SpecPath = Annotated[
    Path, typer.Argument(metavar="SPEC", help="Spec file, YAML or JSON.", show_default=False)
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
