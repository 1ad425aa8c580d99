"""To a Hugging Face folder: a member of a search's Pareto front, the model of a training, an import, or a spec as it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heddle.compose.build import build
from heddle.compose.hf.card import Card, LatencyRow, ScoreRow
from heddle.compose.hf.checkpoint import CONFIG, fill
from heddle.compose.hf.export import ExportResult, export
from heddle.compose.hf.model import HeddleForCausalLM, HeddlePreTrainedModel
from heddle.compose.hf.native import AUTO, REMOTE
from heddle.compose.hf.shards import MAX_SHARD_SIZE
from heddle.compose.hf.verify import AUTO as AUTO_BATTERY
from heddle.errors import HeddleError
from heddle.search.evaluations import weights_path
from heddle.search.import_model import IMPORT_FILE, generation_of, is_import, load_import
from heddle.search.record import (
    LEDGER_FOLDER,
    RUN_FILE,
    TRIALS_FOLDER,
    Latency,
    Run,
    Trial,
    read_run,
    trial_file,
)
from heddle.search.training import SPEC_FILE, TRAIN_FILE, TrainRun, is_train_run, load_run
from heddle.specs import Spec, load, loads, to_yaml
from heddle.specs.base import nearest

BEST = "best"


def export_run(
    run: Path | str,
    out: Path | str,
    *,
    trial: str | int = BEST,
    overwrite: bool = False,
    target: str = AUTO,
    max_shard_size: str = MAX_SHARD_SIZE,
    battery: str = AUTO_BATTERY,
) -> ExportResult:
    """Write the model of a run to `out` as a folder that plain transformers loads, and check that it does.

    `run` is a search's folder, a training's, one that `heddle import` wrote, or a spec file, whose weights are random;
    `trial` is "best" or a number of a search's Pareto front; `target`, `max_shard_size` and `battery` as of
    `heddle.compose.hf.export.export`.

    Raises:
        HeddleError: "run-not-found", "bad-argument", "no-weights" (with the command that trains that trial
        again),
            and what `heddle.compose.hf.export.export` raises.
    """
    _check_source(Path(run))
    how: dict[str, Any] = {
        "overwrite": overwrite,
        "target": target,
        "max_shard_size": max_shard_size,
        "battery": battery,
    }
    if Path(run).is_file():
        return _export_spec(Path(run), Path(out), trial, how)
    if is_import(run):
        return _export_import(Path(run), Path(out), trial, how)
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


def trained_model(run: Path | str, trial: str | int = BEST) -> tuple[Spec, HeddleForCausalLM]:
    """The spec and the trained model of a search's trial, a training or an import, float32, in eval mode.

    Raises:
        HeddleError: "run-not-found", "bad-argument", "no-weights".
    """
    if is_import(run):
        _only_best(Path(run), "an import", trial)
        file, model, _ = load_import(Path(run))
        spec = file.spec
    elif is_train_run(run):
        _only_best(Path(run), "a training", trial)
        training = load_run(run)
        spec, model = training.spec_file().spec, training.model()
    else:
        found = read_run(run)
        chosen = _chosen(found, trial)
        spec = _spec(found, chosen)
        model = _model(found, chosen, spec)
    if not isinstance(model, HeddleForCausalLM):
        raise HeddleError("bad-argument", f"{run} is an encoder, and a causal language model is needed here")
    return spec, model


def _check_source(path: Path) -> None:
    """That there is something to export at `path`, or what is there instead."""
    takes = "export takes the folder of a search, of a training or of heddle import, or a spec file"
    if not path.exists():
        beside = sorted(one.name for one in path.parent.iterdir()) if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        hint = None if close is None else f"did you mean {path.parent / close}?"
        if not path.parent.is_dir():
            hint = f"nor is there a folder {path.parent}"
        hint = (
            hint
            or "heddle search SPEC --out DIR, heddle train SPEC --out DIR and heddle import FOLDER --out DIR make one"
        )
        raise HeddleError("run-not-found", f"there is no {path}; {takes}", hint=hint)
    if path.is_file() or any((path / name).exists() for name in (RUN_FILE, TRAIN_FILE, IMPORT_FILE)):
        return
    if (path / CONFIG).exists():
        told = f"{path} is a model folder of transformers already (it has a {CONFIG})"
        hint = "heddle import makes a folder of it that export takes; heddle verify checks it as it is"
    elif any((path / name).exists() for name in (SPEC_FILE, TRIALS_FOLDER, LEDGER_FOLDER)):
        told = f"{path} is no whole run: neither {RUN_FILE}, {TRAIN_FILE} nor {IMPORT_FILE} is in it"
        hint = "a training or an import that was broken off is started again, with another --out"
    else:
        told = f"nothing of Heddle's is in {path}: neither {RUN_FILE}, {TRAIN_FILE} nor {IMPORT_FILE}"
        hint = "a search writes into runs/NAME; name that folder, or a spec file to export random weights"
    raise HeddleError("run-not-found", f"{told}; {takes}", hint=hint)


def _export_training(run: TrainRun, out: Path, trial: str | int, how: Mapping[str, Any]) -> ExportResult:
    _only_best(run.path, "a training", trial)
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


def _export_import(folder: Path, out: Path, trial: str | int, how: Mapping[str, Any]) -> ExportResult:
    _only_best(folder, "an import", trial)
    file, model, told = load_import(folder)
    target = told["target"]
    facts = {
        "imported from": "an export with code of its own" if target == REMOTE else f"a {target} checkpoint"
    }
    card = Card(name=file.spec.name, spec=file.text, facts=facts, tags=["heddle"])
    generation = generation_of(folder)
    return export(model, out, tokenizer=file.spec.tokenizer, card=card, generation=generation, **how)


def _export_spec(path: Path, out: Path, trial: str | int, how: Mapping[str, Any]) -> ExportResult:
    """What a spec builds, untrained: to see where it can live before it is trained."""
    _only_best(path, "a spec", trial)
    file = load(path)
    spec = file.spec
    facts = {"weights": "random, of seed 0; nothing was trained"}
    card = Card(name=spec.name, spec=to_yaml(spec), facts=facts, tags=["heddle"])
    return export(build(spec.model).eval(), out, tokenizer=spec.tokenizer, card=card, **how)


def _only_best(path: Path, what: str, trial: str | int) -> None:
    if trial != BEST:
        raise HeddleError("bad-argument", f"{path} is {what} and has no trial {trial}")


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


def _model(run: Run, trial: Trial, spec: Spec) -> HeddlePreTrainedModel:
    path = weights_path(run.path, trial.hash)
    if not path.exists():
        raise HeddleError(
            "no-weights",
            f"the weights of trial {trial.number} were not kept: only those of the Pareto front are"
            f" ({', '.join(str(number) for number in run.front) or 'empty'})",
            hint=f"train it again: {retrain_command(run, trial)}",
        )
    model = build(spec.model)
    fill(model, path)
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
    phase = "training step" if row.phase == "train" else row.phase
    what = f"{phase} at batch {row.batch}, context {row.context:,}"
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
