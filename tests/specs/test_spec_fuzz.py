"""Broken specs, by the thousand: each is a legal model or a located error, and never takes long."""

from __future__ import annotations

import random
import time
from collections import Counter

from heddle.compose.plan import plan
from heddle.errors import HeddleErrors
from heddle.specs import SpecFile, loads, spec_hash, to_yaml


def use(file: SpecFile, rng: random.Random) -> None:
    """What is done with a spec that was taken: it is planned, resolved, written and read again."""
    plan(file.spec.model, file.where)
    space = file.space
    space.size()
    values = {
        one.name: rng.choice(one.values()[:1000]) if one.kind != "float" else one.high
        for one in space.parameters
    }
    try:
        spec = file.resolve(values)
    except HeddleErrors as told:
        # A setting may be illegal; then it is told where.
        located(told)
        return
    plan(spec.model, lambda path: file.where(path, values))
    assert spec_hash(loads(to_yaml(spec)).spec.model) == spec_hash(spec.model)


def located(told: HeddleErrors) -> None:
    assert told.errors
    for error in told.errors:
        assert error.where.line is not None
        assert error.where.column is not None
        assert error.where.line >= 1
        assert error.where.column >= 1
        assert error.what
        assert "pydantic" not in str(error).lower()
        assert all(one.isprintable() or one == "\n" for one in str(error))


def test_broken_specs_are_legal_models_or_located_errors(random_seed: int, full_counts: bool) -> None:
    outcomes: Counter[str] = Counter()
    for number in range(20_000 if full_counts else 1_000):
        rng = random.Random(f"{random_seed}-{number}")
        text = rng.choice(MUTATIONS)(rng.choice(SEEDS), rng)
        started = time.process_time()
        try:
            file = loads(text)
        except HeddleErrors as told:
            located(told)
            outcomes[told.code] += 1
        except Exception as error:
            raise AssertionError(f"seed {random_seed}, case {number}: {error!r} for\n{text}") from error
        else:
            outcomes["legal"] += 1
            use(file, rng)
        took = time.process_time() - started
        assert took < 2, f"seed {random_seed}, case {number} took {took:.1f} s:\n{text}"
    # The mutations reach both sides, and much of the language.
    assert outcomes["legal"] > 20
    assert {"syntax", "unknown-field", "missing-field", "wrong-type", "out-of-range", "unknown-kind"} <= set(
        outcomes
    )
