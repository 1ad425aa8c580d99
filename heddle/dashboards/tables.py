"""The trials of a run as a table for other programs and for papers: CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io

from heddle.dashboards import data, words
from heddle.dashboards.axes import axes
from heddle.search.record import Run, Trial

# Characters that LaTeX reads as commands.
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "÷": r"$\div$",
    "–": "--", "★": r"$\star$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
})  # fmt: skip


def table(run: Run, form: str) -> str:
    """The run as `csv` (every trial, plain numbers), or as `md` or `latex` (reference and front, as in the report)."""
    return {"csv": _csv, "md": _markdown, "latex": _latex}[form](run)


def _csv(run: Run) -> str:
    """One line a trial, with a column for each value and each side of its interval."""
    out, known = io.StringIO(), axes(run)
    writer = csv.writer(out, lineterminator="\n")
    spread = [name for axis in known[:-1] for name in (axis.key, f"{axis.key}:low", f"{axis.key}:high")]
    writer.writerow(["trial", "state", "front", "hash", *spread, "parameters", "wall_s", "layers", "reason"])
    for trial in data.with_reference(run):
        cells: list[object] = [trial.number, trial.state, int(trial.number in run.front), trial.hash]
        for axis in known[:-1]:
            value, (below, above) = axis.value(trial), axis.bars(trial)
            cells += ["", "", ""] if value is None else [value, value - below, value + above]
        cells += [trial.parameters, trial.wall_s, " ".join(trial.layers), trial.reason or ""]
        writer.writerow([_harmless(cell) for cell in cells])
    return out.getvalue()


def _harmless(cell: object) -> object:
    """A text that a spreadsheet would take for a formula gets a quote before it."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def _front(run: Run) -> tuple[list[str], list[list[str]]]:
    heads = [words.metric_text(task) for task in run.tasks]
    heads += [f"{words.budget_name(budget)} (allowed {budget.at_most:g})" for budget in run.budgets]
    shown: list[Trial] = ([run.reference] if run.reference is not None else []) + list(run.front_trials)
    names = [data.name_of(trial, run) + (" ★" if trial.number == run.best else "") for trial in shown]
    rows = [[name, *words.trial_cells(trial, run)] for name, trial in zip(names, shown, strict=True)]
    return ["Spec", *heads, "Parameters", "Layers"], rows


def _markdown(run: Run) -> str:
    head, rows = _front(run)
    lines = [head, ["---"] + ["---:"] * (len(head) - 2) + ["---"], *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    """A cell of Markdown: no bar ends it, no tag and no mark begins in it."""
    plain = text.replace("\\", "\\\\").replace("|", "\\|").replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(plain.split())


def _latex(run: Run) -> str:
    head, rows = _front(run)
    lines = [" & ".join(cell.translate(LATEX) for cell in line) + r" \\" for line in (head, *rows)]
    columns = "l" + "r" * (len(head) - 2) + "l"
    body = [lines[0], r"\midrule", *lines[1:]]
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join(["% needs booktabs", begin, r"\toprule", *body, r"\bottomrule", end, ""])
