"""What every mixer and every channel block keeps, over the catalogue."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import EXACT, call_at, checkpoint, noise, shaken

from heddle.compose.blocks import channel_module, mixer_module
from heddle.compose.build import build, config_for, kernel_paths
from heddle.compose.cache import Call, cache_bytes
from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.specs import CHANNELS, MIXERS, ModelSpec
from heddle.specs.kinds import Contract, MixerSpec
from heddle.specs.layer import Site as SpecSite
from heddle.specs.plugins import OPTIONAL

HIDDEN, LENGTH = 48, 150
# A token, more of them, none, more than a chunk of kernels.
DOCUMENTS = [1, 40, 0, 65]

# Fields that make each kind take another road. A kind that is not here says so itself, in the `cases` of its schema.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"heads": 4},
        {"heads": 4, "kv_heads": 2, "head_dim": 16, "qk_norm": True, "gate": True},
        {"heads": 4, "kv_heads": 1, "rope": {"theta": 500.0, "fraction": 0.5}, "window": 7},
        {"heads": 2, "rope": None, "window": 100},
        {"heads": 4, "kv_heads": 2, "window": 7, "sink_tokens": 3},
        {"heads": 2, "window": 100, "sink_tokens": 20, "softcap": 5.0, "sinks": True},
        {"heads": 4, "kv_heads": 2, "qk_norm": True, "qk_source": "position"},
        {
            "heads": 4,
            "kv_heads": 2,
            "qk_norm": "full",
            "window": 7,
            "scale": 0.2,
            "key_multiplier": 1.5,
            "softcap": 5.0,
            "sinks": True,
            "bias": "all",
        },
        {
            "heads": 4,
            "kv_heads": 2,
            "rope": {"scaling": {"kind": "yarn", "factor": 4.0, "original_length": 32}},
            "bias": "qkv",
            "selection": {"block": 8, "count": 4},
        },
        {
            "heads": 4,
            "kv_heads": 2,
            "selection": {"block": 8, "count": 4, "scores": "kernels", "dense_length": 20},
        },
        {"heads": 4, "kv_heads": 2, "selection": {"block": 8, "count": 3, "decode_only": True}},
        {"heads": 4, "kv_heads": 2, "window": 7, "causal": False},
    ],
    "parallel": [
        {"mixers": [{"kind": "attention", "heads": 4, "window": 7}, {"kind": "gated_deltanet", "heads": 2}]},
        {
            "mixers": [{"kind": "attention", "heads": 2}, {"kind": "decay_attention", "heads": 4}],
            "merge": "gate",
            "norm": True,
            "weights": [0.5, 2.0],
        },
        {
            "mixers": [
                {"kind": "decay_attention", "heads": 2, "short_conv": 3},
                {"kind": "attention", "heads": 4, "kv_heads": 2},
                {"kind": "gated_deltanet", "heads": 2},
            ],
            "merge": "concat",
        },
    ],
    "token_router": [
        {
            "mixers": [{"kind": "gated_deltanet", "heads": 2}, {"kind": "decay_attention", "heads": 4}],
            "budget": 0.25,
        },
        {
            "mixers": [
                {"kind": "decay_attention", "heads": 2, "form": "retnet"},
                {"kind": "gated_deltanet", "heads": 2, "value_heads": 4},
            ],
            "chunk": 7,
            "merge": "gate",
            "norm": True,
        },
        {
            "mixers": [
                {"kind": "attention", "heads": 4, "kv_heads": 2},
                {"kind": "attention", "heads": 2, "window": 7},
            ],
            "chunk": 3,
            "merge": "mean",
        },
        {"mixers": [{"kind": "attention", "heads": 4, "rope": None}, {"kind": "gated_deltanet", "heads": 2}]},
    ],
    "layer_router": [
        {
            "mixers": [
                {"kind": "attention", "heads": 4, "kv_heads": 2},
                {"kind": "attention", "heads": 2, "window": 7},
            ],
            "router_dim": 8,
        },
        {
            "mixers": [{"kind": "attention", "heads": 4}, {"kind": "gated_deltanet", "heads": 2}],
            "router_dim": 4,
            "pool": 10,
            "temperature": 2.0,
            "target": 0.5,
        },
    ],
    "sequential": [
        {"mixers": [{"kind": "attention", "heads": 4, "window": 7}, {"kind": "gated_deltanet", "heads": 2}]},
        {
            "mixers": [
                {"kind": "decay_attention", "heads": 2, "form": "retnet", "short_conv": 3},
                {"kind": "attention", "heads": 4, "kv_heads": 2},
                {"kind": "gated_deltanet", "heads": 2},
            ],
            "residual": False,
        },
    ],
    "head_split": [
        {
            "mixers": [
                {"kind": "attention", "heads": 4},
                {"kind": "gated_deltanet", "heads": 4, "value_heads": 8},
            ],
            "share": 0.3,
        },
        {
            "mixers": [
                {"kind": "decay_attention", "heads": 6, "form": "retnet"},
                {"kind": "attention", "heads": 6, "kv_heads": 3, "window": 7},
            ],
            "share": 0.5,
        },
    ],
    "moh": [
        {"mixer": {"kind": "attention", "heads": 8, "kv_heads": 2}, "shared_heads": 3, "active": 2},
        {"mixer": {"kind": "gated_deltanet", "heads": 2, "value_heads": 6}, "shared_heads": 1, "active": 2},
        {"mixer": {"kind": "decay_attention", "heads": 4}, "shared_heads": 4, "active": 0},
        {
            "mixer": {"kind": "attention", "heads": 8, "kv_heads": 2, "gate": True},
            "shared_heads": 3,
            "active": 2,
            "router": "norms",
        },
    ],
}
CHANNEL_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "swiglu": [{}, {"width": 24}],
    "gelu": [{}, {"width": 24}],
    "moe": [
        {"experts": 8, "active": 2},
        {"experts": 4, "active": 1, "width": 24, "normalise": False},
        {
            "experts": 6,
            "active": 3,
            "width": 16,
            "shared_width": 20,
            "shared_gate": True,
            "score": "sigmoid",
            "scale": 2.5,
            "correction_bias": True,
            "balance": 0.0,
        },
    ],
    "none": [{}],
}


def variants(catalogue: Any, table: dict[str, list[dict[str, Any]]], usual: dict[str, Any]) -> list[Any]:
    cases = [{"kind": kind, **fields} for kind in catalogue for fields in table.get(kind, [usual])]
    return [pytest.param(case, id="-".join(_named(value) for value in case.values())) for case in cases]


def _named(value: Any) -> str:
    """A value in the name of a test; of mixers inside a mixer the kinds."""
    if isinstance(value, dict) and "kind" in value:
        return str(value["kind"])
    return "+".join(map(_named, value)) if isinstance(value, list) else str(value)


# Layers of another package that run on a GPU alone have tests of their own: tests/compose/test_fla_gpu.py.
ELSEWHERE = {one.kind for one in OPTIONAL}
HERE = {kind: found for kind, found in MIXERS.items() if kind not in ELSEWHERE}
CASES = {kind: [dict(case) for case in schema.cases] for kind, schema in HERE.items()} | VARIANTS
EVERY_MIXER = variants(HERE, CASES, {})
every_mixer = pytest.mark.parametrize("fields", EVERY_MIXER)
every_channel = pytest.mark.parametrize("fields", variants(CHANNELS, CHANNEL_VARIANTS, {}))


def spec_of(mixer: dict[str, Any], channel: dict[str, Any] | None = None, *, layers: int = 2) -> ModelSpec:
    """A model of equal layers; an encoder if the mixer sees later tokens."""
    block = {"mixer": mixer, "channel": channel or {"kind": "swiglu", "width": 40}}
    is_causal = MIXERS[mixer["kind"]].model_validate(mixer).is_causal
    return ModelSpec.model_validate(
        {
            "kind": "causal_lm" if is_causal else "encoder",
            "vocab_size": 50,
            "hidden_size": HIDDEN,
            "context_length": 256,
            "blocks": {"it": block},
            "layers": ["it"] * layers,
        }
    )


# Mixers of models that decode: an encoder has no next token.
every_decoder = pytest.mark.parametrize(
    "fields",
    [one for one in EVERY_MIXER if MIXERS[one.values[0]["kind"]].model_validate(one.values[0]).is_causal],
)
every_encoder = pytest.mark.parametrize(
    "fields",
    [one for one in EVERY_MIXER if not MIXERS[one.values[0]["kind"]].model_validate(one.values[0]).is_causal],
)


def of_each_kind(cases: list[Any], kinds: set[str]) -> list[Any]:
    """The case of each of these kinds that sets most; the others are long: to trace takes seconds a case."""
    most: dict[str, Any] = {}
    for one in cases:
        kind = one.values[0]["kind"]
        if kind in kinds and (kind not in most or len(one.values[0]) > len(most[kind].values[0])):
            most[kind] = one
    long = [
        pytest.param(*one.values, id=one.id, marks=pytest.mark.long)
        for one in cases
        if one not in most.values()
    ]
    return [*most.values(), *long]


# Of half of the kinds, drawn by the seed of a run, it traces a decode step, and of the others the whole model.
DECODE = {one.values[0]["kind"] for one in every_decoder.args[1]}
STEPS = set(random.Random(os.environ["HEDDLE_TEST_SEED"]).sample(sorted(DECODE), len(DECODE) // 2))
each_mixer = pytest.mark.parametrize("fields", of_each_kind(EVERY_MIXER, set(HERE) - STEPS))
each_decoder = pytest.mark.parametrize("fields", of_each_kind(every_decoder.args[1], STEPS))


def model_of(fields: dict[str, Any], dtype: torch.dtype = torch.float64, *, layers: int = 2) -> Any:
    return shaken(build(spec_of(fields, layers=layers))).to(dtype)


def mixer_of(fields: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    mixer = model_of(fields, dtype).model.layers[1].mixer
    assert isinstance(mixer, nn.Module)
    return mixer


def schema_of(fields: dict[str, Any]) -> MixerSpec:
    """The mixer's schema."""
    return MIXERS[fields["kind"]].model_validate(fields)


def every_keeper_of(*contracts: Contract) -> pytest.MarkDecorator:
    """The mixers that keep all of `contracts`, themselves or by what stands for them in `WEAKER`.

    What sees both sides or has no memory has nothing to stand for it: what holds of it instead has a test of its own.
    """
    return pytest.mark.parametrize(
        "fields",
        [
            one
            for one in EVERY_MIXER
            if one.values[0]["kind"] in WEAKER or not {*contracts} & {*schema_of(one.values[0]).exemptions()}
        ],
    )


def keepers(
    fields: dict[str, Any], *contracts: Contract, dtype: torch.dtype = torch.float64
) -> list[nn.Module]:
    """The mixers that must keep `contracts`: this one, or what stands for it where its schema says that it cannot."""
    exempt = {*contracts} & {*schema_of(fields).exemptions()}
    found = WEAKER[fields["kind"]](fields, dtype) if exempt else [mixer_of(fields, dtype)]
    assert found
    return found


def decided(fields: dict[str, Any], dtype: torch.dtype) -> list[nn.Module]:
    """The mixer with every prompt sent to the first, and with every prompt sent to the second."""
    mixers = [mixer_of(fields, dtype) for _ in range(2)]
    for choice, mixer in enumerate(mixers):
        with torch.no_grad():
            mixer.router.last_weight.zero_()
            mixer.router.last_bias.copy_(torch.tensor([1.0 - choice, float(choice)]))
    return mixers


# What is held of a kind in the place of the contracts from which it is exempt.
WEAKER: dict[str, Callable[[dict[str, Any], torch.dtype], list[nn.Module]]] = {"layer_router": decided}


def in_pieces(mixer: nn.Module, x: Tensor, cuts: list[int], written: Tensor | None = None) -> Tensor:
    """What the mixer gives when `x` comes in pieces that end at `cuts`."""
    cache = mixer.new_cache()
    pieces, start = [], 0
    for end in cuts:
        call = call_at(start, end - start, cache)
        call.written = None if written is None else written[:, start:end]
        pieces.append(mixer(x[:, start:end], call))
        cache.advance(end - start)
        start = end
    return torch.cat(pieces, dim=1)


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_shape_and_type_of_the_input(fields: dict[str, Any], dtype: torch.dtype) -> None:
    x = noise(2, LENGTH, HIDDEN, dtype=dtype)
    y = mixer_of(fields, dtype)(x, call_at(0, LENGTH))
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.isfinite().all()


@every_keeper_of("causality")
@pytest.mark.parametrize("changed", [1, 64, 149])
def test_a_changed_token_leaves_earlier_outputs_bit_equal(fields: dict[str, Any], changed: int) -> None:
    x = noise(2, LENGTH, HIDDEN, dtype=torch.float32)
    other = x.clone()
    other[:, changed] = -x[:, changed]
    for mixer in keepers(fields, "causality", dtype=torch.float32):
        before, after = mixer(x, call_at(0, LENGTH)), mixer(other, call_at(0, LENGTH))
        assert torch.equal(before[:, :changed], after[:, :changed])
        assert not torch.equal(before[:, changed], after[:, changed])


@every_keeper_of("step")
def test_step_by_step_equals_forward(fields: dict[str, Any]) -> None:
    x = noise(2, 70, HIDDEN)
    for mixer in keepers(fields, "step"):
        whole = mixer(x, call_at(0, 70))
        assert (in_pieces(mixer, x, list(range(1, 71))) - whole).abs().max() < EXACT


@every_keeper_of("chunks")
def test_chunked_prefill_equals_whole(fields: dict[str, Any]) -> None:
    x = noise(2, LENGTH, HIDDEN)
    # The first piece is shorter than a convolution, one is a single token, one longer than a kernel's chunk.
    for mixer in keepers(fields, "chunks"):
        whole = mixer(x, call_at(0, LENGTH))
        assert (in_pieces(mixer, x, [2, 3, 70, 149, LENGTH]) - whole).abs().max() < EXACT


@every_keeper_of("chunks", "written")
def test_a_token_that_is_not_written_is_answered_and_not_remembered(fields: dict[str, Any]) -> None:
    x, gap = noise(2, 40, HIDDEN), 20
    everything = torch.ones(2, 40, dtype=torch.float64)
    with_gap = everything.clone()
    with_gap[:, gap] = 0.0
    for mixer in keepers(fields, "chunks", "written"):
        whole, got = mixer(x, call_at(0, 40)), in_pieces(mixer, x, [40], with_gap)
        assert (in_pieces(mixer, x, [40], everything) - whole).abs().max() < EXACT
        assert (got[:, :gap] - whole[:, :gap]).abs().max() < EXACT
        assert (got[:, gap + 1] - whole[:, gap + 1]).abs().max() > 1e-6
        assert (in_pieces(mixer, x, [2, 3, 25, 26, 40], with_gap) - got).abs().max() < EXACT


@every_encoder
@pytest.mark.parametrize("changed", [1, 64, 149])
def test_what_sees_both_sides_hears_later_tokens_and_goes_on_from_nothing(
    fields: dict[str, Any], changed: int
) -> None:
    mixer, x = mixer_of(fields), noise(2, LENGTH, HIDDEN)
    other = x.clone()
    other[:, changed] = -x[:, changed]
    heard = (mixer(x, call_at(0, LENGTH)) != mixer(other, call_at(0, LENGTH))).flatten(2).any(-1).all(0)
    assert heard[changed - 1]
    # As far back as forward: it is a window to both sides that a spec writes.
    window = fields.get("window") or LENGTH
    assert heard.nonzero().flatten().tolist() == [
        place for place in range(LENGTH) if abs(place - changed) < window
    ]
    cache = mixer.new_cache()
    mixer(x, call_at(0, LENGTH, cache))
    cache.advance(LENGTH)
    assert cache.tensors() == {}
    with pytest.raises(HeddleError, match="cannot go on from a cache"):
        mixer(x, call_at(LENGTH, LENGTH, cache))


@every_keeper_of("written")
def test_what_is_written_has_a_gradient(fields: dict[str, Any]) -> None:
    mixer, x = mixer_of(fields).train(), noise(2, 40, HIDDEN)
    written = torch.ones(2, 40, dtype=torch.float64)
    written[:, 20:25] = 0.0
    call = call_at(0, 40)
    call.written = written.requires_grad_()
    (mixer(x, call) * noise(2, 40, HIDDEN, seed=5)).sum().backward()
    assert written.grad is not None
    assert written.grad.isfinite().all()
    # What is not written may have none: it has no say in the loss of a softmax.
    assert (written.grad[:, :20].abs() > 0).all()


@every_mixer
def test_left_padding_equals_none(fields: dict[str, Any]) -> None:
    mixer, x, pad = mixer_of(fields), noise(2, 90, HIDDEN), 67
    whole = mixer(x, call_at(0, 90))
    padded = torch.cat((noise(2, pad, HIDDEN, seed=3), x), dim=1)
    real = torch.ones(2, pad + 90, dtype=torch.bool)
    real[:, :pad] = False
    positions = (torch.arange(pad + 90) - pad).clamp(min=0)[None].expand(2, -1)
    y = mixer(padded, Call(positions, real, real))
    assert y.isfinite().all()
    assert (y[:, pad:] - whole).abs().max() < EXACT


@every_mixer
def test_packed_documents_are_each_alone(fields: dict[str, Any]) -> None:
    model = model_of(fields)
    lengths, ends = DOCUMENTS, [0, *accumulate(DOCUMENTS)]
    ids = torch.randint(50, (1, ends[-1]), generator=torch.Generator().manual_seed(1))
    weights = noise(1, ends[-1], 50, seed=2).split(lengths, dim=1)

    def told(logits: list[Tensor]) -> dict[str, Tensor]:
        torch.stack(
            [(one * weight).sum() for one, weight in zip(logits, weights, strict=True)]
        ).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found | {"logits": torch.cat(logits, dim=1)}

    packed = told(list(model(ids, cu_seqlens=torch.tensor(ends)).logits.split(lengths, dim=1)))
    alone = told([model(own).logits if own.shape[1] else weights[2] for own in ids.split(lengths, dim=1)])
    assert packed.keys() == alone.keys()
    for name, expected in alone.items():
        assert (packed[name] - expected).abs().max() < EXACT * (1.0 + expected.abs().max()), name


@every_mixer
@torch.no_grad()
def test_what_is_no_number_is_handed_on_and_to_no_other_row(fields: dict[str, Any]) -> None:
    x = noise(2, LENGTH, HIDDEN, dtype=torch.float32)
    x[0, 100] = torch.nan
    y = mixer_of(fields, torch.float32)(x, call_at(0, LENGTH))
    assert y[0, 100].isnan().any()
    assert y[1].isfinite().all()


@every_mixer
def test_rows_of_a_batch_are_independent(fields: dict[str, Any]) -> None:
    mixer, x = mixer_of(fields), noise(2, LENGTH, HIDDEN)
    other = torch.cat((x[:1], noise(1, LENGTH, HIDDEN, seed=4)))
    assert torch.equal(mixer(x, call_at(0, LENGTH))[0], mixer(other, call_at(0, LENGTH))[0])


@every_mixer
def test_gradients_are_finite_and_everywhere_in_training(fields: dict[str, Any]) -> None:
    mixer, x = mixer_of(fields).train(), noise(2, LENGTH, HIDDEN).requires_grad_()
    (mixer(x, call_at(0, LENGTH)) * noise(2, LENGTH, HIDDEN, seed=5)).sum().backward()
    for name, tensor in [("x", x), *mixer.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        rows = tensor.grad.flatten(1).abs().sum(1) if tensor.ndim > 1 else tensor.grad.abs()
        assert (rows > 0).all(), f"{name} has parts that no gradient reaches"


@every_mixer
def test_parameters_are_those_the_spec_counts(fields: dict[str, Any]) -> None:
    model = spec_of(fields)
    site = SpecSite(hidden_size=HIDDEN, layer_index=1, layer_count=2, norm_eps=1e-6, context_length=256)
    counted = model.blocks["it"].mixer.params(site)
    assert counted == sum(parameter.numel() for parameter in mixer_of(fields).parameters())


def asked_at(spec: Any, layer: int) -> list[Any]:
    """What a plan asks of one layer of those that share a block."""
    site = SpecSite(HIDDEN, layer_index=layer, layer_count=9, norm_eps=1e-6, context_length=256)
    states = spec.states(site) if isinstance(spec, MixerSpec) else ()
    return [spec.runtime(site), spec.canonical(site), spec.params(site), spec.problems(site), states]


@every_mixer
def test_a_mixer_is_the_same_block_at_every_layer(fields: dict[str, Any]) -> None:
    assert asked_at(schema_of(fields), 0) == asked_at(schema_of(fields), 7)


@every_channel
def test_a_channel_is_the_same_block_at_every_layer(fields: dict[str, Any]) -> None:
    spec = CHANNELS[fields["kind"]].model_validate(fields)
    assert asked_at(spec, 0) == asked_at(spec, 7)


@every_mixer
@pytest.mark.parametrize("context", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_the_spec_counts(
    fields: dict[str, Any], context: int, dtype: torch.dtype
) -> None:
    model = spec_of(fields)
    site = SpecSite(hidden_size=HIDDEN, layer_index=1, layer_count=2, norm_eps=1e-6, context_length=256)
    counted = model.blocks["it"].mixer.state_bytes(site, context, dtype.itemsize)
    mixer = mixer_of(fields, dtype)
    cache = mixer.new_cache()
    mixer(noise(2, context, HIDDEN, dtype=dtype), call_at(0, context, cache))
    assert counted * 2 == cache_bytes([cache])


@every_keeper_of("step")
def test_a_cache_can_be_reordered_repeated_and_forgotten(fields: dict[str, Any]) -> None:
    x = noise(2, 20, HIDDEN)
    mixer = keepers(fields, "step")[0]
    cache = mixer.new_cache()
    mixer(x[:, :19], call_at(0, 19, cache))
    cache.advance(19)
    cache.batch_select_indices(torch.tensor([1, 0]))
    whole = mixer(x, call_at(0, 20))[:, 19:]
    cache.batch_repeat_interleave(2)
    last = x[:, 19:].flip(0).repeat_interleave(2, dim=0)
    got = mixer(last, Call(torch.full((4, 1), 19), cache=cache))
    assert (got[::2] - whole.flip(0)).abs().max() < EXACT
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes([cache]) == 0


@every_mixer
def test_a_filled_cache_repeats_its_step_at_the_size_of_a_grown_one(fields: dict[str, Any]) -> None:
    model = model_of(fields, torch.float32)
    if not spec_of(fields).blocks["it"].mixer.is_causal:
        assert model.model.layers[0].mixer.filled_cache(2, 40, torch.zeros(1)).tensors() == {}
        return
    cache = model.decode_cache(2, 40)
    ids = torch.tensor([[3], [4]])
    with torch.inference_mode():
        first, again = (model(ids, past_key_values=cache).logits for _ in range(2))
        grown = model(torch.arange(82).view(2, 41) % 50).past_key_values
    assert torch.equal(first, again)
    assert cache.get_seq_length() == 40
    # A window that is full drops the oldest token, which a filled cache still holds beside its free slot.
    for filled, real in zip(cache.layers, grown.layers, strict=True):
        assert set(filled.tensors()) == set(real.tensors())
        shapes = {name: held.shape for name, held in real.tensors().items()}
        for name, held in filled.tensors().items():
            assert held.shape[:2] == shapes[name][:2]
            assert held.shape[-1] == shapes[name][-1]
            assert held.shape[2] - shapes[name][2] in (0, 1)
            assert held.dtype == real.tensors()[name].dtype


@every_mixer
def test_heads_are_handed_out_before_the_output_projection(fields: dict[str, Any]) -> None:
    mixer = mixer_of(fields)
    seen: list[Tensor] = []
    # A composite mixer hands out those of its parts.
    points = [one for name, one in mixer.named_modules() if name.rpartition(".")[2] == "heads_out"]
    for point in points:
        point.register_forward_hook(lambda _, __, out: seen.append(out))
    mixer(noise(2, 9, HIDDEN), call_at(0, 9))
    assert len(seen) == len(points) > 0
    for heads in seen:
        assert heads.shape[:2] == (2, 9)
        assert heads.ndim == 4


def rows_of(
    mixer: nn.Module, queries: tuple[int, ...] | None, x: Tensor, call: Call
) -> tuple[list[Tensor], Tensor]:
    """What is handed out of attention rows for `queries`, by the mixer or its parts, and the output."""
    seen: list[Tensor] = []
    points: list[Any] = [one for name, one in mixer.named_modules() if name.rpartition(".")[2] == "rows_out"]
    hooks = [point.register_forward_hook(lambda _, __, rows: seen.append(rows)) for point in points]
    for point in points:
        point.queries = queries
    y: Tensor = mixer(x, call)
    for point, hook in zip(points, hooks, strict=True):
        point.queries = None
        hook.remove()
    assert len(seen) == (0 if queries is None else len(points))
    return seen, y


@every_mixer
def test_attention_rows_are_handed_out_for_chosen_queries_alone(fields: dict[str, Any]) -> None:
    mixer, x = mixer_of(fields), noise(2, 9, HIDDEN)
    rows, y = rows_of(mixer, (3, -1), x, call_at(0, 9))
    assert bool(rows) == any(f"'kind': '{kind}'" in str(fields) for kind in ("attention", "mla"))
    none, plain = rows_of(mixer, None, x, call_at(0, 9))
    assert none == []
    assert torch.equal(y, plain)
    for one in rows:
        assert one.ndim == 4
        assert one.shape[2:] == (2, 9)
        assert (one >= 0).all()
        assert (one.sum(dim=-1) <= 1 + EXACT).all()
        assert not schema_of(fields).is_causal or (one[:, :, 0, 4:] == 0).all()
    if rows:
        with pytest.raises(HeddleError, match="no query 9 in a call of 9 tokens"):
            rows_of(mixer, (9,), x, call_at(0, 9))


@every_keeper_of("step")
def test_attention_rows_of_a_step_are_those_of_the_whole(fields: dict[str, Any]) -> None:
    mixer, x = keepers(fields, "step")[0], noise(2, 20, HIDDEN)
    cache = mixer.new_cache()
    mixer(x[:, :19], call_at(0, 19, cache))
    cache.advance(19)
    step, _ = rows_of(mixer, (0,), x[:, 19:], call_at(19, 1, cache))
    whole, _ = rows_of(mixer, (19,), x, call_at(0, 20))
    for one, other in zip(step, whole, strict=True):
        # A window's cache has dropped keys that the whole gives no weight, those behind its sink tokens.
        first, dropped = fields.get("sink_tokens", 0), other.shape[-1] - one.shape[-1]
        kept = torch.cat((other[..., :first], other[..., first + dropped :]), dim=-1)
        assert (one - kept).abs().max() < EXACT
        assert (other[..., first : first + dropped] == 0).all()


@every_mixer
def test_a_model_is_built_and_run_on_the_meta_device(fields: dict[str, Any]) -> None:
    model = build(spec_of(fields), device="meta", dtype=torch.bfloat16)
    logits = model(torch.zeros(2, 9, dtype=torch.int64, device="meta")).logits
    assert logits.is_meta
    assert logits.shape == (2, 9, 50)


@pytest.mark.slow
@each_mixer
def test_a_model_compiles_without_a_graph_break(fields: dict[str, Any]) -> None:
    # Of more than one layer nothing new is traced, and of more tokens longer graphs.
    model = model_of(fields, torch.float32, layers=1)
    ids = torch.arange(24).view(2, 12) % 50
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(ids, use_cache=False).logits - model(ids).logits).abs().max() < 1e-5
    torch.compiler.reset()


@pytest.mark.slow
@each_decoder
def test_a_decode_step_compiles_without_a_graph_break(fields: dict[str, Any]) -> None:
    model, ids = model_of(fields, layers=1), torch.tensor([[3], [4]])
    cache = model.decode_cache(2, 40)
    step = torch.compile(
        lambda ids: model(ids, past_key_values=cache).logits, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
        for _ in range(2):
            assert (step(ids) - expected).abs().max() < EXACT
    torch.compiler.reset()


@every_mixer
def test_checkpointing_leaves_gradients_equal(fields: dict[str, Any]) -> None:
    found = []
    for is_checkpointed in (False, True):
        model = model_of(fields).train()
        if is_checkpointed:
            checkpoint(model)
        torch.manual_seed(3)
        ids = torch.arange(80).view(2, 40) % 50
        model(ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        assert gradient is None or torch.equal(gradient, found[1][name]), name


@every_mixer
def test_a_model_trains_under_autocast(fields: dict[str, Any]) -> None:
    model, ids = model_of(fields, torch.float32).train(), torch.arange(80).view(2, 40) % 50
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name


@every_mixer
def test_every_cost_is_answered(fields: dict[str, Any]) -> None:
    spec = spec_of(fields).blocks["it"].mixer
    site = SpecSite(hidden_size=HIDDEN, layer_index=1, layer_count=2, norm_eps=1e-6, context_length=256)
    for context in (1, 100, 10_000):
        assert spec.flops(site, context) > 0
        assert spec.prefill_flops(site, context) > 0
        assert 0 <= spec.read_bytes(site, context, 2) <= spec.state_bytes(site, context, 2)
        assert spec.read_bytes(site, context, 2) <= spec.read_bytes(site, context, 4)
    assert spec.read_bytes(site, 0, 2) == 0


@every_mixer
def test_a_model_survives_saving_and_loading(fields: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(fields, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    ids = torch.arange(60).view(2, 30) % 50
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@every_mixer
def test_the_code_that_mixes_is_named(fields: dict[str, Any]) -> None:
    paths = kernel_paths(spec_of(fields), "cpu", torch.float32)
    assert set(paths) == {fields["kind"]}
    assert {path for paths_of_kind in paths.values() for path in paths_of_kind.split(" and ")} <= {
        "torch",
        "sdpa",
    }


@every_channel
def test_a_channel_block_mixes_no_tokens_and_has_the_parameters_the_spec_counts(
    fields: dict[str, Any],
) -> None:
    model = spec_of({"kind": "attention", "heads": 4}, fields)
    built = build(model, dtype=torch.float64)
    channel = built.model.layers[0].channel
    site = SpecSite(hidden_size=HIDDEN, layer_index=0, layer_count=2, norm_eps=1e-6, context_length=256)
    assert model.blocks["it"].channel.params(site) == sum(p.numel() for p in channel.parameters())
    x = noise(2, 9, HIDDEN).requires_grad_()
    y = channel(x, call_at(0, 9))
    assert y.shape == x.shape
    assert torch.allclose(channel(x[:, 4:5], call_at(4, 1)), y[:, 4:5], rtol=0, atol=EXACT)


@every_channel
def test_a_channel_block_reads_no_more_than_it_has(fields: dict[str, Any]) -> None:
    spec = spec_of({"kind": "attention", "heads": 4}, fields).blocks["it"].channel
    site = SpecSite(hidden_size=HIDDEN, layer_index=0, layer_count=2, norm_eps=1e-6, context_length=256)
    read = [spec.params_read(site, tokens) for tokens in (1, 8, 10**6)]
    assert read == sorted(read)
    assert read[-1] <= spec.params(site)


@every_channel
def test_a_layer_with_the_channel_block_trains(fields: dict[str, Any]) -> None:
    built = build(spec_of({"kind": "attention", "heads": 4}, fields), dtype=torch.float64)
    built(torch.arange(18).view(2, 9), labels=torch.arange(18).view(2, 9)).loss.backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_every_kind_of_the_catalogue_has_a_twin() -> None:
    for kind in MIXERS:
        module = mixer_module(kind)
        assert issubclass(module, nn.Module)
        for method in ("new_cache", "filled_cache", "kernel_path"):
            assert callable(getattr(module, method, None)), f"{module.__name__} has no {method}"
    for kind in CHANNELS:
        assert issubclass(channel_module(kind), nn.Module)


def test_every_twin_is_in_the_catalogue() -> None:
    import heddle.compose.channel as channel
    import heddle.compose.mixers as mixers

    for package, catalogue in ((mixers, MIXERS), (channel, CHANNELS)):
        files = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__"}
        assert files == set(catalogue)


def test_the_configuration_is_plain_data() -> None:
    for fields in VARIANTS["attention"]:
        config = config_for(spec_of({"kind": "attention", **fields}))
        assert type(config).from_dict(config.to_dict()).layers == config.layers


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_the_parameters_of_the_whole_model(norm: str, tied: bool) -> None:
    block = {"mixer": {"kind": "attention", "heads": 4}, "channel": {"kind": "gelu"}, "norm": norm}
    bare = block | {"channel": {"kind": "none"}}
    sizes = {"vocab_size": 50, "hidden_size": HIDDEN, "tie_embeddings": tied}
    model = ModelSpec.model_validate(sizes | {"blocks": {"a": block, "b": bare}, "layers": ["a", "b", "a"]})
    built = build(model, device="meta")
    assert plan(model).parameters == sum(parameter.numel() for parameter in built.parameters())


def test_the_seed_alone_decides_the_weights() -> None:
    model = spec_of({"kind": "gated_deltanet", "heads": 2})
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = build(model, seed=1), build(model, seed=1), build(model, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_no_kind_is_exempt_but_these() -> None:
    """Of a kind that is exempt always, and of one that is where its fields ask for it."""
    always = {kind: set(found.exempt) for kind, found in HERE.items() if found.exempt}
    assert always == {"layer_router": {"causality", "step", "chunks"}, "token_mlp": {"written"}}
    # What has no memory is held to that in tests/compose/test_token_mlp.py.
    assert set(WEAKER) == set(always) - {"token_mlp"}
    # Nothing may stand for these, so a test of its own must hold what they keep: of what is causal all the same, attention that
    # chooses blocks in decoding alone, tests/compose/test_block_selection.py.
    sometimes: dict[str, set[str]] = {}
    causal: dict[str, set[str]] = {}
    for one in EVERY_MIXER:
        spec = schema_of(one.values[0])
        exempt = {*spec.exemptions()} - {*spec.exempt}
        if exempt:
            (causal if spec.is_causal else sometimes).setdefault(spec.kind, set()).update(exempt)
    assert causal == {"attention": {"step", "chunks"}}
    both_sides = {"causality", "step", "chunks"}
    assert sometimes == {
        "attention": both_sides,
        "contmix": both_sides,
        "inline": both_sides,
        "hierarchical_attention": both_sides | {"written"},
    }
    # Keys of another layer take two layers to test: tests/compose/test_attention_forms.py holds what it keeps.
    assert set(MIXERS["attention"](heads=4, keys_from="it").exemptions()) == {"written"}


def test_no_kind_is_causal_but_for_rounding_but_these() -> None:
    """On a GPU, which tests/compose/test_model_gpu.py holds to no more than that. Here they are causal to the bit, as all are."""
    rounded = {kind: set(found.rounded) for kind, found in HERE.items() if found.rounded}
    assert rounded == {kind: {"causality"} for kind in ("gla", "hgrn2", "kda", "liger")}
    assert not {*rounded} & {kind for kind, found in HERE.items() if "causality" in found.exempt}
    assert MIXERS["gla"](heads=2, gate="head").roundings() == {}
    for one in EVERY_MIXER:
        spec = schema_of(one.values[0])
        inner = [spec, *spec.parts().values()]
        is_rounded = any(part.kind in rounded and getattr(part, "gate", None) != "head" for part in inner)
        assert set(spec.roundings()) == ({"causality"} if is_rounded else set()), spec.kind
    held = MIXERS["parallel"].model_validate(
        {"mixers": [{"kind": "liger", "heads": 2}, {"kind": "attention", "heads": 2}]}
    )
    assert set(held.roundings()) == {"causality"}


def test_who_says_more_than_its_class_has_said_it_here() -> None:
    """A kind that works its exemptions out must be known to the test above, which sees only the fields of `VARIANTS`."""
    own = {kind for kind, found in MIXERS.items() if "exemptions" in vars(found)}
    assert own == {"attention", "contmix", "inline", "hierarchical_attention"}


def test_no_kind_is_tested_elsewhere_but_this() -> None:
    assert {"fla"} == ELSEWHERE
