"""Bars over layers, drawn by the server: their heights, units, stripes, and how many there are."""

from __future__ import annotations

import re

import pytest

from heddle.dashboards.bars import HEIGHT, bars
from heddle.dashboards.data import Cell
from heddle.dashboards.figures import Figure, layout
from heddle.dashboards.frame import Page
from heddle.dashboards.model_figures import costs
from heddle.dashboards.trial_pages import add_costs


def _layers(mixers: list[str], values: list[float]) -> list[dict[str, object]]:
    held = zip(mixers, values, strict=True)
    return [{"index": at, "mixer": mixer, "cache_bytes": value} for at, (mixer, value) in enumerate(held)]


def _drawn(mixers: list[str], values: list[float]) -> str:
    return bars(costs(_layers(mixers, values), 4096, 1))


def test_bars_are_as_high_as_their_values_and_name_layer_and_unit() -> None:
    drawn = _drawn(["attention", "mamba2", "attention"], [4096.0, 0.0, 1024.0])
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([^"]+)"', drawn)]
    assert heights == pytest.approx([HEIGHT, HEIGHT / 4], abs=0.1)
    assert "layer 2: attention, 1 KiB" in drawn
    assert ">KiB</text>" in drawn
    assert re.findall(r">([\d.]+)</text>", drawn) == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "0",
        "1",
        "2",
    ]


def test_mixers_made_of_others_are_striped_and_names_are_text() -> None:
    drawn = _drawn(["parallel", "<b>"], [1.0, 2.0])
    assert drawn.count("url(#hatch-layers-cache-bytes-0)") == 1
    assert "&lt;b&gt;, 2 B" in drawn
    assert "<b>" not in drawn


def test_equal_neighbours_of_a_thousand_layers_are_one_bar() -> None:
    drawn = _drawn(["attention"] * 500 + ["mamba2"] * 500, [64.0] * 1000)
    assert drawn.count("<rect") == 2
    assert "layers 500 to 999: mamba2, 64 B" in drawn


def test_a_graph_too_large_to_draw_is_said_to_be() -> None:
    for count, told in ((200, "Show the graph"), (201, "heddle show SPEC --graph svg")):
        page = Page("a trial")
        cells = [Cell(at, "full", "attention") for at in range(count)]
        add_costs(page, cells, _layers(["attention"] * count, [64.0] * count), (4096, 1), "graph.svg")
        assert told in str(page.sections[-1])


def test_nothing_but_zeros_has_an_axis_all_the_same() -> None:
    trace = {"type": "bar", "name": "x", "marker": {"color": "#000"}, "x": [0], "y": [0.0]}
    assert ">1</text>" in bars([Figure("none", "Nothing", [trace], layout("layer", "parameters"))])
