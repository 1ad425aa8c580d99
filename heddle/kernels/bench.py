"""Times ops beside their torch path and a rival, in one process, and says what share of the machine they reach.

A row is one JSON object of `tests/bench/results/<machine>.jsonl`. Rows of one `run` share process and machine.
Forward and in steps a rival's row tells in `apart` how far its output and final state are from ours.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import platform
import secrets
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heddle.kernels import OPS
from heddle.kernels.accuracy import Sample, draw
from heddle.kernels.dynamic_conv import dynamic_conv
from heddle.kernels.gated_delta_layer import gated_delta_layer_step
from heddle.kernels.grid_window_attention import grid_window_attention
from heddle.kernels.local_linear_attention import local_linear_attention
from heddle.kernels.op import TRITON_VERSION, Op, Phase, Shape, force_path
from heddle.kernels.rat_attention import rat_attention
from heddle.kernels.rat_scan import rat_scan
from heddle.kernels.rms_norm import rms_norm
from heddle.kernels.token_split_attention import token_split_attention

Row = dict[str, Any]
Call = Callable[[], object]

PHASES: tuple[Phase, ...] = ("fwd", "fwdbwd", "decode", "decode_graph")
# Milliseconds of warming up and of repeating; a CPU repeats for as long, but at least a few times.
WARM_UP, REPEAT, FEWEST = 25, 100, 5
# On a CPU a shape for a GPU would take minutes.
CPU_LIMIT = {"B": 1, "T": 1024, "S": 1024, "H": 4, "HV": 4, "N": 4, "C": 1024}
COPY_BYTES, MATMUL_SIZE = 1 << 32, 8192
# Seconds of a call in PyTorch, which compiles nothing, from which on it is not made again, for its peak neither.
SLOW_S = 5.0
# What is timed whole, and what besides can be called by its cases: a layer's step has no sequences to time.
TIMED: tuple[Op[..., Any], ...] = (
    *OPS,
    local_linear_attention,
    rat_scan,
    rat_attention,
    rms_norm,
    dynamic_conv,
    token_split_attention,
    grid_window_attention,
)
CALLED = (*TIMED, gated_delta_layer_step)


def bench_ops(
    names: Iterable[str] | None = None,
    *,
    device: torch.device | str | None = None,
    impls: Iterable[str] = ("heddle", "torch", "fla"),
    phases: Iterable[Phase] = PHASES,
    ops: Iterable[Op[..., Any]] = OPS,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Rows of every one of `ops` (or those named): each phase and shape, for each implementation that is there.

    `report` is called with each row as it comes. Out of memory leaves a row out.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    header = machine(device)
    wanted = None if names is None else set(names)
    rows = []
    chosen = [each for op in ops for each in timed_as(op) if wanted is None or {op.name, each.name} & wanted]
    for row in itertools.chain(ceilings(device), _rows(chosen, device, list(impls), list(phases))):
        rows.append({**header, **row})
        if report is not None:
            report(rows[-1])
    return rows


def timed_as(op: Op[..., Any]) -> list[Op[..., Any]]:
    """An op, and what else it is timed as: under other names, on other inputs."""
    found = [op]
    for name, (inputs, shapes) in op.cases.variants.items():
        cases = replace(op.cases, inputs=inputs, timed_inputs=None, bench_shapes=shapes, decode_shapes=())
        found.append(replace(op, name=name, cases=cases))
    return found


def machine(device: torch.device) -> Row:
    """The part of a row that is the same for the whole run."""
    cuda = device.type == "cuda"
    return {
        "run": secrets.token_hex(4),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "triton": TRITON_VERSION,
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def ceilings(device: torch.device) -> Iterator[Row]:
    """What this machine can do at most: bytes of a large copy, FLOPs of a large matrix product."""
    cuda = device.type == "cuda"
    count = COPY_BYTES if cuda else COPY_BYTES >> 5
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device)
    bare: Row = {"impl": "torch", "phase": "ceiling", "first_call_s": None, "peak_bytes": None}
    speed = 2 * count / copy["ms"] / 1e6
    yield {
        "op": "copy",
        **bare,
        "shape": {"bytes": count},
        "dtype": "uint8",
        **copy,
        "gbps": speed,
        "tflops": None,
    }
    size, dtype = (MATMUL_SIZE, torch.bfloat16) if cuda else (MATMUL_SIZE >> 3, torch.float32)
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = timed(lambda: x @ y, device)
    speed = 2 * size**3 / product["ms"] / 1e9
    shape = {"M": size, "N": size, "K": size}
    yield {
        "op": "matmul",
        **bare,
        "shape": shape,
        "dtype": _name(dtype),
        **product,
        "gbps": None,
        "tflops": speed,
    }


def timed(call: Call, device: torch.device) -> Row:
    """Median, 10th and 90th percentile of a call, in milliseconds; a GPU's caches are cold."""
    if device.type == "cuda":
        from triton.testing import do_bench

        median, low, high = do_bench(call, warmup=WARM_UP, rep=REPEAT, quantiles=[0.5, 0.1, 0.9])
        return {"ms": median, "ms_p10": low, "ms_p90": high}
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < FEWEST or time.perf_counter() - begin < REPEAT / 1e3:
        before = time.perf_counter()
        call()
        times.append((time.perf_counter() - before) * 1e3)
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"ms": statistics.median(times), "ms_p10": cuts[0], "ms_p90": cuts[-1]}


def timing_sample(op: Op[..., Any], shape: Shape, dtype: torch.dtype, device: torch.device) -> Sample:
    """What an op is timed on: the inputs of its benchmarks, without an initial state."""
    given = replace(op, cases=replace(op.cases, inputs=op.cases.timed_inputs or op.cases.inputs))
    return draw(given, shape, dtype, initial_state=False, device=device)


def first_call(op: Op[..., Any], shape: Shape, *, impl: str, device: torch.device) -> Call:
    """An op, or its rival, in both directions on its inputs, a step forward alone: nothing of it has run yet.

    Raises:
        LookupError: where there is no such rival.
    """
    phase: Phase = "fwdbwd" if op.cases.bench_shapes else "fwd"
    sample = timing_sample(op, shape, torch.bfloat16, device)
    if phase == "fwd":
        state = op.cases.initial_state(shape, torch.Generator(device).manual_seed(0))
        sample.arguments["state"] = state.float()
    function = _function(op, phase, shape, impl, torch.bfloat16, device)
    if function is None:
        raise LookupError(f"{impl} has no {op.name}")
    return _call_of(op, function, impl, sample, phase)


def milliseconds(op: Op[..., Any], sample: Sample, phase: Phase) -> float:
    """The median of a call, "fwd" or "fwdbwd"."""
    call = _call_of(op, op, "heddle", sample, phase)
    return float(timed(call, sample.upstream[0].device)["ms"])


def timed_in_graph(call: Call, milliseconds: int = REPEAT) -> Row:
    """The same in a CUDA graph of many calls: no launches, and caches as the call before left them."""
    from triton.testing import do_bench_cudagraph

    # It calls on a stream of its own, which waits for no other: what still makes the inputs would be overtaken.
    torch.cuda.synchronize()
    median, low, high = do_bench_cudagraph(call, rep=milliseconds, quantiles=[0.5, 0.1, 0.9])
    return {"ms": median, "ms_p10": low, "ms_p90": high}


def _decodes(phase: Phase) -> bool:
    return phase in ("decode", "decode_graph")


def _rows(
    ops: list[Op[..., Any]], device: torch.device, impls: list[str], phases: list[Phase]
) -> Iterator[Row]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # The rival comes last: it may tune itself for minutes, and a lease may end.
    for op, impl, phase in itertools.product(ops, impls, phases):
        if _decodes(phase) and op.step is None:
            continue
        for shape in _shapes(op, phase, device):
            row = _row(op, phase, shape, impl=impl, device=device, dtype=dtype)
            if row is not None:
                yield row


def _shapes(op: Op[..., Any], phase: Phase, device: torch.device) -> list[Shape]:
    shapes = op.cases.decode_shapes if _decodes(phase) else op.cases.bench_shapes
    if device.type == "cuda":
        return list(shapes)
    if phase == "decode_graph":
        return []
    small = [
        {letter: min(size, CPU_LIMIT.get(letter, size)) for letter, size in shape.items()} for shape in shapes
    ]
    return [shape for index, shape in enumerate(small) if shape not in small[:index]]


def _row(
    op: Op[..., Any], phase: Phase, shape: Shape, *, impl: str, device: torch.device, dtype: torch.dtype
) -> Row | None:
    given = replace(op, cases=replace(op.cases, inputs=op.cases.timed_inputs or op.cases.inputs))
    sample = draw(given, shape, dtype, initial_state=_decodes(phase), device=device)
    function = _function(op, phase, shape, impl, dtype, device)
    if function is None:
        return None
    call = _call_of(op, function, impl, sample, phase)
    try:
        with force_path("torch") if impl == "torch" else nullcontext():
            first = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            first = time.perf_counter() - first
            if impl == "torch" and first > SLOW_S:
                times, peak = dict.fromkeys(("ms", "ms_p10", "ms_p90"), first * 1e3), None
            else:
                times = timed_in_graph(call) if phase == "decode_graph" else timed(call, device)
                peak = _peak(call, device)
    except torch.cuda.OutOfMemoryError:
        return None
    work = (
        op.cases.work(shape, "decode" if _decodes(phase) else phase, dtype.itemsize)
        if op.cases.work
        else None
    )
    speeds = {
        "gbps": work and work.bytes / times["ms"] / 1e6,
        "tflops": work and work.flops / times["ms"] / 1e9,
    }
    about: Row = {
        "op": f"{op.name}_step" if _decodes(phase) else op.name,
        "impl": _label(impl, op.name, phase, sample.arguments),
        "phase": phase,
        "shape": dict(shape),
        "dtype": _name(dtype),
    }
    if impl == "fla" and phase != "fwdbwd":
        ours = _function(op, phase, shape, "heddle", dtype, device)
        assert ours is not None
        about["apart"] = _apart(op, phase, ours, sample.arguments)
    return {**about, **times, **speeds, "peak_bytes": peak, "first_call_s": first}


def _function(
    op: Op[..., Any],
    phase: Phase,
    shape: Shape,
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[..., Any] | None:
    """What to call with the op's arguments, or None if there is nothing, or nothing new, to time."""
    if impl == "fla":
        return _rival(op.name, phase) if device.type == "cuda" else None
    if impl == "torch" and (op.kernel is None or op.path(device, dtype, **shape) == "torch"):
        return None
    if not _decodes(phase):
        numbers = op.cases.numbers(shape)
        return functools.partial(op, **numbers) if numbers else op
    step = op.step
    assert step is not None
    return lambda *, initial_state, **rest: step(**rest, state=initial_state)


@dataclass(frozen=True, slots=True)
class _Peer:
    """The same function elsewhere: where it is, for whole sequences and for a token, and its names for our arguments.

    A name of None: it has no such argument. `token_names`: those for a token, where they differ. `given`: arguments of its own.
    `guarded`: its backward refuses to run on Hopper with the Triton of the day, since results may be wrong there. `grouped`:
    value heads may share a key head; if not, queries and keys are copied in each call. `turned`: tokens come before heads there
    and behind them here. `stateless`: it gives its output alone.
    """

    module: str
    whole: str
    token: str
    names: Mapping[str, str | None]
    guarded: bool = False
    token_names: Mapping[str, str | None] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    grouped: bool = False
    turned: bool = False
    stateless: bool = False


_SIMPLE_GLA = ("fla.ops.simple_gla", "chunk_simple_gla", "fused_recurrent_simple_gla")
_GLA = _Peer(
    "fla.ops.gla", "chunk_gla", "fused_recurrent_gla", {"log_decay": "g"}, token_names={"log_decay": "gk"}
)
_PEERS = {
    "simple_gla": _Peer(*_SIMPLE_GLA, {"log_decay": "g"}, guarded=True),
    "decay_attention": _Peer(*_SIMPLE_GLA, {"log_decay": "g_gamma"}),
    "gated_delta_rule": _Peer(
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
        {"log_decay": "g"},
        guarded=True,
        grouped=True,
    ),
    "gla": _GLA,
    "hgrn2": _GLA,
    "hgrn2_first_layer": _GLA,
    "kda": _Peer("fla.ops.kda", "chunk_kda", "fused_recurrent_kda", {"log_decay": "g"}),
    "delta_rule": _Peer("fla.ops.delta_rule", "chunk_delta_rule", "fused_recurrent_delta_rule", {}),
    "lightning": _Peer(*_SIMPLE_GLA, {"log_decay": "g_gamma"}),
    "lightning_linear": _Peer(*_SIMPLE_GLA, {"log_decay": "g_gamma"}),
    "mamba2": _Peer(*_SIMPLE_GLA, {"log_decay": "g"}, guarded=True),
    # It has the decays in it.
    "retention": _Peer(
        "fla.ops.retention", "chunk_retention", "fused_recurrent_retention", {"log_decay": None}
    ),
    "linear_attention": _Peer(
        "fla.ops.linear_attn",
        "chunk_linear_attn",
        "fused_recurrent_linear_attn",
        {"log_decay": None},
        given={"normalize": False},
    ),
    "parallax": _Peer(
        "fla.ops.parallax",
        "parallel_parallax",
        "parallel_parallax",
        {"slope": "r"},
        grouped=True,
        turned=True,
        stateless=True,
    ),
    # All pairs of tokens, or chunk by chunk.
    "taylor_attention": _Peer("fla.ops.based", "parallel_based", "parallel_based", {}, stateless=True),
    "taylor_attention_chunks": _Peer(
        "fla.ops.based", "fused_chunk_based", "fused_chunk_based", {}, stateless=True
    ),
}


def rival(name: str, phase: Phase) -> Callable[..., Any] | None:
    """The same function in flash-linear-attention, for arguments as `arranged` gives them; None if it is not installed."""
    return _rival(name, phase)


def arranged(name: str, x: Tensor) -> Tensor:
    """One of our tensors as the rival of that name reads it, or one of the rival's as we do."""
    return x.transpose(1, 2).contiguous() if _PEERS[name].turned else x


def _rival(name: str, phase: Phase, *, with_state: bool = False) -> Callable[..., Any] | None:
    """The same function in flash-linear-attention, if it is installed; `with_state` it leaves its final state in any phase."""
    peer = _PEERS.get(name)
    if peer is None:
        return None
    try:
        found = importlib.import_module(peer.module)
        if peer.guarded:
            # Its time counts, whatever its results.
            vars(importlib.import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True
    except Exception:
        return None
    run, names = getattr(found, peer.whole), peer.names
    if _decodes(phase):
        run, names = getattr(found, peer.token), peer.token_names or peer.names

    def rival(**arguments: Any) -> Any:
        if _copies_keys(peer, arguments):
            groups = arguments["v"].shape[2] // arguments["k"].shape[2]
            arguments |= {side: arguments[side].repeat_interleave(groups, dim=2) for side in ("q", "k")}
        renamed = {names.get(name, name): value for name, value in arguments.items()}
        known = {name: value for name, value in renamed.items() if name is not None}
        state = {} if peer.stateless else {"output_final_state": with_state or _decodes(phase)}
        return run(**known, **peer.given, **state)

    return rival


def _copies_keys(peer: _Peer, arguments: Mapping[str, Tensor]) -> bool:
    return not peer.grouped and arguments["k"].shape[2] != arguments["v"].shape[2]


def _label(impl: str, name: str, phase: Phase, arguments: Mapping[str, Tensor]) -> str:
    """What a row calls an implementation: that a guard of its was lifted, or keys copied for it, is part of it."""
    if impl != "fla":
        return impl
    peer = _PEERS[name]
    lifted = ["guard lifted"] if phase == "fwdbwd" and peer.guarded else []
    return ", ".join([impl, *lifted, *(["keys copied"] if _copies_keys(peer, arguments) else [])])


def _apart(op: Op[..., Any], phase: Phase, ours: Callable[..., Any], arguments: Mapping[str, Tensor]) -> Row:
    """How far the rival's output and final state are from ours: norms of the differences over those of ours."""
    theirs = _rival(op.name, phase, with_state=True)
    assert theirs is not None
    with torch.no_grad():
        found = [ours(**arguments), theirs(**{name: arranged(op.name, x) for name, x in arguments.items()})]
        names: tuple[str, ...] = ("out", "final_state")
        if _PEERS[op.name].stateless:
            here = found[0][0] if isinstance(found[0], tuple) else found[0]
            found, names = [(here,), (arranged(op.name, found[1]),)], ("out",)
        return {
            name: float((there.float() - here.float()).norm() / here.float().norm())
            for name, here, there in zip(names, *found, strict=True)
        }


def _call_of(op: Op[..., Any], function: Callable[..., Any], impl: str, sample: Sample, phase: Phase) -> Call:
    """A call of a function on an op's sample, in an implementation's layout."""
    arguments, upstream = sample.arguments, sample.upstream[0]
    if impl == "fla":
        arguments = {name: arranged(op.name, x) for name, x in arguments.items()}
        upstream = arranged(op.name, upstream)
    return _call(function, arguments, op.cases.differentiable, upstream, phase, op.cases.read)


def _call(
    function: Callable[..., Any],
    arguments: Mapping[str, Tensor],
    wanted: tuple[str, ...],
    upstream: Tensor,
    phase: Phase,
    read: tuple[int, ...] = (0,),
) -> Call:
    if phase != "fwdbwd":

        def forward() -> object:
            with torch.no_grad():
                return function(**arguments)

        return forward
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in arguments.items()}
    graded = [leaves[name] for name in wanted if name in leaves]

    def both() -> object:
        found = function(**leaves)
        out = [found[index] for index in read] if isinstance(found, tuple) else [found]
        # A result that is not read may be all that an argument is for.
        return torch.autograd.grad(out, graded, [upstream] * len(out), allow_unused=len(read) > 1)

    return both


def _peak(call: Call, device: torch.device) -> int | None:
    """Bytes a call allocates at most, beyond what is there already."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: Iterable[Row]) -> str:
    """Rows as text: a line each, with the share of the ceilings that the run measured."""
    lines, most = [], {"gbps": 0.0, "tflops": 0.0}
    for row in rows:
        if row["phase"] == "ceiling":
            most = {name: max(most[name], row[name] or 0.0) for name in most}
        shares = [
            f"{row[name]:8.1f} {unit}" + (f" ({row[name] / most[name]:4.0%})" if most[name] else "")
            for name, unit in (("gbps", "GB/s"), ("tflops", "TFLOP/s"))
            if row[name]
        ]
        sizes = " ".join(f"{letter}={size}" for letter, size in row["shape"].items())
        head = f"{row['op']:17} {row['phase']:8} {row['impl']:7} {sizes:34} {row['dtype']:9}"
        lines.append(f"{head} {row['ms']:9.4f} ms  {'  '.join(shares)}")
    return "\n".join(lines)
