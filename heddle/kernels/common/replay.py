# mypy: disable-error-code="no-untyped-call"
"""What a launcher works out in Python, worked out once for calls that look the same, and repeated.

Which memory a launcher makes, which kernels it starts and what it tells them depends on the sizes, strides, dtypes and
alignment of what it is given, and on numbers: not on the values of tensors. So its kernels are compiled before it runs, side
by side (`ahead.py`), and the first call is recorded, as a list of launches whose pointers are left open; later ones fill in the
pointers. A launcher can be repeated if each of its tensors is an
argument, or comes from `empty` or `derived`, or is part of such a one, and goes to `start_kernel` or is returned. One that makes
tensors otherwise (a table of packed sequences) is noticed, and runs each time. What is not noticed is a change of memory by
anything but a kernel: there must be none.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton
from torch import Tensor

from heddle.kernels.common.ahead import alike, compile_side_by_side, compiles_only
from heddle.kernels.common.tuning import is_tuned
from heddle.kernels.op import INTERPRETED

P = ParamSpec("P")
Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])
# Appends a tensor to all tensors of a call, and its address to all addresses.
Make = Callable[[list[Any], list[int]], None]

# Launchers are seldom called at more sizes than these; if they are, all are recorded anew.
MOST_PLANS = 1024
# A pointer that is a multiple of this many bytes is one to Triton; memory that torch makes always is.
_ALIGNMENT = 16
_UNKNOWN = object()
# Autograd runs backward passes in threads of its own.
_active = threading.local()


@dataclass(frozen=True, slots=True)
class _Step:
    """One launch: what is made before it, the kernel and what it is told, and which tensors nobody needs after it."""

    makes: tuple[Make, ...]
    run: Callable[..., object]
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    rest: tuple[Any, ...]
    drops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """All launches of a call; `makes` after the last of them, `outputs` by place among given and made tensors."""

    steps: tuple[_Step, ...]
    makes: tuple[Make, ...]
    outputs: tuple[int, ...]

    def replay(self, tensors: list[Any], pointers: list[int], stream: int) -> tuple[Tensor, ...]:
        """What the recorded call would return for these tensors."""
        told: list[Any] = tensors if INTERPRETED else pointers
        for step in self.steps:
            for make in step.makes:
                make(tensors, pointers)
            step.run(*step.pick(told), *step.rest, stream=stream)
            for place in step.drops:
                tensors[place] = None
        for make in self.makes:
            make(tensors, pointers)
        return tuple([tensors[place] for place in self.outputs])


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Make:
    def make(tensors: list[Any], pointers: list[int]) -> None:
        made = torch.empty(shape, dtype=dtype, device=device)
        tensors.append(made)
        pointers.append(made.data_ptr())

    return make


def _derived(function: Callable[..., Tensor], places: tuple[int, ...]) -> Make:
    def make(tensors: list[Any], pointers: list[int]) -> None:
        made = function(*[tensors[place] for place in places])
        tensors.append(made)
        pointers.append(made.data_ptr())

    return make


def _part(place: int, of: Tensor) -> Make:
    shape, strides, first = tuple(of.shape), of.stride(), int(of.storage_offset())
    byte = first * of.element_size()

    def make(tensors: list[Any], pointers: list[int]) -> None:
        # Kernels want no more than the address.
        tensors.append(tensors[place].as_strided(shape, strides, first) if INTERPRETED else None)
        pointers.append(pointers[place] + byte)

    return make


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch as it was seen: as `_Step`, with the places of its tensors, and of all that must be there."""

    makes: tuple[Make, ...]
    run: Callable[..., object]
    places: list[int]
    rest: tuple[Any, ...]
    used: set[int]


class _Recorder:
    """Notes down what a launcher does with the tensors that it is given."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.count = len(given)
        # Kept until the end: a freed tensor would leave its id to another.
        self.tensors = list(given)
        self.places = {id(x): place for place, x in enumerate(given)}
        # By the storage of memory that was made: where it is. And which places are parts of such.
        self.owners: dict[int, int] = {}
        self.parts: set[int] = set()
        self.makes: list[Make] = []
        self.used: set[int] = set()
        self.launches: list[_Launch] = []
        self.possible = True

    def made(self, tensor: Tensor) -> None:
        make = _empty(tuple(tensor.shape), tensor.dtype, tensor.device)
        self.owners[tensor.untyped_storage().data_ptr()] = self._add(tensor, make)

    def derived(self, function: Callable[..., Tensor], sources: tuple[Tensor, ...], tensor: Tensor) -> None:
        if id(tensor) in self.places:
            return
        places = tuple(self.places.get(id(x), -1) for x in sources)
        self.possible &= -1 not in places and self.parts.isdisjoint(places)
        self.used |= set(places)
        self._add(tensor, _derived(function, places))

    def launched(self, run: Callable[..., object] | None, arguments: Sequence[Any]) -> None:
        count = sum(isinstance(x, Tensor) for x in arguments)
        places = [self._place(x) for x in arguments[:count]]
        self.possible &= run is not None and count > 1 and -1 not in places
        if self.possible and run is not None:
            told = tuple(arguments[count:])
            self.launches.append(_Launch(tuple(self.makes), run, places, told, self.used | set(places)))
            self.makes.clear()
            self.used = set()

    def plan(self, outputs: Sequence[Tensor]) -> _Plan | None:
        """What to repeat; None if the launcher did more than a plan can say."""
        returned = tuple(self.places.get(id(x), -1) for x in outputs)
        if not self.possible or -1 in returned or not self.parts.isdisjoint(returned):
            return None
        last = {place: at for at, launch in enumerate(self.launches) for place in launch.used}
        last |= dict.fromkeys((*returned, *self.used), len(self.launches))
        steps = []
        for at, one in enumerate(self.launches):
            drops = tuple(place for place in sorted(one.used) if place >= self.count and last[place] == at)
            steps.append(_Step(one.makes, one.run, itemgetter(*one.places), one.rest, drops))
        return _Plan(tuple(steps), tuple(self.makes), returned)

    def _add(self, tensor: Tensor, make: Make) -> int:
        self.places[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        self.makes.append(make)
        return len(self.tensors) - 1

    def _place(self, x: Any) -> int:
        """Place of a tensor that is known, or of a part of one that was made; -1 for all else."""
        if not isinstance(x, Tensor):
            return -1
        owner = self.owners.get(x.untyped_storage().data_ptr(), -1)
        if owner >= 0:
            # A part is there for as long as the whole.
            self.used.add(owner)
        known = self.places.get(id(x), -1)
        if known >= 0 or owner < 0 or x.dtype != self.tensors[owner].dtype:
            return known
        place = self._add(x, _part(owner, x))
        self.parts.add(place)
        return place


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that nobody has written to."""
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    recorder: _Recorder | None = getattr(_active, "recorder", None)
    if recorder is not None:
        recorder.made(made)
    return made


def derived(function: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """What a function makes of tensors: new memory, or the first of them as it is."""
    made = function(*sources)
    recorder: _Recorder | None = getattr(_active, "recorder", None)
    if recorder is not None:
        recorder.derived(function, sources, made)
    return made


def start_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Starts a kernel of Triton whose first arguments are its tensors."""
    if compiles_only():
        kernel.warmup(*arguments, grid=grid, **constants)
        return
    compiled = kernel[grid](*arguments, **constants)
    if hasattr(compiled, "result"):
        # Another thread compiled it meanwhile.
        compiled = compiled.result()
    recorder = getattr(_active, "recorder", None)
    if recorder is None:
        return
    told = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]
    recorder.launched(_runner(kernel, compiled, grid), told)


def _runner(kernel: Any, compiled: Any, grid: tuple[int, ...]) -> Callable[..., object] | None:
    """Calls the compiled kernel with all arguments in order and a stream; None if there is no such thing."""
    if INTERPRETED:

        def interpret(*told: Any, stream: int) -> None:  # noqa: ARG001
            kernel[grid](*told)

        return interpret
    # Triton has chosen it by what the arguments are, which is in the key of the plan.
    return None if compiled is None else compiled[(*grid, 1, 1)[:3]]


def replayed(run: Callable[P, Outputs]) -> Callable[P, Outputs]:
    """Lets a launcher be recorded and repeated; it takes tensors, numbers and None, by place, and returns tensors."""
    plans: dict[tuple[Any, ...], _Plan | None] = {}
    compiled: set[tuple[Any, ...]] = set()

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        if is_tuned() or compiles_only():
            return run(*args)  # type: ignore[call-arg]
        device = stream = 0
        if not INTERPRETED:
            driver = triton.runtime.driver.active
            device = driver.get_current_device()
            stream = driver.get_current_stream(device)
        key: list[Any] = [device]
        tensors: list[Any] = []
        pointers: list[int] = []
        for x in args:
            if isinstance(x, Tensor):
                pointer = x.data_ptr()
                key += (x.shape, x.stride(), x.dtype, x.get_device(), pointer % _ALIGNMENT)
                tensors.append(x)
                pointers.append(pointer)
            else:
                key.append(x)
        found: Any = plans.get(signature := tuple(key), _UNKNOWN)
        # Which of two equal pointers a kernel got would not be known.
        if found is None or len(set(pointers)) < len(pointers):
            return run(*args)  # type: ignore[call-arg]
        if found is not _UNKNOWN:
            _hide_from_outer()
            return found.replay(tensors, pointers, stream)
        if len(plans) >= MOST_PLANS:
            plans.clear()
            compiled.clear()
        if (kind := alike(args)) not in compiled:
            compile_side_by_side(run, args)
            compiled.add(kind)
        outputs, plans[signature] = _record(run, args, tensors)
        return outputs

    return cast("Callable[P, Outputs]", call)


def _record(run: Any, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[Any, _Plan | None]:
    outer = _hide_from_outer()
    recorder = _active.recorder = _Recorder(tensors)
    try:
        outputs = run(*args)
    finally:
        _active.recorder = outer
    return outputs, recorder.plan(outputs)


def _hide_from_outer() -> _Recorder | None:
    """The recorder of a launcher that has called another, whose launches it does not see."""
    outer: _Recorder | None = getattr(_active, "recorder", None)
    if outer is not None:
        outer.possible = False
    return outer
