"""The self-test finds a wrong op, and benchmark rows have the format that others read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import cold_start
from torch import Tensor

from heddle.kernels import OPS, bench, causal_conv1d, decay_attention, decay_attention_step, simple_gla, ttt
from heddle.kernels.accuracy import Measured, draw, worst_error
from heddle.kernels.bench import TIMED, bench_ops, table, timed_as, timing_sample
from heddle.kernels.local_linear_attention import local_linear_attention, local_linear_attention_reference
from heddle.kernels.selftest import check_op, self_test
from heddle.kernels.simple_gla import simple_gla_reference

ROW = {
    "run", "time", "commit", "device", "driver", "cuda", "torch", "triton", "op", "impl", "phase", "shape", "dtype",
    "ms", "ms_p10", "ms_p90", "gbps", "tflops", "peak_bytes", "first_call_s",
}  # fmt: skip


def test_the_self_test_passes_for_every_op() -> None:
    found = self_test("cpu")
    steps = {f"{op.name}_step" for op in OPS if op.step}
    assert {one.op for one in found} == {op.name for op in OPS} | steps
    assert "decay_attention_step" in steps
    assert all(one.ok for one in found), found


def test_the_self_test_finds_a_wrong_op() -> None:
    def off(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, state = causal_conv1d(*args, **kwargs)
        return out * 1.0001, state

    (found,) = check_op(replace(causal_conv1d, fast=off), torch.device("cpu"), torch.float32)
    assert not found.ok


def test_the_self_test_finds_what_is_no_number_also_where_all_paths_agree() -> None:
    def broken(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, state = causal_conv1d(*args, **kwargs)
        return out, state * torch.nan

    (found,) = check_op(replace(causal_conv1d, fast=broken), torch.device("cpu"), torch.float32)
    assert not found.ok
    assert found.error == torch.inf
    # What is compared with may be at fault as well.
    assert not Measured("out", "triton", torch.inf, torch.inf, torch.inf, "").ok
    numbers, nothing = torch.zeros(1, 3, 1, 2), torch.full((1, 3, 1, 2), torch.nan)
    for one, other in ((nothing, numbers), (numbers, nothing), (nothing, nothing)):
        assert worst_error(one, other, timed=True)[0] == torch.inf


def wrong_in(result: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A decode step that is a little off in its output (0) or in the state it leaves (1)."""

    def off(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, state = decay_attention_step(*args, **kwargs)
        return (out * 1.0001, state) if result == 0 else (out, state * 1.0001)

    return off


@pytest.mark.parametrize("result", [0, 1])
def test_the_self_test_finds_a_wrong_step(result: int) -> None:
    off = replace(decay_attention, step=wrong_in(result))
    whole, step = check_op(off, torch.device("cpu"), torch.float32)
    assert (whole.op, step.op) == ("decay_attention", "decay_attention_step")
    assert whole.ok
    assert not step.ok


def test_a_benchmark_row_has_the_agreed_keys() -> None:
    seen: list[dict[str, Any]] = []
    rows = bench_ops(["causal_conv1d"], device="cpu", phases=["fwd", "fwdbwd"], report=seen.append)
    assert rows == seen
    assert all(set(row) == ROW for row in rows)
    assert {row["phase"] for row in rows} == {"ceiling", "fwd", "fwdbwd"}
    assert len({row["run"] for row in rows}) == 1
    timed = [row for row in rows if row["op"] == "causal_conv1d"]
    assert all(0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"] and row["gbps"] > 0 for row in timed)
    assert len(table(rows).splitlines()) == len(rows)


@pytest.mark.gpu
def test_a_call_in_a_graph_does_not_overtake_what_makes_its_inputs() -> None:
    made, seen = torch.zeros(1, device="cuda"), list[torch.Tensor]()
    # Some 50 ms.
    torch.cuda._sleep(100_000_000)
    made.fill_(1.0)
    bench.timed_in_graph(lambda: seen.append(made.clone()))
    assert seen[0].item() == 1.0


@pytest.mark.gpu
def test_a_slow_call_in_torch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return simple_gla(*args, **kwargs)

    seen: list[Any] = []
    monkeypatch.setattr(bench, "SLOW_S", 0.0)
    shape = {"B": 1, "T": 64, "H": 2, "HV": 2, "K": 64, "V": 64}
    about: dict[str, Any] = {"impl": "torch", "device": torch.device("cuda"), "dtype": torch.bfloat16}
    row = bench._row(replace(simple_gla, fast=counted), "fwdbwd", shape, **about)
    assert row is not None
    assert (len(seen), row["peak_bytes"]) == (1, None)
    assert row["ms"] == row["first_call_s"] * 1e3


def test_rows_of_steps_are_named_after_the_step() -> None:
    rows = bench_ops(["delta_rule"], device="cpu", phases=["decode"])
    assert {(row["op"], row["phase"]) for row in rows} == {
        ("copy", "ceiling"),
        ("matmul", "ceiling"),
        ("delta_rule_step", "decode"),
    }


def test_a_rival_that_knows_no_groups_is_given_copies_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, g: torch.Tensor, **rest: Any) -> Any:
        # The state is made of what is given, so that a wrong order of heads is seen.
        seen.append((q.shape, k.shape, g.shape, rest))
        return simple_gla_reference(q, k, v, g)

    seen: list[Any] = []
    monkeypatch.setitem(sys.modules, "a_rival", SimpleNamespace(whole=whole, token=None))
    monkeypatch.setitem(
        bench._PEERS, "simple_gla", bench._Peer("a_rival", "whole", "token", {"log_decay": "g"})
    )
    sample = draw(
        simple_gla, {"B": 1, "T": 9, "H": 2, "HV": 4, "K": 8, "V": 8}, torch.float64, initial_state=False
    )
    apart = bench._apart(simple_gla, "fwd", simple_gla, sample.arguments)
    assert seen == [((1, 9, 4, 8), (1, 9, 4, 8), (1, 9, 4), {"output_final_state": True})]
    assert all(one < 1e-6 for one in apart.values())
    assert set(apart) == {"out", "final_state"}
    assert bench._label("fla", "simple_gla", "fwd", sample.arguments) == "fla, keys copied"


def test_a_rival_that_loses_its_state_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, g: torch.Tensor, **_: Any) -> Any:
        return simple_gla_reference(q, k, v, g)[:1]

    monkeypatch.setitem(sys.modules, "a_rival", SimpleNamespace(whole=whole, token=None))
    peer = bench._Peer("a_rival", "whole", "token", {"log_decay": "g"})
    monkeypatch.setitem(bench._PEERS, "simple_gla", peer)
    shape = {"B": 1, "T": 9, "H": 2, "HV": 2, "K": 8, "V": 8}
    sample = draw(simple_gla, shape, torch.float64, initial_state=False)
    with pytest.raises(ValueError, match="shorter"):
        bench._apart(simple_gla, "fwd", simple_gla, sample.arguments)


def test_a_rival_whose_tokens_stand_before_heads_is_given_them_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(q: torch.Tensor, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sides = {name: x.transpose(1, 2) for name, x in {"q": q, "k": k, "v": v, "slope": r}.items()}
        return local_linear_attention_reference(**sides).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "fla.ops.parallax", SimpleNamespace(parallel_parallax=whole))
    sloped = bench.timed_as(local_linear_attention)[1]
    shape = {"B": 1, "H": 2, "N": 1, "T": 9, "S": 9, "K": 8, "V": 8}
    sample = draw(sloped, shape, torch.float64, initial_state=False)
    apart = bench._apart(sloped, "fwd", local_linear_attention, sample.arguments)
    assert apart.keys() == {"out"}
    assert apart["out"] < 1e-6
    theirs = bench.rival("parallax", "fwdbwd")
    assert theirs is not None
    ours, other = (
        bench._call_of(sloped, function, impl, sample, "fwdbwd")()
        for function, impl in ((local_linear_attention, "heddle"), (theirs, "fla"))
    )
    for one, gradient in zip(ours, other, strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(one, gradient.transpose(1, 2))


@pytest.mark.parametrize(
    "op", [op for op in bench.CALLED if op not in OPS and op.kernel is not None], ids=lambda op: op.name
)
def test_what_is_no_op_with_a_state_is_called_for_the_first_time_too(op: Any) -> None:
    row = cold_start.measured(op.name, "heddle", True)
    assert row["op"] == op.name
    assert row["first_s"] >= 0  # type: ignore[operator]


def test_a_row_is_told_before_the_next_is_timed() -> None:
    class LeaseEndedError(Exception):
        pass

    def report(row: dict[str, Any]) -> None:
        seen.append(row)
        if len(seen) == 3:
            raise LeaseEndedError

    seen: list[dict[str, Any]] = []
    with pytest.raises(LeaseEndedError):
        bench_ops(device="cpu", report=report)
    assert [row["op"] for row in seen] == ["copy", "matmul", OPS[0].name]


def test_a_benchmark_asks_for_the_path_at_the_whole_shape() -> None:
    asked: list[Mapping[str, int]] = []

    def takes(shape: Mapping[str, int]) -> None:
        asked.append(shape)

    ops = (replace(ttt, kernel=takes),)
    rows = bench_ops(["ttt"], device="cpu", impls=["torch"], phases=["fwd"], ops=ops)
    # An MLP has no kernel, so its path in torch is timed under one name.
    assert [shape.get("M") for shape in asked] == [None, 256]
    assert {row["op"] for row in rows} == {"copy", "matmul"}


OTHER_NAMES = {one.name: one for op in TIMED for one in timed_as(op)[1:]}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_is_timed_under_another_name_takes_its_inputs_in_half_precision(name: str) -> None:
    op, cpu = OTHER_NAMES[name], torch.device("cpu")
    shape = {letter: min(size, 16) for letter, size in op.cases.bench_shapes[0].items()}
    found = op(**timing_sample(op, shape, torch.bfloat16, cpu).arguments)
    assert (found if isinstance(found, Tensor) else found[0]).dtype == torch.bfloat16


@pytest.mark.gpu
def test_on_a_gpu_the_self_test_runs_the_kernels() -> None:
    found = self_test()
    assert all(one.ok for one in found), found
    assert {one.path for one in found if one.op.startswith("decay_attention")} == {"triton"}
