"""The dashboard in Chromium: a search is followed, a point leads to its trial, trials are compared, axe finds no fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import chromium, chromium_path, serving
from latency_models import with_model, with_predictions
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tiny_search import SEARCH, TINY_SEARCH, small_corpus

from heddle import api
from heddle.search.record import read_run

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
SPECS = [ROOT / "examples/specs/sequential.yaml"]
EVERYTHING = [
    *(
        f"/run/run{path}"
        for path in (
            "",
            "/trial/4",
            "/trial/12",
            "/compare?t=3&t=4&t=0",
            "/compare",
            "/placement",
            "/latency",
            "/tools",
        )
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


def _search(folder: Path) -> subprocess.Popen[str]:
    """A real search of six small models, begun in `folder`; its run is `runs/live`."""
    small_corpus(folder / "corpus.txt")
    spec = TINY_SEARCH
    for old, new in (("trials: 4", "trials: 6"), ("8k", "12k"), ("confirm_seeds: 2", "confirm_seeds: 0")):
        spec = spec.replace(old, new)
    (folder / "spec.yaml").write_text(spec)
    command = [sys.executable, "-c", SEARCH, "search", "spec.yaml", "--out", "runs/live"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True
    )


# Keeps how many trials the page has said to be told, without looking away.
KEEP_WHAT_WAS_TOLD = """() => {
  window.told = new Set();
  const look = () => {
    const found = document.querySelector("main").textContent.match(/(\\d+) of 6trials told/);
    if (found) window.told.add(Number(found[1]));
  };
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true});
}"""


def test_a_real_search_is_watched_to_a_trial_a_comparison_and_a_report(
    browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    page, wrong = _watched(browser)
    with serving(tmp_path / "runs") as base:
        _open(page, f"{base}/")
        expect(page.locator("main")).to_contain_text("There is no run in")
        page.evaluate(KEEP_WHAT_WAS_TOLD)
        with _search(tmp_path) as search:
            link = page.get_by_role("link", name="tiny", exact=True)
            expect(link).to_be_visible(timeout=120_000)
            link.click()
            expect(page.locator("main")).to_contain_text("The search is still under way", timeout=60_000)
            expect(page.locator("main")).to_contain_text("wins with", timeout=120_000)
            printed, _ = search.communicate(timeout=120)
            assert search.returncode == 0, printed
        expect(page.locator(".tiles")).to_contain_text("finishedstatus")
        told = page.evaluate("[...window.told]")
        assert len(told) >= 3, told
        assert told == sorted(told), "the page was loaded again, or went back"
        assert told[-1] == 6
        best = read_run(tmp_path / "runs/live").best
        _click_the_winner(
            page, f"trial {best}", others=[f"trial {number}" for number in range(6) if number != best]
        )
        page.wait_for_url(f"**/trial/{best}")
        expect(page.get_by_role("heading", name=f"trial {best} ★ winner")).to_be_visible()
        page.get_by_role("link", name="Front", exact=True).click()
        others = [number for number in range(6) if number != best][:1]
        for number in (best, *others):
            page.get_by_label(f"Compare trial {number}", exact=True).check()
        page.get_by_role("button", name="Compare the chosen").click()
        first, second = sorted((best, *others), key=lambda number: number == best)
        pair = rf"trial ({first} against trial {second}|{second} against trial {first})"
        expect(page.get_by_role("heading", name=re.compile(pair))).to_be_visible()
        page.context.close()
    assert not wrong
    _report_is_read(browser, tmp_path, f"Trial {best} wins with")


def _click_the_winner(page: Page, name: str, others: list[str]) -> None:
    page.locator("#plot-0").scroll_into_view_if_needed()
    # Plotly lays its own layer over the points, so the pointer goes where the winner is drawn.
    place = page.evaluate(WHERE_THE_WINNER_IS)
    page.mouse.move(place["x"] - 3, place["y"])
    page.mouse.move(**place)
    told = page.locator("#plot-0 .hoverlayer .hovertext")
    expect(told).to_contain_text(re.compile("|".join([name, *others])))
    if name in (told.text_content() or ""):
        page.mouse.click(**place)
    else:
        # Timed on a busy machine, one that is as good may lie on top of it.
        page.goto(f"{page.url.partition('?')[0].rstrip('/')}/{name.replace(' ', '/')}")


def _report_is_read(browser: Browser, folder: Path, verdict: str) -> None:
    """The report as its reader opens it: a file, with scripts and without, that asks for nothing else."""
    command = [sys.executable, "-P", "-m", "heddle", "report", "runs/live", "--out", "report.html"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    address = (folder / "report.html").as_uri()
    for has_scripts in (True, False):
        page = browser.new_context(java_script_enabled=has_scripts).new_page()
        asked: list[str] = []
        page.on("request", lambda one, asked=asked: asked.append(one.url))
        page.on("pageerror", lambda error, asked=asked: asked.append(str(error)))
        page.goto(address)
        expect(page.locator("main table").first).to_be_visible()
        expect(page.locator("header")).to_contain_text(verdict)
        if has_scripts:
            page.wait_for_function(
                "() => [...document.querySelectorAll('.plot')].every((one) => one.firstChild)"
            )
            assert page.locator(".plot .main-svg").count() > 10
        else:
            assert "The plots need scripts" in page.locator("main").inner_text()
            expect(page.locator("figure table").first).to_be_visible()
        assert asked == [address]
        page.context.close()


def _few_rows(folder: Path) -> Path:
    """The first rows of the benchmarks, in a folder of their own."""
    rows = (ROOT / "tests/bench/results/nvidia-h200.jsonl").read_text().splitlines(keepends=True)
    (folder / "bench").mkdir()
    (folder / "bench/some.jsonl").write_text("".join(rows[:30]))
    return folder / "bench"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, make_run: MakeRun, tmp_path: Path, theme: str) -> None:
    axe, found = Axe(), []
    # A plot is one picture with a caption; what it is drawn of is plotly's.
    context = {"exclude": [[".plot > *"]]}
    page, wrong = _watched(browser, color_scheme=theme, viewport={"width": 1280, "height": 800})
    folder = with_predictions(with_model(make_run()))
    report = api.report(folder, tmp_path / "report.html").as_uri()
    with serving(folder, bench=_few_rows(tmp_path), specs=SPECS) as base:
        for address in (*(base + path for path in EVERYTHING), report):
            _open(page, address)
            for fault in axe.run(page, context).response["violations"]:
                if fault["impact"] in ("serious", "critical"):
                    found.append(f"{address}: {fault['id']}: {fault['nodes'][0]['html'][:200]}")
        page.context.close()
    assert not found, "\n".join(found)
    assert [one for one in wrong if one != report] == []


def test_no_page_is_wider_than_a_phone(browser: Browser, make_run: MakeRun, tmp_path: Path) -> None:
    page, wrong = _watched(browser, viewport={"width": 390, "height": 780})
    with serving(with_predictions(with_model(make_run())), bench=_few_rows(tmp_path), specs=SPECS) as base:
        for path in EVERYTHING:
            _open(page, base + path)
            assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, path
        page.context.close()
    assert not wrong


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_runs_side_by_side_are_whole_on_a_phone_and_without_fault(
    browser: Browser, two_runs: Path, theme: str
) -> None:
    axe = Axe()
    page, wrong = _watched(browser, color_scheme=theme, viewport={"width": 390, "height": 780})
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
        expect(page.locator("#plot-1")).to_contain_text("worker-seconds")
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


# What can be operated and is seen: where the focus is among it.
CONTROLS = """[...document.querySelectorAll("a[href], button, select, input, textarea, summary, [tabindex='0']")]
    .filter((one) => one.checkVisibility() && !one.disabled)"""


def test_every_control_is_reached_and_worked_with_the_keyboard(browser: Browser, make_run: MakeRun) -> None:
    page, _ = _watched(browser)
    with serving(make_run()) as base:
        for path in ("/run/run", "/run/run/trial/4", "/run/run/compare?t=3&t=4", "/kernels"):
            _open(page, base + path)
            count, reached = page.evaluate(f"{CONTROLS}.length"), set()
            for _ in range(count + 5):
                page.keyboard.press("Tab")
                reached.add(page.evaluate(f"{CONTROLS}.indexOf(document.activeElement)"))
            missed = page.evaluate(
                f"(seen) => {CONTROLS}.filter((_, at) => !seen.includes(at)).map((one) => one.outerHTML)",
                list(reached),
            )
            assert not missed, path
        _open(page, f"{base}/run/run")
        page.get_by_label("Across").focus()
        page.keyboard.press("ArrowDown")
        page.wait_for_url("**x=**")
        page.context.close()


def test_any_plot_is_saved_as_a_picture(browser: Browser, make_run: MakeRun, tmp_path: Path) -> None:
    page, wrong = _watched(browser, color_scheme="dark")
    with serving(make_run(), bench=_few_rows(tmp_path)) as base:
        for path in ("/run/run/compare?t=3&t=4", "/kernels"):
            _open(page, base + path)
            for form, begins in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
                with page.expect_download() as told:
                    page.get_by_role("button", name=f"Save this plot as {form}").first.click()
                name = page.evaluate("window.heddleFigures()[0].name")
                assert told.value.suggested_filename == f"{name}.{form.lower()}"
                assert Path(told.value.path()).read_bytes().startswith(begins)
        page.context.close()
    assert not [one for one in wrong if not one.startswith(f"blob:{base}/")]


# Looks at the moment in which the page says that what is seen is drawn.
KEEP_WHETHER_PLOTLY_CAME_FIRST = """new MutationObserver(() => {
  if (document.documentElement.dataset.drawn) window.plotlyFirst ??= Boolean(document.querySelector("script[src*=plotly]"));
}).observe(document, {subtree: true, attributes: true, attributeFilter: ["data-drawn"]});"""


def test_what_is_chosen_is_drawn_and_a_text_is_copied(browser: Browser, make_run: MakeRun) -> None:
    page, wrong = _watched(browser, permissions=["clipboard-read", "clipboard-write"])
    with serving(make_run()) as base:
        _open(page, f"{base}/run/run")
        page.get_by_label("Across").select_option("parameters")
        page.wait_for_url("**x=parameters**")
        expect(page.locator("#plot-0")).to_contain_text("parameters")
        # A trial is there without plotly, which draws what stands below as soon as it has come.
        page.add_init_script(KEEP_WHETHER_PLOTLY_CAME_FIRST)
        _open(page, f"{base}/run/run/trial/4")
        assert page.evaluate("window.plotlyFirst") is False
        expect(page.locator(".bars").first).to_contain_text("parameters")
        page.wait_for_function("() => [...document.querySelectorAll('.plot')].every((one) => one.firstChild)")
        page.get_by_role("button", name="Copy: Its spec").click()
        expect(page.get_by_role("button", name="Copy: Its spec")).to_have_text("Copied")
        assert "gated_deltanet" in page.evaluate("navigator.clipboard.readText()")
        page.context.close()
    assert not wrong
