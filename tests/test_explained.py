"""*Accumulation explained*: its code runs, its numbers were measured, its figure computes what we do."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from matplotlib import image

from experiments.explained import build, claims
from experiments.explained.pages import PAGES, blocks, filled, places, run
from gaccum_exp.core.reductions import reduction_named
from gaccum_exp.core.window import split_sizes
from gaccum_exp.report.figures.style import DPI, WIDTHS_INCHES
from tests.browsers import in_browser
from tests.support import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROUNDING = 1e-12
FIGURE = ROOT / "docs" / "_static" / "accumulation.html"
TEXTS = {language: path.read_text(encoding="utf-8") for language, path in PAGES.items()}
KEPT: dict[str, Any] = json.loads(build.RESULTS.read_text(encoding="utf-8"))
CJK = r"[\u4e00-\u9fff]"


@pytest.fixture(scope="module")
def ran() -> Iterator[dict[str, tuple[dict[str, Any], list[str]]]]:
    """Run the code of both pages as written; by language, what it defines and what it prints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {language: run(text) for language, text in TEXTS.items()}
    torch.set_num_threads(threads)


def agree(new: Any, kept: Any) -> bool:
    """Whether two results are the same; what is at rounding level has to be so in both."""
    if isinstance(new, dict):
        return new.keys() == kept.keys() and all(agree(new[name], kept[name]) for name in new)
    if isinstance(new, list):
        return len(new) == len(kept) and all(map(agree, new, kept))
    if isinstance(new, float):
        return max(new, kept) < ROUNDING or new == pytest.approx(kept, rel=1e-6)
    return bool(new == kept)


def numbers_in(text: str) -> list[float | str]:
    """Split what was printed into words, and read those that are numbers."""
    words = re.split(r"[\s,()\[\]]+", text.strip())
    return [float(word) if re.fullmatch(r"-?[\d.]+(e[+-]\d+)?", word) else word for word in words]


@pytest.mark.parametrize("language", PAGES)
def test_every_number_on_a_page_is_the_one_that_was_measured(language: str) -> None:
    """Filling in a page from the kept results changes nothing, and all that is measured is on it."""
    said = build.said(KEPT, language)
    assert filled(TEXTS[language], said) == TEXTS[language]
    assert places(TEXTS[language]).keys() == said.keys()


def test_a_wrong_number_would_be_noticed() -> None:
    """The check above can fail."""
    wrong = TEXTS["en"].replace("<!-- rest_scale -->0.50", "<!-- rest_scale -->0.51")
    assert wrong != TEXTS["en"]
    assert filled(wrong, build.said(KEPT, "en")) != wrong


@pytest.mark.parametrize("language", PAGES)
def test_the_code_of_a_page_prints_what_stands_below_it(ran: Any, language: str) -> None:
    """Run from top to bottom in one namespace; what is rounding there has to be rounding here."""
    printed = [text for text in ran[language][1] if text]
    for name, text in zip(build.PRINTS, printed, strict=True):
        there = numbers_in(KEPT["numbers"]["printed"][name])
        for new, kept in zip(numbers_in(text), there, strict=True):
            same = new == kept or (isinstance(new, float) and new == pytest.approx(kept, abs=ROUNDING))
            assert same, (name, new, kept)


def test_both_pages_hold_the_same_code() -> None:
    """But for comments and docstrings, which are in the language of the page."""

    def bare(block: str) -> str:
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                node.body[0] = ast.Pass()
        return ast.dump(tree)

    english, chinese = (list(map(bare, blocks(TEXTS[language]))) for language in PAGES)
    assert english == chinese


@pytest.mark.parametrize("claim", ["clearing", "splits", "summed", "edges", "others", "memory"])
def test_a_claim_is_measured_again(ran: Any, claim: str) -> None:
    """In float64, with the loops of the page: the same numbers, to six digits."""
    new = json.loads(json.dumps(getattr(claims, claim)(ran["en"][0])))
    assert agree(new, KEPT["numbers"]["sum" if claim == "summed" else claim])


def test_what_the_pages_say_in_words_is_what_was_measured() -> None:
    """Equal and summed windows are the large batch's; unequal ones are off, as the formula says."""
    numbers = KEPT["numbers"]
    for sizes, of in numbers["splits"].items():
        equal = len(set(sizes.split(", "))) == 1
        assert (of["mean"] < ROUNDING) == equal
        assert max(of["sum"], of["window"], of["formula_error"]) < ROUNDING
        assert of["sum_scale"] == pytest.approx(sum(map(int, sizes.split(", "))))
    ways = numbers["training"]["ways"]
    assert max(ways["mean, unequal"]["gap"]) > 0.01
    assert all(max(way["gap"]) < ROUNDING for name, way in ways.items() if name != "mean, unequal")
    assert all(
        other["right"] < ROUNDING < 0.1 < other["off"]
        for name, other in numbers["others"].items()
        if name != "precision"
    )
    worth = numbers["worth"]["table"]
    for at, best in (("equal_samples", "32"), ("equal_steps", "256")):
        assert min((of[at][0], batch) for batch, of in worth.items())[1] == best
    assert numbers["worth"]["noise_high"] < 32
    assert all(0.2 < of["rate"] < 1.6 for of in worth.values())  # between others that were tried
    assert list(numbers["memory"].values()) == sorted(numbers["memory"].values(), reverse=True)


def test_the_figures_are_drawn_from_what_is_kept(tmp_path: Path) -> None:
    """In the style of all figures, twice the same bytes."""
    build.draw(KEPT["numbers"], tmp_path)
    build.draw_gap(KEPT["numbers"], tmp_path / "again")
    gap = "accumulation_gap.png"
    assert (tmp_path / gap).read_bytes() == (tmp_path / "again" / gap).read_bytes()
    for path in sorted(tmp_path.glob("*.png")):
        assert image.imread(path).shape[1] == round(DPI * WIDTHS_INCHES["double"])
        assert f"../_static/{path.name}" in TEXTS["en"]
        assert f"../_static/{path.name}" in TEXTS["zh"]
        assert (ROOT / "docs" / "_static" / path.name).exists()


def test_the_same_numbers_keep_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that building the pages again changes no byte; other numbers bring their own provenance."""
    monkeypatch.setattr(build, "RESULTS", tmp_path / "results.json")
    for numbers, where, expected in (({"a": 1}, "x", "x"), ({"a": 1}, "y", "x"), ({"a": 2}, "z", "z")):
        build.keep({"numbers": numbers, "provenance": where})
        assert json.loads(build.RESULTS.read_text())["provenance"] == expected


@pytest.mark.parametrize("page", [*PAGES.values(), ROOT / "docs" / "zh" / "index.md"])
def test_no_line_of_text_is_taken_for_html(page: Path) -> None:
    """A mark that begins a line stands alone there, or Markdown would not format the rest of it."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"\s*<!-- (\w+|/) -->.", line)] == []


@pytest.mark.parametrize("page", [PAGES["zh"], ROOT / "docs" / "zh" / "index.md"])
def test_chinese_is_set_as_chinese_is(page: Path) -> None:
    """Full-width punctuation, no line break in a paragraph (it would be a blank), one word a thing."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = re.sub(r"`[^`]*`", "x", re.sub(r"<!-- .*? -->", "", text))
    assert re.findall(rf"{CJK}[,;:!?()](?!//)|[,;:!?]{CJK}", shown) == []
    assert re.findall(rf"{CJK}\.(?=\s|$)", shown, re.MULTILINE) == []
    assert re.findall(rf"{CJK}\n(?![|\-\d]){CJK}", text) == []
    assert re.findall(rf"{CJK} {CJK}|(?:[，。；：、]) |\s[，。；：、）]", shown) == []
    assert re.findall("微批次|小批次|梯度累加|优化步", text) == []


# The figure in which the split can be changed

ROWS = "() => [...document.querySelectorAll('tbody tr')].map(r => Number(r.dataset.weight))"


def opened(browser: "Browser", language: str = "en", **how: Any) -> tuple["Page", list[str]]:
    """Return the figure in a page, without a network, and all that it asks for or complains of."""
    page = browser.new_context(offline=True, **how).new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url))
    inside = f'<main><h1>a</h1><div lang="{language}">{FIGURE.read_text(encoding="utf-8")}</div></main>'
    page.set_content(f'<!doctype html><html lang="en"><title>a</title><body>{inside}</body></html>')
    return page, heard


def test_the_table_for_readers_without_script_holds_our_formula() -> None:
    """The weights that stand in the file, against core/reductions."""
    static = [float(weight) for weight in re.findall(r'<tr data-weight="([\d.]+)"', FIGURE.read_text())]
    assert static == claims.sample_weights((8, 8, 8, 2), reduction_named("mean"))


@pytest.mark.browser
@in_browser
def test_the_figure_computes_what_core_reductions_does(browser: "Browser") -> None:
    """Typed sizes and sliders, every reduction: the weight of each sample, to the last digits."""
    page, heard = opened(browser)
    for sizes in ([8, 8, 8, 2], [5], [1, 1, 1], [13, 21, 28, 38], [29, 1, 1, 1], [9999, 1]):
        page.get_by_label("their sizes").fill(", ".join(map(str, sizes)))
        for label, name in (("mean, divided by N", "mean"), ("sum, not divided", "sum"),
                            ("sum, divided by n", "global_mean")):  # fmt: skip
            page.get_by_label(label).check()
            ours = claims.sample_weights(sizes, reduction_named(name))
            assert page.evaluate(ROWS) == pytest.approx(ours, rel=1e-15), (sizes, name)
    for samples, parts in ((64, 4), (32, 5), (3, 16), (1, 1)):
        for label, value in (("samples n", samples), ("micro-batches N", parts)):
            page.get_by_label(label).evaluate(
                "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", value
            )
        told = page.get_by_label("their sizes").input_value()
        assert [int(size) for size in told.split(", ")] == split_sizes(samples, parts)
    assert heard == []


@pytest.mark.browser
@in_browser
def test_the_figure_says_in_words_how_far_a_split_is_off(browser: "Browser") -> None:
    """By keyboard; what is typed wrong is said, and the last drawing stays."""
    page, _ = opened(browser)
    status = page.get_by_role("status")
    assert "micro-batch 4 a sample counts 3.25 times" in status.inner_text()
    page.get_by_label("mean, divided by N").focus()
    page.keyboard.press("ArrowDown")
    assert "26 times that of its mean" in status.inner_text()
    page.keyboard.press("ArrowDown")
    assert "Every sample counts 1/26" in status.inner_text()
    for wrong in ("", "8, -1", "8, 0", "a", "1.5", "1," * 65):
        page.get_by_label("their sizes").fill(wrong)
        assert status.inner_text().startswith("Sizes are")
        assert page.get_by_label("their sizes").get_attribute("aria-invalid") == "true"
    assert page.locator("svg rect").count() == 26
    page.get_by_role("button", name="equal", exact=True).focus()
    page.keyboard.press("Enter")
    assert "Every sample counts 1/32" in status.inner_text()


@pytest.mark.browser
@in_browser
@pytest.mark.parametrize(("language", "scheme"), [("en", "dark"), ("zh-Hans", "light")])
def test_the_figure_is_for_everyone(browser: "Browser", language: str, scheme: str) -> None:
    """In both languages, light and dark, on a phone: nothing is cut off, axe finds nothing serious."""
    from axe_playwright_python.sync_playwright import Axe

    page, heard = opened(browser, language, color_scheme=scheme, viewport={"width": 390, "height": 800})
    page.locator("details").evaluate("e => e.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    chinese = bool(re.search(CJK, page.locator("figure").inner_text()))
    assert chinese == (language != "en")
    assert not (chinese and re.search("micro-batch|sample", page.locator("figure").inner_text()))
    found = Axe().run(page).response["violations"]
    assert [f["id"] for f in found if f["impact"] in ("serious", "critical")] == []
    assert heard == []
