"""Takes the pictures of docs/img: each page of the dashboard in both themes, and two at the width of a phone.

    python tests/screenshots.py RUN [--out docs/img] [--bench tests/bench/results] [--only trial,tools]
    python tests/screenshots.py FOLDER --only runs,beside,placement

A folder of runs gives the pages of several runs, and those of its first one.

Needs Chromium (apt-get install chromium).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

from browsing import chromium, serving
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
HEIGHT = 1150
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 780}


def pages(keys: list[str], trial: int, other: int) -> dict[str, str]:
    """Names of pictures and the addresses they show."""
    key = keys[0]
    found = {
        "front": f"/run/{key}",
        "trial": f"/run/{key}/trial/{trial}",
        "compare": f"/run/{key}/compare?t={trial}&t={other}",
        "placement": f"/run/{key}/placement",
        "latency": f"/run/{key}/latency",
        "tools": f"/run/{key}/tools",
        "kernels": "/kernels",
    }
    if len(keys) > 1:
        found |= {"runs": "/", "beside": f"/compare?t={key}:{trial}&t={key}:{other}&t={keys[1]}:{other}"}
    return found


def take(page: Page, address: str, out: Path) -> None:
    """One picture of the first screen and a half, once the figures are drawn."""
    page.goto(address, wait_until="load")
    page.wait_for_selector("html[data-drawn], main:not(:has(.plot))")
    page.wait_for_timeout(300)
    size = page.viewport_size
    assert size is not None
    clip = {"x": 0, "y": 0, "width": size["width"], "height": HEIGHT}
    page.screenshot(path=out, clip=clip, full_page=True)
    print(f"{out}  {out.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/img")
    parser.add_argument("--bench", type=Path, default=ROOT / "tests/bench/results")
    parser.add_argument("--trials", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--only", help="names of pictures, with commas between; all if not given")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as held:
        # Copied, so that the pages name short folders.
        run = copytree(given.run, Path(held) / "runs" / given.run.resolve().name)
        bench = copytree(given.bench, Path(held) / "bench")
        is_run = (run / "run.json").exists()
        keys = [run.name] if is_run else sorted(path.parent.name for path in run.glob("*/run.json"))
        wanted = pages(keys, *given.trials)
        only = given.only.split(",") if given.only else list(wanted)
        with serving(run, bench=bench) as base, sync_playwright() as playwright:
            named = {name: base + wanted[name] for name in only}
            take_all(chromium(playwright), named, given.out)


def take_all(browser: Browser, named: dict[str, str], out: Path) -> None:
    """Every page in both themes, and two of them as a phone shows them."""
    for theme in ("light", "dark"):
        page = browser.new_context(viewport=WIDE, color_scheme=theme).new_page()
        for name, address in named.items():
            take(page, address, out / f"{name}-{theme}.png")
        page.context.close()
    page = browser.new_context(viewport=NARROW).new_page()
    for name in {"front", "trial"} & set(named):
        take(page, named[name], out / f"{name}-phone.png")


if __name__ == "__main__":
    main()
