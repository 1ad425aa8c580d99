"""What an op is, which code runs it, and how it is made known to torch.

An op is a public tensor function that stands beside its reference. It has a path in plain torch, which runs anywhere,
and may have one in Triton. `Op.path` is the one rule that chooses; `force_path` overrides it and `watch_paths` tells
what ran. Torch on a GPU in place of kernels is told by a `SlowPathWarning`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from heddle.errors import HeddleError
from heddle.kernels.common.autocast import out_of_autocast

try:
    import triton

    TRITON_VERSION: str | None = triton.__version__
except ImportError:
    TRITON_VERSION = None

# The namespace of our ops in torch.library. An exported model has one of its own, so that two can live in a process.
LIBRARY = "heddle"

Path = Literal["triton", "torch"]
Phase = Literal["fwd", "fwdbwd", "decode", "decode_graph"]
Shape = Mapping[str, int]
Inputs = dict[str, Tensor]

# Triton decides at import whether kernels are compiled or interpreted, so this is read once.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*TRITON_DTYPES, torch.float64)
INTEGERS = (torch.int64, torch.int32)
MASKS = (torch.bool, *FLOATS)
MIN_CAPABILITY = (8, 0)

P = ParamSpec("P")
R = TypeVar("R")

# Plain globals: autograd runs the backward of CUDA ops in threads of its own, which must see them too.
_forced: list[Path] = []
_watchers: list[list[tuple[str, Path]]] = []
_fragments: list[torch.library.Library] = []
# What was said of slow paths: (op, dtype, what would be allowed).
_told: set[tuple[str, torch.dtype, str]] = set()
# Of the arguments of a call that only autograd has to do with.
_PLAIN = frozenset((Tensor, Parameter, type(None), bool, int, float, str))


class SlowPathWarning(UserWarning):
    """An op that has kernels runs in PyTorch on a GPU, unasked: told once for each op and reason."""


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of the algorithm, and bytes moved when each input is read once and each output written once."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Traits:
    """What tests, self-test and benchmarks must know of an op to call it.

    `inputs(shape, generator)` draws the arguments by name, in float64 on the generator's device. `sequence` names those
    with a time axis (axis 1), `rounded` those that come in the dtype at hand (others stay float32), `differentiable` those with a
    gradient; the output is shaped like the argument `output_like`. `initial_state(shape, generator)` draws a state, which
    is float32 unless `rounded_state`. `work(shape, phase, element size)` counts what must be done. `variants`
    are timed under names of their own, with inputs and shapes of their own. `timed_inputs`, if given, are drawn for
    benchmarks in place of `inputs`. `numbers(shape)` are the arguments without a default that are no tensors, `read` the
    results, all shaped like the argument `output_like`, whose gradients benchmarks send back.
    """

    inputs: Callable[[Shape, torch.Generator], Inputs]
    initial_state: Callable[[Shape, torch.Generator], Tensor]
    sequence: tuple[str, ...]
    rounded: tuple[str, ...]
    differentiable: tuple[str, ...]
    output_like: str
    test_shapes: tuple[Shape, ...]
    bench_shapes: tuple[Shape, ...] = ()
    decode_shapes: tuple[Shape, ...] = ()
    work: Callable[[Shape, Phase, int], Work] | None = None
    rounded_state: bool = False
    variants: Mapping[str, tuple[Callable[[Shape, torch.Generator], Inputs], tuple[Shape, ...]]] = field(
        default_factory=dict
    )
    timed_inputs: Callable[[Shape, torch.Generator], Inputs] | None = None
    numbers: Callable[[Shape], dict[str, Any]] = lambda _: {}
    read: tuple[int, ...] = (0,)


@dataclass(frozen=True, eq=False)
class Op(Generic[P, R]):
    """A public tensor function: what computes it fast, what it must equal, and which path it takes where.

    `kernel(shape)` says whether the Triton kernels take a shape; None, of all shapes or of one, that there are none yet. `limits`
    says in words which shapes they take. In the dtypes of `unproven` no GPU has held them to the reference yet: torch runs
    there, unless Triton is forced, and so it does for shapes of which `unproven_shapes(shape)` says the same. Products are in the
    types that an op says of them, also under autocast, unless it is one that autocast casts the arguments of (`is_cast`).
    """

    name: str
    fast: Callable[P, R]
    reference: Callable[..., Any]
    cases: Traits
    kernel: Callable[[Shape], bool | None] | None = None
    step: Callable[..., tuple[Tensor, Tensor]] | None = field(default=None)
    unproven: tuple[torch.dtype, ...] = ()
    unproven_shapes: Callable[[Shape], bool] | None = None
    limits: str = ""
    is_cast: bool = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.fast(*args, **kwargs)

    def path(self, device: torch.device | str, dtype: torch.dtype, **shape: int) -> Path:
        """The code that runs on this device with this dtype and shape: "triton" or "torch"."""
        takes = None if self.kernel is None else self.kernel(shape)
        possible = takes and _triton_runs(device, dtype)
        if not _forced:
            return "triton" if possible and self.is_proven(dtype, **shape) else "torch"
        if _forced[-1] == "triton" and not possible and takes is not None:
            raise HeddleError(
                "bad-argument", f"{self.name} cannot run in Triton on {device} in {dtype} at {shape}"
            )
        return _forced[-1] if possible else "torch"

    def is_proven(self, dtype: torch.dtype, **shape: int) -> bool:
        """Whether the kernels may run unasked in this dtype, of this shape if one is given: the interpreter has no compiler
        that could get them wrong."""
        doubtful = bool(shape) and self.unproven_shapes is not None and self.unproven_shapes(shape)
        return INTERPRETED or (dtype not in self.unproven and not doubtful)

    def choose(self, device: torch.device, dtype: torch.dtype, **shape: int) -> Path:
        """`told_path`, noted down for `watch_paths`: called where the work is about to be done."""
        path = self.told_path(device, dtype, **shape)
        for seen in _watchers:
            seen.append((self.name, path))
        return path

    def told_path(self, device: torch.device, dtype: torch.dtype, **shape: int) -> Path:
        """`path`; where there are kernels, torch on a GPU that nobody asked for is told in a warning."""
        path = self.path(device, dtype, **shape)
        if path == "torch" and self.kernel is not None and "torch" not in _forced[-1:]:
            self._tell_why(torch.device(device), dtype, shape)
        return path

    def _tell_why(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
        if not _is_gpu(device):
            return
        why, allowed = self._why_torch(device, dtype, shape)
        # Not the sizes: some are other ones in every call.
        if (self.name, dtype, allowed) in _told:
            return
        _told.add((self.name, dtype, allowed))
        what = f"{self.name} runs in PyTorch on {device}, not by its kernels: {why}"
        warnings.warn(str(HeddleError("slow-path", what, hint=allowed)), SlowPathWarning, stacklevel=4)

    def _why_torch(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[str, str]:
        """Why torch runs there, and with what Triton would."""
        sizes = ", ".join(f"{name}={size}" for name, size in shape.items())
        if TRITON_VERSION is None:
            return "Triton is not installed", "install the package triton"
        if dtype not in TRITON_DTYPES:
            return f"there are none for {_short(dtype)}", f"{', '.join(map(_short, TRITON_DTYPES))} have some"
        if self.kernel is not None and not self.kernel(shape):
            return f"they do not take {sizes}", f"they take {self.limits}"
        if not _triton_runs(device, dtype):
            least = ".".join(map(str, MIN_CAPABILITY))
            return "they do not run on this device", f"they run on CUDA from compute capability {least} on"
        what = f"no GPU has held them to the reference yet in {_short(dtype)} with {sizes}"
        return what, 'force_path("triton") runs them all the same'


def op(
    reference: Callable[..., Any],
    cases: Traits,
    *,
    kernel: Callable[[Shape], bool | None] | None = None,
    step: Callable[..., tuple[Tensor, Tensor]] | None = None,
    unproven: tuple[torch.dtype, ...] = (),
    unproven_shapes: Callable[[Shape], bool] | None = None,
    limits: str = "",
    is_cast: bool = False,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes the decorated function an `Op` of the same name and docstring."""

    def wrap(fast: Callable[P, R]) -> Op[P, R]:
        paths = (kernel, step, unproven, unproven_shapes, limits, is_cast)
        call = fast if is_cast else out_of_autocast(fast)
        made = Op(fast.__name__, call, reference, cases, *paths)
        # What functools.update_wrapper would set; the class is frozen.
        vars(made).update(
            {name: getattr(fast, name) for name in functools.WRAPPER_ASSIGNMENTS}, __wrapped__=fast
        )
        return made

    return wrap


@functools.cache
def _triton_runs(named: torch.device | str, dtype: torch.dtype) -> bool:
    device = torch.device(named)
    if TRITON_VERSION is None or dtype not in TRITON_DTYPES:
        return False
    if INTERPRETED:
        # Products of bfloat16 come out wrong in the interpreter, without an error.
        return dtype != torch.bfloat16
    # ROCm calls itself cuda as well; the kernels were never run there.
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    )


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@contextmanager
def force_path(path: Path) -> Iterator[None]:
    """Every op that can takes this path inside; an op with kernels that cannot run them raises."""
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def watch_paths() -> Iterator[list[tuple[str, Path]]]:
    """A list that fills with (op, path) as ops run inside."""
    seen: list[tuple[str, Path]] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [watcher for watcher in _watchers if watcher is not seen]


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    results: int | None = None,
) -> Callable[..., Any]:
    """Makes `implementation` known to torch.library as one opaque op, and returns what calls it.

    Outputs after so many `results` are for `setup_context` alone: who calls the op must not count on them.

    Registering a name again leaves torch with the first op: an export loaded twice compiles to the same code. Plain eager
    calls do without torch's dispatcher, which costs the host more than launches do; all others go through it.
    """
    if _known(name) is None:
        defined = torch.library.custom_op(
            f"{LIBRARY}::{name}", implementation, mutates_args=(), schema=schema
        )
        defined.register_fake(fake)
        if backward is not None:
            defined.register_autograd(backward, setup_context=setup_context)
    known = _require(name)
    differentiable = None
    if backward is not None:
        differentiable = _differentiable(name, implementation, setup_context, backward, results)

    def call(*args: Any) -> Any:
        if not are_plain(args):
            return known(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return implementation(*args)
        # Without a formula torch tells so when one is asked for.
        return known(*args) if differentiable is None else differentiable(*args)

    return call


def register_composite(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    *,
    under_vmap: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Makes plain torch code known to torch.library as an op that autograd and compilers see through.

    `under_vmap` is its rule for `torch.library.register_vmap`; without one vmap calls the op again and again.
    """
    if _known(name) is None:
        fragment = torch.library.Library(LIBRARY, "FRAGMENT")  # type: ignore[no-untyped-call]
        fragment.define(f"{name}{schema}")  # type: ignore[no-untyped-call]
        fragment.impl(name, implementation, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
        if under_vmap is not None:
            torch.library.register_vmap(f"{LIBRARY}::{name}", under_vmap, lib=fragment)
        # The registration lasts as long as the fragment.
        _fragments.append(fragment)
    known = _require(name)

    def call(*args: Any) -> Any:
        if not are_plain(args):
            return known(*args)
        return implementation(*args)

    return call


def are_plain(args: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd watches a call: no tracer, no mode, no transform, no subclass of tensors, no meta device."""
    return (
        # Compilers look no further than this line.
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, args))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and not args[0].is_meta
    )


def _differentiable(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
    results: int | None,
) -> Callable[..., Any]:
    """What calls `implementation` so that autograd knows of it, and no dispatcher."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = implementation(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output if results is None else output[:results]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    made: Any = type(f"{name}_function", (torch.autograd.Function,), methods)
    return made.apply  # type: ignore[no-any-return]


def rows_together(name: str) -> Callable[..., Any]:
    """The vmap rule of an op whose tensors all have rows for axis 0, each row on its own: the rows of all calls in one.

    Packed sequences, the last argument of such an op, are refused.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        if isinstance(given[-1], Tensor):
            raise HeddleError("bad-argument", f"{name}: vmap takes no packed sequences (cu_seqlens)")

        def all_rows(argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            many = (
                argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            )
            return many.flatten(0, 1)

        found = _require(name)(*map(all_rows, given, in_dims))
        return tuple(each.unflatten(0, (info.batch_size, -1)) for each in found), (0,) * len(found)

    return rule


def heads_together(name: str, given_at: Sequence[int | None], found_at: Sequence[int]) -> Callable[..., Any]:
    """The vmap rule of an op whose tensors have heads on these axes, each head on its own: the heads of all calls in one.

    Calls lie side by side in each head, so that which head reads which group of heads stays as it is by their remainder.
    What has no axis (None) must be the same for all calls.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        def all_heads(argument: Any, dim: int | None, axis: int | None) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            if axis is None:
                if dim is not None:
                    what = "vmap takes no rotation and no cu_seqlens that differ between calls"
                    raise HeddleError("bad-argument", f"{name}: {what}")
                return argument
            many = (
                argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            )
            return many.movedim(0, axis + 1).flatten(axis, axis + 1)

        found = _require(name)(*map(all_heads, given, in_dims, given_at))
        each = (found,) if isinstance(found, Tensor) else found
        parts = tuple(
            x.reshape(*x.shape[:axis], -1, info.batch_size, *x.shape[axis + 1 :])
            for x, axis in zip(each, found_at, strict=True)
        )
        axes = tuple(axis + 1 for axis in found_at)
        return (parts[0], axes[0]) if isinstance(found, Tensor) else (parts, axes)

    return rule


def _known(name: str) -> Callable[..., Any] | None:
    packet = getattr(getattr(torch.ops, LIBRARY), name, None)
    return None if packet is None else packet.default


def _require(name: str) -> Callable[..., Any]:
    made = _known(name)
    assert made is not None, f"{LIBRARY}::{name} was not registered"
    return made


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, gates and sums: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; the host is not troubled if it is."""
    return x if x.dtype == dtype else x.to(dtype)


def normal(generator: torch.Generator, *size: int) -> Tensor:
    """Normally distributed numbers in float64, on the device of the generator."""
    return torch.randn(*size, generator=generator, device=generator.device, dtype=torch.float64)


# No view of a dictionary: torch's compiler gives up where one is about while others change.
_NONE: Mapping[str, Tensor | None] = {}


def check_tensors(
    name: str,
    alike: Mapping[str, Tensor | None],
    *,
    floats: Mapping[str, Tensor | None] = _NONE,
    integers: Mapping[str, Tensor | None] = _NONE,
    masks: Mapping[str, Tensor | None] = _NONE,
) -> None:
    """Raises "bad-argument" for the first tensor that is given and is not of the right dtype, or on another device.

    Those `alike` have the floating dtype of the first, which is there; `floats` have any each, `integers` int32 or int64, `masks`
    bool or a floating one.
    """
    first, like = next(iter(alike.items()))
    assert like is not None
    dtype, device = like.dtype, like.device
    own = (dtype,) if dtype in FLOATS else FLOATS
    for some, known in ((alike, own), (floats, FLOATS), (integers, INTEGERS), (masks, MASKS)):
        for argument, x in some.items():
            if x is None or (x.dtype in known and x.device == device):
                continue
            found, expected = _short(x.dtype), ", ".join(map(_short, known))
            if x.dtype in known:
                found, expected = f"on {x.device}", str(device)
            as_first = "" if argument == first else f" as {first}"
            also = as_first if x.dtype in known or some is alike else ""
            raise HeddleError("bad-argument", f"{name}: {argument} is {found}, expected {expected}{also}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_shapes(name: str, expected: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Raises "bad-argument" for the first tensor that is given and has not the expected shape."""
    for argument, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            found = list(tensor.shape)
            raise HeddleError("bad-argument", f"{name}: {argument} has shape {found}, expected {list(shape)}")
