"""Every committed study still runs, shortened, and has its page."""

import csv
import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from experiments.batch_growth import build as batch_growth
from experiments.batch_growth.recursion import excess_loss, final_losses
from experiments.notebook import keep_cells, kept_cells, read_rows
from experiments.strategies import build as strategies
from gaccum_exp.arms.provenance import git_commit
from gaccum_exp.report.figures.style import DPI, WIDTHS_INCHES
from tests.program import Program
from tests.shortened import shortened
from tests.support import ROOT

STUDIES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def test_there_are_studies() -> None:
    """Otherwise the tests below would pass on nothing."""
    assert "equivalence" in STUDIES


@pytest.mark.parametrize("slug", STUDIES)
def test_a_study_says_question_command_runtime_and_result(slug: str) -> None:
    """At the head of its file, with the command that really selects it."""
    text = (ROOT / "conf" / "experiment" / f"{slug}.yaml").read_text(encoding="utf-8")
    for word in ("Question", "Command", "Runtime", "Result"):
        assert re.search(rf"^# {word}: +\S", text, re.M), word
    assert f"experiment={slug}" in text


@pytest.mark.parametrize("slug", STUDIES)
def test_a_study_has_its_page_with_results_figure_and_provenance(slug: str) -> None:
    """And what it shows is written, and what it does not."""
    folder = ROOT / "experiments" / slug
    page = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("Question", "Command", "Runtime", "What it shows", "What it does not show"):
        assert heading in page
    assert "TO WRITE" not in page
    assert re.search(r"^\| .*±", page, re.M), "a table with its spread over seeds"
    assert re.search(r"Commit [0-9a-f]{40}", page), "the commit that measured it"
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert figures
    assert all((folder / name).stat().st_size > 10_000 for name in figures)


@pytest.mark.parametrize(
    "page", sorted((ROOT / "experiments").glob("*/README.md")), ids=lambda page: page.parent.name
)
def test_every_page_opens_with_answer_figure_and_command(page: Path) -> None:
    """In this order, right below its title; a figure where the study has one."""
    head = page.read_text(encoding="utf-8").partition("\n## ")[0]
    places = [head.index("**Answer.**"), *(m.start() for m in re.finditer(r"!\[", head))]
    places.append(head.index("**Command.**"))
    assert places == sorted(places)
    assert len(re.sub(r"<!--.*?-->|\s", "", head[head.index("\n") : places[0]])) == 0
    assert len(places) > 2 or not list(page.parent.glob("*.png"))


@pytest.mark.parametrize(
    ("slug", "kinds", "stated"),
    [
        ("equivalence", (str, int), {"max_loss_gap": ".1e", "weight_distance": ".1e"}),
        ("reduction_ragged", (str, float, int), {"error": ".1e", "shift": "+.1e"}),
        ("padding", (str, int), {"mib": ".1f", "ms": ".0f"}),
        ("precision", (str, int), {"buffer_error": ".1e", "error": ".1e"}),
        ("noise_scale", (str, int), {"exact": ".3g", "scale": ".3g"}),
        ("memory_frontier", (str, int), {}),
    ],
)
def test_a_figure_is_drawn_again_from_what_its_study_keeps(
    slug: str,
    kinds: tuple[Any, ...],
    stated: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In the style of all figures, at its width; and what is drawn is what the page states."""
    study = importlib.import_module(f"experiments.{slug}.build")
    cells = kept_cells(study.DRAWN, *kinds)
    page = (ROOT / "experiments" / slug / "README.md").read_text(encoding="utf-8")
    assert cells
    for cell in cells.values():
        for measure, form in stated.items():
            assert f"{cell[measure][0]:{form}} ± " in page
    monkeypatch.setattr(study, "HERE", tmp_path)
    study.draw(cells)
    (drawn,) = tmp_path.iterdir()
    assert image.imread(drawn).shape[1] == round(DPI * WIDTHS_INCHES["double"])
    assert (ROOT / "experiments" / slug / drawn.name).exists()
    monkeypatch.setattr(study, "DRAWN", tmp_path / "again.csv")
    keep_cells(study.DRAWN, [f"part {i}" for i in range(len(kinds))], cells)
    assert kept_cells(study.DRAWN, *kinds) == cells


def test_the_study_of_strategies_runs_shortened(tmp_path: Path) -> None:
    """Rows, tables, the sentences of its answer and its figure; what is there is not trained again."""
    markdown = strategies.study(strategies.SHORT, tmp_path, processes=1)
    said = strategies.answer(read_rows(tmp_path / "results.csv"))
    assert said.count("Fixed micro-batch") == len(strategies.WAYS[strategies.FIXED_MICRO])
    assert "| fixed global batch | AdamA | 0.001 |" in markdown
    assert (tmp_path / "strategies.png").stat().st_size > 10_000
    rows = (tmp_path / "results.csv").read_text()
    assert len(rows.splitlines()) == 1 + len(list(strategies.SHORT.cells()))
    assert strategies.study(strategies.SHORT, tmp_path, processes=1) == markdown
    assert (tmp_path / "results.csv").read_text() == rows


@pytest.mark.slow
@pytest.mark.parametrize("slug", shortened(STUDIES, ("equivalence", "reduction_ragged")))
def test_a_study_runs_shortened(slug: str, program: Program) -> None:
    """Two optimizer steps, two arms: it composes, trains and is compared."""
    short = ["train.steps=2", "train.epochs=null", "train.samples=null", "runtime.device=cpu"]
    arms = ["hydra.sweeper.params=null", "accum.steps=1,2"]
    ended = program("-m", f"experiment={slug}", *short, *arms)
    assert ended.status == 0, ended.plain
    (table,) = program.folder.glob("multirun/*/comparison.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["accum_steps"] for row in rows] == ["1", "2"]
    assert all(row["status"] == "FINISHED" for row in rows)


def test_the_recursion_of_moments_is_the_mean_of_many_trainings() -> None:
    """SGD on noisy linear regression, batches of 2 and 3, 200,000 times: within 1 %."""
    torch.manual_seed(0)
    spectrum, trials = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64), 200_000
    windows = [(0.3, 2), (0.2, 2), (0.3, 3), (0.1, 3)]
    errors = torch.ones(trials, 3, dtype=torch.float64)
    for rate, batch in windows:
        x = torch.randn(trials, batch, 3, dtype=torch.float64) * spectrum.sqrt()
        residual = (x @ errors[:, :, None]).squeeze(-1) - 0.5 * torch.randn(trials, batch).double()
        errors = errors - rate * (residual[:, :, None] * x).mean(1)
    found = float((errors.square().mean(0) * spectrum).sum() / 2)
    exact = excess_loss(spectrum, 0.25, torch.ones(3, dtype=torch.float64), windows)
    assert found == pytest.approx(exact, rel=0.01)


@pytest.mark.slow
def test_the_study_of_a_growing_batch_runs_shortened(tmp_path: Path) -> None:
    """Sixteen windows of eight sequences, two seeds, a model of one narrow layer; all arms."""
    (tmp_path / "text").write_text((ROOT / "docs" / "howto" / "going_on.md").read_text(encoding="utf-8"))
    short = ("train.epochs=null", "train.steps=16", "model.layers=1", "model.width=16",
             "data.context=16", f"data.root={tmp_path / 'text'}")  # fmt: skip
    git_commit.cache_clear()  # of another test's working directory
    runs = [batch_growth.trained(arm, seed, short) for seed in (0, 1) for arm in batch_growth.ARMS]
    assert {run.samples for run in runs} == {128}
    assert len({run.optimizer_steps for run in runs}) == 2
    shutil.copy(ROOT / "experiments" / "batch_growth" / "README.md", tmp_path)
    batch_growth.write(runs, final_losses((0.1,), 200), 60.0, tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "growth, Adam's rule" in page
    assert re.search(r"Commit [0-9a-f]{40}", page)
    assert (tmp_path / "batch_growth.png").stat().st_size > 10_000
