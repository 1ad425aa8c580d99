"""A search that knows before it times: budgets of costs, budgets beside another file, and predictions of a latency model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from predicted_search import DECODE, QUICK, SPEC, model_of, scored, spec_with

from heddle.compose.plan import plan
from heddle.dashboards import latency_section
from heddle.dashboards.report import write_report
from heddle.errors import HeddleError
from heddle.search import space
from heddle.search.latency import Place
from heddle.search.latency_model import told
from heddle.search.latency_model.find import RUN_COPY, keep, kept_at
from heddle.search.latency_model.model import RANDOM, LatencyModel, load_model
from heddle.search.latency_model.table import timing_environment
from heddle.search.limits import Limits, budgets_on
from heddle.search.objectives import asked_of
from heddle.search.record import Run, Trial, read_run
from heddle.search.run import search
from heddle.search.workers import Workers
from heddle.specs import SpecFile, load, loads


def between() -> int:
    """A number of parameters between those of narrow and of wide specs."""
    file = loads(SPEC)
    ratios = ({"blocks.full.channel.ratio": ratio} for ratio in (1.0, 2.0))
    return sum(plan(file.resolve(values).model).parameters for values in ratios) // 2


def searched(text: str, out: Path, **given: Any) -> Run:
    file = loads(text, file=str(out.parent / "limits.yaml"))
    return search(file, out, effort=QUICK, evaluate=scored, **given)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HEDDLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_costs_are_exact_and_relative_ones_are_ratios() -> None:
    budgets = (
        "parameters: {at_most: 15k}",
        "parameters: {at_most: 0.9, relative_to: all-near}",
        "cache_bytes: {at_most: 64k, context: 128, batch: {cpu: 2, cuda: 4}}",
    )
    file = loads(spec_with(*budgets))
    found = budgets_on(file, "cpu")
    assert [one.label for one in found] == ["parameters", "parameters#2", "cache_bytes@2x128"]
    near = space.reference(file, "all-near")
    known = Limits(found, {"all-near": near}).figures(file.spec.model)
    planned, cost = plan(file.spec.model), plan(file.spec.model).cost(128, 2)
    assert known["parameters"].limited == planned.parameters
    assert known["parameters#2"].limited == planned.parameters / plan(near.model).parameters
    assert known["cache_bytes@2x128"].value == cost["cache_bytes"] + cost["state_bytes"]
    assert {one.source for one in known.values()} == {"computed"}


@pytest.mark.slow
def test_what_breaks_a_cost_is_neither_timed_nor_trained(workers: Workers, tmp_path: Path) -> None:
    assert workers.parallel
    limit = between()
    run = searched(
        spec_with(f"parameters: {{at_most: {limit}}}", DECODE.replace("1.0", "100.0")), tmp_path / "run"
    )
    over = [trial for trial in run.trials if trial.parameters > limit]
    assert over
    assert len(over) < len(run.trials)
    for trial in run.trials:
        is_over = trial.parameters > limit
        assert trial.state == ("infeasible" if is_over else "complete")
        assert bool(trial.latency) != is_over
        assert (run.path / "ledger" / trial.hash).exists() != is_over
        assert trial.constraints["parameters"] == trial.parameters / limit - 1
    assert run.best_trial is not None
    assert run.best_trial.parameters <= limit


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["gp", "nsga2"])
def test_samplers_get_a_constraint_for_every_budget(workers: Workers, tmp_path: Path, sampler: str) -> None:
    assert workers.parallel
    text = spec_with(
        f"parameters: {{at_most: {between()}}}", DECODE.replace("1.0", "100.0"), more=f"  sampler: {sampler}"
    )
    run = searched(text.replace("round: 12", "round: 4"), tmp_path / "run", trials=8)
    assert {trial.state for trial in run.trials} == {"complete", "infeasible"}


def test_a_file_that_a_budget_is_relative_to_is_the_reference(workers: Workers, tmp_path: Path) -> None:
    assert workers.parallel
    other = SPEC.replace("hidden_size: 32", "hidden_size: 16")
    (tmp_path / "small.yaml").write_text(other)
    text = spec_with("parameters: {at_most: 3.0, relative_to: small.yaml}")
    (tmp_path / "limits.yaml").write_text(text)
    file = load(tmp_path / "limits.yaml")
    run = search(file, tmp_path / "run", effort=QUICK, evaluate=scored, trials=2)
    small = plan(loads(other).spec.model).parameters
    assert run.reference is not None
    assert run.reference.parameters == small
    assert run.trials[0].figures["parameters"].limited == run.trials[0].parameters / small
    # Another file of that name is another reference.
    (tmp_path / "small.yaml").write_text(other.replace("hidden_size: 16", "hidden_size: 8"))
    with pytest.raises(HeddleError) as caught:
        search(file, tmp_path / "run", effort=QUICK, evaluate=scored, trials=3, resume=True)
    assert caught.value.code == "run-mismatch"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "file-not-found"),
        ("version: 1\nname: a\nmodel: {}\n", "missing-field"),
        (f"{SPEC.replace('vocab_size: 256', 'vocab_size: 64')}tokenizer: own\n", "conflicting-fields"),
    ],
)
def test_a_file_that_is_no_reference_is_told_at_the_budget(
    tmp_path: Path, content: str | None, code: str
) -> None:
    if content is not None:
        (tmp_path / "small.yaml").write_text(content)
    path = tmp_path / "limits.yaml"
    path.write_text(spec_with("parameters: {at_most: 3.0, relative_to: small.yaml}"))
    with pytest.raises(HeddleError) as caught:
        load(path)
    assert caught.value.code == code
    assert caught.value.where.path == "search.budgets.0.relative_to"
    assert (
        caught.value.where.line
        == path.read_text().splitlines().index("    - parameters: {at_most: 3.0, relative_to: small.yaml}")
        + 1
    )


@pytest.fixture(scope="module")
def predicted_run(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A search that goes by a model: specs with wide full layers are predicted at 1.25 and 1.5 of all-full."""
    assert workers.parallel
    folder = tmp_path_factory.mktemp("predicted")
    text = spec_with(DECODE.replace("1.0", "1.1"), more="  latency: model\n  latency_model: model.json")
    model_of(loads(text)).save(folder / "model.json")
    return searched(text, folder / "run")


def is_wide(trial: Trial) -> bool:
    return trial.params["blocks.full.channel.ratio"] == 2.0


def test_what_is_predicted_over_budget_is_never_timed_and_says_so(predicted_run: Run) -> None:
    run = predicted_run
    assert {is_wide(trial) for trial in run.trials} == {True, False}
    for trial in run.trials:
        figure = trial.figures["decode_ms@1x64"]
        assert figure.source == "predicted"
        full = trial.layers.count("full")
        assert figure.limited == pytest.approx(1 + full / 4 if is_wide(trial) else 1.0)
        if is_wide(trial):
            assert (trial.state, trial.latency, trial.scores) == ("infeasible", {}, {})
            assert not (run.path / "ledger" / trial.hash).exists()
            assert trial.constraints["decode_ms@1x64"] == pytest.approx(figure.limited / 1.1 - 1)
        else:
            assert trial.latency
    assert load_model(run.path / RUN_COPY).fits


def test_the_log_says_which_model_it_goes_by(predicted_run: Run) -> None:
    texts = [event["text"] for event in predicted_run.events if event["event"] == "message"]
    (line,) = (text for text in texts if text.startswith("latency model of "))
    device = predicted_run.meta["environment"]["device_name"]
    assert line == (
        f"latency model of {device}: decode_ms@1x64 fitted on 20 stacks, error 2.0 % on 30 others (worst 6.0 %), margin 5.0 %"
    )
    assert not any("no better than" in text for text in texts)


@pytest.mark.parametrize(
    ("constant", "flops", "simpler"),
    [(0.3, 0.1, "a line in FLOPs"), (0.08, 0.2, "one number for all"), (0.12, 0.12, "a line in FLOPs")],
)
def test_a_model_that_a_simpler_one_matches_is_doubted_in_log_and_report(
    predicted_run: Run, constant: float, flops: float, simpler: str
) -> None:
    (fit,) = predicted_run.meta["latency_model"]
    fit = {
        **fit,
        "held_out": {**fit["held_out"], "mape": 0.12, "constant_mape": constant, "flops_mape": flops},
    }
    (line,) = told.doubts([fit])
    least = f"{100 * min(constant, flops):.1f} %"
    assert line == (
        f"at decode_ms@1x64 the latency model is no better than {simpler} (held-out error 12.0 %, and {least}): "
        "do not go by it there"
    )
    shown = replace(predicted_run, meta={**predicted_run.meta, "latency_model": [fit]})
    assert latency_section.sentences(shown)[0] == f"A{line[1:]}."


def test_the_sampler_learns_the_predicted_violation_and_nothing_measured_again(predicted_run: Run) -> None:
    journal = (predicted_run.path / "study.journal").read_text()
    wide = next(trial for trial in predicted_run.trials if is_wide(trial))
    assert repr(wide.constraints["decode_ms@1x64"]) in journal
    told = [event["event"] for event in predicted_run.events]
    assert "trial_finished" not in told[told.index("remeasured") :] if "remeasured" in told else True


def test_the_report_sets_predicted_beside_measured_again(predicted_run: Run, tmp_path: Path) -> None:
    page = write_report(predicted_run, tmp_path / "report.html").read_text()
    assert "Predicted latencies" in page
    assert "were never timed" in page
    never = sum(is_wide(trial) for trial in predicted_run.trials)
    told = predicted_run.summary()["latency_model"]
    assert told["never_timed"] == never
    unseen = told["fits"][0]["held_out"]
    assert unseen["mape"] == 0.02
    # Of the budget of this search, 1.1 of 4 ms, whatever the model was fitted under.
    assert (unseen["near_budget"], unseen["bias_near_budget"]) == (
        3,
        pytest.approx((4 / 4.4 + 1 + 4.9 / 5) / 3 - 1),
    )
    assert f"{100 * unseen['bias_near_budget']:+.1f} % (3)" in page
    (curse,) = told["curse"]
    front = [trial for trial in predicted_run.front_trials if trial.remeasured]
    assert curse["n_selected"] == len(front)
    assert curse["held_out"] == -0.001
    assert curse["n_selected"] + curse["n_others"] <= len(predicted_run.trials) - never


def test_a_resumed_search_goes_by_the_model_it_began_with(predicted_run: Run, tmp_path: Path) -> None:
    assert read_run(predicted_run.path).meta["latency"] == "model"
    file = loads(predicted_run.meta["spec"], file=str(tmp_path / "elsewhere.yaml"))
    again = search(file, predicted_run.path, effort=QUICK, evaluate=scored, resume=True)
    assert [trial.state for trial in again.trials] == [trial.state for trial in predicted_run.trials]


def test_without_a_margin_nothing_is_ruled_out() -> None:
    file = loads(spec_with(DECODE))
    references = {"all-full": space.reference(file, "all-full")}
    wide = file.resolve({"blocks.full.channel.ratio": 2.0}).model
    for margin, is_out in ((0.05, True), (0.5, False), (None, False)):
        limits = Limits(budgets_on(file, "cpu"), references, model_of(file, margin=margin))
        assert limits.rule_out(limits.figures(wide)) == is_out


@pytest.mark.usefixtures("cached")
def test_a_search_without_its_model_is_refused_at_the_field(workers: Workers, tmp_path: Path) -> None:
    assert workers.parallel
    text = spec_with(DECODE, more="  latency: model")
    with pytest.raises(HeddleError) as caught:
        searched(text, tmp_path / "run")
    assert (caught.value.code, caught.value.where.path) == ("latency-model", "search.latency")
    other = {**timing_environment("cpu"), "device": "another"}
    model_of(loads(text), machine=other).save(tmp_path / "model.json")
    with pytest.raises(HeddleError) as caught:
        searched(f"{text}\n  latency_model: model.json", tmp_path / "run")
    assert (caught.value.code, caught.value.where.path) == ("latency-model", "search.latency_model")
    assert "another" in str(caught.value)


def test_a_kept_model_is_found_and_grows_by_places(cached: Path) -> None:
    file = loads(spec_with(DECODE))
    model = model_of(file)
    path = kept_at(file, model.environment)
    assert path.is_relative_to(cached)
    keep(model, path)
    (fit,) = model.fits
    longer = replace(model, fits=(replace(fit, place=Place("decode", 1, 128)),))
    assert len(keep(longer, path).fits) == 2
    assert len(keep(longer, path).fits) == 2
    found = load_model(path)
    assert found.at(Place("decode", 1, 64), fit.reference_hash) == fit
    assert found.at(Place("decode", 1, 64), "other") is None


@pytest.mark.usefixtures("cached")
def test_fits_for_tokens_of_several_tasks_are_kept_apart_and_a_search_goes_by_its_own(
    workers: Workers, tmp_path: Path
) -> None:
    """Two specs of one space whose tasks differ have one file in the cache."""
    assert workers.parallel
    text = spec_with(DECODE, more="  latency: model").replace(
        "trials: 12\n  round: 12", "trials: 1\n  round: 1"
    )
    file = loads(text)
    model = model_of(file)
    path = kept_at(file, model.environment)

    def with_reads(reads: str, reference_ms: float) -> LatencyModel:
        fit = replace(model.fits[0], reads=reads, reference_ms=reference_ms)
        return replace(model, fits=(fit,))

    keep(with_reads("another", 3.0), path)
    with pytest.raises(HeddleError, match="read other tokens") as caught:
        searched(text, tmp_path / "none")
    assert (caught.value.code, caught.value.where.path) == ("latency-model", "search.latency")
    keep(with_reads(asked_of(file).read.digest, 4.0), path)
    keep(with_reads(RANDOM, 5.0), path)
    assert sorted(fit.reference_ms for fit in load_model(path).fits) == [3.0, 4.0, 5.0]
    run = searched(text, tmp_path / "run")
    assert [fit.reference_ms for fit in load_model(run.path / RUN_COPY).fits] == [4.0]


def test_latency_model_without_latency_is_told() -> None:
    with pytest.raises(HeddleError) as caught:
        loads(spec_with(DECODE, more="  latency_model: model.json"))
    assert (caught.value.code, caught.value.where.path) == ("conflicting-fields", "search.latency_model")


def test_the_costs_that_placements_are_proposed_by_are_the_predictions_of_the_model() -> None:
    file = loads(spec_with(DECODE))
    references = {"all-full": space.reference(file, "all-full")}
    limits = Limits(budgets_on(file, "cpu"), references, model_of(file, margin=0.05))
    kinds = ("near", "full")
    one = file.resolve({"blocks.full.channel.ratio": 2.0}, layers=["near", "full", "near"]).model
    (budget,) = limits.of_placements(one, kinds)
    for layers in (["near", "full", "near"], ["full", "full", "near"], ["near", "near", "full"]):
        model = file.resolve({"blocks.full.channel.ratio": 2.0}, layers=layers).model
        figure = limits.figures(model)[budget.name]
        spent = float(budget.of([kinds.index(name) for name in layers]))
        assert spent == pytest.approx(figure.limited / limits_of(file), rel=1e-9)
    # A block that the fit has not seen, and a search without a model.
    other = file.resolve({"blocks.full.channel.ratio": 2.0}, layers=["near", "near", "near"]).model
    assert limits.of_placements(other, ("full",)) == ()
    assert Limits(budgets_on(file, "cpu"), references).of_placements(one, kinds) == ()


def limits_of(file: SpecFile) -> float:
    (budget,) = budgets_on(file, "cpu")
    return budget.at_most
