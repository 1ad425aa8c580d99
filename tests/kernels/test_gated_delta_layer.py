"""gated_delta_layer_step on every path: its reference's results, whatever the options; states, tiles, errors, and its mixer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from held import fill_fresh_memory_with_nan
from torch import Tensor

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.gated_deltanet import GatedDeltaNetModule
from heddle.compose.modules.site import Site
from heddle.errors import HeddleError
from heddle.kernels import force_path, watch_paths
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.gated_delta_layer import gated_delta_layer_step, gated_delta_layer_step_reference
from heddle.kernels.op import INTERPRETED, LIBRARY, wide_dtype

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

Given = dict[str, Any]
RESULTS = ("out", "state", "conv_state")
SHAPES = gated_delta_layer_step.cases.test_shapes
EPS = 1e-6
# As models have them, few and many of them, with sizes that are no powers of two.
SIZES = (
    (2, 128, 128),
    (160, 128, 128),
    (160, 100, 72),
    (2, 64, 64),
    (2, 128, 256),
    (2, 256, 256),
    (2, 192, 160),
)
NO_CONV = ("conv_state", "conv_weight")
OPTIONS: dict[str, Given] = {
    "plain": {},
    "to_two": {"beta_max": 2.0, "scale": 0.3},
    "bias": {"conv_bias": None},
    "no_activation": {"activation": None},
    "no_norm_of_keys": {"qk_norm": None},
    "no_convolution": dict.fromkeys(NO_CONV),
    "no_convolution_no_activation": {**dict.fromkeys(NO_CONV), "activation": None},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


HERE = (torch.float32, torch.float16) if INTERPRETED else (torch.float64, torch.float32)
THERE = (torch.bfloat16, torch.float16, torch.float32)


def _setting(device: str, dtype: torch.dtype, *what: Any, told: str = "") -> Any:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return pytest.param(device, dtype, *what, id=f"{told}{device}-{str(dtype)[6:]}", marks=marks)


def _settings(*there: torch.dtype) -> list[Any]:
    """Devices and dtypes: on a GPU each is a compile."""
    return [*(_setting("cpu", dtype) for dtype in HERE), *(_setting("cuda", dtype) for dtype in there)]


def _cases() -> Iterator[Any]:
    """Each option in each shape, and on a GPU in bfloat16 once; without options in every dtype."""
    for option, (name, shape) in itertools.product(OPTIONS, zip(("grouped", "odd"), SHAPES, strict=True)):
        there = THERE if option == "plain" else THERE[: name == "odd"]
        for device, dtype in [*(("cpu", dtype) for dtype in HERE), *(("cuda", dtype) for dtype in there)]:
            yield _setting(device, dtype, shape, option, told=f"{option}-{name}-")


def drawn(shape: Any, dtype: torch.dtype, device: str = "cpu", option: str = "plain") -> Given:
    """Arguments by name, rounded to `dtype`, with one of the options."""
    generator, traits = torch.Generator().manual_seed(0), gated_delta_layer_step.cases
    given: Given = {**traits.inputs(shape, generator), "state": traits.initial_state(shape, generator)}
    rounded = {n: x.to(dtype if n in traits.rounded else wide_dtype(dtype)) for n, x in given.items()}
    changed = {**rounded, "eps": EPS, **OPTIONS[option]}
    if option == "bias":
        changed["conv_bias"] = torch.randn(given["qkv"].shape[2], generator=generator).to(dtype)
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in changed.items()}


def exact_of(given: Given) -> tuple[Tensor, ...]:
    there = {n: x.double().cpu() if isinstance(x, Tensor) else x for n, x in given.items()}
    return tuple(x for x in gated_delta_layer_step_reference(**there) if x is not None)


def results(given: Given) -> tuple[Tensor, ...]:
    return tuple(x for x in gated_delta_layer_step(**given) if x is not None)


def assert_right(given: Given) -> None:
    """Every result is within twice the error of plain torch; its own error is measured against rounding."""
    qkv = given["qkv"]
    with watch_paths() as seen:
        found = results(given)
    path = "triton" if INTERPRETED or qkv.device.type == "cuda" else "torch"
    assert seen[0] == ("gated_delta_layer_step", path)
    exact = exact_of(given)
    with force_path("torch"):
        plain = (
            results(given) if path == "triton" else [x.to(y.dtype) for x, y in zip(exact, found, strict=True)]
        )
    for name, tensor, base, truth in zip(RESULTS, found, plain, exact, strict=False):
        error, worst = worst_error(tensor, truth, timed=name == "out")
        bound = 2 * worst_error(base, truth, timed=name == "out")[0] + EPSILON[qkv.dtype]
        assert error <= bound, f"{name}: {error:.2e}, at most {bound:.2e}: {worst}"


@pytest.mark.parametrize(("device", "dtype", "shape", "option"), list(_cases()))
def test_results_are_those_of_the_reference(device: str, dtype: torch.dtype, shape: Any, option: str) -> None:
    assert_right(drawn(shape, dtype, device, option))


@pytest.mark.parametrize(("device", "dtype"), _settings(torch.bfloat16))
@pytest.mark.parametrize(("taps", "shift"), [(2, 0.0), (8, 0.0), (4, -25.0), (4, 25.0)])
def test_few_and_many_taps_and_gates_at_their_ends_are_right(
    taps: int, shift: float, device: str, dtype: torch.dtype
) -> None:
    given = drawn({**SHAPES[0], "W": taps}, dtype, device)
    assert_right({**given, "a": given["a"] + shift, "b": given["b"] + shift})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stages", [1, 2], ids=["one_after_the_other", "ahead"])
def test_tiles_of_a_head_change_nothing(stages: int, device: str) -> None:
    # Three tiles of 16 columns, the last of them half empty.
    with tuning(layer_step=Launch(1, 16, 4, stages)):
        assert_right(drawn(SHAPES[1], torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "K", "V"), SIZES)
def test_heads_as_models_have_them_are_right(batch: int, K: int, V: int) -> None:
    for dtype in THERE if K == V == 128 else THERE[:1]:
        assert_right(drawn({"B": batch, "H": 1, "HV": 2, "K": K, "V": V, "W": 4}, dtype, "cuda"))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_given_stays_and_a_window_moves_on_by_one(device: str) -> None:
    # All value heads of a group read the window of one key head: it must not be written where it is read.
    given = drawn({**SHAPES[0], "H": 1, "HV": 4}, torch.float32, device)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    _, state, past = results(given)
    assert all(torch.equal(given[name], x) for name, x in before.items())
    assert torch.equal(past, torch.cat((before["conv_state"][:, :, 1:], before["qkv"].mT), dim=2))
    assert state.data_ptr() != given["state"].data_ptr()


@pytest.mark.gpu
def test_many_readers_of_one_key_head_agree_in_every_run() -> None:
    given = drawn({"B": 8, "H": 1, "HV": 64, "K": 128, "V": 32, "W": 4}, torch.bfloat16, "cuda")
    first = results(given)
    for _ in range(50):
        assert all(torch.equal(one, other) for one, other in zip(first, results(given), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", ["plain", "no_convolution"])
def test_fresh_memory_full_of_nan_does_not_show(
    option: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = drawn(SHAPES[1], torch.float32, device, option)
    clean = results(given)
    fill_fresh_memory_with_nan(monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(clean, results(given), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_wider_tensors_are_read_as_they_lie(device: str) -> None:
    given = drawn(SHAPES[0], torch.float32, device)
    apart: Given = {
        name: torch.stack((x, x), dim=-1)[..., 0] if isinstance(x, Tensor) else x for name, x in given.items()
    }
    rows = {name: torch.cat((given[name], given[name]), dim=-1) for name in ("qkv", "a", "b")}
    apart |= {name: both[..., : given[name].shape[-1]] for name, both in rows.items()}
    assert not any(apart[name].is_contiguous() for name in ("qkv", "z", "state", "conv_state"))
    assert_right(apart)


def test_the_kernel_runs_where_it_can_and_without_gradients() -> None:
    here = "triton" if INTERPRETED else "torch"
    path = gated_delta_layer_step.path
    assert path("cpu", torch.float32, K=64, V=64, W=4) == here
    assert path("cpu", torch.float32, K=64, V=64, W=9) == "torch"
    assert path("cpu", torch.float32, K=257, V=64, W=4) == "torch"
    assert path("cpu", torch.float64, K=64, V=64, W=4) == "torch"
    given = drawn(SHAPES[0], torch.float32)
    with watch_paths() as seen:
        results({**given, "z": given["z"].requires_grad_()})
    assert [name for name, _ in seen] == ["causal_conv1d", "gated_delta_rule"]


def test_gradients_are_those_of_the_reference() -> None:
    wanted = (*gated_delta_layer_step.cases.differentiable, "state", "conv_state")
    found = []
    for function in (gated_delta_layer_step, gated_delta_layer_step_reference):
        given = drawn(SHAPES[0], torch.float64)
        leaves = [given[name].requires_grad_() for name in wanted]
        found.append(torch.autograd.grad(sum((x**2).sum() for x in function(**given)), leaves))
    for name, one, other in zip(wanted, *found, strict=True):
        error, worst = worst_error(one, other, timed=False)
        assert error <= EPSILON[torch.float64], f"{name}: {error:.2e}, {worst}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", ["plain", "no_convolution"])
def test_torch_knows_the_op_and_compiles_it_whole(option: str, device: str) -> None:
    given = drawn(SHAPES[1], torch.float32, device, option)
    names = ["gated_delta_layer_step"]
    names += ["gated_delta_layer_step_kernel"] if INTERPRETED or device == "cuda" else []
    for name in names:
        known = getattr(getattr(torch.ops, LIBRARY), name).default
        usual = {"activation": "silu", "qk_norm": "l2", "beta_max": 1.0, "scale": 0.25}
        arguments = tuple({**usual, **given}.get(one.name) for one in known._schema.arguments)
        torch.library.opcheck(known, arguments, test_utils=("test_schema", "test_faketensor"))
    if option != "plain":
        return
    torch.compiler.reset()
    compiled = torch.compile(lambda: results(given)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), results(given)[0] * 2)


@pytest.mark.gpu
def test_a_cuda_graph_repeats_the_step() -> None:
    given = drawn({"B": 2, "H": 2, "HV": 4, "K": 64, "V": 64, "W": 4}, torch.bfloat16, "cuda")
    expected = results(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(given)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"qkv": torch.zeros(2, 2, 128)}, "qkv must be"),
        ({"qkv": torch.zeros(2, 1, 120)}, "qkv and state do not fit"),
        ({"state": torch.zeros(2, 3, 16, 16)}, "qkv and state do not fit"),
        ({"state": torch.zeros(1, 4, 16, 16)}, "state has shape"),
        ({"z": torch.zeros(2, 1, 4, 15)}, "z has shape"),
        ({"z": torch.zeros(2, 1, 4, 16).half()}, "z is float16, expected float32 as qkv"),
        ({"a": torch.zeros(2, 1, 3)}, "a has shape"),
        ({"dt_bias": torch.zeros(3)}, "dt_bias has shape"),
        ({"norm_weight": torch.zeros(15)}, "norm_weight has shape"),
        ({"conv_state": torch.zeros(2, 128, 4)}, "conv_state has shape"),
        ({"conv_weight": torch.zeros(127, 4)}, "conv_weight has shape"),
        ({"conv_bias": torch.zeros(127)}, "conv_bias has shape"),
        ({"conv_state": None}, "come together"),
        ({"activation": "relu"}, "no activation 'relu'"),
        ({"qk_norm": "l1"}, "no qk_norm 'l1'"),
    ],
)
def test_wrong_arguments_are_told(change: Given, told: str) -> None:
    with pytest.raises(HeddleError, match=told) as error:
        gated_delta_layer_step(**{**drawn(SHAPES[0], torch.float32), **change})
    assert error.value.code == "bad-argument"


def _outputs(mixer: GatedDeltaNetModule, x: Tensor, first: int) -> Tensor:
    """`first` tokens at once, then token by token."""
    cache, begin, found = mixer.new_cache(), 0, []
    for length in (first, *[1] * (x.shape[1] - first)):
        positions = torch.arange(begin, begin + length, device=x.device).expand(x.shape[0], -1)
        found.append(mixer(x[:, begin : begin + length], Call(positions, cache=cache)))
        cache.advance(length)
        begin += length
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("device", "dtype"), _settings(torch.bfloat16))
@torch.no_grad()
def test_a_mixer_decodes_through_it_what_it_prefills(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options: Given = {"short_conv": 3, "negative_eigenvalues": True}
    mixer = GatedDeltaNetModule(Site(32, 0, 1), heads=2, value_heads=4, head_dim=8, value_dim=12, **options)
    for module in mixer.modules():
        initialise(module, std=32**-0.5)
    mixer, x = mixer.to(device, dtype), torch.randn(2, 6, 32).to(device, dtype)
    with watch_paths() as seen:
        decoded = _outputs(mixer, x, 2)
    path = "triton" if INTERPRETED or device == "cuda" else "torch"
    assert seen.count(("gated_delta_layer_step", path)) == 4
    with force_path("torch"):
        plain, exact = _outputs(mixer, x, 6), _outputs(mixer.to(torch.float64), x.double(), 6)
    error, worst = worst_error(decoded, exact, timed=True)
    bound = 2 * worst_error(plain, exact, timed=True)[0] + EPSILON[dtype]
    assert error <= bound, f"{error:.2e}, at most {bound:.2e}: {worst}"


@torch.no_grad()
def test_a_token_that_is_not_written_takes_the_longer_way() -> None:
    mixer = GatedDeltaNetModule(
        Site(16, 0, 1),
        heads=2,
        value_heads=2,
        head_dim=4,
        value_dim=4,
        short_conv=2,
        negative_eigenvalues=False,
    ).double()
    for module in mixer.modules():
        initialise(module, std=0.25)
    x, cache = torch.randn(1, 3, 16, dtype=torch.float64), mixer.new_cache()
    mixer(x[:, :2], Call(torch.arange(2)[None], cache=cache))
    call = Call(torch.tensor([[2]]), cache=cache, written=torch.zeros(1, 1))
    with watch_paths() as seen:
        mixer(x[:, 2:], call)
    assert "gated_delta_layer_step" not in dict(seen)
