"""`heddle eval`: an exported folder under lm-evaluation-harness, by its `hf` backend. That package is the extra `eval`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from heddle.compose.hf.card import ScoreRow
from heddle.compose.hf.checkpoint import open_checkpoint, require_trust
from heddle.errors import HeddleError

PACKAGE = "lm_eval"


def run_harness(
    folder: Path | str,
    tasks: Sequence[str],
    *,
    trusted: bool = False,
    include_path: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> list[ScoreRow]:
    """The scores of a folder in `tasks`, by the names that the harness has for them or that the files in `include_path` give.

    `limit` takes the first so many examples of each. The folder's own code runs only if it is `trusted`; tasks in
    `include_path` may name Python functions beside them, which run.

    Raises:
        HeddleError: what `open_checkpoint` raises, "untrusted-code"; "package-missing"; "bad-argument" for a task that
            the harness does not know.
    """
    folder = Path(folder).resolve()
    open_checkpoint(folder)
    require_trust(folder, trusted=trusted)
    if importlib.util.find_spec(PACKAGE) is None:
        raise HeddleError(
            "package-missing", f"{PACKAGE} is not installed", hint="pip install 'heddle-lm[eval]' brings it"
        )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        told = f"the harness has no task {', '.join(unknown)}" if unknown else "no task is named"
        raise HeddleError("bad-argument", told, hint="lm_eval ls tasks lists them; --include-path adds yours")
    found = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(folder),
            "trust_remote_code": trusted,
            **_tokens(folder, trusted=trusted),
        },
        tasks=[*tasks],
        limit=limit,
        batch_size=batch_size,
        device=device,
        task_manager=manager,
        log_samples=False,
    )
    return list(_rows(found))


def _tokens(folder: Path, *, trusted: bool) -> dict[str, Any]:
    """What the harness asks of a tokenizer and a byte tokenizer has not: a token to begin with, and one to stop at."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    if tokenizer.eos_token is not None:
        return {}
    # Text of any corpus has line ends; padding never stands in text.
    tokenizer.eos_token = tokenizer.pad_token
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return {"tokenizer": tokenizer, "prefix_token_id": newline[0]}


def _rows(found: Mapping[str, Any]) -> Iterator[ScoreRow]:
    """One for each task and metric, whose key is "metric,filter" with "metric_stderr,filter" beside it."""
    for task, scores in found["results"].items():
        counted = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in scores.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or not filtered or metric.endswith("_stderr"):
                continue
            se = scores.get(f"{metric}_stderr,{filtered}")
            yield ScoreRow(
                task, metric, float(value), se if isinstance(se, float) else None, counted,
                "" if filtered == "none" else filtered,
            )  # fmt: skip
