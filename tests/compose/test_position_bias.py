"""Position bias against closed forms (arXiv 2502.01951), graph search and models at random weights."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch

from heddle import api
from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.plan import plan
from heddle.compose.position_bias import layer_weights, position_bias, transport
from heddle.errors import HeddleError
from heddle.search.space import check_reach
from heddle.specs import ModelSpec, loads
from heddle.specs.layer import Site
from heddle.specs.pattern import layers_of
from heddle.specs.sight import Sight, reach


def model_of(*mixers: dict[str, object]) -> ModelSpec:
    blocks = {
        f"b{index}": {"mixer": mixer, "channel": {"kind": "none"}} for index, mixer in enumerate(mixers)
    }
    sizes = {"vocab_size": 32, "hidden_size": 16}
    return ModelSpec.model_validate({**sizes, "blocks": blocks, "layers": list(blocks)})


def windowed(window: int | None) -> dict[str, object]:
    return {"kind": "attention", "heads": 2, "window": window, "rope": None}


def test_two_uniform_causal_layers_have_the_closed_form() -> None:
    length = 24
    one = layer_weights([Sight()], length)
    harmonic = np.concatenate(([0.0], np.cumsum(1.0 / np.arange(1, length + 1))))
    expected = np.array(
        [
            [(harmonic[i + 1] - harmonic[j]) / (i + 1) if j <= i else 0.0 for j in range(length)]
            for i in range(length)
        ]
    )
    assert np.abs(transport([one, one], 0.0) - expected).max() < 1e-14


def test_unnormalised_paths_of_a_decay_count_as_combinations() -> None:
    length, layers, rate = 20, 4, 0.3
    lag = np.arange(length)[:, None] - np.arange(length)[None]
    one = np.where(lag >= 0, np.exp(-rate * lag), 0.0)
    moved = transport([one] * layers, 0.0)
    for n in range(length):
        assert moved[-1, length - 1 - n] == pytest.approx(math.comb(n + layers - 1, n) * math.exp(-rate * n))


def test_weight_gathers_at_the_first_token_with_depth_and_a_window_delays_it() -> None:
    full, narrow = layer_weights([Sight()], 24), layer_weights([Sight(4)], 24)
    primacy = [transport([full] * depth, 0.0)[-1, 0] for depth in (1, 2, 4, 8, 16)]
    assert primacy == sorted(primacy)
    assert primacy[-1] > 0.99
    # The last of 24 tokens is 23 back, and 3 tokens a layer are carried.
    assert transport([narrow] * 7, 0.0)[-1, 0] == 0.0
    assert transport([narrow] * 8, 0.0)[-1, 0] > 0.0


def test_every_row_is_a_distribution() -> None:
    sights = [Sight(5, -0.2), Sight(None, -0.01), Sight(3, is_causal=False)]
    assert np.allclose(layer_weights(sights, 17).sum(1), 1.0)
    assert np.allclose(transport([layer_weights(sights, 17)] * 3, 0.5).sum(1), 1.0)


def test_hops_and_layers_are_those_of_a_search_in_the_layered_graph() -> None:
    windows, length = (3, 6, 2, 4), 16
    found = position_bias(plan(model_of(*map(windowed, windows))), length)
    graph = nx.DiGraph()
    for layer, window in enumerate(windows):
        for i in range(length):
            graph.add_edge((layer, i), (layer + 1, i), cost=0)
            for j in range(max(0, i - window + 1), i):
                graph.add_edge((layer, j), (layer + 1, i), cost=1)
    # 2 + 5 + 1 + 3 tokens back are fewer than 15.
    assert found.reach == 11
    assert found.layers_to_reach_all is None
    wide = position_bias(plan(model_of(*map(windowed, (3, 6, 2, 9)))), length)
    assert wide.layers_to_reach_all == 4
    costs = nx.single_source_dijkstra_path_length(graph, (0, 5), weight="cost")
    assert costs[len(windows), 15] == 3


def test_centres_are_the_tokens_that_all_hear_from() -> None:
    assert position_bias(plan(model_of(windowed(None))), 12).centre == (0,)
    assert position_bias(plan(model_of(windowed(4), windowed(2))), 12).centre == (0,)


def test_reach_is_the_sum_of_the_windows_or_all() -> None:
    site = Site(16)
    assert reach(layers_of(model_of(windowed(4), windowed(8))), site) == 3 + 7
    assert reach(layers_of(model_of(windowed(4), windowed(None))), site) is None
    linear = {"kind": "gated_deltanet", "heads": 2}
    assert reach(layers_of(model_of(windowed(4), linear)), site) is None
    both = {"kind": "parallel", "mixers": [windowed(4), windowed(6)]}
    assert reach(layers_of(model_of(both)), site) == 5


def test_a_random_model_with_tiny_logits_moves_content_as_the_masks_say() -> None:
    """Masks are compiled as they are analysed: gradients of a linearised stack of layers follow the transport."""
    spec = model_of(windowed(4), windowed(None), windowed(3))
    model = build(spec, dtype=torch.float64).eval()
    width, length = 16, 12
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj"):
                getattr(layer.mixer, name).weight.zero_()
            layer.mixer.v_proj.weight.copy_(torch.eye(width))
            layer.mixer.o_proj.weight.copy_(torch.eye(width))
            # A norm would weigh tokens by their length.
            layer.mixer_norm = torch.nn.Identity()
    x = torch.randn(1, length, width, dtype=torch.float64)
    moved = x
    with torch.no_grad():
        for layer in model.model.layers:
            moved = layer(moved, Call(torch.arange(length)[None]))
    sights = [layer.spec.mixer.sights(Site(width)) for layer in layers_of(spec)]
    # The stream adds: x + A x, which is twice the half-and-half of the analysis.
    shares = transport([layer_weights(one, length) for one in sights], 0.5) * 2 ** len(sights)
    assert np.abs(shares @ x[0].numpy() - moved[0].numpy()).max() < 1e-9


SHORT = """\
version: 1
name: short
model:
  vocab_size: 64
  hidden_size: 16
  blocks:
    a: {mixer: {kind: attention, heads: 2, window: {choice: [4, 64]}}, channel: {kind: none}}
  layers: [a, a]
tokenizer: path
search: {tasks: [{mqar: {pairs: 4, length: 32}}], trials: 2}
"""


def test_a_task_beyond_the_reach_is_warned_about() -> None:
    warnings = [str(one) for one in loads(SHORT, file="a.yaml").warnings]
    assert warnings[0].splitlines()[0] == (
        "a.yaml:10:25: search.tasks.0.mqar: the layers together see 6 tokens back, and mqar asks for what stood up to 31 back"
        "   [reach-too-short]"
    )
    assert loads(SHORT.replace("[4, 64]", "[64, 4]")).warnings == ()


def test_a_search_does_not_try_what_reaches_less_than_asked() -> None:
    check_reach(model_of(windowed(4), windowed(8)), 10)
    check_reach(model_of(windowed(None)), 10**6)
    check_reach(model_of(windowed(2)), None)
    with pytest.raises(HeddleError) as told:
        check_reach(model_of(windowed(4), windowed(8)), 11)
    assert told.value.what == "the layers together see 10 tokens back, and 11 are asked for"


def test_a_length_beyond_reason_is_refused() -> None:
    with pytest.raises(HeddleError) as told:
        api.position_bias("examples/specs/hybrid.yaml", length=100_000)
    assert told.value.code == "bad-argument"
