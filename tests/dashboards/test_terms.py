"""What the placement page tells of the model that places blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from seen import client, get

from heddle.dashboards.figures import TRAINED
from heddle.dashboards.model_figures import terms
from heddle.search.placement_terms import LEAST, MOST, placement_terms
from heddle.search.record import Run, Score, read_run

MakeRun = Callable[..., Path]


def _run(folder: Path, worth: Callable[[tuple[str, ...]], float], copies: int = 1) -> Run:
    """The made-up run with every placement of six layers, each scored by `worth`."""
    run = read_run(folder)
    trials = []
    for number in range(64 * copies):
        layers = tuple("full" if number >> layer & 1 else "linear" for layer in range(6))
        score = Score("mqar", "accuracy", 0.0, 0.0, 1, worth(layers), 0, 1, 1, 0.0, ())
        trial = replace(run.trials[4], number=number, layers=layers, params={}, scores={"mqar": score})
        trials.append(trial)
    return replace(run, trials=tuple(trials))


def test_the_terms_are_what_the_scores_were_made_of(make_run: MakeRun) -> None:
    def worth(layers: tuple[str, ...]) -> float:
        return 0.3 * (layers[2] == "full") - 0.1 * (layers[5] == "full")

    found = placement_terms(_run(make_run(), worth))
    assert found is not None
    assert found.baseline == "linear"
    means = [term.mean for term in found.singles["full"]]
    # The prior smooths over layers, and draws all terms towards zero.
    assert max(range(6), key=lambda layer: means[layer]) == 2
    assert min(range(6), key=lambda layer: means[layer]) == 5
    term = found.singles["full"][2]
    assert abs(term.mean - 0.3) < 3 * term.sd
    assert set(found.pairs) == {(low, high) for low in ("full", "linear") for high in ("full", "linear")}


def test_pairs_that_help_are_found(make_run: MakeRun) -> None:
    found = placement_terms(
        _run(make_run(), lambda layers: 0.1 * sum(map(lambda a, b: a != b, layers, layers[1:])))
    )
    assert found is not None
    apart = min(found.pairs["full", "linear"].mean, found.pairs["linear", "full"].mean)
    assert apart > max(found.pairs["full", "full"].mean, found.pairs["linear", "linear"].mean)


def test_a_large_run_is_sampled(make_run: MakeRun) -> None:
    found = placement_terms(_run(make_run(), lambda layers: layers.count("full") / 6, copies=10))
    assert found is not None
    assert found.trials <= MOST < found.trained == 640


@pytest.mark.parametrize("kept", [0, LEAST - 1])
def test_few_trials_say_nothing(make_run: MakeRun, kept: int) -> None:
    run = _run(make_run(), lambda layers: layers.count("full") / 6)
    assert placement_terms(replace(run, trials=run.trials[:kept])) is None
    assert placement_terms(replace(run, trials=run.trials[:1] * 20)) is None


def test_the_page_shows_the_terms_in_figures_and_in_a_table(make_run: MakeRun) -> None:
    seen = get(client(make_run()), "/run/run/placement")
    assert [figure["name"] for figure in seen.figures][2:] == ["terms-layers", "terms-pairs"]
    assert "against linear there" in seen.figures[2]["caption"]  # type: ignore[operator]
    assert "full → linear" in seen.text


def test_blocks_take_no_colour_of_a_mixer(make_run: MakeRun) -> None:
    found = placement_terms(_run(make_run(), lambda layers: 0.1 * (layers[2] == "full")))
    assert found is not None
    lines = terms(found)[0].data
    assert {line["line"]["color"] for line in lines} == {TRAINED}
    assert len({line["marker"]["symbol"] for line in lines}) == len(lines)
