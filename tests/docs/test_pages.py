"""The pages hold together: links resolve, what the code knows stands in the reference, examples run."""

import ast
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gaccum_exp.arms import advise, audits, continued, outcome, plan
from gaccum_exp.audit.audited_window import WINDOW_FILE
from gaccum_exp.audit.result import CAUSES, SEVERITY
from gaccum_exp.integrations.pytest_plugin import AuditLoop
from gaccum_exp.report.compare.columns import COLUMNS
from gaccum_exp.tracking import metrics, sink
from tests.program import Program
from tests.support import ROOT

PAGES = sorted(
    path
    for place in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "docs/**/*.md",
        "experiments/*/README.md",
    )
    for path in ROOT.glob(place)
    if not {"_build", "template"} & set(path.parts)
)


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"(?ms)^( *)(```+|~~~+).*?^\1\2 *$", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub and the site give to a page's headings."""
    found: set[str] = set()
    for title in re.findall(r"(?m)^#+ (.*)$", prose(page)):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower())
        name = words.strip().replace(" ", "-")
        found.add(next(n for i in itertools.count() if (n := f"{name}-{i}" if i else name) not in found))
    return found


def links(page: Path) -> Iterator[str]:
    """Yield where the links and pictures of a page point to, but for other hosts."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    yield from (to for to in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in to)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """To a file of the checkout, and where it names a heading, to one that stands there."""
    for to in links(page):
        file, _, heading = to.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), to
        if heading and target.suffix == ".md" and not target.name.startswith("reference"):
            assert heading in anchors(target), to


def test_every_study_is_on_the_site() -> None:
    """Each page of experiments/ stands in the list of studies."""
    listed = (ROOT / "docs/studies/index.md").read_text(encoding="utf-8")
    for study in ROOT.glob("experiments/*/README.md"):
        assert f"experiments/{study.parent.name}/README" in listed


def test_hosts_of_other_people_are_named_and_never_fetched() -> None:
    """Links that leave the site are to papers and projects; a page loads nothing from them."""
    for page in PAGES:
        assert not re.search(r"<script[^>]+src=.?https?:|!\[[^]]*\]\(https?:", page.read_text()), page


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """Return the parts of the reference that are made from the code."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/_ext/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: make() for name, make in module.GENERATED.items()}


def test_the_reference_has_all_that_the_code_knows(made: dict[str, str]) -> None:
    """Metrics, columns, causes, exit statuses, each with a sentence; keys: tests/config/test_help.py."""
    names = {value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)}
    statuses = (0, 1, 2, 130, *outcome.VERDICT_STATUS.values())
    csv = (name for name, column in COLUMNS.items() if column.in_csv)
    for part, words in (
        ("metrics", map("`{}`".format, names)), ("columns", map("`{}`".format, csv)),
        ("causes", CAUSES), ("exit_statuses", map(str, statuses)),
    ):  # fmt: skip
        rows = [row.split(" | ") for row in made[part].splitlines()[2:]]
        assert {row[0].removeprefix("| ") for row in rows} >= set(words)
        assert all(len(row[1]) > 10 for row in rows)


def test_the_pages_that_are_made_are_all_placed(made: dict[str, str]) -> None:
    """Each part stands on one page, and verdicts, which are written by hand, are all there."""
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md")]
    for part in made:
        assert sum(f"{{generated}} {part}\n" in page for page in pages) == 1, part
    verdicts = (ROOT / "docs/reference/verdicts.md").read_text(encoding="utf-8")
    assert all(f"`{verdict}`" in verdicts for verdict in SEVERITY)


def test_every_file_that_a_run_leaves_is_explained(program: Program) -> None:
    """Of a training with its audit and checkpoints; and the names that other tasks and sweeps write."""
    page = (ROOT / "docs/reference/files.md").read_text(encoding="utf-8")
    ended = program.tiny("checkpoint.every_steps=1", "audit.every_steps=2")
    assert ended.status == 0
    left = {path.name for path in program.sweep_folder.iterdir()}
    others = {
        outcome.OUTCOME_FILE, audits.AUDIT_FILE, WINDOW_FILE, plan.PLAN, advise.ADVICE, sink.WEIGHTS,
        sink.CRITERION_WEIGHTS, continued.COMMAND_FILE, continued.COMMAND_LOCK, "comparison.csv",
        "batches.csv", "report.html", "comparison.md", "comparison.tex",
    }  # fmt: skip
    for name in left | others:
        assert f"`{name}" in page, name


def python_of(page: str, which: int = 0) -> str:
    """Return a page's block of Python."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"(?ms)^```python\n(.*?)^```$", text)[which]


def test_the_test_in_the_page_on_gates_is_one(audit_loop: AuditLoop) -> None:
    """It passes as it stands, and fails where the step divides by N instead."""
    code = python_of("howto/audit_gate.md")
    names: dict[str, Any] = {}
    exec(code, names)
    names["test_accumulation_is_the_large_batch"](audit_loop)
    exec(code.replace("/ samples", "/ len(target) / 3"), names)
    with pytest.raises(BaseException, match="unequal denominators"):
        names["test_accumulation_is_the_large_batch"](audit_loop)


def test_the_blocks_of_python_run_on_what_they_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A plan without a configuration, and the noise scale in a loop."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(8, 3), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.randn(4, 8), torch.randint(3, (4,))
    names = {"model": model, "nn": nn, "images": images, "labels": labels, "optimizer": optimizer}
    exec(python_of("howto/memory.md"), dict(names))
    assert "Peak memory of a window of 256 samples" in capsys.readouterr().out
    windows = [[(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(4)] for _ in range(9)]
    exec(python_of("explanation/noise_scale.md"), names | {"criterion": criterion, "windows": windows})
    assert "noise scale: " in capsys.readouterr().out


def test_the_notebook_of_the_tutorial_runs_and_says_what_stands_in_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cell by cell, in this process: verdicts and the plan's sizes are those that the site shows."""
    notebook = json.loads((ROOT / "docs/tutorial/notebook.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        *statements, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(statements, []), "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if value is not None:
                print(value)
        else:
            exec(compile(ast.Module([last], []), "<cell>", "exec"), names)
        outputs = (one.get("text") or one["data"]["text/plain"] for one in cell["outputs"])
        shown = "".join("".join(output) for output in outputs)
        assert without_rounding(capsys.readouterr().out) == without_rounding(shown)


def without_rounding(text: str) -> str:
    """Return what was said without the numbers that another machine rounds otherwise."""
    return re.sub(r"\b(off by|float64:|alone: up to|projected on it) [\d.e+-]+", r"\1", text).strip()
