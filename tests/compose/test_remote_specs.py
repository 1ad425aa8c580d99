"""Exports with code of their own of random specs, in a process without heddle: `remote_versions.py` says what is compared.

`make test` draws five, `make test-long` fifty, and asks older versions of transformers too.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from native_versions import install
from remote_specs import COMPOSED, HIDDEN, KINDS, SITE, mixer, plain, ready, spec
from remote_versions import Folders
from toys import call_at, mixer_of, noise, shaken

from heddle.compose.build import build
from heddle.compose.hf import parity
from heddle.compose.hf.known_failures import CHOSEN_STEPS, PROMPTED, known_failures
from heddle.compose.hf.parity import Loaded, battery
from heddle.compose.plan import plan
from heddle.compose.targets.report import padding_warning
from heddle.specs import CHANNELS, MIXERS, ModelSpec
from heddle.specs.kinds import MixerSpec

COUNT, FULL_COUNT = 5, 50


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, random_seed: int, full_counts: bool) -> Folders:
    """The exports, written once; seeds begin anywhere, so that each run draws others."""
    first = random_seed % 1_000_000
    return Folders(
        tmp_path_factory.mktemp("remote"), range(first, first + (FULL_COUNT if full_counts else COUNT))
    )


def wrong(folders: Folders, first: list[str]) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The version that was asked, and what is wrong, by seed and kinds."""
    version, figures = folders.ask(first)
    assert len(figures) == len(folders.seeds)
    return version, {f"{one.seed}: {one.kinds}": one.wrong for one in figures if one.wrong}


@pytest.mark.slow
def test_random_specs_compute_the_same_in_a_clean_process_and_are_read_back(folders: Folders) -> None:
    assert wrong(folders, [])[1] == {}


@pytest.mark.long
@pytest.mark.parametrize("version", ["5.17", "5.19"])
def test_random_specs_compute_the_same_in_an_older_transformers(
    folders: Folders, version: str, tmp_path: Path
) -> None:
    asked, found = wrong(folders, [install(version, tmp_path / "packages")])
    assert asked.startswith(f"{version}.")
    assert found == {}


def kinds_in(held: MixerSpec) -> set[str]:
    return {held.kind}.union(*(kinds_in(part) for part in held.parts().values()))


def test_fifty_random_specs_hold_every_kind_of_mixer_channel_and_model() -> None:
    blocks, models = [], [spec(seed) for seed in range(FULL_COUNT)]
    for one in models:
        blocks += one.blocks.values()
    assert set[str]().union(*(kinds_in(block.mixer) for block in blocks)) == {*KINDS}
    assert {block.channel.kind for block in blocks} == {*CHANNELS}
    assert {block.norm_placement for block in blocks} == {"pre", "post", "sandwich"}
    assert {block.shared for block in blocks} == {True, False}
    assert any(block.skip for block in blocks)
    assert any(getattr(block.mixer, "keys_from", None) for block in blocks)
    readouts = {one.readout.kind for one in models if one.readout is not None}
    assert len(readouts) >= 3
    assert {one.kind for one in models} == {"causal_lm", "encoder"}


@pytest.mark.slow
def test_whatever_an_export_computes_otherwise_is_told(folders: Folders) -> None:
    key = next(key for key, right in folders.right.items() if "tokens" in right)
    right = folders.right[key]
    found = {"logits": right["logits"] + 1e-3, "bfloat16": right["exact"], "tokens": right["tokens"] + 1}
    told = {"keys": ["norm.weight"], "bare_agrees": False, "cache_agrees": False}
    figure = folders.figure(key, told, {f"{key}.{name}": one for name, one in found.items()})
    assert len(figure.wrong) == 5
    assert figure.apart > 9e-4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_verdict_warns_of_padding_where_the_battery_expects_it_to_fail() -> None:
    ids = torch.arange(1, 5)[None]
    for index in range(len(KINDS)):
        drawn = spec(index)
        model = build(drawn, seed=0).eval()
        if model.can_generate():
            excused = parity._Causal.excuse(cast(Any, SimpleNamespace(model=model, ids=ids)))
            assert bool(padding_warning(plan(drawn))) == bool(excused), KINDS[index]


@pytest.mark.parametrize("kind", COMPOSED)
def test_every_composition_of_mixers_can_be_drawn(kind: str) -> None:
    drawn = [MIXERS[kind].model_validate(mixer(random.Random(seed), kind)) for seed in range(5)]
    assert all(not one.problems(SITE) for one in drawn)


@torch.no_grad()
def test_no_memory_that_is_drawn_leaves_float32() -> None:
    drawn = [plain(random.Random(seed), "ttt") for seed in range(200)]
    # Inputs of a layer without a norm before it may be as large; the widest range is that of writes after each token.
    x = 3 * noise(2, 74, HIDDEN, dtype=torch.float32)
    for fields in drawn:
        if not MIXERS["ttt"].model_validate(fields).problems(SITE):
            made = shaken(mixer_of(HIDDEN, **fields)).float()
            cache = made.new_cache()
            y = made(x, call_at(0, 74, cache))
            assert y.isfinite().all(), fields
            # Squares, which norms sum up, are within float32 as well.
            assert cache.states["memory"].abs().max() < 1e15, fields
    ways = {(one.get("normalise", "after"), one.get("memory", "mlp")) for one in drawn}
    assert {("after", "mlp"), ("after", "linear"), ("before", "linear"), ("none", "linear")} == ways


@torch.no_grad()
def test_a_spec_whose_memory_ran_away_is_drawn_within_float32() -> None:
    ids = torch.randint(1, 256, (2, 70), generator=torch.Generator().manual_seed(0))
    assert ready(spec(651956), 651956)(ids).logits.isfinite().all()


@pytest.mark.slow
def test_logits_that_are_no_numbers_are_told(folders: Folders) -> None:
    key = next(iter(folders.right))
    nothing = torch.full_like(folders.right[key]["logits"], torch.nan)
    told = {"keys": [], "bare_agrees": True, "cache_agrees": True}
    found = {"logits": nothing, "bfloat16": folders.right[key]["exact"]}
    found |= {"tokens": folders.right[key]["tokens"]} if "tokens" in folders.right[key] else {}
    figure = folders.figure(key, told, {f"{key}.{name}": one for name, one in found.items()})
    assert figure.wrong == ("logits nan apart",)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_picks_by_the_prompt_is_expected_to_pick_again_without_its_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "LENGTH", 24)
    model = ready(spec(KINDS.index("layer_router")))
    for part in model.modules():
        if hasattr(part, "last_bias"):
            torch.nn.init.normal_(part.last_weight, std=100.0)
            torch.nn.init.zeros_(part.last_bias)
    failed = failures(model)
    assert PROMPTED in failed.values()
    assert all(failed.values()), failed
    assert {"left padding", "batch of one, padded", "full pass"} & {*failed} == set()


def failures(model: Any) -> dict[str, str]:
    """What is expected of each check of the battery that a model fails."""
    how: dict[str, Any] = {"trusted": True, "reader": lambda *_: ([], 0), "known": known_failures}
    loaded = Loaded(model, None, "", "", 0.0, **how)
    rows: dict[str, Any] = {row["check"]: SimpleNamespace(**row) for row in battery(loaded, full=False)}
    return {name: row.expected for name, row in rows.items() if not row.passed}


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_chooses_for_single_tokens_is_expected_to_step_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "LENGTH", 24)
    chosen = {"block": 4, "count": 2, "sink": 1, "recent": 1, "decode_only": True}
    mixer = {"kind": "attention", "heads": 4, "selection": chosen}
    blocks = {"it": {"mixer": mixer, "channel": {"kind": "none"}}}
    data = {"vocab_size": 64, "hidden_size": 32, "blocks": blocks, "layers": ["it", "it"]}
    failed = failures(ready(ModelSpec.model_validate(data)))
    assert {*failed.values()} == {CHOSEN_STEPS}
    assert {"left padding", "batch of one, padded", "full pass"} & {*failed} == set()
