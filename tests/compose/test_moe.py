"""The mixture of experts: against transformers' blocks and a loop over tokens, by every road, in training and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3

from heddle import api
from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.channel.moe import MoEModule
from heddle.compose.hf.card import Card
from heddle.compose.hf.export import export
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.modules.experts import BIAS_RATE, even, load_of
from heddle.compose.plan import plan
from heddle.compose.train import Recipe, fit, parameter_groups
from heddle.errors import HeddleErrors
from heddle.specs import ModelSpec, loads
from heddle.specs import load as load_spec

EXAMPLE = Path(__file__).parents[2] / "examples" / "specs" / "moe.yaml"
HIDDEN, WIDTH, EXPERTS = 32, 16, 8
EXACT, SINGLE = 1e-9, 1e-5
MIXTRAL: dict[str, Any] = {"experts": EXPERTS, "active": 2, "width": WIDTH}
SHARED = MIXTRAL | {"shared_width": 24, "shared_gate": True}
DEEPSEEK = MIXTRAL | {
    "active": 3,
    "shared_width": WIDTH,
    "score": "sigmoid",
    "scale": 2.5,
    "correction_bias": True,
}
SWITCH = MIXTRAL | {"active": 1, "normalise": False, "balance": 0.1}
KINDS = {"mixtral": MIXTRAL, "shared": SHARED, "deepseek": DEEPSEEK, "switch": SWITCH}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
# Few tokens are gathered, many are sorted.
every_length = pytest.mark.parametrize("length", [1, 2, 50])


def spec_of(fields: dict[str, Any], **more: Any) -> ModelSpec:
    block = {"mixer": {"kind": "attention", "heads": 4}, "channel": {"kind": "moe", **fields}}
    sizes = {"vocab_size": 50, "hidden_size": HIDDEN}
    return ModelSpec.model_validate(sizes | {"blocks": {"a": block}, "layers": ["a", "a"]} | more)


def large(module: nn.Module) -> None:
    """Weights large enough for every part to count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)


def model_of(fields: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> HeddleForCausalLM:
    model = build(spec_of(fields, **more), dtype=torch.float64).eval()
    large(model)
    return model.to(dtype)


def moe_of(fields: dict[str, Any], dtype: torch.dtype = torch.float64) -> MoEModule:
    found = model_of(fields, dtype).model.layers[0].channel
    assert isinstance(found, MoEModule)
    if found.correction is not None:
        found.correction.bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    return found


def noise(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def call_of(x: Tensor, padding: Tensor | None = None) -> Call:
    return Call(torch.arange(x.shape[1])[None].expand(*x.shape[:2]), padding)


def by_loop(moe: MoEModule, x: Tensor, fields: dict[str, Any]) -> Tensor:
    """Token by token and expert by expert, from the weights and the fields alone."""
    y = torch.zeros_like(x)
    up, down = moe.experts.gate_up_proj, moe.experts.down_proj
    for row in range(x.shape[0]):
        for column, token in enumerate(x[row]):
            logits = moe.gate.weight @ token
            s = logits.sigmoid() if fields.get("score") == "sigmoid" else logits.softmax(0)
            ranked = s if moe.correction is None else s + moe.correction.bias
            chosen = sorted(range(EXPERTS), key=lambda e: -float(ranked[e]))[: fields["active"]]
            total = sum(s[e] for e in chosen) if fields.get("normalise", True) else 1.0
            for e in chosen:
                hidden = F.silu(up[e, :WIDTH] @ token) * (up[e, WIDTH:] @ token)
                y[row, column] += fields.get("scale", 1.0) * s[e] / total * (down[e] @ hidden)
            if moe.shared_expert is not None:
                own = moe.shared_expert
                shared = own.down_proj.weight @ (
                    F.silu(own.gate_proj.weight @ token) * (own.up_proj.weight @ token)
                )
                gate = moe.shared_expert_gate
                y[row, column] += shared if gate is None else torch.sigmoid(gate.weight @ token) * shared
    return y


@torch.no_grad()
@every_kind
@every_length
def test_it_equals_a_loop_over_tokens_and_experts(fields: dict[str, Any], length: int) -> None:
    moe, x = moe_of(fields), noise(2, length, HIDDEN)
    assert (moe(x, call_of(x)) - by_loop(moe, x, fields)).abs().max() < EXACT


TWINS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        mixtral.MixtralSparseMoeBlock,
        mixtral.MixtralConfig,
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH},
        MIXTRAL,
    ),
    "qwen2": (
        qwen2.Qwen2MoeSparseMoeBlock,
        qwen2.Qwen2MoeConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 24},
        SHARED | {"normalise": False},
    ),
    "qwen3-next": (
        qwen3.Qwen3NextSparseMoeBlock,
        qwen3.Qwen3NextConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 24},
        SHARED,
    ),
    "deepseek-v3": (
        deepseek.DeepseekV3MoE,
        deepseek.DeepseekV3Config,
        {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH, "n_group": 1, "topk_group": 1},
        DEEPSEEK,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TWINS)
@every_length
def test_it_equals_the_block_of_transformers_with_its_weights(name: str, length: int) -> None:
    block, config, sizes, fields = TWINS[name]
    twin = block(config(hidden_size=HIDDEN, num_experts_per_tok=fields["active"], **sizes)).eval()
    large(twin)
    moe = moe_of(fields, torch.float32)
    renamed = {
        key.replace("shared_experts.", "shared_expert.").replace(
            "gate.e_score_correction_bias", "correction.bias"
        ): value
        for key, value in twin.state_dict().items()
    }
    if moe.correction is not None:
        renamed["correction.bias"].copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    moe.load_state_dict(renamed)
    x = noise(2, length, HIDDEN, dtype=torch.float32)
    difference = moe(x, call_of(x)) - twin(x)
    assert difference.abs().max() < SINGLE
    assert twin(x).abs().max() > 0.1


def test_the_road_follows_from_the_number_of_choices() -> None:
    experts, x = moe_of(MIXTRAL).experts, noise(9, HIDDEN)
    assert [experts.road(x, choices) for choices in (1, 8, 9, 1000)] == ["gathered"] * 2 + ["sorted"] * 2


@every_kind
def test_a_compiled_block_takes_the_dense_road_and_gives_the_same_numbers_and_gradients(
    fields: dict[str, Any],
) -> None:
    moe, roads = moe_of(fields), []
    x = noise(2, 30, HIDDEN).requires_grad_()

    def run(x: Tensor) -> Tensor:
        roads.append(moe.experts.road(x, 30 * fields["active"]))
        return moe(x, call_of(x))

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * noise(2, 30, HIDDEN, seed=3)).sum(), [x, *moe.parameters()]))

    torch.compiler.reset()
    eager, whole = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.compiler.reset()
    assert roads == ["sorted", "dense"]
    assert (whole - eager).abs().max() < EXACT
    for one, other in zip(gradients(whole), gradients(eager), strict=True):
        assert (one - other).abs().max() < EXACT


@every_kind
def test_the_gathered_road_has_the_gradients_of_the_sorted_one(fields: dict[str, Any]) -> None:
    moe, x, weight = moe_of(fields), noise(1, 20, HIDDEN), noise(1, 20, HIDDEN, seed=3)

    def gradients(cuts: list[int]) -> list[Tensor]:
        pieces = [moe(piece, call_of(piece)) for piece in x.split(cuts, dim=1)]
        return list(torch.autograd.grad((torch.cat(pieces, dim=1) * weight).sum(), list(moe.parameters())))

    for one, other in zip(gradients([1] * 20), gradients([20]), strict=True):
        assert (one - other).abs().max() < EXACT


@every_kind
def test_the_grouped_road_has_the_numbers_and_gradients_of_the_sorted_one(fields: dict[str, Any]) -> None:
    # PyTorch has grouped products of float32 on a CPU; in a model they are used on CUDA alone.
    moe, x = moe_of(fields, torch.float32), noise(60, HIDDEN, dtype=torch.float32)
    # Some experts have no token.
    chosen = torch.randint(0, EXPERTS - 3, (60, 3), generator=torch.Generator().manual_seed(4))
    weight = noise(60, 3, HIDDEN, seed=3, dtype=torch.float32)
    found = []
    for road in ("grouped", "sorted"):
        y = moe.experts._by_expert(x, chosen, road)
        found.append([y, *torch.autograd.grad((y * weight).sum(), list(moe.experts.parameters()))])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < SINGLE


@torch.no_grad()
@every_kind
def test_a_token_does_not_hear_the_others(fields: dict[str, Any]) -> None:
    moe, x = moe_of(fields), noise(3, 40, HIDDEN)
    whole, other = moe(x, call_of(x)), x.clone()
    other[1:] = noise(2, 40, HIDDEN, seed=9)
    other[0, :7] = 0.0
    assert (moe(other, call_of(x))[0, 7:] - whole[0, 7:]).abs().max() < EXACT
    pieces = [moe(piece, call_of(piece)) for piece in x.split([1, 2, 30, 7], dim=1)]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < EXACT


@torch.no_grad()
@every_kind
def test_a_model_decodes_what_it_computes_in_one_pass(fields: dict[str, Any]) -> None:
    model = model_of(fields)
    ids = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(2))
    whole, cache = model(ids, use_cache=False).logits, None
    for step in range(20):
        found = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        assert (found.logits[:, 0] - whole[:, step]).abs().max() < EXACT


def test_it_is_built_and_run_on_the_meta_device_and_in_bfloat16() -> None:
    model = build(spec_of(DEEPSEEK), device="meta", dtype=torch.bfloat16)
    assert model(torch.zeros(2, 40, dtype=torch.int64, device="meta")).logits.shape == (2, 40, 50)
    narrow, x = moe_of(DEEPSEEK, torch.bfloat16), noise(2, 40, HIDDEN, dtype=torch.bfloat16)
    assert narrow.correction is not None
    assert narrow.correction.bias.dtype == torch.float32
    y = narrow(x, call_of(x))
    assert y.dtype == torch.bfloat16
    # Against the same weights and inputs in float64; a choice may tip over where two experts are nearly equal.
    exact = moe_of(DEEPSEEK, torch.bfloat16).double()
    with torch.no_grad():
        far = (y - exact(x.double(), call_of(x))).norm(dim=-1) / y.double().norm(dim=-1)
    assert far.median() < 0.02


@torch.no_grad()
def test_the_router_stays_exact_under_autocast() -> None:
    moe, x = moe_of(SHARED, torch.float32), noise(2, 40, HIDDEN, dtype=torch.float32)
    flat = x.reshape(-1, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, y = moe.scores(flat), moe(x, call_of(x))
    assert torch.equal(scores, moe.scores(flat))
    assert y.dtype == torch.bfloat16
    assert (y - moe(x, call_of(x))).abs().max() < 0.1


@torch.no_grad()
def test_the_load_is_counted_without_padding() -> None:
    chosen = torch.tensor([[0, 2], [2, 1], [2, 3]])
    assert load_of(chosen, 5).tolist() == [1, 1, 3, 1, 0]
    assert load_of(chosen, 5, torch.tensor([True, False, True])).tolist() == [1, 0, 2, 1, 0]
    assert even(11, 4) == [3, 3, 3, 2]


def told_of(moe: MoEModule, x: Tensor, padding: Tensor | None = None) -> dict[str, tuple[Tensor, float]]:
    call = call_of(x, padding)
    moe.train()(x, call)
    return {name: (value, factor) for name, value, factor in call.losses}


@torch.no_grad()
def test_the_balance_loss_is_the_one_of_mixtral_over_the_number_of_choices() -> None:
    moe, x = moe_of(MIXTRAL), noise(2, 40, HIDDEN)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :13] = False
    logits = (x.reshape(-1, HIDDEN) @ moe.gate.weight.T,)
    for padding in (None, mask):
        theirs = mixtral.load_balancing_loss_func(logits, EXPERTS, 2, padding)
        value, factor = told_of(moe, x, padding)["load_balance"]
        assert factor == 0.01
        # Their counts are float32.
        assert float(value) == pytest.approx(float(theirs) / 2, rel=1e-6)


@torch.no_grad()
def test_the_balance_loss_of_sigmoids_takes_their_shares() -> None:
    moe, x = moe_of(DEEPSEEK), noise(2, 40, HIDDEN)
    s = (x.reshape(-1, HIDDEN) @ moe.gate.weight.T).sigmoid()
    counts = torch.zeros(EXPERTS, dtype=s.dtype)
    assert moe.correction is not None
    for row in s + moe.correction.bias:
        counts[row.argsort(descending=True)[:3]] += 1
    expected = EXPERTS * (counts / (80 * 3) * (s / s.sum(1, keepdim=True)).mean(0)).sum()
    assert float(told_of(moe, x)["load_balance"][0]) == pytest.approx(float(expected), rel=1e-12)


@torch.no_grad()
def test_the_losses_tell_an_even_load_from_a_collapse() -> None:
    moe = moe_of(SWITCH)
    moe.gate.weight.zero_()
    moe.gate.weight[:, :EXPERTS].copy_(1e3 * torch.eye(EXPERTS))
    x = torch.zeros(1, EXPERTS, HIDDEN, dtype=torch.float64)
    x[0, :, :EXPERTS] = torch.eye(EXPERTS)
    told = told_of(moe, x)
    assert float(told["load_balance"][0]) == pytest.approx(1.0)
    assert float(told["busiest_experts"][0]) == pytest.approx(1 / EXPERTS)
    told = told_of(moe, x[:, 2:3].expand(1, 9, HIDDEN))
    assert float(told["load_balance"][0]) == pytest.approx(EXPERTS)
    assert float(told["busiest_experts"][0]) == pytest.approx(1.0)
    assert told["busiest_experts"][1] == 0.0


def test_the_correction_bias_decides_the_choice_and_nothing_else() -> None:
    moe, x = moe_of(DEEPSEEK), noise(5, HIDDEN)
    assert moe.correction is not None
    s = moe.scores(x)
    moe.correction.bias.zero_()
    moe.correction.bias[3] = 100.0
    chosen = moe.choice(s)
    assert (chosen[:, 0] == 3).all()
    weights = moe.weights(s, chosen)
    assert torch.allclose(weights, 2.5 * s.gather(1, chosen) / s.gather(1, chosen).sum(1, keepdim=True))
    assert "correction.bias" in moe.state_dict()
    assert "correction.load" not in moe.state_dict()
    assert not any("correction" in name for name, _ in moe.named_parameters())


def text(step: int) -> tuple[Tensor, Tensor]:
    """A Markov chain that a model learns in a few steps."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, 50, (8, 1), generator=generator)
    ids = (first + 7 * torch.arange(17)) % 50
    return ids[:, :-1], ids[:, 1:]


def test_training_moves_the_correction_bias_towards_an_even_load() -> None:
    model = build(spec_of(DEEPSEEK | {"balance": 0.0}, layers=["a"]))
    correction = model.model.layers[0].channel.correction
    correction.load.zero_()
    correction.load[:2] = torch.tensor([40, 8])
    correction.after_step()
    # The mean load is 6.
    assert correction.bias.tolist() == pytest.approx([-BIAS_RATE] * 2 + [BIAS_RATE] * 6)
    assert correction.load.tolist() == [0] * EXPERTS
    fit(model, text, Recipe(tokens=12 * 128, batch_tokens=128))
    assert correction.load.tolist() == [0] * EXPERTS
    steps = correction.bias / BIAS_RATE
    assert (steps - steps.round()).abs().max() < 1e-3
    assert not torch.equal(correction.bias, build(spec_of(DEEPSEEK)).model.layers[0].channel.correction.bias)


def test_the_matrices_of_experts_decay() -> None:
    model = build(spec_of(DEEPSEEK))
    decayed, _ = parameter_groups(model, 0.1)
    held = {id(parameter) for parameter in decayed["params"]}
    channel = [(name, one) for name, one in model.named_parameters() if ".channel." in name]
    assert len(channel) == 2 * 6
    assert all(id(one) in held for _, one in channel)


def test_experts_begin_as_projections_do() -> None:
    model = build(spec_of(MIXTRAL | {"width": 64}), seed=3)
    experts = model.model.layers[0].channel.experts
    for held in (experts.gate_up_proj, experts.down_proj):
        assert held.detach().std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
        assert not torch.equal(held[0], held[1])


def test_flops_are_those_of_the_active_experts_and_parameters_those_of_all() -> None:
    for fields in KINDS.values():
        model, spec = model_of(fields, torch.float32), spec_of(fields).blocks["a"].channel
        moe, x = model.model.layers[0].channel, noise(4, 50, HIDDEN, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            moe(x, call_of(x))
        site = plan(spec_of(fields)).layers[0]._mixer.site
        assert counter.get_total_flops() == 200 * spec.flops(site)
        one = 3 * HIDDEN * WIDTH
        assert spec.params(site) - spec.active_params(site) == (EXPERTS - fields["active"]) * one
        assert spec.params_read(site, 0) == spec.params(site) - EXPERTS * one
        assert spec.params_read(site, 1) == spec.active_params(site)
        assert spec.params_read(site, 1000) == spec.params(site)


def test_a_plan_tells_the_parameters_that_a_token_meets() -> None:
    made = plan(spec_of(SHARED))
    idle = (EXPERTS - 2) * 3 * HIDDEN * WIDTH
    assert made.active_parameters == made.parameters - 2 * idle
    assert made.layers[0].summary(10)["active_parameters"] == made.layers[0].parameters - idle
    shared = spec_of(SHARED).model_dump()
    shared["blocks"]["a"]["shared"] = True
    once = plan(ModelSpec.model_validate(shared))
    assert once.active_parameters == once.parameters - idle


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"active": 9}, "out-of-range", "active"),
        ({"active": 1}, "conflicting-fields", "active"),
        ({"shared_gate": True}, "conflicting-fields", "shared_gate"),
        ({"width": 16, "ratio": 2.0}, "conflicting-fields", "ratio"),
        ({"experts": 1}, "out-of-range", "experts"),
        ({"score": "tanh"}, "out-of-range", "score"),
    ],
)
def test_what_cannot_be_built_is_told_at_its_field(fields: dict[str, Any], code: str, field: str) -> None:
    channel = {"kind": "moe", "experts": 8, "active": 2, **fields}
    lines = [
        "version: 1",
        "name: a",
        "model:",
        "  vocab_size: 256",
        "  hidden_size: 32",
        "  blocks:",
        "    a:",
    ]
    lines += ["      mixer: {kind: attention, heads: 4}", "      channel:"]
    lines += [f"        {name}: {str(value).lower()}" for name, value in channel.items()]
    with pytest.raises(HeddleErrors) as caught:
        loads("\n".join([*lines, "  layers: [a]"]))
    (error,) = caught.value.errors
    assert error.code == code
    assert error.where.path.endswith(f"blocks.a.channel.{field}")
    assert error.where.line == lines.index(next(line for line in lines if f"  {field}: " in line)) + 1


def test_the_example_trains_and_decodes() -> None:
    file = load_spec(EXAMPLE)
    model = build(file.spec.model)
    result = fit(model, text, Recipe(tokens=30 * 128, batch_tokens=128, learning_rate=1e-2))
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert set(result.aux) == {"load_balance", "busiest_experts"}
    ids = text(0)[0][:2]
    whole = model.generate(ids[:, :6], max_new_tokens=8, do_sample=False, pad_token_id=0)
    without = model.generate(ids[:, :6], max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(whole, without)


def test_show_tells_the_active_parameters_of_the_example() -> None:
    shown = api.show(EXAMPLE)
    assert shown["active_parameters"] < 0.5 * shown["parameters"]
    assert all(layer["active_parameters"] < layer["parameters"] for layer in shown["layers"])


@pytest.mark.slow
def test_an_exported_model_computes_the_same_without_heddle(tmp_path: Path) -> None:
    model = model_of(DEEPSEEK, torch.float32, vocab_size=256)
    model.model.layers[0].channel.correction.bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    card = Card("moe", "version: 1\nname: moe\n", license="apache-2.0")
    result = export(model, tmp_path / "out", card=card, battery="short")
    assert result.max_difference < SINGLE


@pytest.mark.gpu
def test_the_grouped_road_equals_the_others_on_cuda_and_is_captured() -> None:
    moe, x = moe_of(SHARED, torch.bfloat16).cuda(), noise(2, 64, HIDDEN, dtype=torch.bfloat16).cuda()
    assert moe.experts.road(x, 256) == "grouped"
    with torch.no_grad():
        call = Call(torch.arange(64, device="cuda")[None].expand(2, 64))
        grouped = moe(x, call)
        flat = x.reshape(-1, HIDDEN)
        scores = moe.scores(flat)
        chosen = moe.choice(scores)
        dense = moe.experts._dense(flat, chosen, moe.weights(scores, chosen))
        ours = moe.experts(flat, chosen, moe.weights(scores, chosen))
        assert (ours - dense).abs().max() < 0.05 * dense.abs().max()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = moe(x, call)
        graph.replay()
        assert torch.equal(again, grouped)
