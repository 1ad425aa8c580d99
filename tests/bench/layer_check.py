"""One call on a GPU machine: stacks that select, route or split tokens beside dense ones of equal width, in bfloat16.

    python tests/bench/layer_check.py --out "$OUT" --budget 500 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/layer_check.py --out /tmp/layers --budget 60 --commit none --tiny

Holds each kind to float64 on a small shape first (a whole pass, and a prompt with decode steps), with kernels forced, as no GPU
had run some of them. Then times, in turns: a NAtS-L layer with a quarter of its chunks kept by softmax beside dense attention and
Gated DeltaNet, its two ops alone, and launches of the gated tiles; HyLRA's stacks (one layer chooses, three reuse; one full, one
chooses, two reuse), dense in prompts, beside four full layers; Flux's routed stack, half of it windows, beside four full layers.
HyLRA's goal is of a full layer whose list three others reuse. A full layer hands out none here; that stack would cost what one
full, one choosing and two reusing layers do, which answer the goal. Steps are CUDA graphs over random caches. A floor is the
larger of FLOPs by the rate of a large product and bytes by that of a large copy. A part that fails is told and the rest goes on.
Writes layer_check.log and rows to evidence-layers.jsonl, and exits with 1 if anything was wrong. `--tiny` tries the script itself
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_check import Log
from layer_stacks import FULL, Sizes, Stack, flux, hylra, made, nats_l, stack_cache
from torch import Tensor

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.bench import ceilings, machine
from heddle.kernels.block_attention import block_attention, block_attention_reference
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.routed_delta_rule import routed_delta_rule

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32
PARTS = ("checks", "nats_l", "launches", "hylra", "hylra_prefill", "flux_step", "flux")
LAUNCHES = (
    Launch(128, 64, 8, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 5), Launch(128, 64, 8, 5),
)  # fmt: skip
# By descriptors. Blocks are found on a list, which takes a stage for each that tiles are loaded ahead: five load two ahead.
IN_TILES = (
    Launch(64, 64, 4, 3), Launch(64, 64, 4, 5), Launch(128, 64, 4, 3), Launch(128, 64, 4, 5), Launch(128, 64, 8, 5),
    Launch(128, 32, 4, 5),
)  # fmt: skip
Call = Callable[[], object]


class Report:
    """Logs, keeps the table, and writes rows as they come; `rates` are bytes and FLOP a second of this machine."""

    def __init__(self, folder: Path, commit: str | None, sizes: Sizes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.file = Log(folder / "layer_check.log"), folder / "evidence-layers.jsonl"
        self.header = machine(DEVICE) | ({} if commit is None else {"commit": commit})
        self.sizes, self.table = sizes, list[str]()
        copy, product = ceilings(DEVICE)
        self.rates = (1e9 * copy["gbps"], 1e12 * product["tflops"])
        self.log(f"copy {copy['gbps'] / 1e3:.2f} TB/s, product {product['tflops']:.0f} TFLOP/s")

    def row(self, **told: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({**self.header, "op": "layers", "dtype": str(HALF)[6:], **told}) + "\n")

    def floor(self, flops: float, moved: float) -> float:
        """Milliseconds below which no version gets."""
        return 1e3 * max(moved / self.rates[0], flops / self.rates[1])


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def once(call: Call) -> float:
    """Milliseconds of one call."""
    if not ON_GPU:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def captured(call: Call) -> Call:
    """The call as a CUDA graph, on a GPU."""
    if not ON_GPU:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def begun(call: Call, *, graph: bool) -> tuple[Call, dict[str, float]]:
    """The call as it is timed, what its first run cost and the memory it took beside what was there."""
    synchronize()
    held = torch.cuda.memory_allocated() if ON_GPU else 0
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    call()
    synchronize()
    about = {"first_call_s": time.perf_counter() - begin}
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize()
        about["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    return captured(call) if graph else call, about


def in_turns(
    report: Report,
    phase: str,
    shape: Mapping[str, Any],
    calls: Mapping[str, Call],
    floors: Mapping[str, float],
    *,
    graph: bool = False,
) -> dict[str, float]:
    """Median milliseconds of each call, one after the other in every round; a call that fails is told and left out."""
    ready: dict[str, tuple[Call, dict[str, float]]] = {}
    for name, call in calls.items():
        try:
            ready[name] = begun(call, graph=graph)
        except Exception as error:
            report.log.wrong.append(f"{phase} {name}: {' '.join(str(error).split())[-300:]}")
    times: dict[str, list[float]] = {name: [] for name in ready}
    begin = time.perf_counter()
    while ready and (
        len(times[next(iter(times))]) < report.sizes.rounds[0] or time.perf_counter() - begin < 1.0
    ):
        for name, (call, _) in ready.items():
            times[name].append(once(call))
        if len(times[name]) >= report.sizes.rounds[1]:
            break
    found = {}
    for name, taken in times.items():
        taken.sort()
        found[name] = median(taken)
        low, high = taken[len(taken) // 10], taken[-1 - len(taken) // 10]
        about = {
            "ms": found[name],
            "ms_p10": low,
            "ms_p90": high,
            "floor_ms": floors.get(name),
            "runs": len(taken),
        }
        report.row(impl=name, phase=phase, shape=dict(shape), **about, **ready[name][1])
        share = floors.get(name, 0.0) / found[name]
        peak = ready[name][1].get("peak_bytes", 0) / 1e9
        report.log(
            f"{phase:14} {name:34} {found[name]:9.4f} ms, of floor {share:4.0%}, peak {peak:.2f} GB, "
            f"first call {ready[name][1]['first_call_s']:.1f} s"
        )
    return found


def compared(report: Report, what: str, times: Mapping[str, float], ours: str, other: str, goal: str) -> None:
    if ours in times and other in times:
        ratio = times[other] / times[ours]
        report.table.append(
            f"{what}: {times[ours]:.4f} ms, {other} {times[other]:.4f}: {ratio:.2f} x ({goal})"
        )


def forced() -> Any:
    """Kernels also where none has been held to its reference, on a GPU."""
    return force_path("triton") if ON_GPU else nullcontext()


def close(found: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """The relative error of what was found, and what it may be."""
    scale = exact.norm()
    error, baseline = (float((x.double() - exact).norm() / scale) for x in (found, plain))
    return error, 2 * baseline + EPSILON[HALF]


def stepped(stack: Stack, ids: Tensor, steps: int) -> Tensor:
    """The stream of all tokens, the last `steps` of which came one by one."""
    model, pieces, cache = stack.model.model, [], None
    for start, end in (
        (0, ids.shape[1] - steps),
        *((t, t + 1) for t in range(ids.shape[1] - steps, ids.shape[1])),
    ):
        told = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = told.past_key_values
        pieces.append(told.last_hidden_state)
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def check(report: Report, make: Callable[[Sizes, int], Stack], name: str) -> None:
    """A stack of a small shape in the kernels, in plain torch and in float64; drawn again where rounding turns a choice."""
    for seed in range(6):
        stack = make(report.sizes.small(), seed)
        ids = torch.randint(
            1, stack.vocabulary, (2, report.sizes.checked), generator=torch.Generator().manual_seed(seed)
        )
        ids = ids.to(DEVICE)
        runs: dict[str, Tensor] = {}
        routes = []
        for path in ("triton", "torch", "exact"):
            model = stack if path != "exact" else stack.double()
            with forced() if path == "triton" else force_path("torch"), model.routes() as seen:
                runs[path] = model.model.model(input_ids=ids, use_cache=False).last_hidden_state
                runs[f"{path} stepped"] = stepped(model, ids, 3)
            routes.append([one.gt(0.5) for one in seen])
        same = all(torch.equal(a, b) for other in routes[:2] for a, b in zip(other, routes[2], strict=True))
        if same:
            break
    else:
        report.log.wrong.append(f"{name}: choices turn with every seed")
        return
    for way in ("", " stepped"):
        found, plain, exact = (runs[f"{path}{way}"] for path in ("triton", "torch", "exact"))
        error, bound = close(found, plain, exact.to(found.device))
        good = bool(found.isfinite().all()) and error <= bound
        report.log(f"{'ok   ' if good else 'WRONG'} {name}{way}: error {error:.2e}, at most {bound:.2e}")
        report.row(impl="heddle", phase="check", kind=f"{name}{way}", error=error, bound=bound, ok=good)
        if not good:
            report.log.wrong.append(f"{name}{way}: error {error:.2e}, at most {bound:.2e}")


def checks(report: Report) -> None:
    kinds: dict[str, Callable[[Sizes, int], Stack]] = {
        "nats_l": lambda sizes, seed: nats_l(sizes, seed)["heddle"],
        "hylra": lambda sizes, seed: hylra(sizes, seed, everything=True)["choose, 3 reuse"],
        "flux": lambda sizes, seed: flux(sizes, seed)["half windows"],
    }
    for name, make in kinds.items():
        check(report, make, name)


def prefill(stack: Stack, tokens: int) -> Call:
    ids = torch.randint(1, stack.vocabulary, (1, tokens), device=DEVICE)

    @torch.inference_mode()
    def run() -> Tensor:
        with forced():
            hidden: Tensor = stack.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    return run


def step(stack: Stack, batch: int, context: int) -> Call:
    ids = torch.randint(1, stack.vocabulary, (batch, 1), device=DEVICE)
    cache = stack_cache(stack, batch, context)

    @torch.inference_mode()
    def run() -> Tensor:
        with forced():
            hidden: Tensor = stack.model.model(
                input_ids=ids, past_key_values=cache, use_cache=True
            ).last_hidden_state
        return hidden

    return run


def prefills(report: Report, stacks: Mapping[str, Stack], tokens: int, phase: str) -> dict[str, float]:
    """Each stack's pass over one prompt, after a look whether all of it is finite."""
    floors = {
        name: report.floor(stack.prefill_flops(tokens), stack.prefill_bytes(tokens))
        for name, stack in stacks.items()
    }
    calls = {name: prefill(stack, tokens) for name, stack in stacks.items()}
    times = in_turns(report, phase, {"B": 1, "T": tokens}, calls, floors)
    for name in times:
        finite(report, f"{phase} {name}", calls[name])
    return times


def finite(report: Report, what: str, call: Call) -> None:
    found = call()
    if isinstance(found, Tensor) and not bool(found.isfinite().all()):
        report.log.wrong.append(f"{what}: not finite")


def steps(
    report: Report, stacks: Mapping[str, Stack], batch: int, context: int, phase: str
) -> dict[str, float]:
    floors = {name: report.floor(0.0, stack.step_bytes(batch, context)) for name, stack in stacks.items()}
    calls = {name: step(stack, batch, context) for name, stack in stacks.items()}
    for name, call in calls.items():
        finite(report, f"{phase} {name}", call)
    return in_turns(report, phase, {"B": batch, "S": context}, calls, floors, graph=True)


def device_times(call: Call, calls: int = 3) -> Counter[str]:
    """Milliseconds of a call on the device, by the first 60 letters of what runs there."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in seen.events():
        # What launches a kernel is told its time as well.
        if event.device_type == DeviceType.CUDA:
            found[event.name[:60]] += event.device_time / 1e3 / calls
    return found


def nats_l_rows(report: Report) -> None:
    stacks, tokens = nats_l(report.sizes, 0), report.sizes.long
    times = prefills(report, stacks, tokens, "nats_l prefill")
    with stacks["heddle"].routes() as seen:
        prefill(stacks["heddle"], min(tokens, 16384))()
    share = float(seen[0][..., 0].float().mean())
    report.row(impl="heddle", phase="nats_l share", shape={"T": tokens}, share=share)
    if ON_GPU:
        spent = device_times(prefill(stacks["heddle"], tokens))
        report.row(impl="heddle", phase="nats_l kernels", shape={"T": tokens}, kernels_ms=dict(spent))
        report.table += [f"NAtS-L {ms:7.3f} ms {name}" for name, ms in spent.most_common(16)]
        report.table.append(f"NAtS-L {spent.total():7.3f} ms on the device, in all")
    compared(report, f"NAtS-L prefill 1 x {tokens}, {share:.0%} softmax", times, "heddle", "dense", "goal 3")
    compared(report, "Gated DeltaNet alone", times, "gated_deltanet", "dense", "no goal")


def nats_l_ops(report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the two ops of a NAtS-L layer at its size, a quarter of the chunks softmax."""
    sizes = report.sizes
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = {"B": 1, "T": sizes.long, "H": 6, "K": 128, "V": 256, "chunk": 64}
    shape = shape if ON_GPU else {**shape, "H": 2, "K": 16, "V": 16}
    drawn = {name: x.float() for name, x in routed_delta_rule.cases.inputs(shape, generator).items()}
    linear = torch.rand(drawn["routes"].shape, generator=generator, device=DEVICE) > 0.25
    linear_given = {**drawn, "routes": linear.float(), "chunk": 64} | {
        name: drawn[name].to(HALF) for name in "qkv"
    }
    heads = {"q": shape["K"], "k": shape["K"], "v": shape["V"]}
    sides = {
        name: torch.randn(1, 2 * shape["H"], sizes.long, d // 2, generator=generator, device=DEVICE).to(HALF)
        for name, d in heads.items()
    }
    gates = (~linear).float().transpose(1, 2).repeat_interleave(2, dim=1)
    return linear_given, {
        **sides,
        "gates": gates,
        "block": 64,
        "start": torch.zeros(1, dtype=torch.int64, device=DEVICE),
    }


def gate_launches() -> dict[str, dict[str, Any]]:
    """Overrides by what they are called: launches by pointers, and by descriptors."""
    both = ((0, LAUNCHES), (1, IN_TILES)) if ON_GPU else ((0, LAUNCHES[:1]), (1, IN_TILES[:1]))
    return {
        f"gates, {launch}{', descriptors' if tiles else ''}": {"gated": launch, "gate_descriptors": tiles}
        for tiles, launches in both
        for launch in launches
    }


def held_gates(report: Report) -> dict[str, dict[str, Any]]:
    """The launches that are as near to float64 as plain torch is, on an odd length with padding, and twice the same."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    T, heads = 333, 2
    drawn = {name: torch.randn(1, heads, T, d, generator=generator, device=DEVICE).to(HALF)
             for name, d in {"q": 64, "k": 64, "v": 128}.items()}  # fmt: skip
    gates = (torch.rand(1, heads, -(-T // 64), generator=generator, device=DEVICE) > 0.6).float()
    start, right = torch.zeros(1, dtype=torch.int64, device=DEVICE), dict[str, dict[str, Any]]()
    for real in (None, torch.rand(1, T, generator=generator, device=DEVICE) > 0.2):
        given = {**drawn, "gates": gates, "block": 64, "start": start, "real": real}
        exact = block_attention_reference(**given)
        with force_path("torch"):
            plain = block_attention(**given)
        for name, overrides in gate_launches().items():
            try:
                with forced(), torch.no_grad(), tuning(**overrides):
                    found, again = (block_attention(**given) for _ in range(2))
            except Exception as error:
                report.log(f"none  {name}: {' '.join(str(error).split())[-200:]}")
                continue
            error, bound = close(found, plain, exact)
            right[name] = overrides
            if not (error <= bound and torch.equal(found, again)):
                report.log.wrong.append(
                    f"{name}, padded {real is not None}: {error:.1e}, at most {bound:.1e}"
                )
    wrong = " ".join(report.log.wrong)
    return {name: overrides for name, overrides in right.items() if f"{name}, padded" not in wrong}


def launch_rows(report: Report) -> None:
    """The two ops alone, and the attention with other launches, each compared with that of the table."""
    linear, gated = nats_l_ops(report)

    def run(overrides: dict[str, Any]) -> Call:
        def call() -> Tensor:
            with forced(), torch.no_grad(), tuning(**overrides):
                return block_attention(**gated)

        return call

    def recall() -> Tensor:
        with forced(), torch.no_grad():
            return routed_delta_rule(**linear)[0]

    calls: dict[str, Call] = {"routed_delta_rule": recall, "block_attention, gates": run({})}
    tried = {name: run(overrides) for name, overrides in held_gates(report).items()}
    shape = {"B": 1, "T": report.sizes.long}
    times = in_turns(report, "nats_l ops", shape, calls | tried, {})
    expected = run({})().float()
    for name, call in tried.items():
        if name in times:
            error = float((call().float() - expected).norm() / expected.norm())  # type: ignore[attr-defined]
            if not error <= 4 * EPSILON[HALF]:
                report.log.wrong.append(f"{name}: differs by {error:.1e} from the launch of the table")
    best = min((name for name in tried if name in times), key=times.__getitem__, default=None)
    report.table += [f"op {name}: {times[name]:.3f} ms" for name in (*calls, best) if name in times]


def hylra_rows(report: Report) -> None:
    stacks, (batch, context) = hylra(report.sizes, 0), report.sizes.step
    times = steps(report, stacks, batch, context, "hylra step")
    for name in [name for name in stacks if name != FULL]:
        goal = "goal 1.46" if name.startswith("full") else "no goal"
        compared(report, f"HyLRA step B={batch} {context}, {name}", times, name, FULL, goal)


def hylra_prefill(report: Report) -> None:
    stacks, tokens = hylra(report.sizes, 0), report.sizes.step[1]
    times = prefills(report, stacks, tokens, "hylra prefill")
    for name in [name for name in stacks if name != FULL]:
        compared(report, f"HyLRA prefill 1 x {tokens}, {name}", times, name, FULL, "dense in the method")


def flux_step(report: Report) -> None:
    stacks, context = flux(report.sizes, 0), report.sizes.long
    times = steps(report, stacks, 1, context, "flux step")
    compared(report, f"Flux step B=1 {context}", times, "half windows", FULL, "paper 2.0 at 256 K")


def flux_rows(report: Report) -> None:
    stacks, tokens = flux(report.sizes, 0), report.sizes.long
    times = prefills(report, stacks, tokens, "flux prefill")
    compared(report, f"Flux prefill 1 x {tokens}", times, "half windows", FULL, "paper 2.8 at 256 K")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=500.0, help="seconds after which no part is begun")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS, help="parts left out")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="parts run")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    chosen = parser.parse_args()
    begin, report = time.monotonic(), Report(chosen.out, chosen.commit, made(tiny=chosen.tiny))
    runs = (checks, nats_l_rows, launch_rows, hylra_rows, hylra_prefill, flux_step, flux_rows)
    for name, run in zip(PARTS, runs, strict=True):
        if name in chosen.skip or name not in chosen.only:
            continue
        if time.monotonic() - begin > chosen.budget:
            report.log(f"{name}: out of time")
            continue
        try:
            run(report)
        except Exception as error:
            report.log.wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[-300:]}")
        if ON_GPU:
            torch.cuda.empty_cache()
        report.log(f"{name} done after {time.monotonic() - begin:.0f} s")
    log = report.log
    for line in (*log.wrong, *report.table, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
