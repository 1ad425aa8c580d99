"""Takes the pictures of docs/img: each page of the dashboard in both themes, on a wide window and at the width of a phone.

    python tests/screenshots.py [RUN_OR_FOLDER] [--out docs/img] [--bench tests/bench/results] [--only trial,tools]

A folder of runs gives the pages of several runs, and those of its first one; without a run two are made up.

Needs Chromium (apt-get install chromium) and Pillow, which matplotlib brings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from shutil import copy, copytree
from tempfile import TemporaryDirectory

from browsing import chromium, serving
from latency_models import with_model
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from recorded_runs import FRAME_MS, FULL_MS, LINEAR_MS, Recorded

from heddle.search.record import read_run
from heddle.search.study import Direction, Study, open_storage

ROOT = Path(__file__).parents[1]
# Beside the trials.
SPECS = [ROOT / "examples/specs/hybrid.yaml", ROOT / "examples/specs/sequential.yaml"]
# As high as the pictures, since plots out of sight are drawn later.
WIDE, NARROW = {"width": 1280, "height": 1150}, {"width": 390, "height": 1000}
# Searches that are made up, and the seeds of their numbers.
MADE_UP, TRIALS = {"made-up-a": 1, "made-up-b": 2}, 120
# A page has few colours, and a picture of so many is half as large.
COLOURS = 255
# Pictures of what stands further down on a page.
HEADINGS = {"blocks": "Predicted time of each block"}


def pages(keys: list[str], trial: int, other: int) -> dict[str, str]:
    """Names of pictures and the addresses they show."""
    key = keys[0]
    found = {
        "front": f"/run/{key}",
        "trial": f"/run/{key}/trial/{trial}",
        "blocks": f"/run/{key}/trial/{trial}",
        "compare": f"/run/{key}/compare?t={trial}&t={other}",
        "specs": f"/run/{key}/compare?t={trial}&s={SPECS[0].name}&s={SPECS[1].name}",
        "placement": f"/run/{key}/placement",
        "latency": f"/run/{key}/latency",
        "tools": f"/run/{key}/tools",
        "kernels": "/kernels?op=gated_delta_rule",
    }
    if len(keys) > 1:
        found |= {"runs": "/", "beside": f"/compare?t={key}:{trial}&t={key}:{other}&t={keys[1]}:{other}"}
    return found


def shown(folder: Path) -> tuple[int, int]:
    """The trials of the pictures: the winner of a run, and another of its front."""
    run = read_run(folder)
    others = [
        number for number in (*run.front, *(trial.number for trial in run.trials)) if number != run.best
    ]
    return run.best or 0, others[0]


def take(page: Page, address: str, out: Path, heading: str | None = None) -> None:
    """One picture of a window, from `heading` on if one is given, once the figures in it are drawn."""
    page.goto(address, wait_until="load")
    page.wait_for_selector("html[data-drawn], main:not(:has(.plot))")
    if heading is not None:
        page.get_by_role("heading", name=heading).evaluate("it => it.scrollIntoView()")
    page.wait_for_function("() => [...document.querySelectorAll('.plot')].every((one) => one.firstChild)")
    page.wait_for_timeout(300)
    page.screenshot(path=out)
    Image.open(out).convert("RGB").quantize(
        COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    ).save(out, optimize=True)
    print(f"{out}  {out.stat().st_size / 1000:.0f} kB")


def made_up(folder: Path) -> Path:
    """Two searches, the first with a latency model of its winner's layers."""
    for name, seed in MADE_UP.items():
        run = read_run(Recorded(folder / name, TRIALS, name=name, seed=seed, has_all=True).write())
        assert run.best is not None
        directions: list[Direction] = [
            "maximize" if task.higher_is_better else "minimize" for task in run.tasks
        ]
        # No trial is in it; the page of tools opens it where it is.
        Study(open_storage(run.path), name, directions, sampler="random", seed=0, startup=1)
        with_model(run.path, phases=("decode",), number=run.best, times=(FRAME_MS, LINEAR_MS, FULL_MS, 0.0))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/img")
    parser.add_argument("--bench", type=Path, default=ROOT / "tests/bench/results")
    parser.add_argument(
        "--trials", type=int, nargs=2, help="the winner and the next on the front if not given"
    )
    parser.add_argument("--only", help="names of pictures, with commas between; all if not given")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as held:
        # Copied, so that the pages name short folders.
        source = given.run or made_up(Path(held) / "made-up")
        run = copytree(source, Path(held) / "runs" / source.resolve().name)
        bench = copytree(given.bench, Path(held) / "bench")
        specs = [Path(copy(path, held)) for path in SPECS]
        is_run = (run / "run.json").exists()
        keys = [run.name] if is_run else sorted(path.parent.name for path in run.glob("*/run.json"))
        wanted = pages(keys, *(given.trials or shown(run if is_run else run / keys[0])))
        only = given.only.split(",") if given.only else list(wanted)
        with serving(run, bench=bench, specs=specs) as base, sync_playwright() as playwright:
            named = {name: base + wanted[name] for name in only}
            take_all(chromium(playwright), named, given.out)


def take_all(browser: Browser, named: dict[str, str], out: Path) -> None:
    """Every page in both themes, wide and as a phone shows it."""
    for theme in ("light", "dark"):
        for size, window in (("", WIDE), ("phone-", NARROW)):
            page = browser.new_context(viewport=window, color_scheme=theme).new_page()
            for name, address in named.items():
                take(page, address, out / f"{name}-{size}{theme}.png", HEADINGS.get(name))
            page.context.close()


if __name__ == "__main__":
    main()
