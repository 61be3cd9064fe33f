"""A reader opens the page: without a network, by keyboard, in a frame that may do little."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gaccum_exp.audit.audited_window import AuditedWindow
from gaccum_exp.report.compare.batches import compare_batches
from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.report.page.write_page import write_page
from gaccum_exp.tracking.records import RunRecord
from tests.browsers import IN_BROWSER
from tests.report.page.test_page import window
from tests.shortened import shortened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Frame, Page

Arm = Callable[..., RunRecord]
pytestmark = list(IN_BROWSER)
PATHS = """() => [...document.querySelectorAll('[data-plot=loss] .mark-line path')]
    .map(path => path.getAttribute('d'))"""
TOLD = {
    "loss": r"N=\d · micro \d+ · mean\s*step \d+: train loss \d\.\d+",
    "gap": r"N=\d · micro \d+ · mean\s*step \d+: largest difference so far \d",
    "memory": r"N = \d\s*\w+ \w*\s*[\d.]+ MiB",
    "tradeoff": r"N = \d[^\n]*\s*[\d.]+ ms \([\d.]+ to [\d.]+\), [\d.]+ MiB",
    "window": r"micro-batch \d\s*samples \d+ to \d+, one \w+ weighs [\d.]+ ×",
    "errors": r"\w+, (window|micro-batch \d)\s*(error \S+, (above|within)|no error)",
    "noise": r"N = \d[^\n]*\s*noise scale 90, 70 to 120 samples; global batch \d+",
    "batches": r"batch \d+\s*train loss at [\d,]+ samples: [\d.]+ \([\d.]+ to [\d.]+\)",
}
"""What a mark of each figure says."""
STRICT = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@pytest.fixture
def written(arm: Arm, audited: Callable[..., RunRecord], control: Arm, tmp_path: Path) -> Path:
    """Write a page that has every part."""
    runs = [
        audited(arm(n, global_batch=b, seed=s, n_losses=40, micro_batch=b // n), "equivalent")
        for b in (128, 256) for s in (0, 1) for n in (1, 2, 4)
    ]  # fmt: skip
    runs += [control(runs[0], 1, 1e-7)]
    told = {"noise/trace": 1.0, "noise/scale": 90.0, "noise/scale_low": 70.0, "noise/scale_high": 120.0}
    for run in runs[1:3]:
        curves: Any = run.curves
        curves.update({name: type(run.curves["train/loss"])((3,), (v,)) for name, v in told.items()})
    windows = {
        run.run_id: AuditedWindow.of_json(json.dumps(window(run.accum_steps or 1, samples=128)))
        for run in runs
        if run.accum_steps != 1
    }
    comparison = compare(runs)
    return write_page(comparison, runs, tmp_path, compare_batches(comparison, runs), windows.get)


class Opened:
    """A page that is open, and what was heard of it."""

    def __init__(self, browser: "Browser", path: Path, **how: Any) -> None:
        self.context = browser.new_context(offline=True, **how)
        self.page: Page = self.context.new_page()
        self.heard: list[str] = []
        self.page.on("console", lambda message: self.heard.append(message.text))
        self.page.on("pageerror", lambda error: self.heard.append(str(error)))
        self.page.on("request", lambda request: self.heard.append(request.url[:80]))
        self.page.goto(path.as_uri())
        assert self.heard[0].startswith("file:")
        self.heard = [said for said in self.heard[1:] if not said.startswith("data:")]


def drawn(frame: "Page | Frame") -> list[str]:
    """Return the paths of the loss curves, once every figure is drawn."""
    plots = "[...document.querySelectorAll('.plot')]"
    done = "p => p.offsetParent === null || p.firstChild && !p.querySelector('.pending')"
    frame.wait_for_function(f"() => {plots}.every({done})")
    paths: list[str] = frame.evaluate(PATHS)
    return paths


@pytest.mark.parametrize("scheme", shortened(["light", "dark"], ["dark"]))
def test_everything_is_drawn_without_a_network_and_for_everyone(
    browser: "Browser", written: Path, scheme: str
) -> None:
    """Each figure, nothing asked for, nothing complained of; axe finds nothing serious."""
    from axe_playwright_python.sync_playwright import Axe

    opened = Opened(browser, written, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    assert drawn(opened.page)
    plots = "() => [...document.querySelectorAll('.plot:has(svg)')].map(p => p.dataset.plot)"
    kinds = opened.page.evaluate(plots)
    assert set(kinds) == {"loss", "gap", "memory", "tradeoff", "window", "errors", "noise", "batches"}
    opened.page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(opened.page).response["violations"]
    assert [
        (f["id"], f["nodes"][0]["html"]) for f in found if f["impact"] in ("serious", "critical")
    ] == []
    assert opened.heard == []


def test_switches_and_the_budget_change_what_is_drawn(browser: "Browser", written: Path) -> None:
    """With the keyboard alone; off and on again draws the same."""
    page = Opened(browser, written).page
    before = drawn(page)
    page.get_by_label("N = 2").focus()
    page.keyboard.press("Space")
    page.wait_for_function(f"before => ({PATHS})().length < before", arg=len(before))
    page.keyboard.press("Space")
    page.wait_for_function(f"before => ({PATHS})().length === before", arg=len(before))
    assert drawn(page) == before
    for name in ("logarithmic", "linear"):
        now = drawn(page)
        page.get_by_label(name, exact=True).check()
        page.wait_for_function(f"now => ({PATHS})().join() !== now", arg=",".join(now))
    for name in ("samples", "seconds"):
        page.get_by_label(name, exact=True).check()
        titles = page.locator("[data-plot=loss] .role-axis-title")
        titles.filter(has_text=name).first.wait_for(state="attached")
    words = page.locator("output[name=words]")
    page.get_by_label("Budget", exact=True).focus()
    page.keyboard.press("Home")
    assert "no N fits" in words.inner_text()
    page.keyboard.press("End")
    assert "every N fits" in words.inner_text()


def test_a_mark_says_what_it_is_to_the_pointer_and_to_the_keyboard(
    browser: "Browser", written: Path
) -> None:
    """Of every figure: arm, place and value; Escape silences it, and a finger asks it too."""
    page = Opened(browser, written, has_touch=True).page
    drawn(page)
    tip = page.locator("#tip")
    for plot, said in TOLD.items():
        figure = page.locator(f"[data-plot={plot}]:visible").first
        figure.hover()
        assert re.search(said, tip.inner_text()), plot
        page.mouse.move(0, 0)
        assert tip.inner_text() == ""
        figure.tap()
        assert re.search(said, tip.inner_text()), plot
        page.keyboard.press("Escape")
        assert tip.inner_text() == ""
    loss = page.locator("[data-plot=loss]").first
    loss.focus()
    for key, begins, step in (
        ("Home", "N=1 ", 1), ("ArrowRight", "N=1 ", 2), ("ArrowDown", "N=", 2), ("End", "N=", 40),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert re.match(rf"{begins}[^\n]*\s*step {step}: train loss [\d.]+$", tip.inner_text()), key
    loss.blur()
    assert tip.inner_text() == ""


def test_it_draws_in_a_frame_that_allows_scripts_alone(
    browser: "Browser", written: Path, tmp_path: Path
) -> None:
    """As MLflow shows it, and under a policy against `eval` besides."""
    policy = f'<head><meta http-equiv="Content-Security-Policy" content="{STRICT}">'
    inside = html.escape(written.read_text().replace("<head>", policy))
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<!doctype html><meta charset="utf-8"><iframe sandbox="allow-scripts" width="900" height="800" '
        f'srcdoc="{inside}"></iframe>'
    )
    opened = Opened(browser, frame)
    inner = opened.page.frames[1]
    before = drawn(inner)
    assert before
    inner.get_by_label("N = 4").uncheck()
    inner.wait_for_function(f"before => ({PATHS})().length < before", arg=len(before))
    assert [said for said in opened.heard if not said.startswith("about:")] == []


def test_a_phone_and_paper_hold_it(browser: "Browser", written: Path) -> None:
    """Nothing is wider than 390 pixels; on paper a dark screen's figures are dark on white."""
    page = Opened(browser, written, color_scheme="dark", viewport={"width": 390, "height": 800}).page
    drawn(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    ends = (
        "() => [...document.querySelectorAll('caption span')].map(c => c.getBoundingClientRect().right)"
    )
    assert max(page.evaluate(ends)) <= 390
    assert page.pdf()[:4] == b"%PDF"
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    ink = "() => document.querySelector('[data-plot=memory] .role-axis-label text').getAttribute('fill')"
    page.wait_for_function(f"() => ({ink})() === '#566072'")
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    page.wait_for_function(f"() => ({ink})() !== '#566072'")


def test_the_newest_of_two_drawings_stays(browser: "Browser", written: Path) -> None:
    """Whatever was asked for before it, and is ready after it."""
    page = Opened(browser, written).page
    drawn(page)
    page.evaluate("""() => {
        const boxes = [...document.querySelectorAll('input[name=group]')];
        for (const keeps of [0, -1]) {
            boxes.forEach((box, index) => { box.checked = index === keeps; });
            boxes[0].dispatchEvent(new Event('change', { bubbles: true }));
        }
    }""")
    page.get_by_label("Budget", exact=True).press("Home")
    page.wait_for_timeout(300)
    assert drawn(page) == []
    said = page.locator("[data-plot=loss]").all_inner_texts()
    assert set(said) == {"No arm is chosen."}


def test_a_number_without_a_neighbour_is_a_point(browser: "Browser", arm: Arm, tmp_path: Path) -> None:
    """A training of one step has one, and one that fell apart after it; an unknown peak is said."""
    runs = [arm(n, losses=[2.0 + n / 100]) for n in (1, 2)]
    runs.append(arm(4, losses=[2.5, float("nan"), float("nan")]))
    gone = ("memory/peak_bytes", "memory/predicted_peak_bytes", "train/loss")
    runs.append(arm(8, status="FAILED", drop=gone))
    opened = Opened(browser, write_page(compare(runs), runs, tmp_path))
    drawn(opened.page)
    for plot, points in (("loss", 3), ("gap", 2)):
        symbols = opened.page.locator(f"[data-plot={plot}] .mark-symbol.role-mark path")
        assert symbols.count() == points
    assert "no peak is known of N = 8." in opened.page.locator("output[name=words]").inner_text()
    assert opened.heard == []
