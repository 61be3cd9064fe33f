"""The comparison's table as a file says what the terminal says, in sound Markdown and LaTeX."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gaccum_exp.report.compare.comparison import Comparison, compare
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.table import cells_of
from gaccum_exp.report.text.table_files import write_latex, write_markdown
from gaccum_exp.tracking.records import RunRecord

Arm = Callable[..., RunRecord]
HOSTILE = {"failure": r"a_b|c & 5% of #1 {x} $y$ \z ~ ^ <w> * 2.5e-07 é ẍ β × 10⁻⁷ 好的 ½"}
NAMES = ("好_模型", "100%#1", "[x]", "*y", "$z^2$", "\\n", "β&{")


@pytest.fixture
def comparison(arm: Arm, audited: Arm, control: Arm) -> Comparison:
    """Two settings with every mark there is, and a reason full of signs that both languages take."""
    one = arm(1, params={"optimizer.lr": "0.1"})
    return compare(
        [
            one,
            audited(arm(4, params={"optimizer.lr": "0.1"}, noise=1e-2), "biased", cause="a_b|c"),
            arm(8, params={"optimizer.lr": "0.1"}, status="FAILED", losses=[], tags=HOSTILE),
            arm(2, run_id="u", params={"optimizer.lr": "0.2"}),
            arm(4, run_id="v", params={"optimizer.lr": "0.2"}),
            *(control(one, seed, 1e-7) for seed in (1, 2)),
        ]
    )


def test_markdown_has_a_line_per_arm_and_every_cell_in_its_column(
    comparison: Comparison, tmp_path: Path
) -> None:
    """A sign that would end a cell, or set it in bold, stands for itself."""
    text = write_markdown(comparison, tmp_path / "c.md").read_text(encoding="utf-8")
    table = cells_of(comparison)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    read = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert {len(cells) for cells in read} == {len(table.headers)}
    plain = [tuple(re.sub(r"\\(.)", r"\1", cell).strip() for cell in cells) for cells in read]
    assert plain[2:] == [tuple(cell.strip() for cell in line) for line in table.lines]
    assert plain[0] == tuple(" ".join(header.split()) for header in table.headers)
    assert r"a\_b\|c & 5% of \#1 \{x\} \$y\$ \\z \~ ^ \<w\> \* 2.5e-07 é ẍ β × 10⁻⁷ 好的 ½" in text
    said = re.sub(r"\\(.)", r"\1", text)
    assert all(note in said for note in comparison.notes)
    assert summary(comparison).splitlines()[0] in said


def test_latex_is_balanced_and_escapes_what_is_its_own(comparison: Comparison, tmp_path: Path) -> None:
    """Environments, braces and mathematics end where they began, and every line has all cells."""
    text = write_latex(comparison, tmp_path / "c.tex").read_text(encoding="utf-8")
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table")
    ]  # fmt: skip
    bare = re.sub(r"\\[\\{}$&%#_]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[%#~^](?!\{)", bare)
    rows = text.partition("\\hline\n")[2].partition("\\end{tabular}")[0]
    columns = len(cells_of(comparison).headers)
    lines = [line for line in rows.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 2 + len(comparison.rows)
    assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {columns}
    assert re.search(r"\$\d\.\d\\times10\^\{-2\}\$\(out\)", rows)
    assert r"a\_b$|$c \& 5\% of \#1 \{x\} \$y\$ \textbackslash{}z $\sim$" in text
    # A sign that no font of pdfTeX's own has would end it: there its code stands for it.
    assert (
        r"\'{e} \"{x} $\beta$ $\times$ 10$^{-}$$^{7}$ \ifdefined\Umathchar 好的\else[U+597D U+7684]\fi{}"
        in text
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no TeX here")
def test_latex_compiles_whatever_arms_are_called(
    comparison: Comparison, arm: Arm, audited: Arm, tmp_path: Path
) -> None:
    """In an article without packages: trainings, audits, an empty sweep, and values of signs alone."""
    named = [arm(n, run_id=f"{name}-{n}", params={"model.name": name}) for name in NAMES for n in (1, 3)]
    audit = {"params": {"task": "audit"}, "losses": []}
    audits = [audited(arm(n, **audit), "biased", culprit=f"bn_{n}", cause="a_b|c") for n in (2, 4)]
    every = [comparison, *map(compare, (named, audits, []))]
    for number, each in enumerate(every):
        write_latex(each, tmp_path / f"{number}.tex")
    inputs = "".join(rf"\input{{{number}}}" for number in range(len(every)))
    (tmp_path / "d.tex").write_text(
        rf"\documentclass{{article}}\begin{{document}}{inputs}\end{{document}}"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "d.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
