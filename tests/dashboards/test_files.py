"""What a run becomes outside of a browser: plots as files, tables, cells of a notebook; names stay text in all of them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from heddle import api, specs
from heddle.dashboards.drawing import draw
from heddle.dashboards.every_figure import every_figure
from heddle.search.record import read_run

MakeRun = Callable[..., Path]
HOSTILE = "</text><script>alert(1)</script>&\"'|\\input{x}$_%"
ROOT = Path(__file__).parents[2]


def test_every_plot_becomes_an_svg_and_a_png(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(name=HOSTILE)
    written = api.plots(folder, tmp_path / "plots")
    names = [figure.name for figure in every_figure(read_run(folder))]
    assert {
        "placement-best",
        "terms-pairs",
        "layers-cache-bytes",
        "curve-text",
        "best-so-far-by-device",
    } <= set(names)
    assert [path.name for path in written] == [f"{name}.{form}" for name in names for form in ("svg", "png")]
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
            assert "script" not in tags
    drawn = written[0].read_text()
    assert "mqar accuracy" in drawn
    assert "winner" in drawn
    again = draw(every_figure(read_run(folder))[0], tmp_path / "again.svg")
    assert again.read_bytes() == written[0].read_bytes()


def test_the_csv_has_every_trial_and_its_intervals(make_run: MakeRun) -> None:
    folder = make_run()
    rows = list(csv.DictReader(io.StringIO(api.table(folder, "csv"))))
    run = read_run(folder)
    assert [int(row["trial"]) for row in rows] == [-1, *(trial.number for trial in run.trials)]
    assert float(rows[5]["task:mqar"]) == run.trial(4).scores["mqar"].value
    ratio = run.trial(4).latency["decode_ms@1x4096"]
    assert float(rows[5]["budget:decode_ms@1x4096:low"]) == pytest.approx(ratio.ratio_low)
    assert rows[13]["task:mqar"] == ""


def test_the_front_is_a_table_of_markdown_and_of_latex(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    lines = api.table(folder, "md").splitlines()
    assert len(lines) == 2 + 1 + 3
    assert len({line.count("|") for line in lines}) == 1
    latex = api.table(folder, "latex", tmp_path / "front.tex")
    assert (tmp_path / "front.tex").read_text() == latex
    assert r"trial 4 $\star$ & 90.0 $\pm$ 1.0 \%" in latex
    assert latex.count(r"\\") == 5


def test_no_text_of_a_run_is_a_command_in_a_table(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "events.jsonl"
    file.write_text(file.read_text().replace('"full"', '"=cmd|<b>\\\\x{$&#"'))
    latex = api.table(folder, "latex")
    assert r"=cmd|<b>\textbackslash{}x\{\$\&\#" in latex
    assert "<b>" not in api.table(folder, "md")
    assert not re.search(r"(^|,)=", api.table(folder, "csv"), re.MULTILINE)


class _Cell(HTMLParser):
    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags, self.text = set[str](), ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_spec_and_a_run_show_themselves_in_a_notebook(make_run: MakeRun) -> None:
    seen = _Cell(specs.load(ROOT / "examples/quickstart.yaml")._repr_html_())
    assert "a space of" in seen.text
    assert "gated_deltanet ×" in seen.text
    seen = _Cell(read_run(make_run(name=HOSTILE))._repr_html_())
    assert seen.tags <= {"div", "span", "strong", "details", "summary", "pre"}
    assert f"search {HOSTILE}" in seen.text
    assert "trial 4 wins: mqar 0.9000 ± 0.0100" in seen.text


def test_a_run_without_a_winner_shows_itself_too(make_run: MakeRun) -> None:
    assert "no winner" in read_run(make_run(feasible=False))._repr_html_()
