"""From a run to a Hugging Face folder: a member of a search's Pareto front, or the model of a training."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_model

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.card import Card, LatencyRow, ScoreRow
from heddle.compose.hf.export import ExportResult, export
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.hf.shards import MAX_SHARD_SIZE
from heddle.errors import HeddleError
from heddle.search.evaluations import weights_path
from heddle.search.record import Latency, Run, Trial, read_run, trial_file
from heddle.search.training import TrainRun, is_train_run, load_run
from heddle.specs import Spec, loads

BEST = "best"


def export_run(
    run: Path | str,
    out: Path | str,
    *,
    trial: str | int = BEST,
    overwrite: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> ExportResult:
    """Write the model of a run to `out` as a folder that plain transformers loads, and check that it does.

    `run` is a search's folder or a training's; `trial` is "best" or a number of a search's Pareto front. Weights of more than
    `max_shard_size`, as "5GB", are spread over several files.

    Raises:
        HeddleError: "run-not-found", "bad-argument", "no-weights" (with the command that trains that trial
        again),
            and what `heddle.compose.hf.export.export` raises.
    """
    how: dict[str, Any] = {"overwrite": overwrite, "max_shard_size": max_shard_size}
    if is_train_run(run):
        return _export_training(load_run(run), Path(out), trial, how)
    found = read_run(run)
    chosen = _chosen(found, trial)
    spec = _spec(found, chosen)
    model = _model(found, chosen, spec)
    card = Card(
        name=spec.name,
        spec=chosen.spec,
        scores=[_score(found, chosen, task.name) for task in found.tasks],
        latency=[_latency(row) for row in (chosen.remeasured or chosen.latency).values()],
        facts=_facts(found, chosen),
        tags=["heddle"],
    )
    return export(model, out, tokenizer=spec.tokenizer, card=card, **how)


def _export_training(run: TrainRun, out: Path, trial: str | int, how: Mapping[str, Any]) -> ExportResult:
    if trial != BEST:
        raise HeddleError("bad-argument", f"{run.path} is a training and has no trial {trial}")
    spec = run.spec_file().spec
    score, task = run.score, run.record["task"]
    row = ScoreRow(task["name"], task["metric"], score.value, score.se, score.n)
    facts = {
        "trained for": f"{run.record['tokens']:,} tokens, seed {run.record['recipe']['seed']}",
        "data": f"{spec.data.source} (digest {task['digest']})",
    }
    card = Card(
        name=spec.name, spec=(run.path / "spec.yaml").read_text(), scores=[row], facts=facts, tags=["heddle"]
    )
    return export(run.model(), out, tokenizer=spec.tokenizer, card=card, **how)


def _chosen(run: Run, trial: str | int) -> Trial:
    if trial == BEST:
        if run.best_trial is None:
            raise HeddleError(
                "no-weights",
                f"{run.path} has no best trial: none is complete within the budgets",
                hint="widen search.budgets, or export a trial by its number",
            )
        return run.best_trial
    try:
        return run.trial(int(trial))
    except ValueError:
        raise HeddleError("bad-argument", f'--trial is "best" or a number, not {trial!r}') from None


def _spec(run: Run, trial: Trial) -> Spec:
    if not trial.spec:
        raise HeddleError(
            "no-weights", f"trial {trial.number} of {run.path} is no legal spec: {trial.reason}"
        )
    return loads(trial.spec, file=str(trial_file(run.path, trial.number))).spec


def _model(run: Run, trial: Trial, spec: Spec) -> HeddleForCausalLM:
    path = weights_path(run.path, trial.hash)
    if not path.exists():
        raise HeddleError(
            "no-weights",
            f"the weights of trial {trial.number} were not kept: only those of the Pareto front are"
            f" ({', '.join(str(number) for number in run.front) or 'empty'})",
            hint=f"train it again: {retrain_command(run, trial)}",
        )
    model = build_causal_lm(spec.model)
    load_model(model, path)
    model.eval()
    return model


def retrain_command(run: Run, trial: Trial) -> str:
    """What to type to train the spec of `trial` again and export it."""
    file, out = trial_file(run.path, trial.number), f"{run.path}-trial-{trial.number}"
    train = shlex.join(["heddle", "train", str(file), "--out", out])
    return f"{train} && {shlex.join(['heddle', 'export', out, '--out', 'DIR'])}"


def _score(run: Run, trial: Trial, task: str) -> ScoreRow:
    score = trial.scores[task]
    exported = task == run.meta["exported"]
    note = "" if exported else "by a model of this spec trained for that task; not by these weights"
    return ScoreRow(task, score.metric, score.value, score.se, score.n, note)


def _latency(row: Latency) -> LatencyRow:
    what = f"{row.phase} at batch {row.batch}, context {row.context:,}"
    return LatencyRow(
        what,
        row.median_ms,
        row.low_ms,
        row.high_ms,
        row.device,
        row.dtype,
        row.method,
        ratio=row.ratio,
        reference=row.reference,
    )


def _facts(run: Run, trial: Trial) -> dict[str, str]:
    score = trial.scores[run.meta["exported"]]
    return {
        "found by": f"heddle search, run {run.name} ({run.meta['id']}), trial {trial.number} of {len(run.trials)}",
        "trained for": f"{score.tokens:,} tokens, seed {score.seed}",
        "data digest": run.meta["lock"]["data"][run.meta["exported"]],
    }
