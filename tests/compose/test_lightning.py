"""Lightning attention: its equation, both tables of slopes, and MiniMax's own layer and model with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.lightning import LightningModule, log_decays
from heddle.compose.modules.site import Site
from heddle.specs import ModelSpec
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Lightning

HIDDEN, HEADS, DIM, LENGTH, LAYERS = 48, 4, 12, 150, 3
# Float64 on a CPU: two ways to compute one thing differ by rounding alone.
EXACT = 1e-9
# A few roundings to float32, which transformers' norms compute in whatever comes.
SINGLE = 4 * torch.finfo(torch.float32).eps
TABLES = ("geometric", "linear")
every_table = pytest.mark.parametrize("slopes", TABLES)
every_layer = pytest.mark.parametrize("layer", range(LAYERS))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ready(layer: int = 1, *, slopes: str = "geometric", short_conv: int | None = None) -> LightningModule:
    """A layer of three whose projections and gains make every term count, in float64."""
    site = Site(HIDDEN, layer, LAYERS)
    mixer = LightningModule(
        site, heads=HEADS, head_dim=DIM, slopes=slopes, short_conv=short_conv, norm_eps=1e-6
    )
    for module in mixer.modules():
        initialise(module, std=HIDDEN**-0.5)
    nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return exact_decays(mixer.double())


def exact_decays(mixer: LightningModule) -> LightningModule:
    """The decays are float32; here their own rounding is not what is asked about."""
    mixer.log_decay = log_decays(mixer.slopes, mixer.heads, mixer.site)
    return mixer


def whole(length: int = LENGTH) -> Call:
    return Call(torch.arange(length)[None].expand(2, length))


def noise() -> Tensor:
    return torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)


def slope(table: str, head: int, layer: int, heads: int = HEADS, layers: int = LAYERS) -> float:
    """As it stands in the papers, one number at a time."""
    if table == "linear":
        return 8 / heads * head * (1 - layer / layers)
    return 1 / (2 ** (8 / heads)) ** (head + 1) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def by_loop(mixer: LightningModule, x: Tensor, layer: int, slopes: str) -> Tensor:
    """Head by head, every pair of tokens weighed by its distance; from the weights and the fields alone."""
    projected = x @ mixer.qkv_proj.weight.T
    if mixer.conv is not None:
        taps = mixer.conv.weight.shape[1]
        past = torch.cat((torch.zeros_like(projected[:, : taps - 1]), projected), dim=1)
        projected = sum(mixer.conv.weight[:, tap] * past[:, tap : tap + LENGTH] for tap in range(taps))
    qkv = silu(projected)
    age = torch.arange(LENGTH, dtype=torch.float64)
    age = age[:, None] - age
    outputs = []
    for head in range(HEADS):
        q, k, v = (qkv[..., (3 * head + side) * DIM : (3 * head + side + 1) * DIM] for side in range(3))
        fading = torch.exp(-slope(slopes, head, layer) * age).masked_fill(age < 0, 0.0)
        outputs.append((q @ k.mT * fading) @ v)
    o = torch.cat(outputs, dim=-1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    return (o / (1 + torch.exp(-x @ mixer.gate_proj.weight.T))) @ mixer.o_proj.weight.T


@torch.no_grad()
@every_table
@pytest.mark.parametrize("short_conv", [None, 4])
def test_it_equals_its_formula(slopes: str, short_conv: int | None) -> None:
    mixer, x = ready(slopes=slopes, short_conv=short_conv), noise()
    assert (mixer(x, whole()) - by_loop(mixer, x, 1, slopes)).abs().max() < EXACT


def minimax_of(layer: int) -> MiniMaxLightningAttention:
    config = MiniMaxConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        head_dim=DIM,
        num_hidden_layers=LAYERS,
        block_size=32,
        hidden_act="silu",
        layer_types=["linear_attention"] * LAYERS,
    )
    return MiniMaxLightningAttention(config, layer).double()


NAMES = {
    "qkv_proj.weight": "qkv_proj.weight",
    "output_gate.weight": "gate_proj.weight",
    "norm.weight": "norm.weight",
    "out_proj.weight": "o_proj.weight",
}
BUFFERS = {"slope_rate", "query_decay", "key_decay", "diagonal_decay"}


def slopes_given(theirs: MiniMaxLightningAttention, log_decay: Tensor) -> None:
    """Writes a table of ours into the buffers that MiniMax keeps in its checkpoints.

    Their own formula of `diagonal_decay` lets a head that never decays see later tokens.
    """
    rate, row = -log_decay[:, None, None], torch.arange(theirs.block_size)
    age = row[:, None] - row
    theirs.slope_rate.copy_(rate)
    theirs.query_decay.copy_(torch.exp(-rate * (row[:, None] + 1)))
    theirs.key_decay.copy_(torch.exp(-rate * (theirs.block_size - 1 - row[:, None])))
    theirs.diagonal_decay.copy_(torch.exp(-rate * age).masked_fill(age < 0, 0.0))


@torch.no_grad()
@every_layer
@every_table
def test_it_is_the_layer_of_minimax_under_other_names(layer: int, slopes: str) -> None:
    ours, theirs, x = ready(layer, slopes=slopes), minimax_of(layer), noise()
    weights = ours.state_dict()
    found = theirs.load_state_dict({name: weights[own] for name, own in NAMES.items()}, strict=False)
    # All but what follows from the slopes.
    assert set(found.missing_keys) == BUFFERS
    slopes_given(theirs, ours.log_decay)
    expected, _ = theirs(x, position_embeddings=None, attention_mask=None)
    assert (ours(x, whole()) - expected).abs().max() <= SINGLE * expected.abs().max()


@every_layer
def test_the_geometric_table_is_that_of_minimax_to_the_rounding_of_float32(layer: int) -> None:
    theirs = minimax_of(layer).slope_rate.flatten()
    ours = -log_decays("geometric", HEADS, Site(HIDDEN, layer, LAYERS))
    # Three operations in float32 after an exact base.
    assert ((ours - theirs).abs() <= SINGLE * ours).all()


@every_table
@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (6, 3), (64, 80)])
def test_slopes_and_what_a_token_sees_follow_the_table(slopes: str, heads: int, layers: int) -> None:
    spec = Lightning.model_validate({"heads": heads, "head_dim": 4, "slopes": slopes})
    for layer in {0, layers // 2, layers - 1}:
        expected = [-slope(slopes, head, layer, heads, layers) for head in range(heads)]
        got = log_decays(slopes, heads, Site(HIDDEN, layer, layers))
        assert got.tolist() == pytest.approx(expected, rel=1e-12)
        seen = [one.log_decay for one in spec.sights(SpecSite(HIDDEN, layer, layers))]
        assert seen == pytest.approx(expected, rel=1e-12)


def test_the_last_geometric_layer_hardly_forgets_and_the_first_linear_head_never() -> None:
    assert log_decays("geometric", 4, Site(HIDDEN, 2, 3)).exp().min() > 1 - 1e-4
    assert log_decays("linear", 4, Site(HIDDEN, 0, 3)).exp()[0] == 1.0
    assert log_decays("geometric", 4, Site(HIDDEN, 0, 1)).isfinite().all()


def test_decays_stay_wide_when_the_model_is_narrow() -> None:
    mixer = ready().float()
    before = mixer.log_decay.clone()
    assert torch.equal(mixer.to(torch.bfloat16).log_decay, before)
    assert mixer.norm.weight.dtype == torch.bfloat16


ALPHA, BETA = 3.5, 0.75


def twin_spec() -> ModelSpec:
    channel = {"kind": "moe", "experts": 4, "active": 2, "width": 20}
    residual = {"of": "normed", "stream": ALPHA, "branch": BETA}
    linear = {"kind": "lightning", "heads": HEADS, "head_dim": DIM, "norm_eps": 1e-6}
    full = {"kind": "attention", "heads": HEADS, "kv_heads": 2, "head_dim": DIM}
    return ModelSpec.model_validate(
        {
            "vocab_size": 90,
            "hidden_size": HIDDEN,
            "norm_eps": 1e-2,
            "tie_embeddings": False,
            "blocks": {
                "linear": {"mixer": linear, "channel": channel, "residual": residual},
                "full": {"mixer": full, "channel": channel, "residual": residual},
            },
            "layers": ["linear", "full", "linear"],
        }
    )


def minimax_model() -> Any:
    factors = {f"{part}_alpha_factor": ALPHA for part in ("full_attn", "linear_attn", "mlp")}
    factors |= {name.replace("alpha", "beta"): BETA for name in factors}
    config = MiniMaxConfig(
        vocab_size=90,
        hidden_size=HIDDEN,
        intermediate_size=20,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=32,
        rms_norm_eps=1e-2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **factors,
    )
    # The default of transformers multiplies float64 by no expert.
    config._experts_implementation = "eager"
    return MiniMaxForCausalLM(config).double().eval()


def renamed(name: str) -> str:
    for theirs, ours in (
        ("input_layernorm", "mixer_norm"),
        ("post_attention_layernorm", "channel_norm"),
        ("self_attn.output_gate", "mixer.gate_proj"),
        ("self_attn.out_proj", "mixer.o_proj"),
        ("self_attn", "mixer"),
        ("mlp", "channel"),
    ):
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


@torch.no_grad()
def test_a_model_equals_minimax_with_its_weights_under_other_names() -> None:
    theirs, ours = minimax_model(), build(twin_spec(), dtype=torch.float64).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    ours.load_state_dict({renamed(name): parameter for name, parameter in theirs.named_parameters()})
    for index in (0, 2):
        slopes_given(
            theirs.model.layers[index].self_attn, exact_decays(ours.model.layers[index].mixer).log_decay
        )
    ids = torch.randint(90, (2, LENGTH))
    expected, got = theirs(ids).logits, ours(ids).logits
    # Nine norms, one after the other.
    assert (got - expected).abs().max() <= 9 * SINGLE * expected.abs().max()


def test_it_costs_what_the_sheet_says() -> None:
    site, spec = SpecSite(hidden_size=2048), Lightning.model_validate({"heads": 16, "head_dim": 128})
    D = width = 2048
    assert spec.params(site) == 5 * D * width + width
    assert spec.flops(site, 0) - 10 * D * width == 16 * 5 * 128 * 128
    # 98 kFLOP a token and head at chunks of 64.
    assert (spec.prefill_flops(site, 4096) - 10 * D * width) / 16 == 98_304
    assert spec.state_bytes(site, 5, 2) == 16 * 128 * 128 * 4


def test_the_layer_of_hypenet_is_its_recurrence_token_by_token() -> None:
    """Norms of heads, rotation, slopes of ALiBi, no SiLU: S = γ S + k vᵀ, o = Sᵀ q, one norm of all heads, a sigmoid gate."""
    spec = Lightning(heads=HEADS, slopes="alibi", activation="none", qk_norm=True, rope={"theta": 500.0})
    site = SpecSite(HIDDEN, 1, LAYERS)
    fields = {name: one for name, one in spec.runtime(site).items() if name != "kind"}
    mixer = LightningModule(Site(HIDDEN, 1, LAYERS), **fields)
    for module in mixer.modules():
        initialise(module, std=HIDDEN**-0.5)
    for norm in (mixer.q_norm, mixer.k_norm, mixer.norm):
        assert norm is not None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    mixer, x = exact_decays(mixer.double()), noise()[:, :20]
    assert sum(one.numel() for one in mixer.parameters()) == spec.params(site)
    q, k, v = mixer.qkv_proj(x).view(2, 20, HEADS, 3, DIM).unbind(3)
    angle = torch.arange(20)[:, None] * 500.0 ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = (torch.cat((one, one), dim=-1)[None, :, None].double() for one in (angle.cos(), angle.sin()))

    def placed(y: Tensor, weight: Tensor) -> Tensor:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        return y * cos + torch.cat((-y[..., DIM // 2 :], y[..., : DIM // 2]), dim=-1) * sin

    q, k = placed(q, mixer.q_norm.weight), placed(k, mixer.k_norm.weight)
    state, rows = torch.zeros(2, HEADS, DIM, DIM, dtype=torch.float64), []
    fade = torch.exp(-torch.exp2(-8.0 * torch.arange(1, HEADS + 1, dtype=torch.float64) / HEADS))
    for t in range(20):
        state = fade[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    o = torch.stack(rows, dim=1).flatten(2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    expected = mixer.o_proj(o * torch.sigmoid(mixer.gate_proj(x)))
    difference = mixer(x, Call(torch.arange(20)[None].expand(2, 20))) - expected
    # Angles are float32.
    assert difference.abs().max() < 20 * SINGLE * expected.abs().max()
    fields = {"heads": HEADS, "activation": "none", "short_conv": 4}
    assert [one.field for one in Lightning.model_validate(fields).problems(site)] == ["activation"]
