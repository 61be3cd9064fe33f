"""Write a comparison's table to files: Markdown for an issue or a README, LaTeX for a paper.

They hold what the terminal shows, the table, the notes and what it says in words, from the same cells.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.table import cells_of
from gaccum_exp.report.whole_files import whole

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")
"""What Markdown might take for its own, in a cell or a sentence; `~~` strikes out, `$` is a formula."""
_GREEK = {sign: unicodedata.name(sign).split()[-1] for sign in "αβγδεζηθικμνξπρστυφχψωΓΔΘΞΠΣΦΨΩ"}
_FORMULAS = {
    **{sign: name.lower() if sign.islower() else name.title() for sign, name in _GREEK.items()},
    "λ": "lambda", "Λ": "Lambda",  # which Unicode spells otherwise
    "~": "sim", "<": "<", ">": ">", "|": "|", "−": "-", "‖": r"\|", "µ": "mu", "×": "times",
    "≈": "approx", "·": "cdot", "√": "surd", "≤": "leq", "≥": "geq", "≠": "neq", "†": "dagger",
    "‡": "ddagger", "→": "to", "←": "leftarrow", "∝": "propto", "±": "pm", "∞": "infty", "∇": "nabla",
    "∂": "partial", "∑": "Sigma", "∈": "in", "°": r"^{\circ}", "⁻": "^{-}",
    **{sign: f"^{{{digit}}}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{sign: f"_{digit}" for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
}  # fmt: skip
"""Signs that LaTeX has in formulas; a word is a command's."""
_LATEX = {
    **{sign: f"$\\{of}$" if of.isalpha() else f"${of}$" for sign, of in _FORMULAS.items()},
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "–": "--", "—": "---", "…": r"\ldots{}",
    "`": "{`}", "‘": "`", "’": "'", "“": "``", "”": "''", "ß": r"\ss{}", "æ": r"\ae{}", "ø": r"\o{}",
    "œ": r"\oe{}", "Æ": r"\AE{}", "Ø": r"\O{}", "Œ": r"\OE{}", "ł": r"\l{}", "Ł": r"\L{}",
    "ı": r"\i{}", "✓": "(in)", "✗": "(out)", **{sign: f"\\{sign}" for sign in "_%&#${}"},
}  # fmt: skip
"""What LaTeX has for signs that are its own, or that its usual fonts lack."""
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327",
                    "`'^~=u.\"rHvc", strict=True))  # fmt: skip
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
        r"\footnotesize\setlength{\tabcolsep}{3pt}",
        # A table that is wider than the text reaches into both margins.
        rf"\makebox[\textwidth]{{\begin{{tabular}}{{{columns}}}",
        r"\hline",
        *(_row(line, _in_latex) for line in zip(*map(_two_lines, table.headers), strict=True)),
        r"\hline",
        *rows,
        r"\hline",
        r"\end{tabular}}",
        *(rf"\par {_in_latex(line)}\par" for line in (*table.legend, *table.notes)),
        r"\end{table}",
    ]
    return _write(path, lines)


def _row(cells: Iterable[str], say: Callable[[str], str]) -> str:
    return f"{' & '.join(say(cell.strip()) for cell in cells)} \\\\"


def _two_lines(header: str) -> tuple[str, str]:
    above, _, below = header.rpartition("\n")
    return above, below


def _in_a_line(header: str) -> str:
    return " ".join(header.split())


def _escaped_in_markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", _in_a_line(text))


def _in_latex(text: str) -> str:
    found = []
    for unknown, signs in groupby(text, key=lambda sign: _sign_in_latex(sign) is None):
        if unknown:
            found.append(_codes_in_latex("".join(signs)))
        else:
            found += [_sign_in_latex(sign) or "" for sign in signs]
    return "".join(found)


def _sign_in_latex(sign: str) -> str | None:
    """Return a sign as LaTeX's usual fonts have it without a package; None: they lack it."""
    if sign in _LATEX or sign.isspace():
        return _LATEX.get(sign, " ")
    letter, *marks = list(unicodedata.normalize("NFD", sign))
    if not (letter.isascii() and letter.isprintable()) or not all(mark in _ACCENTS for mark in marks):
        return None
    if marks and letter in "ij":
        letter = f"\\{letter}"  # without its dot
    for mark in marks:
        letter = f"\\{_ACCENTS[mark]}{{{letter}}}"
    return letter


def _codes_in_latex(text: str) -> str:
    """Return signs for engines that take their fonts from the system, and their codes for pdfTeX."""
    codes = " ".join(f"U+{ord(sign):04X}" for sign in text)
    return rf"\ifdefined\Umathchar {text}\else[{codes}]\fi{{}}" if text.isprintable() else f"[{codes}]"


def _cell_in_latex(text: str) -> str:
    """Return a cell with `2.5e-07` as a power of ten."""
    parts = _POWER.split(text)
    found = [_in_latex(parts[0])]
    for number, sign, exponent, after in zip(*(parts[i::4] for i in (1, 2, 3, 4)), strict=True):
        minus = "-" if sign == "-" else ""
        found.append(rf"${number}\times10^{{{minus}{exponent}}}${_in_latex(after)}")
    return "".join(found)


def _write(path: Path, lines: Sequence[str]) -> Path:
    with whole(path) as beside:
        beside.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path
