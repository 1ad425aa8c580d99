"""Times `heddle dashboard` on a run of 10,000 trials, written by the search's own event log and ledger; appends a row.

    python tests/bench/dashboard_load.py [--trials 10000] [--run FOLDER] [--note "the machine was shared"]

Start is from the command to its address; first view is of Chromium's first page of a server that has read nothing, to its
plots drawn; read is from the start to the last trial read. The interactions come after that, from the choice or the click
to the new page drawn, with all plots in the window (those out of sight are drawn when nothing else is to do); a trial is opened
by its link in the table, and once more by its address, which loads the scripts anew; a hover is from the pointer to its label.
Beside the time of opening a trial by its link stands for how long the main thread was busy, and how often it laid the page out.
Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/bench/results/evidence-dashboard.jsonl"


def _drawn(page: Any, act: Any) -> float:
    """Milliseconds from `act`, which loads a page, to its plots drawn."""
    started = time.perf_counter()
    act()
    page.wait_for_selector("html[data-drawn]")
    return 1000 * (time.perf_counter() - started)


def _changed(page: Any, act: Any, seen: str) -> float:
    """Milliseconds from `act` to what it brings being there."""
    started = time.perf_counter()
    act()
    page.wait_for_selector(seen, state="attached")
    return 1000 * (time.perf_counter() - started)


def _work(page: Any) -> Any:
    """Gives milliseconds that the main thread of the page has been busy, and how often it has laid the page out."""
    asked = page.context.new_cdp_session(page)
    asked.send("Performance.enable")

    def now() -> dict[str, float]:
        told = {one["name"]: one["value"] for one in asked.send("Performance.getMetrics")["metrics"]}
        return {"busy": 1000 * told["TaskDuration"], "layouts": told["LayoutCount"]}

    return now


def _interactions(page: Any, address: str) -> dict[str, list[float]]:
    """Milliseconds of what a user does on the front, five times each."""
    opened = ("open_trial", "open_trial_busy", "open_trial_layouts", "load_trial")
    names = ("choose_axes", "filter", "page_of_trials", "hover", *opened)
    found: dict[str, list[float]] = {name: [] for name in names}
    work = _work(page)
    for turn in range(5):
        page.goto(address)
        page.wait_for_selector("html[data-drawn]")
        # Found beforehand: the search for a label in a large page is no part of what a user waits for.
        choose = page.get_by_label("Across").element_handle()
        title = "#plot-0 .xtitle:has-text('parameters')"
        found["choose_axes"].append(_changed(page, lambda box=choose: box.select_option("parameters"), title))
        state = page.get_by_label("State").element_handle()
        every = page.locator(".pages").inner_text().split()[0]
        only = f".pages:not(:has-text('{every} trials'))"
        found["filter"].append(_changed(page, lambda box=state: box.select_option("failed"), only))
        later = page.get_by_role("link", name="later →").element_handle()
        second = ".pages:has-text('page 2 of')"
        found["page_of_trials"].append(_changed(page, lambda link=later: link.click(), second))
        point = page.locator("#plot-0 .scatterlayer .trace path.point").nth(100 + turn)
        point.scroll_into_view_if_needed()
        box = point.bounding_box()
        page.mouse.move(0, 0)
        place = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        label = "#plot-0 .hoverlayer .hovertext"
        found["hover"].append(_changed(page, lambda at=place: page.mouse.move(*at), label))
        page.goto(address)
        page.wait_for_selector("html[data-drawn]")
        trial = page.locator(f"a[href$='/trial/{turn + 4}']").first.element_handle()
        shown = f"html[data-drawn] h1:has-text('trial {turn + 4}')"
        before = work()
        found["open_trial"].append(_changed(page, lambda link=trial: link.click(), shown))
        for kind, value in work().items():
            found[f"open_trial_{kind}"].append(value - before[kind])
        found["load_trial"].append(_drawn(page, lambda at=turn: page.goto(f"{address}/trial/{at + 9}")))
    return found


def measure(folder: Path) -> dict[str, Any]:
    """Seconds and milliseconds of one server and one browser."""
    from browsing import chromium, serving
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = chromium(playwright)
        page = browser.new_page()
        page.goto("about:blank")
        started = time.perf_counter()
        with serving(folder) as base:
            start_s = time.perf_counter() - started
            address = f"{base}/run/{folder.resolve().name}"
            first_ms = _drawn(page, lambda: page.goto(address))
            seen = page.locator(".tiles").inner_text()
            # By hand, since the pages allow no script that is a string.
            while "is being read" in page.locator("main").inner_text():
                page.wait_for_timeout(50)
            read_s = time.perf_counter() - started
            found = _interactions(page, address)
        browser.close()
    told = {
        name: {"median": round(median(row)), "worst": round(max(row))}
        if name.endswith("_layouts")
        else {"median_ms": round(median(row), 1), "worst_ms": round(max(row), 1)}
        for name, row in found.items()
    }
    return {
        "start_s": round(start_s, 3),
        "first_view_s": round(first_ms / 1000, 3),
        "first_view_showed": " ".join(seen.split()),
        "read_s": round(read_s, 2),
        "interactions": told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument(
        "--run", type=Path, help="where the run is, or is written; a temporary folder if not given"
    )
    parser.add_argument("--note", help="what the figures should be read with")
    given = parser.parse_args()
    sys.path.append(str(ROOT / "tests"))
    from recorded_runs import Recorded

    with tempfile.TemporaryDirectory() as held:
        folder = given.run or Path(held) / "runs" / "ten-thousand"
        if not (folder / "run.json").exists():
            Recorded(folder, given.trials).write()
        figures = measure(folder)
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    row = {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit.stdout.strip(),
        "device": "cpu",
    }
    row |= {
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "trials": given.trials,
    }
    row |= {"python": sys.version.split()[0], **figures, "note": given.note}
    with RESULTS.open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
