"""Tuning of launches: what is tried, what is kept, and that tables of another machine or of older kernels are passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from heddle.errors import HeddleError
from heddle.kernels import tune_backends
from heddle.kernels.configs import found, gla, kda, simple_gla
from heddle.kernels.configs.dense_attention import HOPPER, NEVER, Backend, Rule, rules_on
from heddle.kernels.configs.launch import Launch
from heddle.kernels.tune import climb, neighbours, tune, tuned_ops
from heddle.kernels.tune_backends import SIZES, BackendTrial, best_rules

SLOW = Launch(chunk=64, columns=64, warps=4, stages=2)
SHIPPED = {"forward": SLOW, "gradient": Launch(chunk=64, columns=32, warps=4, stages=1)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEDDLE_CACHE", str(tmp_path))
    return tmp_path


def keep(launches: Mapping[str, Launch], device: str = "A card") -> Path:
    return found.keep(
        "gla", launches, device=device, triton="3.6.0", told={"shipped_ms": 2.0, "found_ms": 1.0}
    )


def test_neighbours_differ_in_one_thing() -> None:
    tried = list(neighbours(SLOW))
    assert len(tried) == len(set(tried)) == 6
    for one in tried:
        pairs = zip(
            (one.chunk, one.columns, one.warps, one.stages),
            (SLOW.chunk, SLOW.columns, SLOW.warps, SLOW.stages),
            strict=True,
        )
        assert [a == b for a, b in pairs].count(False) == 1


def test_one_stage_stays_one() -> None:
    assert {one.stages for one in neighbours(SHIPPED["gradient"])} == {1}


def test_the_climb_takes_what_is_faster_and_passes_over_what_fails() -> None:
    def trial(launches: Mapping[str, Launch]) -> float:
        forward = launches.get("forward", SLOW)
        if forward.warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return 10.0 - (forward.columns == 128) * 3 - (forward.stages == 3) * 2

    told: list[str] = []
    best = climb("gla", SHIPPED, trial, report=told.append)
    # Both gains are found, one after the other, from the launch that was shipped; the later one is taken if it is better.
    assert best.launches == {"forward": Launch(64, 128, 4, 2)}
    assert (best.shipped_ms, best.found_ms) == (10.0, 7.0)
    assert best.tried == len(told)
    assert any("shared memory" in line for line in told)


def test_each_trial_is_given_all_launches() -> None:
    """An earlier tuning is in the table of this process: nothing may be left to it."""
    tried: list[Mapping[str, Launch]] = []
    climb("gla", SHIPPED, lambda launches: tried.append(launches) or 1.0)
    assert tried[0] == SHIPPED
    assert all(each.keys() == SHIPPED.keys() for each in tried)


def test_noise_is_no_gain_and_no_time_is_no_try() -> None:
    times = iter([10.0, *([9.9] * 100)])
    assert climb("gla", SHIPPED, lambda _: next(times)).launches == {}
    assert climb("gla", SHIPPED, lambda _: 1.0, late=lambda: True).tried == 0


def test_what_was_found_comes_before_the_table_on_that_machine_alone() -> None:
    path = keep({"forward": SLOW})
    here = found.found_for("gla", device="A card", triton="3.6.0")
    assert here == {"forward": SLOW}
    assert found.found_for("gla", device="Another", triton="3.6.0") == {}
    assert found.found_for("gla", device="A card", triton="3.7.1") == {}
    assert found.found_for("kda", device="A card", triton="3.6.0") == {}
    table = found.overlaid(gla.HOPPER, here)
    assert table.half.forward == SLOW
    assert table.half.gradient == gla.HOPPER.half.gradient
    assert table.wide == gla.HOPPER.wide
    data = json.loads(path.read_text())
    data["found"][0]["kernels"] = "older"
    path.write_text(json.dumps(data))
    assert found.found_for("gla", device="A card", triton="3.6.0") == {}


def test_a_second_tuning_replaces_the_first_and_leaves_other_machines() -> None:
    keep({"forward": SLOW})
    keep({"forward": SLOW}, device="Another")
    path = keep({"gradient": SLOW})
    assert found.found_for("gla", device="A card", triton="3.6.0") == {"gradient": SLOW}
    assert len(json.loads(path.read_text())["found"]) == 2


def test_what_was_found_is_part_of_what_runs() -> None:
    before = found.running_digest()
    assert before == found.kernel_digest()
    keep({"forward": SLOW})
    assert found.running_digest() != before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "found": 3}', '{"format": 9, "found": []}'])
def test_a_file_that_cannot_be_read_is_no_table(cache: Path, text: str) -> None:
    (cache / "launches.json").write_text(text)
    assert found.found_for("gla", device="A card", triton="3.6.0") == {}
    assert found.running_digest() == found.kernel_digest()


def test_every_kernel_of_half_precision_can_be_tuned() -> None:
    assert set(found.tunable(gla.HOPPER)) == {"prepare", "forward", "summary", "keep", "backward", "gradient"}
    assert set(found.tunable(kda.HOPPER)) == {"prepare", "forward", "keep", "backward", "gradient", "pairs"}
    assert set(found.tunable(simple_gla.HOPPER)) == {"output", "backward", "state"}
    assert {"gla", "kda", "simple_gla", "decay_attention", "gated_delta_rule"} <= set(tuned_ops())


def by_backend(name: Backend | None, size: int, length: int, _: str) -> float:
    """Flash is the fastest in short trainings, cuDNN else, and `efficient` takes no wide heads."""
    if name == "efficient" and size == 256:
        raise RuntimeError("No available kernel")
    if name is None:
        return 3.0
    return {"cudnn": 2.0, "flash": 1.0 if length == 512 else 2.5, "efficient": 4.0}[name]


def test_backends_are_taken_from_the_length_on_at_which_they_are_the_fastest() -> None:
    told: list[str] = []
    best = best_rules(by_backend, report=told.append)
    assert len(best.rules) == 2 * len(SIZES)
    order = ("cudnn", "flash", "efficient", "math")
    assert best.rules["fwdbwd_128"] == Rule(order, training=2048, inference=NEVER, largest=128, above=64)
    assert best.rules["fwd_256"] == Rule(order, training=NEVER, inference=2048, largest=256, above=128)
    # Of each head size one training of three stays as shipped.
    assert best.shipped_ms == pytest.approx(3.0)
    assert best.found_ms == pytest.approx((2.0**4 * 3.0) ** (1 / 5))
    assert len(told) == best.tried + 5
    assert sum("No available kernel" in line for line in told) == 5


def test_backends_that_are_no_faster_leave_the_table_as_it_is() -> None:
    assert best_rules(lambda *_: 1.0).rules == {}
    assert best_rules(by_backend, late=lambda: True).rules == {}

    def none(name: Backend | None, *_: object) -> float:
        if name is None:
            return 1.0
        raise RuntimeError("No available kernel")

    assert best_rules(none).rules == {}


def test_rules_that_were_found_come_before_the_table_with_that_torch_alone() -> None:
    best = best_rules(by_backend).rules
    found.keep("dense_attention", best, device="A card", triton="3.6.0", told={}, library="2.11")
    here = rules_on("A card", (9, 0), triton="3.6.0", library="2.11")
    assert here == (*best.values(), *HOPPER)
    assert rules_on("A card", (9, 0), triton="3.6.0", library="2.13") == HOPPER
    assert rules_on("Another", (8, 0), triton="3.6.0", library="2.11") == ()


def by_head_size(name: Backend | None, size: int, length: int, phase: str) -> float:
    """Heads of 64 train fastest by `efficient`, from 8192 tokens on alone; of 128 and 256 flash is always the fastest. Heads of
    64 run by no backend where no gradient is wanted."""
    if name is not None and (size, phase) == (64, "fwd"):
        raise RuntimeError("No available kernel")
    if name is None:
        return 2.0
    if size > 64:
        return 1.0 if name == "flash" else 3.0
    return {"efficient": 1.0 if length == 8192 else 5.0, "flash": 3.0, "cudnn": 3.0}[name]


def first_rule(rules: tuple[Rule, ...], size: int, queries: int, *, training: bool = True) -> Rule | None:
    held = (one for one in rules if one.holds(queries=queries, size=size, masked=False, training=training))
    return next(held, None)


def test_calls_that_no_found_rule_is_about_stay_as_shipped_and_are_counted_so() -> None:
    best = best_rules(by_head_size)
    found.keep("dense_attention", best.rules, device="A card", triton="3.6.0", told={}, library="2.11")
    here, elsewhere = (
        rules_on("A card", capability, triton="3.6.0", library="2.11") for capability in ((9, 0), (8, 0))
    )
    assert first_rule(here, 64, 8192) == best.rules["fwdbwd_64"]
    for size in (16, 64):
        for queries in (512, 2048, 8191):
            assert first_rule(here, size, queries) == HOPPER[0]
            assert first_rule(elsewhere, size, queries) is None
        assert first_rule(here, size, 2048, training=False) == HOPPER[0]
        assert first_rule(elsewhere, size, 2048, training=False) is None
        assert first_rule(here, size, 511) is None
    assert first_rule(here, 72, 512) == best.rules["fwdbwd_128"]
    assert first_rule(here, 128, 2048, training=False) == best.rules["fwd_128"]
    # Of heads of 64 one call of five is faster, of the others all.
    assert best.found_ms == pytest.approx(2.0 ** (4 / 15))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_backend_is_held_to_the_reference_before_it_is_timed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_backends, "TOKENS", 128)
    trial = BackendTrial(torch.device(device), HOPPER)
    assert trial(None, 64, 128, "fwdbwd") > 0.0
    assert trial("flash", 64, 128, "fwd") > 0.0
    assert trial.right == {("flash", 64)}
    right = F.scaled_dot_product_attention

    def wrong(*sides: Tensor, is_causal: bool) -> Tensor:
        out = right(*sides, is_causal=is_causal)
        return 1.1 * out if _cur_sdpa_kernel_backends() == [SDPBackend.FLASH_ATTENTION] else out

    monkeypatch.setattr(tune_backends.F, "scaled_dot_product_attention", wrong)
    with pytest.raises(ArithmeticError, match=r"out: .* at most"):
        trial("flash", 128, 128, "fwd")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_tune() -> None:
    with pytest.raises(HeddleError, match="there is none here"):
        tune()
