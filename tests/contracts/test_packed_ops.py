"""Packed sequences in attention over chosen keys: each is as if it came alone, in results and gradients, empty ones anywhere.

On a CPU the paths in plain torch run, with TRITON_INTERPRET=1 (see tests/kernels/test_interpreter.py) the kernels, interpreted;
on a GPU the real ones. What recurrences and windows keep of it is in test_ops.py, test_other_ops.py and tests/kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from chosen_keys import BLOCK, FORMS, Given, gradient, in_time, results
from held import assert_held, compiled, over_settings
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels.accuracy import EPSILON, worst_error

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

# Nothing at the beginning, at the end and twice between; one token, less than a block, a block that is not full.
ENDS = (0, 0, 1, 4, 4, 4, 34, 34)
FLOAT64 = EPSILON[torch.float64]
UPSTREAM = gradient(ENDS[-1])
# With kernels: one sequence after the other, and all in one call.
IN_TURN, AT_ONCE = ("listed", "chosen", "gates", "landmarks", "best"), ("clusters", "window")
# Of which the host reads nothing.
MOVED = ("members", *AT_ONCE)


def drawn(form: str) -> list[Given]:
    """The arguments of each sequence."""
    generator = torch.Generator().manual_seed(0)
    return [FORMS[form][1](end - begin, generator) for begin, end in pairwise(ENDS) if begin < end]


def packed(sequences: list[Given]) -> Given:
    """Those of all, one behind the other. What stands in `chosen` behind a sequence's last block says nothing."""
    most = max(one["chosen"].shape[-1] for one in sequences) if "chosen" in sequences[0] else 0
    joined = {}
    for name, x in sequences[0].items():
        parts = [one[name] for one in sequences]
        if name == "chosen":
            parts = [F.pad(part, (0, most - part.shape[-1]), value=True) for part in parts]
        joined[name] = torch.cat(parts, dim=min(x.dim() - 1, 2))
    if "start" in joined:
        joined["start"] = torch.zeros(len(ENDS) - 1, dtype=torch.int64)
    return {**joined, "cu_seqlens": torch.tensor(ENDS)}


def apart(given: Given) -> list[Given]:
    """The arguments of each sequence as views of those of all."""
    lengths = [end - begin for begin, end in pairwise(ENDS)]
    blocks = [-(-length // BLOCK) for length in lengths]
    counts = {"start": [1] * len(lengths), "gates": blocks, "landmarks": blocks}
    parts = {
        name: x.split(counts.get(name, lengths), min(x.dim() - 1, 2))
        for name, x in given.items()
        if name != "cu_seqlens"
    }
    found = [{name: x[number] for name, x in parts.items()} for number, n in enumerate(lengths) if n]
    for one in found:
        if "chosen" in one:
            one["chosen"] = one["chosen"][..., : -(-one["q"].shape[2] // BLOCK)]
    return found


def of_each(function: Callable[..., Tensor], sequences: list[Given], rest: Given) -> dict[str, Tensor]:
    """Results of every sequence alone, one behind the other."""
    upstream = UPSTREAM.split([one["q"].shape[2] for one in sequences], 2)
    alone = [results(function, one, rest, part) for one, part in zip(sequences, upstream, strict=True)]
    return {
        name: torch.cat([one[name] for one in alone], dim=min(x.dim() - 1, 2)) for name, x in alone[0].items()
    }


@pytest.mark.parametrize("way", [0, 1], ids=["op", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_are_each_alone_with_all_gradients(form: str, way: int) -> None:
    (functions, _, rest), sequences = FORMS[form], drawn(form)
    together = results(functions[way], packed(sequences), rest, UPSTREAM)
    for name, expected in of_each(functions[way], sequences, rest).items():
        assert (together[name] - expected).abs().max() < FLOAT64 * max(1.0, expected.abs().max()), name


@over_settings
@pytest.mark.parametrize("form", IN_TURN)
def test_what_goes_one_by_one_is_each_alone_to_the_bit(form: str, device: str, dtype: torch.dtype) -> None:
    (fast, _), _, rest = FORMS[form]
    given = packed(drawn(form))
    there = {name: (x.to(dtype) if x.is_floating_point() else x).to(device) for name, x in given.items()}
    together, alone = results(fast, there, rest, UPSTREAM), of_each(fast, apart(there), rest)
    assert all(torch.equal(together[name], expected) for name, expected in alone.items())


@over_settings
@pytest.mark.parametrize("form", AT_ONCE)
def test_sequences_of_one_call_are_those_of_the_reference(form: str, device: str, dtype: torch.dtype) -> None:
    (fast, reference), _, rest = FORMS[form]
    given = packed(drawn(form))
    rounded = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in rounded.items()}
    there = {name: x.to(device) for name, x in rounded.items()}
    exact = in_time(results(reference, wide, rest, UPSTREAM))
    assert_held(exact, lambda: in_time(results(fast, there, rest, UPSTREAM)), dtype, device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", MOVED)
def test_where_places_alone_move_nothing_waits_and_all_compiles(form: str, device: str) -> None:
    (fast, reference), _, rest = FORMS[form]
    given = packed(drawn(form))
    exact = results(reference, given, rest, UPSTREAM)
    there = {name: (x.float() if x.is_floating_point() else x).to(device) for name, x in given.items()}
    found = results(compiled(fast), there, rest, UPSTREAM)
    for name, x in exact.items():
        error, worst = worst_error(found[name].cpu(), x, timed=False)
        assert error <= EPSILON[torch.float32], f"{name}: {error:.1e}, {worst}"


@pytest.mark.parametrize("form", FORMS)
def test_wrong_ends_of_sequences_are_told(form: str) -> None:
    (fast, _), _, rest = FORMS[form]
    given = packed(drawn(form))
    rows = {
        name: x.expand(2, *x.shape[1:]) for name, x in given.items() if name not in ("start", "cu_seqlens")
    }
    start = {"start": torch.zeros(2, dtype=torch.int64)} if "start" in given else {}
    last = {
        name: x[:, :, -1:] for name, x in given.items() if name in ("q", "own", "listed", "chosen", "index")
    }
    last |= {name: x[..., -1:] for name, x in given.items() if name in ("first", "last", "queries")}
    for change, told in (
        ({"cu_seqlens": torch.tensor(ENDS) - 1}, "must rise from 0 to 34, got"),
        ({"cu_seqlens": torch.tensor([*ENDS[:-1], 33])}, "must rise from 0 to 34, got"),
        ({"cu_seqlens": torch.tensor([0, 0, 4, 1, 4, 4, 34, 34])}, "must rise from 0 to 34, got"),
        ({"cu_seqlens": torch.tensor([ENDS])}, r"must be \[N \+ 1\]"),
        ({**rows, **start}, "the batch 1, not 2"),
        (last, "as many queries as keys"),
    ):
        with pytest.raises(HeddleError, match=f"^{fast.__name__}: .*{told}") as error:
            fast(**{**given, **change}, **rest)
        assert error.value.code == "bad-argument"


@pytest.mark.parametrize(
    ("form", "argument", "told"),
    [
        ("listed", "start", r"shape \[6\], expected \[7\]"),
        ("gates", "gates", r"shape \[1, 2, 5\], expected \[1, 2, 6\]"),
        ("chosen", "chosen", r"shape \[1, 2, 34, 3\], expected \[1, 2, 34, 4\]"),
        ("landmarks", "landmarks", r"shape \[1, 2, 5, 16\], expected \[1, 2, 6, 16\]"),
        ("clusters", "order", r"shape \[1, 4, 33\], expected \[1, 4, 34\]"),
    ],
)
def test_what_is_not_of_all_sequences_is_told(form: str, argument: str, told: str) -> None:
    (fast, _), _, rest = FORMS[form]
    given = packed(drawn(form))
    axis = 2 if argument == "landmarks" else -1
    short = given[argument].narrow(axis, 0, given[argument].shape[axis] - 1)
    with pytest.raises(HeddleError, match=f"{argument} has {told}") as error:
        fast(**{**given, argument: short}, **rest)
    assert error.value.code == "bad-argument"
