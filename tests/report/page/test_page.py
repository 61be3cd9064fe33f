"""The page says what the comparison says, in any sweep, and the same bytes each time."""

import csv
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from gaccum_exp.audit.audited_window import AuditedWindow
from gaccum_exp.report.compare.batches import compare_batches
from gaccum_exp.report.compare.comparison import compare, write_csv
from gaccum_exp.report.page import vega
from gaccum_exp.report.page.arms import arm_section, commands
from gaccum_exp.report.page.write_page import write_page
from gaccum_exp.report.text.summary import summary
from gaccum_exp.tracking.records import Curve, RunRecord

Arm = Callable[..., RunRecord]
HOSTILE = """</script><script>alert("1")</script><img src=x onerror='alert(1)'>&amp;"""
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """Reads a page: that what is opened is closed, its tables by caption, its text, its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.said = self.data = ""
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self.tables.setdefault(self._caption, self._rows)

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.data = self.data or data
            return
        if "style" in self.open:
            return
        self.said += data.replace("\u00a0", " ")  # which keeps `N = 8` on a line
        if {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data
        elif "caption" in self.open:
            self._caption += data

    def shown(self) -> dict[str, Any]:
        """Return what the figures are drawn from."""
        data: dict[str, Any] = json.loads(self.data)
        return data


def text_of(folder: Path, runs: Sequence[RunRecord], windows: Mapping[str, Any] | None = None) -> str:
    """Write the page of these runs, and return it."""
    comparison = compare(runs)
    write_csv(comparison, folder / "comparison.csv")
    batches = compare_batches(comparison, runs)

    def window_of(run_id: str) -> AuditedWindow | None:
        kept = (windows or {}).get(run_id)
        return None if kept is None else AuditedWindow.of_json(json.dumps(kept))

    return write_page(comparison, runs, folder, batches, window_of).read_text()


def page_of(folder: Path, runs: Sequence[RunRecord], windows: Mapping[str, Any] | None = None) -> Page:
    """Write the page of these runs, and read it."""
    return Page(text_of(folder, runs, windows))


def sweep(arm: Arm, **given: Any) -> list[RunRecord]:
    """Return the arms of N = 1, 2, 4 and 8."""
    return [arm(n, **given) for n in (1, 2, 4, 8)]


def test_numbers_are_those_of_the_file(arm: Arm, tmp_path: Path) -> None:
    """Every cell of `comparison.csv` stands in the page's table of it, digit by digit."""
    page = page_of(tmp_path, sweep(arm, reduction="mean") + sweep(arm, reduction="sum"))
    with (tmp_path / "comparison.csv").open(newline="") as file:
        assert page.tables["comparison.csv"] == list(csv.reader(file))


def test_the_answer_comes_first(arm: Arm, audited: Callable[..., RunRecord], tmp_path: Path) -> None:
    """The summary's words, unchanged, before any table."""
    runs = [audited(run, "equivalent") for run in sweep(arm)]
    page = page_of(tmp_path, runs)
    said = summary(compare(runs))
    assert page.said.index(said) < page.said.index("The arms compared")
    assert said.startswith("N = 2, 4 and 8 are equivalent to the large batch")


@pytest.mark.parametrize("seeds", [1, 20])
def test_the_same_runs_give_the_same_bytes(arm: Arm, tmp_path: Path, seeds: int) -> None:
    """Whatever order they are read in; and nothing in it tells the time or the place."""
    runs = [run for seed in range(seeds) for run in sweep(arm, seed=seed)]
    first = text_of(tmp_path, runs)
    assert text_of(tmp_path, runs[::-1]) == first
    assert str(tmp_path) not in first


def test_words_of_strangers_are_only_words(arm: Arm, tmp_path: Path) -> None:
    """Names, overrides and failures with tags and quotes in them open no element."""
    runs = [
        arm(
            n, run_id=f"{n}{HOSTILE}", params={"model._target_": HOSTILE, "seed": HOSTILE},
            tags={"overrides": f"model.name={HOSTILE}", "device": HOSTILE, "sweep_id": HOSTILE},
        )
        for n in (1, 2)
    ]  # fmt: skip
    runs.append(arm(4, status="FAILED", tags={"failure": HOSTILE, "remedy": HOSTILE}))
    windows = {run.run_id: window(2, name=HOSTILE) for run in runs}
    page = page_of(tmp_path, runs, windows)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert HOSTILE in page.said
    assert HOSTILE in json.dumps(page.shown(), ensure_ascii=False).replace('\\"', '"')


def test_parts_are_well_formed_and_named(arm: Arm, tmp_path: Path) -> None:
    """Ids are unique, what refers to one finds it, every figure has a name, and nothing is fetched."""
    runs = [run for seed in range(2) for run in sweep(arm, seed=seed)]
    page = page_of(tmp_path, runs, {runs[1].run_id: window(2)})
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    refer = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert refer
    assert set(refer) <= set(ids)
    figures = [a for _, a in page.tags if "data-plot" in a]
    assert {a["data-plot"] for a in figures} >= {"loss", "gap", "memory", "tradeoff", "window", "errors"}
    assert all(a["role"] == "img" and a["aria-label"] for a in figures)
    assert [tag for tag, _ in page.tags].count("details") >= 6
    sources = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert sources == ["data:,"]


def test_a_spike_is_drawn_however_many_arms_there_are(arm: Arm, tmp_path: Path) -> None:
    """200 arms × 1,000 steps stay below 2 MB, and one loss of 200,000 that leaps is in the page."""
    runs = [arm(n, seed=seed, n_losses=1000) for seed in range(50) for n in (1, 2, 4, 8)]
    losses = list(runs[121].curves["train/loss"].values)
    losses[617] = 77.125
    steps = runs[121].curves["train/loss"].global_steps
    runs[121] = arm(2, seed=30, n_losses=1000, losses=losses, tags={"note": "the one that leaps"})
    assert runs[121].curves["train/loss"] == Curve(steps, tuple(losses))
    page = page_of(tmp_path, runs)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    (panel,) = page.shown()["curves"]["panels"]
    assert max(v for curve in panel["losses"] for v in curve["high"]) == 77.125
    (leapt,) = [c for c in panel["gaps"] if max(v or 0 for v in c["high"]) > 70]
    assert leapt["steps"][[v > 70 for v in leapt["high"]].index(True)] == 618


def test_the_largest_page_is_small_enough(arm: Arm, tmp_path: Path) -> None:
    """Five settings of 40 arms have a curve each, windows have 128 micro-batches and 60 layers: 2 MB."""
    rates = [{"optimizer.lr": str(rate)} for rate in range(5)]
    runs = [
        arm(n, run_id=f"{n}-{rate}", n_losses=1000, params=rate) for rate in rates for n in range(1, 41)
    ]
    kept = window(128, samples=1024)
    kept["layers"] *= 60
    page_of(tmp_path, runs, {run.run_id: kept for run in runs})
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_curves_hold_what_was_recorded(arm: Arm, control: Arm, tmp_path: Path) -> None:
    """Each arm's losses in five digits, the samples of each step, and the envelope of the controls."""
    runs = sweep(arm)
    runs += [control(runs[0], seed, 1e-6 * seed) for seed in (1, 2)]
    shown = page_of(tmp_path, runs).shown()["curves"]
    (panel,) = shown["panels"]
    assert [group["label"] for group in shown["groups"]] == [
        "N = 1 (reference)",
        "N = 2",
        "N = 4",
        "N = 8",
    ]
    for curve in panel["losses"]:
        recorded = runs[curve["group"]].curves["train/loss"]
        assert curve["steps"] == list(recorded.global_steps)
        assert curve["values"] == [float(f"{value:.5g}") for value in recorded.values]
        assert curve["batch"] == 256
    for curve in panel["gaps"]:
        assert curve["values"] == sorted(curve["values"])  # the largest so far never falls
    (envelope,) = panel["envelopes"]
    assert envelope["values"][-1] == pytest.approx(2e-6, rel=1e-2)


@pytest.mark.parametrize(
    ("given", "absent"),
    [
        ({"drop": ("memory/peak_bytes", "memory/predicted_peak_bytes")}, "Peak memory"),
        ({"drop": ("time/step_s",)}, "Memory against time"),
        ({"drop": ("train/loss",)}, "Loss curves"),
        ({}, "Noise scale"),
        ({}, "One window"),
    ],
)
def test_what_was_not_recorded_has_no_part(
    arm: Arm, tmp_path: Path, given: Mapping[str, Any], absent: str
) -> None:
    """No empty axes: the part is left out, and the others stay."""
    page = page_of(tmp_path, sweep(arm, **given))
    assert absent not in page.said
    assert "Run it again" in page.said


def test_arms_that_failed_say_why(arm: Arm, tmp_path: Path) -> None:
    """One was refused before it had a configuration, one failed, one is alone: pages all the same."""
    refused = arm(1, status="FAILED", tags={"failure": "data.train: no such folder"})
    refused = RunRecord("r", "1", "N=3", "FAILED", 0, {}, {"failure": "accum.steps=3: refused"}, {})
    page = page_of(tmp_path, [refused])
    assert "accum.steps=3: refused" in page.said
    assert page.shown()["curves"] is None
    failed = arm(
        4, status="FAILED", tags={"failure": "out of memory"}, losses=[], drop=("memory/peak_bytes",)
    )
    page = page_of(tmp_path, [*sweep(arm)[:2], refused, failed])
    assert "out of memory" in page.said
    alone = page_of(tmp_path, [arm(1)])
    assert "There is only the reference" in alone.said
    assert alone.shown()["tradeoff"] is None


def test_a_budget_begins_at_the_configured_one(arm: Arm, tmp_path: Path) -> None:
    """And is marked as such; peaks are in the unit of the largest."""
    runs = sweep(arm, params={"runtime.memory_budget_gib": "0.03125"})
    memory = page_of(tmp_path, runs).shown()["memory"]
    assert (memory["unit"], memory["budget"]) == ("MiB", {"value": 32.0, "given": True})
    first = memory["panels"][0]["bars"][0]
    assert first["total"] == pytest.approx(57e6 / 2**20, rel=1e-4)
    assert sum(first["parts"].values()) == pytest.approx(first["total"], rel=1e-3)


def test_a_budget_begins_where_its_line_crosses_no_label(arm: Arm, tmp_path: Path) -> None:
    """In the middle of the widest gap between peaks, or above all of them where none is wide enough."""
    peaks = {1: 100e6, 2: 60e6, 4: 50e6}
    for factor, expected in ((1.0, 80e6), (1e-3, 50e6 * 1.08)):
        runs = [arm(n, drop=("memory/predicted_peak_bytes",)) for n in peaks]
        for run, peak in zip(runs, peaks.values(), strict=True):
            run.metrics["memory/peak_bytes"] = 50e6 + (peak - 50e6) * factor  # type: ignore[index]  # a dict
        memory = page_of(tmp_path, runs).shown()["memory"]
        assert memory["budget"]["value"] * memory["unit_bytes"] == pytest.approx(expected, rel=1e-2)


def test_a_panel_without_a_number_is_left_out_and_named(arm: Arm, tmp_path: Path) -> None:
    """Of losses and of peaks alike; one number is enough for a panel."""
    gone = ("memory/peak_bytes", "memory/predicted_peak_bytes")
    runs = [*sweep(arm), arm(1, reduction="sum", losses=[float("nan")], drop=gone)]
    page = page_of(tmp_path, runs)
    for name, what in (("curves", "loss"), ("memory", "peak")):
        shown = page.shown()[name]
        assert [panel["title"] for panel in shown["panels"]] == ["mean"]
        assert f"No {what} was recorded: sum." in page.said
        panels = [a["data-panel"] for _, a in page.tags if a.get("data-plot") in (name[:-1], what, name)]
        assert panels == ["0"]
    assert page_of(tmp_path, [arm(1, losses=[float("nan")])]).shown()["curves"] is None
    (panel,) = page_of(tmp_path, [arm(1, losses=[2.0])]).shown()["curves"]["panels"]
    assert panel["losses"][0]["values"] == [2.0]


def test_panels_are_in_the_order_of_the_table(arm: Arm, tmp_path: Path) -> None:
    """A global batch of 128 stands after one of 64."""
    runs = [arm(n, global_batch=b) for b in (128, 32, 64) for n in (1, 2)]
    page = page_of(tmp_path, runs)
    titles = [f"mean, global batch={b}" for b in (32, 64, 128)]
    for name in ("curves", "memory"):
        assert [panel["title"] for panel in page.shown()[name]["panels"]] == titles


@pytest.mark.parametrize(
    ("batches", "seeds", "said"),
    [
        ((64,), (0,), "in every arm, so"),
        ((64, 128), (0,), "in every arm of the same panel, so"),
        ((64, 128), (0, 1), "in every arm of the same panel and seed, so"),
    ],
)
def test_it_is_said_which_arms_are_fed_the_same(
    arm: Arm, tmp_path: Path, batches: Sequence[int], seeds: Sequence[int], said: str
) -> None:
    """Not those of another global batch, nor of another seed."""
    runs = [arm(n, global_batch=b, seed=s) for b in batches for s in seeds for n in (1, 2)]
    assert f"Every optimizer step is fed the same samples {said}" in page_of(tmp_path, runs).said


def test_what_arms_ran_on_outlives_one_that_was_refused(arm: Arm) -> None:
    """It has run on nothing; and what it alone has stands beside it."""
    tags = {"git.commit": "c0ffee", "sweep_id": "s2"}
    refused = RunRecord("r", "1", "N=100", "FAILED", 0, {}, {"failure": "no", "sweep_id": "s3"}, {})
    runs = [*(arm(n, tags=tags) for n in (1, 2)), refused]
    comparison = compare(runs)
    section = arm_section(comparison, {run.run_id: run for run in runs})
    assert tags.items() <= section["shared_tags"].items()
    assert "run id" not in section["shared_tags"]
    of_name = {of["name"]: of["own"] for of in section["arms"]}
    assert of_name["N=100"] == {"run id": "r", "sweep_id": "s3"}
    only = compare([refused])
    assert arm_section(only, {"r": refused})["shared_tags"] == {"sweep_id": "s3"}


def test_the_box_says_why_no_arm_finished(arm: Arm, tmp_path: Path) -> None:
    """Each reason once; where any arm finished the notes say it."""
    why = {"failure": "data.train: no such folder"}
    failed = [arm(n, status="FAILED", losses=[], tags=why) for n in (1, 2)]

    def box(runs: Sequence[RunRecord]) -> str:
        return page_of(tmp_path, runs).said.partition("The arms compared")[0]

    assert "Every arm: data.train: no such folder" in box(failed)
    full = arm(4, status="FAILED", losses=[], tags={"failure": "out of memory"})
    assert f"{failed[0].name} and 1 more: data.train" in box([*failed, full])
    assert f"{full.name}: out of memory" in box([*failed, full])
    assert "no such folder" not in box([*failed, arm(4)])


def test_commands_are_those_that_were_typed(arm: Arm) -> None:
    """One line for a full product, else a line for each arm; blanks in a value stay in it."""
    product = [
        arm(n, tags={"overrides": f"accum.steps={n} seed={s} +note='a b'", "command_id": "s1"})
        for n in (1, 2) for s in (0, 1)
    ]  # fmt: skip
    typed, report = commands(product)
    assert typed == """python -m gaccum_exp -m accum.steps=1,2 seed=0,1 '+note='"'"'a b'"'"''"""
    assert report == "python -m gaccum_exp report s1"
    assert len(commands(product[:3])) == 4
    assert commands(product[:1])[0].startswith("python -m gaccum_exp accum.steps=1 seed=0")


def test_commands_are_said_as_their_runs_tell_them(arm: Arm) -> None:
    """With their flags, refused values and blanks; an arm's own has where its configuration is found."""
    typed = "python -m gaccum_exp -m --config-dir mine accum.steps=1,2,100 'model.note=\"w=8 d=2\"'"
    note = 'model.note="w=8 d=2"'
    runs = [
        arm(n, tags={"command": typed, "overrides": shlex.join([f"accum.steps={n}", note])})
        for n in (1, 2)
    ]
    assert commands(runs)[0] == typed
    assert runs[0].overrides == ["accum.steps=1", note]
    (_, own) = arm_section(compare(runs), {run.run_id: run for run in runs})["arms"]
    assert own["command"] == f"python -m gaccum_exp --config-dir mine accum.steps=2 '{note}'"


def window(n: int, name: str = "fc.weight", samples: int = 12) -> dict[str, Any]:
    """Return what an audit keeps of a window under `mean`."""
    small, larger = divmod(samples, n)
    sizes = [small + 1] * larger + [small] * (n - larger)
    micro = [
        {"index": i, "first": sum(sizes[:i]), "samples": s, "counted": s, "weight": 1 / (n * s),
         "one_pass_weight": 1 / samples}
        for i, s in enumerate(sizes)
    ]  # fmt: skip
    layer = {"name": name, "error": 0.04, "floor": 4e-7, "error64": 0.04, "floor64": 4e-16}
    layer |= {"by_micro_batch": [4e-16, None, *[4e-14] * (n - 2)][:n]}
    whole = {"reduction": "mean", "accum_steps": n, "global_batch_size": samples}
    return {**whole, "unit": "samples", "micro_batches": micro, "layers": [layer]}


def test_a_window_is_drawn_as_its_audit_kept_it(
    arm: Arm, audited: Callable[..., RunRecord], tmp_path: Path
) -> None:
    """Weights relative to one pass, errors above the floor that they are measured against."""
    runs = sweep(arm)
    runs[3] = audited(runs[3], "biased")
    kept = {runs[1].run_id: window(2), runs[3].run_id: window(8)}
    page = page_of(tmp_path, runs, kept)
    worst, other = page.shown()["windows"]
    assert (worst["verdict"], other["verdict"]) == ("biased", "")
    assert [m["weight"] for m in worst["micro"]] == [0.75] * 4 + [1.5] * 4
    assert [m["end"] - m["first"] for m in worst["micro"]] == [2] * 4 + [1] * 4
    (layer,) = worst["layers"]
    assert layer["above"] == "100111111"
    assert layer["errors"][:3] == [0.04, 4e-16, None]
    assert worst["columns"] == ["window", *map(str, range(1, 9))]
    assert page.tables["Micro-batches of the window"][1] == ["1", "0", "2", "2", "0.0625", "0.08333"]


def test_a_window_that_is_known_in_part_is_drawn_in_part(arm: Arm, tmp_path: Path) -> None:
    """Nothing counted, no shares, several terms, hundreds of micro-batches: none is in the way."""
    bare = window(4)
    bare["micro_batches"][0].update(weight=None, counted=None)
    layer = {"name": "all", "error": None, "floor": 0.0, "by_micro_batch": None}
    bare = {**bare, "layers": [layer], "no_shares": "the loss couples samples"}
    terms = window(2)
    for micro in terms["micro_batches"]:
        own = {"counted": 1, "one_pass_weight": 0.5}
        micro["terms"] = [{"name": "box", "weight": 0.5, **own}, {"name": "class", "weight": 1.0, **own}]
        micro.update(counted=None, weight=None, one_pass_weight=None)
    many = window(240, samples=480)
    runs = [arm(n) for n in (1, 2, 4, 8)]
    page = page_of(
        tmp_path, runs, dict(zip([run.run_id for run in runs[1:]], (terms, bare, many), strict=True))
    )
    of_many, of_bare, of_terms = page.shown()["windows"]
    assert len(of_many["columns"]) == 65
    assert of_bare["micro"][0]["weight"] is None
    assert "the loss couples samples" in page.said
    assert of_terms["weighed"] == "one sample of the term class"
    assert [m["weight"] for m in of_terms["micro"]] == [2, 2]


def test_global_batches_have_a_figure_and_a_table(arm: Arm, tmp_path: Path) -> None:
    """Of a sweep with several; the sentence that the terminal prints stands on top."""
    runs = [
        arm(b // 64, global_batch=b, seed=s, micro_batch=64, params={"optimizer.lr": str(rate)})
        for b in (64, 128, 256) for s in (0, 1) for rate in (0.1, 0.2, 0.4)
    ]  # fmt: skip
    page = page_of(tmp_path, runs)
    (shown,) = page.shown()["batches"]
    assert [loss["batch"] for loss in shown["losses"]] == [64, 128, 256]
    assert "Global batches, each at its best learning rate" in page.tables
    assert page.said.index("Critical batch") < page.said.index("The arms compared")


def test_noise_scales_stand_beside_the_batch(arm: Arm, tmp_path: Path) -> None:
    """The interval of the last window that was measured."""
    runs = sweep(arm)
    told = {"noise/trace": 1.0, "noise/scale": 90.0, "noise/scale_low": 70.0, "noise/scale_high": 120.0}
    curves = {name: Curve((3,), (value,)) for name, value in told.items()}
    runs[2] = arm(4)
    runs[2].curves.update(curves)
    (interval,) = page_of(tmp_path, runs).shown()["noise"]["intervals"]
    assert interval == {"label": "N = 4", "low": 70.0, "high": 120.0, "scale": 90.0, "batch": 256}


def test_what_was_made_is_kept_and_a_damaged_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a cache folder; where none can be written, each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make() -> str:
        made.append(1)
        return "a\r\nscript"

    assert [vega._kept("of this", make) for _ in range(3)] == ["a\r\nscript"] * 3
    assert len(made) == 1
    (file,) = (tmp_path / "gaccum_exp").iterdir()
    file.write_bytes(file.read_bytes()[:-2])
    assert vega._kept("of this", make) == "a\r\nscript"
    assert vega._kept("of that", make) == "a\r\nscript"
    assert len(made) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert vega._cache_folder() == tmp_path / "home/.cache/gaccum_exp"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert vega._kept("of this", make) == "a\r\nscript"
    assert len(made) == 4
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home directory")))
    assert vega._kept("of this", make) == "a\r\nscript"
    assert len(made) == 5


def test_the_script_cannot_end_its_element() -> None:
    """Neither Vega's nor the page's own."""
    own = Path(vega.__file__).with_name("page.js").read_text()
    assert not re.search("</script|<!--", own, re.IGNORECASE)
    assert "<!--" not in vega.vega_script()
