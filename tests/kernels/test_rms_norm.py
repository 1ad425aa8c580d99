"""rms_norm: rows that lie apart, weights and gates, against the reference in both directions; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from held import assert_held, over_settings
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.rms_norm import HOPPER
from heddle.kernels.op import INTERPRETED
from heddle.kernels.rms_norm import rms_norm, rms_norm_reference

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

Given = dict[str, Any]
FORMS: dict[str, Given] = {
    "plain": {},
    "weighted": {"weight": True},
    "gated": {"weight": True, "gate": True},
    "sigmoid": {"weight": True, "gate": True, "activation": "sigmoid"},
    "length 1": {"mean": False},
    "gated alone": {"gate": True, "mean": False},
}
SIZES = {"heads": (2, 5, 3, 16), "ragged": (1, 130, 1, 100), "wide": (1, 3, 1, 1536), "few": (1, 1, 1, 2)}


def drawn(size: tuple[int, ...], **form: Any) -> Given:
    generator = torch.Generator().manual_seed(3)
    given: Given = {"x": torch.randn(*size, generator=generator, dtype=torch.float64)}
    if form.pop("weight", False):
        given["weight"] = torch.randn(size[-1], generator=generator, dtype=torch.float64)
    if form.pop("gate", False):
        given["gate"] = torch.randn(*size, generator=generator, dtype=torch.float64)
    return given | form


def results(
    function: Any, given: Given, dtype: torch.dtype, device: str, apart: bool = False
) -> dict[str, Tensor]:
    """Output and all gradients; `apart` gives rows that are parts of wider ones."""
    leaves: Given = {}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            leaves[name] = x
            continue
        leaf = x.to(dtype).to(device, dtype if function is rms_norm else torch.float64)
        if apart and leaf.dim() == 4:
            leaf = torch.stack((leaf, leaf), dim=2).unbind(2)[1]
        leaves[name] = leaf.detach().requires_grad_()
    wanted = [x for x in leaves.values() if isinstance(x, Tensor)]
    out = function(**leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(out, wanted, upstream.to(dtype).to(out))
    names = [name for name, x in leaves.items() if isinstance(x, Tensor)]
    return {"out": out.detach(), **dict(zip(names, found, strict=True))}


def results_as_they_lie(given: Given, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Output and gradients of what is given with its strides."""
    leaves = {}
    for name, x in given.items():
        whole = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device)
        leaves[name] = whole.copy_(x).requires_grad_()
        assert leaves[name].stride() == x.stride()
    out = rms_norm(**leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


@over_settings
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_results_and_gradients_are_those_of_the_reference(
    size: str, form: str, device: str, dtype: torch.dtype
) -> None:
    given = drawn(SIZES[size], **FORMS[form])
    exact = results(rms_norm_reference, given, dtype, "cpu")
    assert_held(exact, lambda: results(rms_norm, given, dtype, device), dtype, device)


@over_settings
def test_rows_may_lie_apart_and_two_runs_agree_to_the_bit(device: str, dtype: torch.dtype) -> None:
    given = drawn((2, 70, 3, 64), weight=True, gate=True)
    together, apart = (results(rms_norm, given, dtype, device, apart=way) for way in (False, True))
    # Rows of the gate alone together, and a length that is a part of a longer one.
    wide = {name: torch.cat((x, x), dim=2) if x.dim() == 4 else x for name, x in given.items()}
    mixed = {**given, "x": wide["x"][:, :, :3]}
    part = {name: wide[name][:, 4:60, 2] if name != "weight" else x for name, x in wide.items()}
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in part.items()}
    for one, other in ((mixed, given), (part, dense)):
        found, expected = (results_as_they_lie(each, dtype, device) for each in (one, other))
        assert all(torch.equal(found[name], expected[name]) for name in found)
    again = results(rms_norm, given, dtype, device)
    assert all(torch.equal(together[name], apart[name]) for name in together)
    assert all(torch.equal(together[name], again[name]) for name in together)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(4, 1000, 16, 128), (2, 513, 2048), (3, 65, 8192), (1, 7, 5, 256)], ids=str)
def test_sizes_as_models_have_them_are_right(size: tuple[int, ...], dtype: torch.dtype) -> None:
    given = drawn(size, weight=True, gate=True)
    exact = results(rms_norm_reference, given, dtype, "cpu")
    assert_held(exact, lambda: results(rms_norm, given, dtype, "cuda"), dtype, "cuda")


def test_compilers_and_vmap_see_plain_torch() -> None:
    x, weight = torch.randn(3, 4, 8), torch.randn(3, 8)
    each = torch.stack([rms_norm(x[i], weight[i]) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(rms_norm)(x, weight), each)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"weight": torch.ones(3)}, "weight has shape"),
        ({"gate": torch.ones(2, 3)}, "gate has shape"),
        ({"activation": "tanh"}, "no activation 'tanh'"),
    ],
)
def test_what_does_not_fit_is_named(wrong: Given, names: str) -> None:
    with pytest.raises(HeddleError, match=names):
        rms_norm(torch.ones(2, 4), **wrong)


def test_a_length_is_not_among_what_kernels_are_compiled_for() -> None:
    op = pytest.importorskip("heddle.kernels._rms_norm_op")
    for length in (5, 6, 70):
        x, wide = torch.ones(2, length, 3, 16), torch.ones(2, length, 40)
        for rows in (
            x,
            x.flatten(2),
            x[0, :, 0],
            wide[..., :16],
            wide[:, : length - 1, :16],
            x[:, 1:].flatten(2),
        ):
            assert op._sides(rows, None)[2] == 1, rows.shape
        assert op._sides(torch.ones(2, length, 5, 16)[:, :, :3], x)[2] == 3


@pytest.mark.parametrize(
    ("rows", "size", "launch"),
    [
        (1 << 19, 128, HOPPER.backward),
        (1 << 18, 128, HOPPER.backward),
        ((1 << 18) - 1, 128, HOPPER.few),
        (1 << 20, 1024, HOPPER.few),
    ],
)
def test_gradients_come_from_few_programs_where_there_are_rows_enough(
    rows: int, size: int, launch: Launch
) -> None:
    assert HOPPER.back(rows, size) == launch


def test_the_gradient_of_a_gradient_is_refused_by_kernels_and_not_lost() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm(x).square().sum(), x, create_graph=True)
    if not INTERPRETED:
        assert torch.autograd.grad(gradient.sum(), x)[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(gradient.sum(), x)


def test_a_wider_gate_does_not_widen_the_output() -> None:
    x, gate = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8)
    assert rms_norm(x, gate=gate).dtype == torch.bfloat16
