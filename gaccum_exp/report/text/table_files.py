"""Write a comparison's table to files: Markdown for an issue or a README, LaTeX for a paper.

They hold what the terminal shows, the table, the notes and what it says in words, from the same cells.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.table import cells_of

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")
"""What Markdown might take for its own, in a cell or a sentence; `~~` strikes out, `$` is a formula."""
_LATEX = {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"$\sim$", "–": "--", "…": r"\ldots{}",
    "<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$", "²": "$^2$", "‖": r"$\|$", "µ": r"$\mu$",
    "×": r"$\times$", "≈": r"$\approx$", "·": r"$\cdot$", "√": r"$\surd$", "≤": r"$\leq$",
    "≥": r"$\geq$",
    "†": r"$\dagger$", "‡": r"$\ddagger$", "→": r"$\to$", "∝": r"$\propto$", "Σ": r"$\Sigma$",
    "±": r"$\pm$",
    "✓": "(in)", "✗": "(out)", **{sign: f"\\{sign}" for sign in "_%&#${}"},
}  # fmt: skip
"""What LaTeX has for signs that are its own, or that its usual fonts lack."""
_ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"
_LETTERS = "ßæøœÆØŒ“”"
_POWER = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e([+-])0?(\d+)")
"""A number with an exponent."""


def write_markdown(comparison: Comparison, path: Path) -> Path:
    """Write the table as GitHub's Markdown has tables, with its notes as a list; return the file."""
    table = cells_of(comparison)
    plain = _escaped_in_markdown
    rule = ["---" if left else "---:" for left in table.left]
    lines = [
        f"**{plain(table.title)}**\n",
        *(f"| {' | '.join(cells)} |" for cells in ([*map(plain, map(_in_a_line, table.headers))], rule)),
        *(f"| {' | '.join(map(plain, cells))} |" for cells in table.lines),
        "",
        *(f"{plain(line)}  " for line in table.legend),
        *([""] if table.notes else []),
        *(f"- {plain(note)}" for note in table.notes),
        "",
        *(f"{plain(line)}\n" for line in summary(comparison).splitlines()),
    ]
    return _write(path, lines)


def write_latex(comparison: Comparison, path: Path) -> Path:
    r"""Write the table as a `table` environment, which needs no package; return the file.

    What the legend and the notes say follows it in small print.
    """
    table = cells_of(comparison)
    columns = "".join("l" if left else "r" for left in table.left)
    rows = [_row(cells, _cell_in_latex) for cells in table.lines]
    for number in sorted(table.ends, reverse=True):
        rows.insert(number + 1, r"\hline")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_in_latex(summary(comparison).replace(chr(10), ' '))}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\hline",
        _row(map(_in_a_line, table.headers), _in_latex),
        r"\hline",
        *rows,
        r"\hline",
        r"\end{tabular}",
        *(rf"\par{{\footnotesize {_in_latex(line)}\par}}" for line in (*table.legend, *table.notes)),
        r"\end{table}",
    ]
    return _write(path, lines)


def _row(cells: Iterable[str], say: Callable[[str], str]) -> str:
    return f"{' & '.join(say(cell.strip()) for cell in cells)} \\\\"


def _in_a_line(header: str) -> str:
    return " ".join(header.split())


def _escaped_in_markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", _in_a_line(text))


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(sign) or _plain_in_latex(sign) for sign in text)


def _plain_in_latex(sign: str) -> str:
    """Return a sign as LaTeX's usual fonts have it without a package, or a question mark."""
    base, *marks = list(unicodedata.normalize("NFD", sign))
    accented = base.isascii() and base.isalpha() and all(mark in _ACCENTS for mark in marks)
    known = accented or (sign.isascii() and sign.isprintable()) or sign in _LETTERS
    return sign if known else " " if sign.isspace() else "?"


def _cell_in_latex(text: str) -> str:
    """Return a cell with `2.5e-07` as a power of ten."""
    parts = _POWER.split(text)
    found = [_in_latex(parts[0])]
    for number, sign, exponent, after in zip(*(parts[i::4] for i in (1, 2, 3, 4)), strict=True):
        minus = "-" if sign == "-" else ""
        found.append(rf"${number}\times10^{{{minus}{exponent}}}${_in_latex(after)}")
    return "".join(found)


def _write(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path
