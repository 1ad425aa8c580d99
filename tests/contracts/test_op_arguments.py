"""What every op of the package says of tensors that it cannot take, and of a GPU on which its kernels do not run."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from views import VIEWS

import heddle.kernels
from heddle.errors import HeddleError
from heddle.kernels import OPS, Op, force_path, gla
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.local_linear_attention import local_linear_attention
from heddle.kernels.op import SlowPathWarning

AnyOp = Op[..., Any]


def _all_ops() -> Iterator[AnyOp]:
    """Those of every module, whether or not the package hands them on."""
    for info in pkgutil.iter_modules(heddle.kernels.__path__, "heddle.kernels."):
        for found in vars(importlib.import_module(info.name)).values():
            if isinstance(found, Op) and found.__module__ == info.name:
                yield found


EVERY_OP = tuple(_all_ops())
WITH_KERNELS = tuple(op for op in EVERY_OP if op.kernel is not None)
# May be of another floating dtype than the first tensor: weights, gates and states of a model in half precision.
OF_THEIR_OWN = {
    ("causal_conv1d", "weight"),
    ("rms_norm", "weight"),
    ("rms_norm", "gate"),
    *(("gated_delta_layer_step", name) for name in ("a", "b", "norm_weight", "conv_state", "conv_weight")),
}
# Sizes that no kernels take, and sizes that all do.
HUGE = {"K": 9000, "V": 9000, "W": 99, "G": 1, "block": 64, "choice": 1, "room": 64, "chunk": 64, "blocks": 9}
SMALL = {**HUGE, "K": 64, "V": 64, "W": 4}
GPU = torch.device("cuda:0")

# Not of the module: of two marks the wider one wins.
not_told = pytest.mark.filterwarnings("error::heddle.kernels.op.SlowPathWarning")

over_ops = pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.name)
over_kernels = pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)


def _shape(op: AnyOp) -> dict[str, int]:
    return {"T": 8, **op.cases.test_shapes[0]}


def _given(op: AnyOp, **sizes: int) -> dict[str, Any]:
    """Arguments of a call in float32, with a state where it may have one."""
    shape = {**_shape(op), **sizes}
    generator = torch.Generator().manual_seed(0)
    drawn = {**shape, **op.cases.inputs(shape, generator), "eps": 1e-6}
    drawn |= {name: op.cases.initial_state(shape, generator) for name in ("state", "initial_state")}
    places = torch.arange(shape["T"]).expand(shape["B"], shape.get("H", 1), shape["T"])
    drawn |= {"blocks": -(-shape.get("S", 0) // shape.get("block", 1)), "sink": 1, "recent": 1}
    drawn |= {"order": places, "first": (places - shape.get("width", 0)).clamp(min=0), "last": places}
    named = inspect.signature(op.fast).parameters
    return {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in drawn.items()
        if name in named
    }


def _tensors(given: dict[str, Any], *, floating: bool = False) -> dict[str, Tensor]:
    found = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    return {name: x for name, x in found.items() if x.is_floating_point() or not floating}


def _refused(call: Callable[..., Any], given: dict[str, Any], op: AnyOp, told: str) -> None:
    with pytest.raises(HeddleError, match=f"^{op.name}: {told}") as error:
        call(**given)
    assert error.value.code == "bad-argument"


def _told_as(name: str) -> str:
    return "(initial_)?state" if name.endswith("state") and "conv" not in name else name


@over_ops
def test_what_has_a_gradient_is_an_argument_that_is_drawn(op: AnyOp) -> None:
    """Elsewhere a name that is not drawn is passed over: some are of variants alone."""
    assert set(op.cases.differentiable) <= inspect.signature(op.fast).parameters.keys()
    inputs = (op.cases.inputs, *(drawn for drawn, _ in op.cases.variants.values()))
    found = [drawn(_shape(op), torch.Generator().manual_seed(0)) for drawn in inputs]
    assert set(op.cases.differentiable) <= set().union(*found)


@over_ops
def test_integers_and_complex_numbers_are_refused_by_name(op: AnyOp) -> None:
    given = _given(op)
    op(**given)
    for name, x in _tensors(given, floating=True).items():
        for dtype, told in ((torch.int32, "int32"), (torch.complex64, "complex64")):
            _refused(op, {**given, name: x.to(dtype)}, op, f"{_told_as(name)} is {told}, expected .*float32")


WITH_STEPS = tuple(op for op in EVERY_OP if op.step is not None)


@pytest.mark.parametrize("op", WITH_STEPS, ids=lambda op: op.name)
def test_products_of_a_step_are_those_of_the_arguments_types_under_autocast(op: AnyOp) -> None:
    shape, generator = {**_shape(op), "T": 1}, torch.Generator().manual_seed(0)
    drawn = {**op.cases.inputs(shape, generator), "state": op.cases.initial_state(shape, generator)}
    assert op.step is not None
    named = inspect.signature(op.step).parameters
    given = {name: x.float() for name, x in drawn.items() if name in named}
    expected = op.step(**given)
    with torch.autocast("cpu", torch.bfloat16):
        found = op.step(**given)
    for one, wanted in zip(found, expected, strict=True):
        assert torch.equal(one, wanted)


def _told(found: Any) -> list[Tensor]:
    parts = [found] if isinstance(found, Tensor) else found
    return [one for one in parts if one is not None]


# What is no number would count tokens, or is a mark.
COUNTED = {("ttt", "initial_state"), ("token_split_attention", "kept")}


# What block_choice gives are places.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("op", [op for op in EVERY_OP if op.name != "block_choice"], ids=lambda op: op.name)
@torch.no_grad()
def test_what_is_no_number_is_handed_on(op: AnyOp) -> None:
    given = _given(op)
    for name, x in _tensors(given, floating=True).items():
        if (op.name, name) not in COUNTED:
            found = _told(op(**{**given, name: torch.full_like(x, torch.nan)}))
            assert any(one.isnan().any() for one in found), name


@over_ops
def test_products_are_those_of_the_arguments_types_under_autocast(op: AnyOp) -> None:
    given = _given(op)
    expected = _told(op(**given))
    with torch.autocast("cpu", torch.bfloat16):
        found = _told(op(**given))
    for one, wanted in zip(found, expected, strict=True):
        assert one.dtype == (torch.bfloat16 if op.is_cast else wanted.dtype)
        assert op.is_cast or torch.equal(one, wanted)


@over_ops
def test_floating_places_are_refused_by_name(op: AnyOp) -> None:
    given = _given(op)
    for name in _tensors(given).keys() - _tensors(given, floating=True).keys():
        _refused(op, {**given, name: given[name].float()}, op, f"{name} is float32, expected int64, int32")


@over_ops
def test_a_tensor_of_another_dtype_is_refused_by_name_or_free(op: AnyOp) -> None:
    given = _given(op)
    first = next(iter(_tensors(given)))
    for name in (one for one in op.cases.rounded if one != first and one in given):
        changed = {**given, name: given[name].double()}
        if (op.name, name) in OF_THEIR_OWN:
            found = op(**changed)
            out = found if isinstance(found, Tensor) else found[0]
            assert out.dtype == torch.float32, name
            assert out.isfinite().all(), name
        else:
            _refused(op, changed, op, f"{name} is float64, expected float32 as {first}")


@over_ops
def test_a_tensor_of_another_device_is_refused_by_name(op: AnyOp) -> None:
    given = _given(op)
    first = next(iter(_tensors(given)))
    for name, x in _tensors(given).items():
        if name != first:
            _refused(
                op, {**given, name: x.to("meta")}, op, f"{_told_as(name)} is on meta, expected cpu as {first}"
            )


PACKED = tuple(op for op in EVERY_OP if "cu_seqlens" in inspect.signature(op.fast).parameters)


@pytest.mark.parametrize("op", PACKED, ids=lambda op: op.name)
def test_ends_of_sequences_are_integers_of_the_same_device(op: AnyOp) -> None:
    given = _given(op, B=1)
    ends = torch.tensor([0, _shape(op)["T"]])
    _refused(op, {**given, "cu_seqlens": ends.float()}, op, "cu_seqlens is float32, expected int64, int32")
    _refused(op, {**given, "cu_seqlens": ends.to("meta")}, op, "cu_seqlens is on meta, expected cpu")


@pytest.mark.parametrize("op", [op for op in EVERY_OP if op.step is not None], ids=lambda op: op.name)
def test_a_step_tells_the_same(op: AnyOp) -> None:
    assert op.step is not None
    given = {name: x[:, :1] if name in op.cases.sequence else x for name, x in _given(op).items()}
    given = {name.removeprefix("initial_"): x for name, x in given.items()}
    for name, x in _tensors(given).items():
        _refused(op.step, {**given, name: x.int()}, op, f"{name} is int32, expected .*float32")


def _results(op: AnyOp, given: dict[str, Any], view: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """All results of a call on views of the tensors, alone and where gradients are wanted, and these."""
    leaves = {
        name: x.detach().requires_grad_(name in op.cases.differentiable) if isinstance(x, Tensor) else x
        for name, x in given.items()
    }
    seen = {name: view(x) if isinstance(x, Tensor) else x for name, x in leaves.items()}
    with torch.no_grad():
        alone = op(**seen)
    found = op(**seen)
    alone, outputs = (
        [x for x in (y if isinstance(y, tuple) else (y,)) if x is not None] for y in (alone, found)
    )
    graded = [x for x in outputs if x.requires_grad]
    wanted = [leaves[name] for name in op.cases.differentiable if name in leaves]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in graded]
    gradients = torch.autograd.grad(graded, wanted, upstream, allow_unused=True) if graded else ()
    return [*alone, *outputs, *gradients]


@pytest.mark.usefixtures("kernels_on_gpu")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", [op for op in WITH_KERNELS if op not in OPS], ids=lambda op: op.name)
def test_tensors_are_read_as_they_lie(op: AnyOp, device: str) -> None:
    # Those of OPS are held to their references: test_ops.py.
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in _given(op).items()}
    expected = _results(op, given, lambda x: x)
    for view in VIEWS:
        for number, (found, one) in enumerate(zip(_results(op, given, view), expected, strict=True)):
            if one is not None:
                error = (found - one).abs().max() / one.abs().max()
                assert error <= EPSILON[torch.float32], f"{view.__name__}, result {number}: {error:.1e}"


@pytest.fixture
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not run an op yet."""
    monkeypatch.setattr("heddle.kernels.op._told", set())


@over_kernels
@not_told
@not_told
@pytest.mark.usefixtures("nothing_told")
def test_torch_on_a_gpu_is_told_once_with_its_reason_and_what_would_do(op: AnyOp) -> None:
    assert op.limits, "the op must say which shapes its kernels take"
    sizes = [name for name in ("K", "W") if name in op.limits or "rows" in op.limits]
    told = rf"{op.name} runs in PyTorch on cuda:0, .* do not take .*{sizes[0]}=\d+.*slow-path.\n  hint: they take "
    with pytest.warns(SlowPathWarning, match=told):
        assert op.choose(GPU, torch.bfloat16, **HUGE) == "torch"
    with pytest.warns(
        SlowPathWarning, match=f"{op.name} .* none for float64 .*\n  hint: bfloat16, float16, "
    ):
        assert op.choose(GPU, torch.float64, **SMALL) == "torch"
    # Nothing more is told, or it would be an error.
    assert op.choose(GPU, torch.bfloat16, **{**HUGE, "K": 9001, "W": 100}) == "torch"
    assert op.choose(GPU, torch.float64, **SMALL) == "torch"


@over_kernels
@not_told
@not_told
@pytest.mark.usefixtures("nothing_told")
def test_torch_is_not_told_where_it_is_asked_for_or_there_is_no_gpu(op: AnyOp) -> None:
    with force_path("torch"):
        op.choose(GPU, torch.float64, **SMALL)
    op.choose(torch.device("cpu"), torch.float64, **HUGE)


@not_told
@pytest.mark.usefixtures("nothing_told")
def test_kernels_that_no_gpu_has_held_to_the_reference_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heddle.kernels.op._triton_runs", lambda *_: True)
    monkeypatch.setattr("heddle.kernels.op.INTERPRETED", False)
    assert local_linear_attention.unproven == (torch.float32,)
    told = r"no GPU has held .* in float32 with K=64, V=64 .*\n  hint: .*force_path\(.triton.\)"
    with pytest.warns(SlowPathWarning, match=told):
        assert local_linear_attention.choose(GPU, torch.float32, K=64, V=64) == "torch"
    assert local_linear_attention.choose(GPU, torch.float16, K=64, V=64) == "triton"


@not_told
@pytest.mark.usefixtures("nothing_told")
def test_a_slow_path_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    # The op sees a GPU where there is none.
    monkeypatch.setattr("heddle.kernels.op._is_gpu", lambda _: True)
    given = {
        name: x.requires_grad_()
        for name, x in gla.cases.inputs(
            {"B": 1, "T": 8, "H": 1, "K": 300, "V": 4}, torch.Generator().manual_seed(0)
        ).items()
    }

    def block(**arguments: Tensor) -> Tensor:
        return 2 * gla(**arguments)[0]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with pytest.warns(SlowPathWarning, match="gla runs in PyTorch on cpu"):
        found = compiled(**given)
    assert torch.allclose(found, block(**given))
    torch.autograd.grad(found.sum(), list(given.values()))
