"""Each mixer computes what its papers say: against transformers' own layers, or else a plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MiniMaxConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from heddle.compose.cache import Call
from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.init import initialise
from heddle.compose.mixers.attention import AttentionModule
from heddle.compose.mixers.decay_attention import DecayAttentionModule, log_decays
from heddle.compose.modules.site import Site

HIDDEN, HEADS, DIM, LENGTH = 48, 4, 12, 150


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def whole(length: int = LENGTH) -> Call:
    return Call(torch.arange(length)[None].expand(2, length))


def ready(mixer: nn.Module) -> nn.Module:
    """Projections and gains that make every term count, in float64."""
    for module in mixer.modules():
        initialise(module, std=HIDDEN**-0.5)
    for name, parameter in mixer.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return mixer.double()


def heads_of(rows: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, rows).unflatten(-1, (-1, DIM)).transpose(1, 2)


def test_a_model_of_gated_deltanet_and_gated_attention_equals_qwen3_5() -> None:
    theirs = qwen(head_dim=16, value_heads=4)
    ours = HeddleForCausalLM(twin_config(theirs.config)).double().eval()
    ours.load_state_dict(translated(theirs.state_dict()))
    ids = torch.randint(90, (2, LENGTH))
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def qwen(*, head_dim: int, value_heads: int) -> Any:
    config = Qwen3_5TextConfig(
        vocab_size=90,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        linear_num_key_heads=2,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=8,
        linear_value_head_dim=DIM,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=None,
    )
    model = Qwen3_5ForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def twin_config(config: Any) -> HeddleConfig:
    rope = {"theta": 5000.0, "fraction": 0.5}
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": config.head_dim, "rope": rope}
    attention |= {"qk_norm": True, "gate": True, "window": None}
    linear = {
        "kind": "gated_deltanet",
        "heads": 2,
        "value_heads": config.linear_num_value_heads,
        "head_dim": 8,
    }
    linear |= {"value_dim": DIM, "short_conv": 4, "negative_eigenvalues": False}
    channel = {"kind": "swiglu", "width": config.intermediate_size}
    layers = [{"mixer": mixer, "channel": channel, "norm": "rmsnorm"} for mixer in (linear, attention)]
    return HeddleConfig(vocab_size=90, hidden_size=HIDDEN, layers=layers, tie_word_embeddings=False)


def translated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names and layouts as ours. All their norms but the gated one hold gain - 1."""
    names = {
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "channel_norm",
        "linear_attn.in_proj_qkv": "mixer.qkv_proj",
        "linear_attn.in_proj_z": "mixer.z_proj",
        "linear_attn.in_proj_a": "mixer.a_proj",
        "linear_attn.in_proj_b": "mixer.b_proj",
        "linear_attn.out_proj": "mixer.o_proj",
        "linear_attn.conv1d": "mixer.conv",
        "linear_attn": "mixer",
        "self_attn": "mixer",
        "mlp": "channel",
    }
    found = {}
    for name, weight in weights.items():
        new = name
        for theirs, ours in names.items():
            new = new.replace(f".{theirs}.", f".{ours}.")
        weight = weight.squeeze(1) if "conv1d" in name else weight
        found[new] = weight + 1 if "norm" in name and "linear_attn" not in name else weight
    return found


@pytest.mark.parametrize("layer", [0, 2])
def test_lightning_equals_minimax(layer: int) -> None:
    config = MiniMaxConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        head_dim=DIM,
        num_hidden_layers=3,
        block_size=32,
        hidden_act="silu",
        layer_types=["linear_attention"] * 3,
    )
    site = Site(HIDDEN, layer, 3)
    ours = ready(DecayAttentionModule(site, heads=HEADS, head_dim=DIM, form="lightning", short_conv=None))
    theirs = MiniMaxLightningAttention(config, layer).double()
    # They hold q, k and v of each head together.
    qkv = ours.qkv_proj.weight.unflatten(0, (3, HEADS, DIM)).transpose(0, 1).flatten(0, 2)
    theirs.load_state_dict(
        {
            "qkv_proj.weight": qkv,
            "output_gate.weight": ours.gate_proj.weight,
            "norm.weight": ours.norm.weight,
            "out_proj.weight": ours.o_proj.weight,
        },
        strict=False,
    )
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, _ = theirs(x, position_embeddings=None, attention_mask=None)
        got = ours(x, whole())
    # Their decays are float32, as ours.
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_retnet_equals_its_parallel_form() -> None:
    site = Site(HIDDEN, 1, 3)
    mixer = ready(DecayAttentionModule(site, heads=HEADS, head_dim=DIM, form="retnet", short_conv=None))
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    q, k, v = (heads_of(rows, x) for rows in mixer.qkv_proj.weight.chunk(3))
    q, k = rotated(q, theta=1e4, size=DIM), rotated(k, theta=1e4, size=DIM)
    time = torch.arange(LENGTH, dtype=torch.float64)
    distance = time[:, None] - time
    decay = torch.stack([(1 - 2.0 ** (-5 - head)) ** distance.clamp(min=0) for head in range(HEADS)]).tril()
    o = (q @ k.mT * DIM**-0.5 * decay) @ v
    o = o / (o.square().mean(-1, keepdim=True) + site.norm_eps).sqrt() * mixer.norm.weight
    gate = F.silu(heads_of(mixer.gate_proj.weight, x))
    expected = F.linear((o * gate).transpose(1, 2).flatten(2), mixer.o_proj.weight)
    assert (mixer(x, whole()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("rope", [None, {"theta": 100.0, "fraction": 1.0}])
def test_attention_equals_its_formula(window: int | None, rope: dict[str, float] | None) -> None:
    options: dict[str, Any] = {
        "heads": HEADS,
        "kv_heads": 2,
        "head_dim": DIM,
        "qk_norm": False,
        "gate": False,
    }
    mixer = ready(AttentionModule(Site(HIDDEN, 0, 1), rope=rope, window=window, **options))
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    q, k, v = (heads_of(linear.weight, x) for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if rope is not None:
        q, k = rotated(q, theta=100.0, size=DIM), rotated(k, theta=100.0, size=DIM)
    # Query heads 0 and 1 read key head 0, heads 2 and 3 key head 1.
    k, v = (torch.stack([side[:, head // 2] for head in range(HEADS)], dim=1) for side in (k, v))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (distance >= 0) & (distance < (window or LENGTH))
    p = (q @ k.mT * DIM**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    expected = F.linear((p @ v).transpose(1, 2).flatten(2), mixer.o_proj.weight)
    # Rotations are float32.
    assert (mixer(x, whole()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def rotated(x: Tensor, *, theta: float, size: int) -> Tensor:
    """Pairs (j, j + size/2) as complex numbers, turned by pos * theta^(-2j/size)."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def test_decays_lie_between_0_and_1_and_the_last_lightning_layer_hardly_forgets() -> None:
    for form in ("lightning", "retnet"):
        for index in range(3):
            decays = log_decays(form, 6, Site(HIDDEN, index, 3)).exp()
            assert ((decays > 0) & (decays < 1)).all()
    assert log_decays("lightning", 4, Site(HIDDEN, 2, 3)).exp().min() > 1 - 1e-4
    assert log_decays("retnet", 1, Site(HIDDEN, 0, 1)).exp().item() == pytest.approx(1 - 1 / 32)


def test_one_layer_lightning_model_has_finite_decays() -> None:
    assert log_decays("lightning", 4, Site(HIDDEN, 0, 1)).isfinite().all()
