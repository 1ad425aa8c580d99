"""What every op keeps, on every path: its reference's results and gradients, packing, states, repeatability, compilers.

On a CPU the torch paths run; with TRITON_INTERPRET=1 (see tests/kernels/test_interpreter.py) the Triton paths, interpreted;
on a GPU the real ones.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from held import fill_fresh_memory_with_nan
from torch import Tensor
from views import VIEWS

from heddle.errors import HeddleError
from heddle.kernels import OPS, Op, force_path
from heddle.kernels.accuracy import EPSILON, Sample, compare, draw, is_timed, oracle, results, worst_error
from heddle.kernels.op import INTERPRETED, LIBRARY, watch_paths

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

AnyOp = Op[..., Any]
LENGTHS = (1, 63, 64, 65, 1000)
# Sizes as models have them; too large for the interpreter.
GPU_SIZES = {"B": 1, "H": 2, "HV": 2, "K": 128, "V": 128, "C": 64, "W": 4}

ONE_HEAD = {"B": 1, "H": 1, "HV": 1, "K": 16, "V": 16, "T": 70}
DECAYS = (-1e-6, -5.0, -10.0, -20.0)

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def _settings(takes: Callable[[AnyOp], bool] = lambda _: True) -> Iterator[Any]:
    """Every op, or those it takes, with every device and dtype it is tested on."""
    for op in filter(takes, OPS):
        # Torch paths are tested in full precision here: in half, that of an op with kernels is the baseline itself.
        for dtype in (torch.float32, torch.float16) if INTERPRETED else (torch.float64, torch.float32):
            yield pytest.param(op, "cpu", dtype, id=f"{op.name}-cpu-{_short(dtype)}")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield pytest.param(op, "cuda", dtype, id=f"{op.name}-cuda-{_short(dtype)}", marks=pytest.mark.gpu)


def _settings_and_sizes(takes: Callable[[AnyOp], bool] = lambda _: True) -> Iterator[Any]:
    """The same with small sizes; in half precision on a GPU, where models have launches of their own, with theirs too."""
    for one in _settings(takes):
        op, device, dtype = one.values
        yield pytest.param(*one.values, op.cases.test_shapes[-1], id=one.id, marks=one.marks)
        if device == "cuda" and dtype.itemsize == 2:
            yield pytest.param(*one.values, _gpu_sizes(op), id=f"{one.id}-wide", marks=one.marks)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shapes(op: AnyOp, device: str) -> list[dict[str, int]]:
    sizes = [dict(shape) for shape in op.cases.test_shapes]
    return [*sizes, _gpu_sizes(op)] if device == "cuda" else sizes


def _gpu_sizes(op: AnyOp) -> dict[str, int]:
    takes = op.kernel is None or op.kernel(GPU_SIZES)
    # Of features of pairs kernels take few dimensions.
    return GPU_SIZES if takes else {**GPU_SIZES, "K": op.cases.test_shapes[0]["K"]}


def _expected_path(op: AnyOp, shape: Mapping[str, int], device: str, dtype: torch.dtype) -> str:
    takes = op.kernel and op.kernel(shape)
    return "triton" if takes and dtype != torch.float64 and (INTERPRETED or device == "cuda") else "torch"


def _check(op: AnyOp, shape: Mapping[str, int], sample: Sample, device: str) -> None:
    measured = compare(op, sample, device)
    assert {one.path for one in measured} == {_expected_path(op, shape, device, sample.dtype)}
    wrong = [str(one) for one in measured if not one.ok]
    assert not wrong, "\n".join(wrong)


def _assert_close(op: AnyOp, sample: Sample, device: str, found: dict[str, Tensor]) -> None:
    """`found` keeps the tolerance that the op itself has on this sample."""
    exact = oracle(op, sample)
    bounds = {one.name: one.bound for one in compare(op, sample, device)}
    for name, tensor in found.items():
        error, worst = worst_error(tensor, exact[name], timed=is_timed(name))
        assert error <= bounds[name], f"{name}: {error:.2e}, at most {bounds[name]:.2e}, {worst}"


over_settings_and_sizes = pytest.mark.parametrize(
    ("op", "device", "dtype", "sizes"), list(_settings_and_sizes())
)
over_settings = pytest.mark.parametrize(("op", "device", "dtype"), list(_settings()))
# Where the kernels are compiled anew: sizes of 1 and strides are among what they are compiled for.
over_few_settings = pytest.mark.parametrize(
    ("op", "device", "dtype"),
    [one for one in _settings() if one.values[1] == "cpu" or one.values[2] == torch.bfloat16],
)


@over_settings
@pytest.mark.parametrize("length", LENGTHS)
def test_results_and_gradients_are_those_of_the_reference(
    op: AnyOp, device: str, dtype: torch.dtype, length: int, full_counts: bool
) -> None:
    shapes = _shapes(op, device)
    # A reference goes token by token: on a CPU the longest sequence takes seconds a shape.
    if length > 65 and (INTERPRETED or not (full_counts or device == "cuda")):
        shapes = shapes[-1:]
    for shape in shapes:
        _check(op, shape, draw(op, {**shape, "T": length}, dtype, seed=length), device)


@over_settings
def test_without_an_initial_state_it_begins_with_zeros(op: AnyOp, device: str, dtype: torch.dtype) -> None:
    # The second chunk has one token: of so few numbers in half precision the baseline's error is a matter of luck.
    rows = {"B": 4} if device == "cuda" else {}
    shape = {**op.cases.test_shapes[-1], **rows, "T": 65}
    sample = draw(op, shape, dtype, initial_state=False)
    _check(op, shape, sample, device)
    zeros = torch.zeros_like(draw(op, shape, dtype).arguments["initial_state"])
    begun = replace(sample, arguments={**sample.arguments, "initial_state": zeros})
    alone, with_zeros = results(op, sample.to(device)), results(op, begun.to(device))
    assert all(torch.equal(alone[name], with_zeros[name]) for name in alone)


@over_settings_and_sizes
def test_packed_sequences_equal_each_alone(
    op: AnyOp, device: str, dtype: torch.dtype, sizes: Mapping[str, int]
) -> None:
    # One token, nothing, less than a chunk, a chunk and one more, a chunk.
    ends = [0, 1, 1, 40, 105, 169]
    shape = {**sizes, "B": 1, "T": ends[-1]}
    sample = draw(op, shape, dtype, cu_seqlens=ends)
    _check(op, shape, sample, device)
    outputs, states = [], []
    for index, (begin, end) in enumerate(itertools.pairwise(ends)):
        given = sample.to(device).arguments
        state = given["initial_state"][index : index + 1]
        if begin == end:
            states.append(state)
            continue
        alone = {name: x[:, begin:end] if name in op.cases.sequence else x for name, x in given.items()}
        alone = {name: x for name, x in alone.items() if name != "cu_seqlens"}
        out, state = op(**{**alone, "initial_state": state})
        outputs.append(out)
        states.append(state)
    _assert_close(op, sample, device, {"out": torch.cat(outputs, 1), "final_state": torch.cat(states)})


@over_settings_and_sizes
def test_empty_sequences_are_right_at_every_place(
    op: AnyOp, device: str, dtype: torch.dtype, sizes: Mapping[str, int]
) -> None:
    ends = [0, 0, 3, 3, 3, 103, 103]
    sample = draw(op, {**sizes, "B": 1, "T": ends[-1]}, dtype, cu_seqlens=ends)
    _check(op, sizes, sample, device)
    given = sample.to(device).arguments
    _, state = op(**given)
    empty = [0, 2, 3, 5]
    assert torch.equal(state[empty], given["initial_state"][empty])


@over_few_settings
def test_a_single_head_of_a_single_row_is_right(op: AnyOp, device: str, dtype: torch.dtype) -> None:
    shape = {**_shapes(op, device)[-1], "B": 1, "H": 1, "HV": 1, "C": 1, "T": 120}
    _check(op, shape, draw(op, shape, dtype), device)


def _has_beta(op: AnyOp) -> bool:
    return "beta" in op.cases.sequence


@pytest.mark.parametrize(("op", "device", "dtype", "sizes"), list(_settings_and_sizes(_has_beta)))
@pytest.mark.parametrize("count", [1, 3])
def test_keys_that_repeat_are_right(
    op: AnyOp, device: str, dtype: torch.dtype, sizes: Mapping[str, int], count: int
) -> None:
    shape = {**sizes, "T": 120}
    sample = draw(op, shape, dtype)
    k = sample.arguments["k"][:, torch.arange(shape["T"]) % count]
    _check(op, shape, replace(sample, arguments={**sample.arguments, "k": k}), device)


@pytest.mark.parametrize(("op", "device", "dtype"), list(_settings(_has_beta)))
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_one_beta_throughout_is_right(op: AnyOp, device: str, dtype: torch.dtype, beta: float) -> None:
    # In half precision whole chunks: of the few numbers of a last one the baseline's error is a matter of luck.
    shape = {"B": 1, "H": 2, "HV": 2, "K": 64, "V": 16, "T": 120 if dtype == torch.float32 else 128}
    sample = draw(op, shape, dtype)
    even = torch.full_like(sample.arguments["beta"], beta)
    _check(op, shape, replace(sample, arguments={**sample.arguments, "beta": even}), device)


def _fades(op: AnyOp) -> bool:
    return "log_decay" in inspect.signature(op.reference).parameters


def _with_one_decay(
    op: AnyOp, dtype: torch.dtype, log_decay: float | None, sizes: Mapping[str, int] = ONE_HEAD
) -> Sample:
    """A sample whose log-decays are all the same, or as they are drawn."""
    sample = draw(op, sizes, dtype)
    drawn = sample.arguments["log_decay"]
    given = drawn if log_decay is None else torch.full_like(drawn, log_decay)
    return replace(sample, arguments={**sample.arguments, "log_decay": given})


@pytest.mark.parametrize("log_decay", DECAYS)
@pytest.mark.parametrize(("op", "device", "dtype", "sizes"), list(_settings_and_sizes(_fades)))
def test_one_decay_throughout_is_right(
    op: AnyOp, device: str, dtype: torch.dtype, sizes: Mapping[str, int], log_decay: float
) -> None:
    # Of large heads whole chunks: of the few numbers of a last one the baseline's error is a matter of luck.
    shape = {**GPU_SIZES, "T": 128} if sizes is GPU_SIZES else ONE_HEAD
    sample = _with_one_decay(op, dtype, log_decay, shape)
    wrong = [str(one) for one in compare(op, sample, device) if not one.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="only the decay of a chunk's first token is kept from being rounded",
)
@pytest.mark.parametrize(
    ("op", "device", "dtype"), [one for one in _settings(_fades) if one.values[2] == torch.float16]
)
def test_a_state_that_the_first_tokens_have_no_gradient_for_is_right_in_float16(
    op: AnyOp, device: str, dtype: torch.dtype
) -> None:
    sample = _with_one_decay(op, dtype, -5.0)
    d_out, d_state = sample.upstream
    masked = torch.cat((torch.zeros_like(d_out[:, :2]), d_out[:, 2:]), dim=1)
    measured = compare(op, replace(sample, upstream=(masked, d_state)), device)
    assert next(one for one in measured if one.name == "d_initial_state").ok


@pytest.mark.parametrize("log_decay", DECAYS[1:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_short)
@pytest.mark.parametrize("op", list(filter(_fades, OPS)), ids=lambda op: op.name)
def test_the_baseline_of_half_precision_knows_one_strong_decay(
    op: AnyOp, dtype: torch.dtype, log_decay: float
) -> None:
    # Else what it says of an error would be no bound.
    usual, strong = (
        _errors_of_baseline(op, _with_one_decay(op, dtype, given)) for given in (None, log_decay)
    )
    wrong = {
        name: error for name, error in strong.items() if error > 2 * max(usual.values()) + EPSILON[dtype]
    }
    assert not wrong, f"{wrong}, as drawn {usual}"


def _errors_of_baseline(op: AnyOp, sample: Sample) -> dict[str, float]:
    exact = oracle(op, sample)
    with force_path("torch"):
        found = results(op, sample)
    return {name: worst_error(x, exact[name], timed=is_timed(name))[0] for name, x in found.items()}


@over_few_settings
@pytest.mark.parametrize("view", VIEWS)
def test_tensors_are_read_as_they_lie(
    op: AnyOp, device: str, dtype: torch.dtype, view: Callable[[Tensor], Tensor]
) -> None:
    sample = draw(op, {**op.cases.test_shapes[0], "T": 20}, dtype).to(device)

    def on_views(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        return op(**{name: view(x) for name, x in arguments.items()})

    found, expected = results(on_views, sample), results(op, sample)
    # How tensors lie may change the order of a sum, and so a rounding: half a unit of either at most.
    limit = max(EPSILON[dtype], torch.finfo(dtype).eps)
    for name, tensor in expected.items():
        error, worst = worst_error(found[name], tensor, timed=is_timed(name))
        assert error <= limit, f"{name}: {error:.2e}, {worst}"


@over_settings
def test_prefill_in_parts_equals_the_whole(op: AnyOp, device: str, dtype: torch.dtype) -> None:
    sample = draw(op, {**op.cases.test_shapes[0], "T": 130}, dtype)
    given = sample.to(device).arguments
    state, outputs = given["initial_state"], []
    for begin, end in itertools.pairwise((0, 1, 66, 130)):
        part = {name: x[:, begin:end] if name in op.cases.sequence else x for name, x in given.items()}
        out, state = op(**{**part, "initial_state": state})
        outputs.append(out)
    _assert_close(op, sample, device, {"out": torch.cat(outputs, 1), "final_state": state})


@over_settings
def test_step_by_step_equals_the_whole(op: AnyOp, device: str, dtype: torch.dtype) -> None:
    shape = op.cases.test_shapes[-1]
    sample = draw(op, {**shape, "T": 5}, dtype)
    given = sample.to(device).arguments
    state, outputs = given.pop("initial_state"), []
    with watch_paths() as seen:
        for t in range(5):
            token = {name: x[:, t : t + 1] if name in op.cases.sequence else x for name, x in given.items()}
            out, state = op.step(**token, state=state) if op.step else op(**token, initial_state=state)
            outputs.append(out)
    assert {path for _, path in seen} == {_expected_path(op, shape, device, dtype)}
    _assert_close(op, sample, device, {"out": torch.cat(outputs, 1), "final_state": state})


@over_settings
def test_a_step_has_the_gradients_of_one_token(op: AnyOp, device: str, dtype: torch.dtype) -> None:
    sample = draw(op, {**op.cases.test_shapes[0], "T": 1}, dtype)

    def step(*, initial_state: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        return op.step(**rest, state=initial_state) if op.step else op(**rest, initial_state=initial_state)

    found, exact = results(step, sample.to(device)), oracle(op, sample)
    bounds = {one.name: one.bound for one in compare(op, sample, device)}
    for name, tensor in found.items():
        error, worst = worst_error(tensor, exact[name], timed=name in {f"d_{x}" for x in op.cases.sequence})
        assert error <= bounds[name], f"{name}: {error:.2e}, at most {bounds[name]:.2e}, {worst}"


@over_settings
def test_two_runs_are_equal_to_the_bit(op: AnyOp, device: str, dtype: torch.dtype) -> None:
    sample = draw(op, {**_shapes(op, device)[-1], "T": 150}, dtype).to(device)
    first, second = results(op, sample), results(op, sample)
    assert all(torch.equal(first[name], second[name]) for name in first)


@over_settings
def test_scratch_memory_full_of_nan_does_not_show(
    op: AnyOp, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [0, 1, 1, 40, 105]
    dense = draw(op, {**op.cases.test_shapes[-1], "T": 105}, dtype).to(device)
    packed = draw(op, {**op.cases.test_shapes[-1], "B": 1, "T": 105}, dtype, cu_seqlens=ends).to(device)
    clean = [results(op, sample) for sample in (dense, packed)]

    fill_fresh_memory_with_nan(monkeypatch)
    for before, sample in zip(clean, (dense, packed), strict=True):
        after = results(op, sample)
        assert all(torch.equal(before[name], after[name]) for name in before)


# Torch's check of an op that calls another looks at gradients of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_torch_library_knows_the_op(op: AnyOp, packed: bool, device: str, full_counts: bool) -> None:
    ends = [0, 3, 3, 8] if packed else None
    sample = draw(op, {**op.cases.test_shapes[-1], "T": 8}, torch.float32, cu_seqlens=ends).to(device)
    known = getattr(getattr(torch.ops, LIBRARY), op.name).default
    given = {**sample.arguments, "scale": 0.5, "activation": "silu"}
    given |= {"chunk": 4, "loss": "l2", "normalise": "before"}
    arguments = [given.get(argument.name) for argument in known._schema.arguments]
    arguments = [
        x.requires_grad_(argument.name in sample.wanted) if isinstance(x, Tensor) else x
        for x, argument in zip(arguments, known._schema.arguments, strict=True)
    ]
    # What compilers make of it is in `test_compiles_whole` as well; with lengths unknown it takes long.
    torch.library.opcheck(known, tuple(arguments), test_utils=CHECKS if full_counts else CHECKS[:3])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compiles_whole(op: AnyOp, packed: bool, device: str) -> None:
    ends = [0, 3, 3, 20] if packed else None
    sample = draw(op, {**op.cases.test_shapes[-1], "T": 20}, torch.float32, cu_seqlens=ends).to(device)

    def block(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        out, state = op(**arguments)
        return 2 * out, state + 1

    # `block` is one code object for all ops, and has been compiled for others.
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, expected = results(compiled, sample), results(block, sample)
    for name, tensor in expected.items():
        error, worst = worst_error(found[name], tensor, timed=False)
        assert error <= EPSILON[torch.float32], f"{name}: {error:.2e}, {worst}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_wrong_arguments_are_told(op: AnyOp) -> None:
    sample = draw(op, {**op.cases.test_shapes[0], "T": 8}, torch.float32)
    given = sample.arguments
    state, first = given["initial_state"], op.cases.sequence[0]
    wrong: list[dict[str, Tensor]] = [
        {"initial_state": state[:, :-1]},
        {first: given[first][:, :0]},
        {"cu_seqlens": torch.tensor([0, 8])},
    ]
    for change in wrong:
        with pytest.raises(HeddleError) as error:
            op(**{**given, **change})
        assert error.value.code == "bad-argument"
    single = draw(op, {**op.cases.test_shapes[0], "B": 1, "T": 8}, torch.float32, cu_seqlens=[0, 5, 8])
    for ends in ([0, 5, 7], [0, 9, 8], [1, 5, 8]):
        with pytest.raises(HeddleError) as error:
            op(**{**single.arguments, "cu_seqlens": torch.tensor(ends)})
        assert error.value.code == "bad-argument"
