"""The rows that attention hands out to a probe: they are the weights its values got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heddle.compose.cache import Call
from heddle.compose.mixers.attention import AttentionModule
from heddle.compose.modules.site import Site
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.attention import Attention

HIDDEN = 24
# Float64 on a CPU: two ways to one sum differ by rounding alone.
EXACT = 1e-9


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixer_of(**fields: Any) -> Any:
    data = Attention.model_validate({"heads": 4, **fields}).runtime(SpecSite(HIDDEN))
    del data["kind"]
    mixer = AttentionModule(Site(HIDDEN, 0, 1), **data).double()
    with torch.no_grad():
        for seed, parameter in enumerate(mixer.parameters()):
            parameter.copy_(0.5 * noise(*parameter.shape, seed=seed))
    return mixer


def call_at(length: int, **given: Any) -> Call:
    return Call(torch.arange(length)[None].expand(2, length), **given)


FORMS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 2, "qk_norm": True, "scale": 0.3, "key_multiplier": 1.5},
    {"window": 5, "kv_heads": 2},
    {"window": 5, "kv_heads": 2, "sink_tokens": 4},
    {"causal": False, "window": 4},
    {"softcap": 0.8, "sinks": True},
    {"kv_heads": 2, "selection": {"block": 4, "count": 2}},
]


@pytest.mark.parametrize("form", FORMS)
def test_the_rows_handed_out_are_the_weights_of_the_values(form: dict[str, Any]) -> None:
    mixer, x, chosen = mixer_of(**form), noise(2, 60, HIDDEN), (7, 45, -1)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[0, :5] = False
    seen: dict[str, Tensor] = {}
    mixer.rows_out.queries = chosen
    for point in ("heads_out", "rows_out"):
        getattr(mixer, point).register_forward_hook(lambda _, __, out, name=point: seen.update({name: out}))
    mixer(x, call_at(60, key_padding=real, padding=real))
    v = mixer.v_proj(x).view(2, 60, -1, 6).transpose(1, 2)
    v = v.repeat_interleave(mixer.heads // v.shape[1], dim=1)
    assert seen["rows_out"].shape == (2, mixer.heads, 3, 60)
    assert ((seen["rows_out"] @ v).transpose(1, 2) - seen["heads_out"][:, chosen]).abs().max() < EXACT


@pytest.mark.parametrize("queries", [None, (0, -1)])
def test_attention_compiles_whole_with_and_without_a_probe(queries: tuple[int, ...] | None) -> None:
    mixer, x = mixer_of(window=5), noise(2, 40, HIDDEN)
    mixer.rows_out.queries = queries
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    assert (compiled(x, call_at(40)) - mixer(x, call_at(40))).abs().max() < EXACT
    torch.compiler.reset()
