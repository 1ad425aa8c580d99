"""The dashboard in Chromium: a search is followed, a point leads to its trial, trials are compared, axe finds no fault."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import chromium, chromium_path, serving
from latency_models import with_model, with_predictions
from playwright.sync_api import Browser, Page, expect, sync_playwright

from heddle import api

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
SPECS = [ROOT / "examples/specs/sequential.yaml"]
EVERYTHING = [
    *(
        f"/run/run{path}"
        for path in ("", "/trial/4", "/compare?t=3&t=4&t=0", "/placement", "/latency", "/tools")
    ),
    "/kernels",
    "/spec/sequential.yaml",
    "/run/run/compare?t=4&s=sequential.yaml",
]

WHERE_THE_WINNER_IS = """() => {
  const plot = document.getElementById("plot-0");
  const traces = plot.querySelectorAll(".scatterlayer .trace");
  const box = [...traces].find((trace) => trace.__data__[0].trace.name === "winner").querySelector("path.point");
  const {x, y, width, height} = box.getBoundingClientRect();
  return {x: x + width / 2, y: y + height / 2};
}"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium_path() is None and not os.environ.get("CI"):
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        found = chromium(playwright)
        yield found
        found.close()


def _open(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("html[data-drawn], main:not(:has(.plot))")


def _watched(browser: Browser, **options: object) -> tuple[Page, list[str]]:
    """A page, and all that goes wrong in it: errors, refused scripts, requests to elsewhere."""
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.on(
        "request", lambda asked: wrong.append(asked.url) if "//localhost:" not in asked.url[:20] else None
    )
    return page, wrong


def test_a_search_is_followed_to_a_trial_a_comparison_and_an_export(
    browser: Browser, make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run()
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "events.jsonl").write_bytes(b"".join(lines[:9]))
    page, wrong = _watched(browser)
    with serving(folder) as base:
        _open(page, f"{base}/")
        assert page.url == f"{base}/run/run"
        expect(page.locator("main")).to_contain_text("The search is still under way")
        page.evaluate("window.same = true")
        with open(folder / "events.jsonl", "ab") as file:
            file.write(b"".join(lines[9:]))
        expect(page.locator("main")).to_contain_text("Trial 4 wins with")
        assert page.evaluate("window.same"), "the page was loaded again"
        assert page.locator("[data-live]:empty").count() == 0
        # Two trials of the made-up run have one score in the other task.
        _open(page, f"{base}/run/run?y=task:text")
        page.locator("#plot-0").scroll_into_view_if_needed()
        # Plotly lays its own layer over the points, so the pointer goes where the winner is drawn.
        place = page.evaluate(WHERE_THE_WINNER_IS)
        page.mouse.move(place["x"] - 3, place["y"])
        page.mouse.move(**place)
        expect(page.locator("#plot-0 .hoverlayer .hovertext")).to_contain_text("trial 4")
        page.mouse.click(**place)
        page.wait_for_url("**/trial/4")
        expect(page.get_by_role("heading", name="trial 4 ★ winner")).to_be_visible()
        page.goto(f"{base}/run/run")
        for number in (3, 4):
            page.get_by_label(f"Compare trial {number}", exact=True).check()
        page.get_by_role("button", name="Compare the chosen").click()
        expect(page.get_by_role("heading", name="trial 4 against trial 3")).to_be_visible()
        page.context.close()
    assert api.report(folder, tmp_path / "report.html").stat().st_size > 0
    assert not wrong


def _few_rows(folder: Path) -> Path:
    """The first rows of the benchmarks, in a folder of their own."""
    rows = (ROOT / "tests/bench/results/nvidia-h200.jsonl").read_text().splitlines(keepends=True)
    (folder / "bench").mkdir()
    (folder / "bench/some.jsonl").write_text("".join(rows[:30]))
    return folder / "bench"


@pytest.mark.long
def test_a_real_search_is_watched_from_its_first_trial_to_its_winner(
    browser: Browser, search_run: Path, tmp_path: Path
) -> None:
    for name in ("spec.yaml", "corpus.txt"):
        (tmp_path / name).write_bytes((search_run.parent / name).read_bytes())
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "heddle", "search", "spec.yaml", "--out", "runs/live"]
    page, wrong = _watched(browser)
    with serving(tmp_path / "runs") as base:
        _open(page, f"{base}/")
        expect(page.locator("main")).to_contain_text("There is no run in")
        page.evaluate("window.same = true")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as search:
            expect(page.get_by_role("link", name="tiny", exact=True)).to_be_visible(timeout=300_000)
            assert page.evaluate("window.same"), "the page was loaded again"
            page.get_by_role("link", name="tiny", exact=True).click()
            expect(page.locator("main")).to_contain_text("The search is still under way", timeout=60_000)
            expect(page.locator("main")).to_contain_text("wins with", timeout=600_000)
            assert search.wait(300) == 0
        expect(page.locator("main")).to_contain_text("finished")
        page.context.close()
    assert not wrong


# What a theme can spoil, on two pages that have all there is; the light one is looked at for everything.
RULES = {"light": None, "dark": {"runOnly": ["color-contrast"]}}
LOOKED_AT = {"light": EVERYTHING, "dark": EVERYTHING[:2]}


@pytest.mark.parametrize("theme", RULES)
def test_axe_finds_nothing_serious(browser: Browser, make_run: MakeRun, tmp_path: Path, theme: str) -> None:
    axe, found = Axe(), []
    # A plot is one picture with a caption; what it is drawn of is plotly's.
    context = {"exclude": [[".plot > *"]]}
    page, wrong = _watched(browser, color_scheme=theme, viewport={"width": 1280, "height": 800})
    with serving(with_predictions(with_model(make_run())), bench=_few_rows(tmp_path), specs=SPECS) as base:
        for path in LOOKED_AT[theme]:
            _open(page, base + path)
            for fault in axe.run(page, context, RULES[theme]).response["violations"]:
                if fault["impact"] in ("serious", "critical"):
                    found.append(f"{path}: {fault['id']}: {fault['nodes'][0]['html'][:200]}")
        page.context.close()
    assert not found, "\n".join(found)
    assert not wrong


def test_no_page_is_wider_than_a_phone(browser: Browser, make_run: MakeRun, tmp_path: Path) -> None:
    page, wrong = _watched(browser, viewport={"width": 390, "height": 780})
    with serving(with_predictions(with_model(make_run())), bench=_few_rows(tmp_path), specs=SPECS) as base:
        for path in EVERYTHING:
            _open(page, base + path)
            assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, path
        page.context.close()
    assert not wrong


def test_runs_side_by_side_are_whole_on_a_phone_and_without_fault(browser: Browser, two_runs: Path) -> None:
    axe = Axe()
    page, wrong = _watched(browser, viewport={"width": 390, "height": 780})
    with serving(two_runs) as base:
        for path in ("/", "/compare?t=one:3&t=two:4&t=two:0"):
            _open(page, base + path)
            assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, path
            faults = axe.run(page, {"exclude": [[".plot > *"]]}).response["violations"]
            assert not [fault["id"] for fault in faults if fault["impact"] in ("serious", "critical")], path
        _open(page, f"{base}/")
        for name in ("one: trial 4", "two: trial 2"):
            page.get_by_label(f"Compare {name}", exact=True).check()
        page.get_by_role("button", name="Compare the chosen").click()
        expect(page.get_by_role("heading", name="two: trial 2 against one: trial 4")).to_be_visible()
        # What was chosen stays while the fronts below are drawn over something else.
        page.get_by_label("Across").select_option("parameters")
        page.wait_for_url("**x=parameters**")
        assert page.url.count("t=") == 2
        page.context.close()
    assert not wrong


def test_a_section_that_moves_up_keeps_what_is_in_it(browser: Browser, make_run: MakeRun) -> None:
    # Of two pages with as many sections, "Plots" is the fourth of one and the third of the other.
    page, wrong = _watched(browser)
    with serving(make_run()) as base:
        _open(page, f"{base}/run/run")
        heads = page.locator("[data-live]")
        page.evaluate("""() => {
            const all = [...document.querySelectorAll("[data-live]")];
            all.at(-1).remove();
            const extra = all[0].cloneNode(true);
            extra.dataset.live = "00000000";
            all[0].before(extra);
        }""")
        page.get_by_label("Best so far over").select_option("device")
        page.wait_for_url("**over=device**")
        expect(heads.first).not_to_have_attribute("data-live", "00000000")
        assert page.locator("[data-live]:empty").count() == 0
        expect(page.locator("#plot-1")).to_contain_text("minutes of evaluations")
        page.context.close()
    assert not wrong


def test_every_page_is_reached_with_the_keyboard(browser: Browser, make_run: MakeRun) -> None:
    page, _ = _watched(browser)
    with serving(make_run()) as base:
        _open(page, f"{base}/run/run")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
        for _ in range(2):
            page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Front")).to_be_focused()
        for _ in range(2):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_url("**/placement")
        page.context.close()


def test_what_is_chosen_is_drawn_and_a_text_is_copied(browser: Browser, make_run: MakeRun) -> None:
    page, wrong = _watched(browser, permissions=["clipboard-read", "clipboard-write"])
    with serving(make_run()) as base:
        _open(page, f"{base}/run/run")
        page.get_by_label("Across").select_option("parameters")
        page.wait_for_url("**x=parameters**")
        expect(page.locator("#plot-0")).to_contain_text("parameters")
        # A trial is there without plotly, which draws what stands below as soon as it has come.
        asked: list[str] = []
        page.on("request", lambda one: asked.append(one.url))
        _open(page, f"{base}/run/run/trial/4")
        assert not [address for address in asked if "plotly" in address]
        expect(page.locator(".bars").first).to_contain_text("parameters")
        page.wait_for_function("() => [...document.querySelectorAll('.plot')].every((one) => one.firstChild)")
        page.get_by_role("button", name="Copy: Its spec").click()
        expect(page.get_by_role("button", name="Copy: Its spec")).to_have_text("Copied")
        assert "gated_deltanet" in page.evaluate("navigator.clipboard.readText()")
        page.context.close()
    assert not wrong
