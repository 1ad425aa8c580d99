"""The whole model on a CUDA device: kernels in place, nothing waits for the device, steps can be captured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.kernels.op import force_path, watch_paths
from heddle.specs import MIXERS as KINDS
from heddle.specs import Site

pytestmark = pytest.mark.gpu

# What house.md allows on top of twice the error of the torch path in the same type.
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}

ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 64, "qk_norm": True, "gate": True}
ATTENTION |= {"rope": {"theta": 1e4, "fraction": 1.0}, "window": None}
DELTA = {
    "kind": "gated_deltanet",
    "heads": 2,
    "value_heads": 4,
    "head_dim": 64,
    "value_dim": 64,
    "short_conv": 4,
}
DELTA |= {"negative_eigenvalues": False}
DECAY = {"kind": "decay_attention", "heads": 4, "head_dim": 64, "form": "lightning", "short_conv": None}
MIXERS = {
    "attention": ATTENTION,
    "window": ATTENTION | {"window": 50},
    "constant": ATTENTION | {"qk_source": "constant"},
    "gated_deltanet": DELTA,
    "lightning": DECAY,
    "retnet": DECAY | {"form": "retnet", "short_conv": 4},
}
WINDOW = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 32, "window": 50}
# Every other causal kind, as a spec writes it, in the type in which models are trained.
WRITTEN: dict[str, dict[str, Any]] = {
    "selection": {
        "kind": "attention",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "selection": {"block": 32, "count": 4, "scores": "kernels"},
    },
    "capped": {
        "kind": "attention",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "softcap": 5.0,
        "sinks": True,
    },
    "moh": {
        "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 64},
        "shared_heads": 1,
        "active": 2,
    },
    "nats_l": {"heads": 2, "head_dim": 64, "split": 2, "chunk": 16},
    "still": {"heads": 2, "head_dim": 64, "chunk": 32, "keep": 4},
    "landmark": {"heads": 4, "kv_heads": 2, "head_dim": 64, "block": 32, "top": 3},
    "routing": {"heads": 2, "head_dim": 64, "clusters": 4, "members": 40},
    "contmix": {"heads": 2, "head_dim": 64},
    "mla": {"heads": 2, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "v_head_dim": 64},
    "gla": {"heads": 2, "head_dim": 64},
    "gated_retention": {"kind": "retnet", "heads": 2, "head_dim": 64, "value_dim": 64, "decay": "gate"},
    "kda": {"heads": 2, "head_dim": 64},
    "mamba2": {"heads": 4, "head_dim": 64, "state_dim": 64},
    "hgrn2": {"heads": 2, "head_dim": 64},
    "inline": {"heads": 2, "head_dim": 64, "decay": "gate", "local": 3},
    "ttt": {"heads": 2, "head_dim": 64, "chunk": 64, "rate": 0.05},
    "rat": {"heads": 4, "head_dim": 64, "groups": 2, "chunk": 16},
    "deltanet": {"heads": 2, "head_dim": 64},
    "local_linear_attention": {"heads": 4, "kv_heads": 2, "head_dim": 64},
    "learned_slope": {
        "kind": "local_linear_attention",
        "heads": 2,
        "head_dim": 64,
        "slope": "learned",
        "window": 50,
    },
    "rf_attention": {"heads": 2, "head_dim": 64, "key_noise": 0.5, "rope": {"theta": 1e4}},
    "linear_attention": {"heads": 4, "head_dim": 16, "value_dim": 32},
    "liger": {"heads": 4, "kv_heads": 2, "head_dim": 64, "window": 50},
    "gated_pool": {"heads": 2, "head_dim": 64},
    "token_mlp": {},
    "parallel": {
        "mixers": [WINDOW, {"kind": "gated_deltanet", "heads": 2, "head_dim": 64}],
        "merge": "mean",
        "norm": True,
    },
    "sequential": {"mixers": [{"kind": "gated_deltanet", "heads": 2, "head_dim": 64}, WINDOW]},
    "head_split": {"mixers": [{"kind": "gated_deltanet", "heads": 4, "head_dim": 32}, WINDOW], "share": 0.5},
    "token_router": {"mixers": [WINDOW, {"kind": "gated_deltanet", "heads": 2, "head_dim": 64}], "chunk": 16},
}
# A step of it waits for the host.
FETCHED = {"fetched": WRITTEN["landmark"] | {"kind": "landmark", "offload": True}}
OTHERS, WAITING = (
    {
        name: KINDS[fields.get("kind", name)]
        .model_validate({"kind": name, **fields})
        .runtime(Site(128, 0, 1))
        for name, fields in written.items()
    }
    for written in (WRITTEN, FETCHED)
)
# What the schemas of these say is causal but for rounding: kernels take decays of a chunk from its middle (`_gla_fwd`).
FROM_MIDDLE, CHUNK = (
    tuple(name for name in WRITTEN if name in KINDS and "causality" in KINDS[name].rounded),
    64,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_mixer = pytest.mark.parametrize("name", [*MIXERS, *OTHERS])
every_setting = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in MIXERS for dtype in DTYPES] + [(name, torch.bfloat16) for name in OTHERS],
    ids=str,
)


def model_of(*names: str) -> HeddleForCausalLM:
    """A model in float32 on the CPU."""
    layers = [
        {
            "mixer": (MIXERS | OTHERS | WAITING)[name],
            "channel": {"kind": "swiglu", "width": 128},
            "norm": "rmsnorm",
        }
        for name in names
        # The constant stream runs through the layers in front of the last that reads it.
        for _ in range(2 if name == "constant" else 1)
    ]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 128, "constant_tokens": [3, 1, 4, 1, 5]}
    return HeddleForCausalLM(HeddleConfig(layers=layers, initializer_range=0.1, **sizes))


def tokens(batch: int = 2, length: int = 300) -> Tensor:
    return torch.randint(1, 100, (batch, length), generator=torch.Generator().manual_seed(1))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).norm() / exact.norm())


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Reading from the device raises inside."""
    torch.cuda.synchronize()
    try:
        # Warns that it is a prototype, after it has been set: where warnings are errors, it must be undone all the same.
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_setting
def test_a_model_errs_no_more_than_twice_its_torch_path(name: str, dtype: torch.dtype) -> None:
    model = model_of(name).to(dtype).eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(tokens()).logits
        model = model.cuda()
        fast = model(tokens().cuda()).logits
        with force_path("torch"):
            baseline = model(tokens().cuda()).logits
    assert error(fast, exact) <= 2 * error(baseline, exact) + EPSILON[dtype]


@every_setting
def test_decode_agrees_with_prefill(name: str, dtype: torch.dtype) -> None:
    model, ids = model_of(name).to(dtype).eval(), tokens()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits[:, -1]
        model, ids = model.cuda(), ids.cuda()
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1]).past_key_values
        step = model(ids[:, -1:], past_key_values=cache).logits[:, 0]
    assert error(step, exact) <= 2 * error(whole, exact) + EPSILON[dtype]


@every_mixer
@torch.no_grad()
def test_a_changed_token_leaves_earlier_logits_equal_to_the_bit(name: str) -> None:
    model, ids, place = model_of(name).to(torch.bfloat16).cuda().eval(), tokens(), 150
    other = ids.clone()
    other[:, place] = other[:, place] % 99 + 1
    exact = copy.deepcopy(model).cpu().double()(ids, use_cache=False).logits if name in FROM_MIDDLE else None
    before, after = (model(one.cuda(), use_cache=False).logits for one in (ids, other))
    assert not torch.equal(before[:, place], after[:, place])
    if exact is None:
        assert torch.equal(before[:, :place], after[:, :place])
        return
    begin = place // CHUNK * CHUNK
    assert torch.equal(before[:, :begin], after[:, :begin])
    first, second, exact = (one[:, begin:place].double().cpu() for one in (before, after, exact))
    # Two roundings of the same numbers.
    assert error(second, first) <= 2 * error(first, exact) + EPSILON[torch.bfloat16]


def test_decay_attention_runs_in_triton_in_prefill_step_and_training() -> None:
    model = model_of("lightning", "retnet").cuda()
    with watch_paths() as seen:
        with torch.no_grad():
            cache = model.eval()(tokens().cuda()).past_key_values
            model(tokens(2, 1).cuda(), past_key_values=cache)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model.train()(tokens().cuda(), labels=tokens().cuda()).loss.backward()
    ran = [path for op, path in seen if op.startswith("decay_attention")]
    # Two layers, each once forward, once as a step, once forward and once backward.
    assert ran == ["triton"] * 8


# nats_l asks which chunks no head will look at again, and forgets them.
@pytest.mark.parametrize("name", [name for name in (*MIXERS, *OTHERS) if name != "nats_l"])
# torch calls the mode a prototype, in a warning of its own; in full precision local linear attention runs in PyTorch.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.filterwarnings("ignore:.*local_linear_attention runs in PyTorch")
def test_a_forward_waits_for_nothing(name: str) -> None:
    model, ids = model_of(name).cuda(), tokens().cuda()
    for _ in range(2):
        # The first round compiles kernels, which may wait.
        cache = model.eval()(ids).past_key_values
    model(ids[:, :1], past_key_values=cache)
    with nothing_waits():
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = model.train().model(input_ids=ids, use_cache=False).last_hidden_state
            model.lm_head(hidden).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_mixer
def test_a_decode_step_is_captured_as_a_graph_and_repeats(name: str) -> None:
    model = model_of(name).to(torch.bfloat16).cuda().eval()
    ids, cache = tokens(2, 1).cuda(), model.decode_cache(2, 1000)

    def step() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            return logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [step() for _ in range(3)][-1].clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("padding", [0, 40])
@torch.no_grad()
def test_blocks_that_wait_in_pinned_memory_are_read_as_those_on_the_device(padding: int) -> None:
    ids = tokens()
    ids[0, :padding] = 0
    mask = (ids != 0).long()

    def by_steps(name: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
        model, cache, found, begin = model_of(name).to(device, dtype).eval(), None, [], 0
        # A prompt, some tokens that choose, and single ones; a block is done on the way.
        for end in (280, 285, *range(286, 301)):
            given = {"attention_mask": mask[:, :end].to(device), "past_key_values": cache}
            out = model(ids[:, begin:end].to(device), **given)
            cache, begin = out.past_key_values, end
            found.append(out.logits)
        return torch.cat(found[1:], dim=1), cache

    exact, _ = by_steps("landmark", "cpu", torch.float64)
    plain, _ = by_steps("landmark", "cuda", torch.float32)
    fetched, cache = by_steps("fetched", "cuda", torch.float32)
    assert error(fetched, exact) <= 2 * error(plain, exact) + EPSILON[torch.float32]
    held = cache.layers[0].parts["tokens"]
    assert held.moved > 0
    assert all(room.is_pinned() for room in held.rooms)


def test_generation_on_the_device_agrees_with_and_without_cache() -> None:
    model = model_of(*MIXERS).cuda().double().eval()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = tokens(2, 40)
    ids[0, :11] = 0
    mask = (ids != 0).long().cuda()
    found = [
        model.generate(ids.cuda(), attention_mask=mask, use_cache=cache, **options) for cache in (True, False)
    ]
    assert torch.equal(*found)


# The compiler warns of its own imports and of what it could do faster.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("names", [*((name,) for name in MIXERS), tuple(MIXERS)], ids="+".join)
@torch.no_grad()
def test_prefill_and_decode_step_compile_with_inductor(names: tuple[str, ...]) -> None:
    model, ids = model_of(*names).to(torch.bfloat16).eval(), tokens()
    exact = copy.deepcopy(model).double()(ids).logits
    model, ids = model.cuda(), ids.cuda()
    torch.compiler.reset()
    prefill = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True)
    limit = 2 * error(model(ids).logits, exact) + EPSILON[torch.bfloat16]
    assert error(prefill(ids), exact) <= limit

    cache = model.decode_cache(2, 1000)
    wide = copy.deepcopy(model).double()
    wide_cache = copy.deepcopy(cache)
    for layer in wide_cache.layers:
        layer.replace({name: held.double() for name, held in layer.tensors().items()})
    step = torch.compile(lambda ids: model(ids, past_key_values=cache, use_cache=True).logits, fullgraph=True)
    expected = wide(ids[:, :1], past_key_values=wide_cache).logits.cpu()
    eager = error(model(ids[:, :1], past_key_values=cache).logits, expected)
    for _ in range(3):
        assert error(step(ids[:, :1]), expected) <= 2 * eager + EPSILON[torch.bfloat16]
    torch.compiler.reset()


def trained(call: Callable[[Tensor], Tensor], model: HeddleForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradients of all parameters one behind the other."""
    logits = call(ids)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(logits, list(model.parameters()), upstream.to(logits), allow_unused=True)
    return logits.detach(), torch.cat([x.flatten() for x in gradients if x is not None])


# The compiler warns of its own imports; in full precision local linear attention runs in PyTorch, which is told.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", OTHERS)
def test_a_compiled_model_and_its_gradients_are_those_of_a_cpu(name: str) -> None:
    model, ids = model_of(name).eval(), tokens(length=100)
    exact, plain = (
        trained(lambda ids, one=one: one(ids, use_cache=False).logits, one, ids)
        for one in (copy.deepcopy(model).double(), model)
    )
    model, ids = model.cuda(), ids.cuda()
    torch.compiler.reset()
    # As inductor takes gradients apart: `aot_eager` has a softplus whose gradient lies otherwise than torch has it lie.
    how = {"fullgraph": True, "backend": "aot_eager_decomp_partition"}
    whole = torch.compile(lambda ids: model(ids, use_cache=False).logits, **how)
    for found, here, wide in zip(trained(whole, model, ids), plain, exact, strict=True):
        assert error(found, wide) <= 2 * error(here, wide) + EPSILON[torch.float32]
    torch.compiler.reset()
