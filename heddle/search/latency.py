"""How long a model takes, and how much memory, measured on the device present: prefill of T tokens, one decode step after T
tokens, a training step of T tokens without its optimizer.

The candidate and the reference model take turns (A B B A …), so that clocks, heat and neighbours hit both
alike and cancel in the ratio. Where a model's memory lies changes its speed by some percent, as luck has it:
both are built several times, and intervals draw builds, then turns of a build. Repeats go on until the
bootstrap 95 % interval of the median is narrow, or the time is up; the interval is reported either way. CUDA:
events around a captured graph (decode) or around the launches (prefill, train). CPU: a wall clock around the same call
with all physical cores, so launch overhead is part of the figure.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from heddle.compose.build import kernel_paths
from heddle.compose.memory import memory_told
from heddle.errors import HeddleError
from heddle.search import environment
from heddle.search.cores import usable_cores
from heddle.search.gpu_state import THROTTLING, both, gpu_state
from heddle.search.intervals import Array, summary, width
from heddle.search.peak import peak_bytes
from heddle.search.record import Latency
from heddle.search.results import PHASES
from heddle.search.timing_quality import NARROW
from heddle.search.timing_subject import Ids, Subject, routes, shares_of, subject_of
from heddle.search.training_step import TrainingStep
from heddle.specs import ModelSpec

# Turns without which nothing is said.
LEAST_TURNS = 3
# With few turns, or an interval wider than this share, so many times the seconds are spent before giving up.
DISTURBED = 0.1
PATIENCE = 3
# A timing that was disturbed is taken anew so many times.
AGAIN = 2


@dataclass(frozen=True, slots=True)
class Place:
    """What is timed: one decode step after `context` tokens, a prefill of `context` tokens, or a forward and a backward of them
    ("train", see `heddle.search.training_step`), of `batch` sequences.

    Raises:
        HeddleError: "bad-argument" for another phase, as that of a budget that nothing is timed for.
    """

    phase: str
    batch: int
    context: int

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            hint = f"one of {', '.join(PHASES)}"
            raise HeddleError("bad-argument", f"nothing is timed in a phase {self.phase!r}", hint=hint)

    @property
    def label(self) -> str:
        """The name under which the figure stands in results: decode_ms@1x4096."""
        return f"{self.phase}_ms@{self.batch}x{self.context}"


@dataclass(frozen=True, slots=True)
class Effort:
    """When to stop: at `precision` (width of the interval over the median), or after `seconds`, or at `most`
    turns, over all `builds` of the models. The width that was reached is in the row."""

    warmup: int = 3
    least: int = 10
    most: int = 200
    seconds: float = 2.0
    precision: float = NARROW
    builds: int = 3

    def to(self, precision: float) -> Effort:
        """The effort for intervals so narrow: widths fall with the root of the turns, so time and turns grow with the square."""
        more = max(1.0, (self.precision / precision) ** 2)
        return replace(
            self, precision=precision, seconds=self.seconds * more, most=math.ceil(self.most * more)
        )

    @property
    def of_one_build(self) -> Effort:
        """A share of the turns and of the time; an interval may be wider, since several are taken together."""
        share = 1 / self.builds
        return replace(
            self,
            least=max(1, math.ceil(self.least * share)),
            most=max(1, math.ceil(self.most * share)),
            seconds=self.seconds * share,
            precision=self.precision / math.sqrt(share),
            builds=1,
        )


def measure(
    model: ModelSpec,
    place: Place,
    weights: bytes | None = None,
    *,
    reference: ModelSpec | None = None,
    reference_name: str | None = None,
    device: str | None = None,
    effort: Effort = Effort(),
    ids: Ids | None = None,
) -> Latency:
    """The latency of `model` at `place`, and its ratio to `reference` when one is given.

    Weights are in the dtype of the device (bfloat16 on CUDA, float32 on a CPU), in training float32 with that dtype for autocast,
    and random without `weights`. `ids` are what a model with routers reads (`heddle.search.timing_subject`); all others, and all
    without `ids`, read random tokens.

    Raises:
        HeddleError: "out-of-memory".
    """
    device = device or environment.pick_device()
    names = reference_name if reference is not None else None
    subjects = [subject_of(model, ids, weights)]
    subjects += [] if reference is None else [subject_of(reference, ids)]
    return undisturbed(lambda: _measure_once(subjects, place, names, device=device, effort=effort))


def undisturbed(time_once: Callable[[], Latency]) -> Latency:
    """The timing that `time_once` gives; up to twice anew while others use the GPU, or something that passes holds it back.

    A power cap is told and does not pass: the next timing would be under it as well.
    """
    for repeated in range(AGAIN):
        found = time_once()
        if not _is_disturbed(found):
            return replace(found, repeated=repeated)
    return replace(time_once(), repeated=AGAIN)


def _is_disturbed(row: Latency) -> bool:
    passing = THROTTLING - {"power cap"}
    reasons = (None if row.gpu is None else row.gpu.get("reasons")) or ()
    return bool(row.foreign) or not passing.isdisjoint(reasons)


def _measure_once(
    specs: Sequence[Subject], place: Place, reference_name: str | None, *, device: str, effort: Effort
) -> Latency:
    """The latency of the first of `specs`, turn by turn with the second if there is one."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    guard = memory_told(f"no memory to time {place.label}", "a smaller context or batch needs less")
    with _threads(device) as threads, _quiet(), guard:
        before = gpu_state() if device == "cuda" else None
        seen = _timed(specs, place, device, dtype, effort=effort)
        shares = _Step(specs[0], place, device, dtype).shares() if routes(specs[0].spec) else []
        state = both(before, gpu_state()) if device == "cuda" else None
    return Latency(
        label=place.label,
        **asdict(place),
        **summary(np.concatenate(seen.times, axis=1), [build.shape[1] for build in seen.times]),
        reference=reference_name,
        device=environment.device_name(device),
        driver=environment.driver_version(),
        dtype=str(dtype).removeprefix("torch."),
        method=seen.method,
        threads=threads,
        paths=dict(kernel_paths(specs[0].spec, device, dtype)),
        foreign=seen.foreign,
        gpu=state,
        inputs=specs[0].inputs_told,
        weights=specs[0].weights_told,
        learned_share=shares,
        peak_bytes=seen.peaks[0],
        reference_peak_bytes=seen.peaks[1] if len(specs) == 2 else None,
    )


def measure_spec(
    model: ModelSpec,
    *,
    batch: int = 1,
    context: int = 4096,
    phases: Sequence[str] = ("decode", "prefill"),
    device: str | None = None,
    effort: Effort = Effort(),
) -> list[Latency]:
    """The latency of one model in each phase: what `heddle bench SPEC` prints."""
    return [measure(model, Place(phase, batch, context), device=device, effort=effort) for phase in phases]


@dataclass(frozen=True, slots=True)
class _Seen:
    """Times of each spec for each build, and its peak of bytes; how the first was timed, and how many processes of others were
    seen on the device."""

    times: list[Array]
    peaks: list[int]
    method: str
    foreign: int | None


def _timed(
    specs: Sequence[Subject], place: Place, device: str, dtype: torch.dtype, *, effort: Effort
) -> _Seen:
    before, times, peaks, method = environment.foreign_processes(), list[Array](), list[int](), ""
    for number in range(effort.builds):
        # Who is built first alternates as well.
        order = specs if number % 2 == 0 else specs[::-1]
        steps = [_Step(spec, place, device, dtype) for spec in order]
        steps = steps if number % 2 == 0 else steps[::-1]
        times.append(take_turns([step.run for step in steps], effort.of_one_build))
        method = steps[0].method
        if number == effort.builds - 1:
            # Memory is the same each time: looked at once, when nothing is timed any more.
            peaks = [step.peak_bytes() for step in steps]
        # The next build finds the memory free; a step holds itself, so only the collector frees it.
        del steps
        gc.collect()
    after = environment.foreign_processes()
    foreign = None if before is None or after is None else max(before, after)
    return _Seen(times, peaks, method, foreign)


def take_turns(runs: Sequence[Callable[[], float]], effort: Effort) -> Array:
    """Milliseconds of each call of each of `runs`, which take turns, the order reversed every time. [runs,
    turns]"""
    _warm(runs, effort)
    turns: list[list[float]] = []
    started, check_at = time.perf_counter(), min(LEAST_TURNS, effort.least)
    while len(turns) < effort.most:
        order = range(len(runs)) if len(turns) % 2 == 0 else reversed(range(len(runs)))
        turn = {which: runs[which]() for which in order}
        turns.append([turn[which] for which in range(len(runs))])
        if len(turns) < check_at:
            continue
        check_at = int(check_at * 1.25) + 1
        if _enough(np.array(turns).T, effort, time.perf_counter() - started):
            break
    return np.array(turns).T


def _warm(runs: Sequence[Callable[[], float]], effort: Effort) -> None:
    """Calls that do not count: kernels compile, memory is touched. One alone where that takes all the time
    there is."""
    started = time.perf_counter()
    for _ in range(effort.warmup):
        for run in runs:
            run()
        if time.perf_counter() - started > effort.seconds:
            return


def _enough(times: Array, effort: Effort, spent: float) -> bool:
    """Whether the intervals are narrow, or the time is up: later for few turns or where something
    disturbs."""
    share = width(times)
    few = times.shape[-1] < effort.least
    if spent > effort.seconds * PATIENCE:
        return True
    return not few and (share <= effort.precision or (spent > effort.seconds and share <= DISTURBED))


class _Step:
    """One model ready to be timed: `run()` does the work once and gives the milliseconds it took."""

    def __init__(self, spec: Subject, place: Place, device: str, dtype: torch.dtype) -> None:
        is_training = place.phase == "train"
        self._model = spec.built(device, torch.float32 if is_training else dtype)
        length = 1 if place.phase == "decode" else place.context
        self._ids = spec.tokens(place.batch, length).to(device)
        decode = place.phase == "decode"
        self._cache = self._model.decode_cache(place.batch, place.context) if decode else None
        self._device = device
        training = TrainingStep(self._model, self._ids) if is_training else None
        self._work: Callable[[], None] = training or self._forward
        self._clear: Callable[[], None] = training.clear if training else lambda: None
        if device == "cpu":
            self.run, self.method = self._on_cpu, "cpu-timer"
            return
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._launch, self.method = self._work, "cuda-events"
        if decode:
            self._capture()
        self.run = self._on_cuda

    def peak_bytes(self) -> int:
        """The most bytes at one time while the work is done once more, as launches: weights, caches and what is computed."""
        cached = [] if self._cache is None else self._cache.layers
        states = (state for layer in cached for state in layer.tensors().values())
        held = (*self._model.parameters(), *self._model.buffers(), *states, self._ids)
        return peak_bytes(self._work, held, self._device)

    def shares(self) -> list[list[float]]:
        """What its routers do with these tokens, when they are not trained."""
        self._model.eval()
        return shares_of(self._model, self._ids, past_key_values=self._cache, use_cache=True)

    @torch.inference_mode()
    def _forward(self) -> None:
        self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def _on_cpu(self) -> float:
        started = time.perf_counter()
        self._work()
        spent_s = time.perf_counter() - started
        self._clear()
        return spent_s * 1e3

    def _on_cuda(self) -> float:
        self._start.record()
        self._launch()
        self._end.record()
        self._end.synchronize()
        self._clear()
        return float(self._start.elapsed_time(self._end))

    def _capture(self) -> None:
        """Capture the step as a CUDA graph. One that cannot be captured is timed as launches, and its row
        says so."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._forward()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize()
            return
        self._graph = graph
        self._launch, self.method = graph.replay, "cuda-graph"


@contextmanager
def _threads(device: str) -> Iterator[int]:
    """All physical cores for a timing on the CPU; gives the number of threads."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(usable_cores())
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection inside; memory is handed back to the device afterwards."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
