"""The plots of a run as PNG or SVG files for a paper, drawn by matplotlib: no browser, no network.

Takes the same figures as the pages; what differs is only who draws them.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heddle.dashboards.every_figure import every_figure
from heddle.dashboards.figures import Figure
from heddle.errors import HeddleError
from heddle.search.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reached = dict[tuple[str, bool], float]
FORMS = ("svg", "png")
# The light colours of report.css, by the names that figures have for them.
PAINT = {
    "--dim": "#8a9199",
    "--accent": "#0b5cad",
    "--good": "#0b7a4b",
    "--ink": "#1d2125",
    "--soft": "#5a6169",
    "--bad": "#b3261e",
    "--over": "#8a6800",
    "--left": "#7b3fa0",
    "--line": "#dcdcd5",
}
SYMBOLS = {
    "star": "*", "diamond": "D", "square": "s", "cross": "P", "triangle-up": "^", "triangle-down": "v", "x-thin": "x",
    "line-ns": "|",
}  # fmt: skip
DASHES = {
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 1, 3)),
}
DPI = 200
# The lowest share of a plot, which trials without a score have to themselves.
FOOT = 0.17
# Longer names stand below one another in a legend.
LONG_NAME = 22


def draw_all(run: Run, folder: Path) -> list[Path]:
    """Every plot of the run and of its winner as SVG and as PNG in `folder`, named after what it shows.

    Raises:
        HeddleError: "package-missing".
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [draw(figure, folder / f"{figure.name}.{form}") for figure in every_figure(run) for form in FORMS]


def draw(figure: Figure, path: Path) -> Path:
    """One plot as a file; the ending of `path` says in which form. Raises HeddleError "package-missing"."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Sheet
    except ModuleNotFoundError:
        hint = "pip install 'heddle-lm[plots]'"
        raise HeddleError("package-missing", "plots as files need matplotlib", hint=hint) from None
    # Text stays text in an SVG, and the same run gives the same bytes.
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "heddle", "font.size": 9, "text.parse_math": False}
    ):
        sheet = Sheet(figsize=(5.2, 3.6), layout="constrained")
        axes = sheet.subplots()
        axes.grid(color=PAINT["--line"], linewidth=0.6)
        axes.set_axisbelow(True)
        # Where bars stand on one another, how far those of a row reach already, to the right and to the left.
        reached: Reached | None = {} if figure.layout.get("barmode") == "relative" else None
        for trace in figure.data:
            _trace(axes, trace, reached)
        if any(trace.get("yaxis") == "y2" for trace in figure.data):
            low, high = axes.get_ylim()
            axes.set_ylim(low - FOOT / (1 - FOOT) * (high - low), high)
        _frame(axes, figure)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        sheet.savefig(path, dpi=DPI, metadata=metadata)
    return path


def _trace(axes: Axes, trace: dict[str, Any], reached: Reached | None) -> None:
    if trace["type"] == "heatmap":
        _heat(axes, trace)
    elif trace["type"] == "bar":
        _bars(axes, trace, reached)
    elif trace.get("yaxis") == "y2":
        _rug(axes, trace)
    elif trace["x"]:
        _points(axes, trace)


def _heat(axes: Axes, trace: dict[str, Any]) -> None:
    rows = range(len(trace["y"]))
    axes.grid(visible=False)
    mesh = axes.pcolormesh(trace["x"], rows, trace["z"], cmap="cividis", vmin=0, vmax=1, shading="nearest")
    axes.set_yticks(rows, _texts(trace["y"]))
    axes.figure.colorbar(mesh, ax=axes, label=trace["colorbar"]["title"]["text"])


def _bars(axes: Axes, trace: dict[str, Any], reached: Reached | None) -> None:
    colour = _paint(trace["marker"]["color"])
    if trace.get("orientation") == "h":
        left = [0.0] * len(trace["x"])
        for at, (row, width) in enumerate(zip(trace["y"], trace["x"], strict=True)):
            if reached is not None:
                left[at] = reached.get((row, width < 0), 0.0)
                reached[row, width < 0] = left[at] + width
        reach, look = _reach(trace.get("error_x")), _hatch(trace)
        name = _text(trace["name"]) if trace.get("showlegend", True) else None
        axes.barh(_texts(trace["y"]), trace["x"], left=left, color=colour, xerr=reach, label=name, **look)
    else:
        axes.bar(trace["x"], trace["y"], color=colour, label=_text(trace["name"]), **_hatch(trace))


def _hatch(trace: dict[str, Any]) -> dict[str, str]:
    return {"hatch": "///", "edgecolor": "#ffffff"} if "pattern" in trace["marker"] else {}


def _rug(axes: Axes, trace: dict[str, Any]) -> None:
    """Trials without a score, as marks at the foot of the plot, a row a kind."""
    foot = [FOOT - 0.05 + 0.05 * at for at in trace["y"]]
    marker = trace["marker"]
    axes.plot(
        trace["x"], foot, SYMBOLS[marker["symbol"].removesuffix("-open")], color=_paint(marker["color"]),
        label=_text(trace["name"]), transform=axes.get_xaxis_transform(), markersize=5, markerfacecolor="none",
    )  # fmt: skip


def _points(axes: Axes, trace: dict[str, Any]) -> None:
    marker, line = trace.get("marker", {}), trace.get("line", {})
    symbol = str(marker.get("symbol", "circle"))
    shape = SYMBOLS.get(symbol.removesuffix("-open"), "o") if "markers" in trace["mode"] else ""
    look: dict[str, Any] = {"marker": shape, "markersize": marker.get("size", 6) * 0.75}
    look["color"] = _paint(marker.get("color") or line.get("color"))
    look["markerfacecolor"] = "none" if symbol.endswith("-open") else look["color"]
    look["linestyle"] = DASHES.get(line.get("dash", ""), "-") if "lines" in trace["mode"] else "none"
    look["drawstyle"] = "steps-post" if line.get("shape") == "hv" else "default"
    bars = {side: _reach(trace.get(f"error_{side[0]}")) for side in ("xerr", "yerr")}
    axes.errorbar(trace["x"], trace["y"], **bars, **look, elinewidth=0.8, label=_text(trace["name"]))


def _reach(bars: dict[str, Any] | None) -> list[Sequence[float]] | None:
    return None if bars is None else [bars.get("arrayminus", bars["array"]), bars["array"]]


def _frame(axes: Axes, figure: Figure) -> None:
    """Titles of the axes, the budget, the legend."""
    axes.set_xlabel(_text(figure.layout["xaxis"]["title"]["text"]))
    axes.set_ylabel(_text(figure.layout["yaxis"]["title"]["text"]))
    for shape in figure.layout.get("shapes", ()):
        line = axes.axvline if shape.get("yref") == "paper" else axes.axhline
        line(
            shape["x0"] if shape.get("yref") == "paper" else shape["y0"],
            color=PAINT["--bad"],
            linestyle="--",
            linewidth=1,
        )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if figure.layout["xaxis"].get("tickformat") == "d":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if figure.layout["yaxis"].get("autorange") == "reversed":
        axes.invert_yaxis()
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        columns = 3 if max(map(len, names)) < LONG_NAME else 1
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, frameon=False, fontsize=8)


def _paint(colour: str | None) -> str | None:
    return None if colour is None else PAINT.get(colour, colour)


def _text(text: str) -> str:
    """Figures hold their texts escaped, since plotly reads tags in them; here they are plain again."""
    return html.unescape(text)


def _texts(texts: Sequence[str]) -> list[str]:
    return [_text(text) for text in texts]
