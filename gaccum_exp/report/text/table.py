"""The comparison as a terminal table, and in one or two sentences."""

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.row import ComparisonRow
from gaccum_exp.report.text.condensed import condense
from gaccum_exp.report.text.findings import say_verdict
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.wording import (
    MISSING,
    byte_unit,
    say_controls,
    say_gap,
    say_loss,
    say_micro_batches,
    say_ratio,
    say_scaled,
    time_unit,
)

_MARKS = {"reference": "*", "stand-in": "†", "stored reference": "‡"}
_LEGEND = {
    "*": "the reference: one pass over the same global batch",
    "†": "a stand-in for the missing one-pass reference",
    "‡": "the reference, a stored run of another sweep",
    "!": "not finished",
}
_HEADERS = (
    "loss gap: largest difference to its loss curve; weight dist.: relative, of the final weights; "
    "×: ratio to its value"
)
_MOST_NOTES = 16
_STANDINGS = {"inside": "✓", "outside": "✗"}

_VERDICT, _REDUCTION, _VARIED = "\nverdict", "\nreduction", "also\nvaried"

Column = tuple[str, Callable[[ComparisonRow], str]]


def print_comparison(comparison: Comparison) -> None:
    """Print the table, and what it says in words; 100 columns wide where there is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(render(comparison))
    console.print(summary(comparison), highlight=False)


def render(comparison: Comparison) -> Table:
    """Return the comparison as a table that fits a terminal of 80 columns, its notes underneath.

    Gap, distance and ratios are against the reference that is marked in the N column; a rule
    separates groups that have different ones. Many arms share lines: `condensed` says how.
    """
    condensed = condense(_shown(comparison))
    rows = condensed.rows
    columns = _columns(rows, condensed.counts)
    reductions = _reductions(rows)
    table = Table(
        title="Every arm against its reference"
        + (f", {reductions.pop()}" if len(reductions) == 1 else ""),
        caption=_caption(rows, [note for note in (condensed.said, *comparison.notes) if note]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        header_style="bold",
    )
    for header, _ in columns:
        # Numbers are never cut; what else was swept, and at worst the verdict, may take several lines.
        table.add_column(
            Text(header),
            justify="left" if header in (_VERDICT, _VARIED, _REDUCTION) else "right",
            no_wrap=header not in (_VERDICT, _VARIED),
            overflow="fold",
        )
    for row, after in [*pairwise(rows), *((row, None) for row in rows[-1:])]:
        ends = after is not None and after.setting != row.setting
        style = "bold" if row.is_reference else "dim" if not row.finished else None
        table.add_row(*(Text(say(row)) for _, say in columns), end_section=ends, style=style)
    return table


def _shown(comparison: Comparison) -> list[ComparisonRow]:
    """Return the arms' rows, each group's stored reference in front of it."""
    stored = {row.setting: row for row in comparison.stored}
    shown: list[ComparisonRow] = []
    for row in comparison.rows:
        borrowed = stored.pop(row.setting, None)
        shown += [row] if borrowed is None else [borrowed, row]
    return shown


def _columns(rows: Sequence[ComparisonRow], counts: Mapping[str, int]) -> list[Column]:
    """Return the columns that say something: what is the same for all arms takes no room."""
    columns: list[Column] = [("N", _say_n)]
    if counts:
        columns.append(("\nruns", lambda row: str(counts[row.run_id])))
    if any(row.verdict for row in rows):
        columns.append((_VERDICT, say_verdict))
    crowded = len(columns) > 1 and len(_reductions(rows)) > 1 and any(row.differs for row in rows)
    if not crowded:  # else it makes room: it is the global batch over N, and uneven splits have a note
        columns.append(("micro\nbatch", say_micro_batches))
    said_elsewhere = any("global batch" in dict(row.setting.values) for row in rows)
    if len({row.global_batch_size for row in rows}) > 1 and not said_elsewhere:
        columns.append(("global\nbatch", lambda row: str(row.global_batch_size or MISSING)))
    if len(_reductions(rows)) > 1:
        columns.append((_REDUCTION, lambda row: row.reduction or MISSING))
    if any(row.differs for row in rows):
        columns.append((_VARIED, lambda row: row.differs or MISSING))
    return [*columns, *_measured(rows)]


def _measured(rows: Sequence[ComparisonRow]) -> list[Column]:
    """Return the numbers' columns, with one unit for all arms in the header."""
    any_controls = any(row.controls for row in rows)
    bytes_each, in_bytes = byte_unit(max((row.peak_bytes or 0 for row in rows), default=0))
    seconds_each, in_seconds = time_unit(max((row.step_s or 0 for row in rows), default=0))
    return [
        ("train\nloss", lambda row: say_loss(row.train_loss)),
        ("eval\nloss", lambda row: say_loss(row.eval_loss)),
        ("eval\nacc.", lambda row: say_loss(row.eval_accuracy)),
        ("loss\ngap", lambda row: say_gap(row.max_loss_gap) + _standing(row, any_controls)),
        ("weight\ndist.", lambda row: say_gap(row.weight_distance)),
        (f"peak\n{in_bytes}", lambda row: say_scaled(row.peak_bytes, bytes_each)),
        ("\n×", lambda row: say_ratio(row.peak_ratio)),
        (f"step\n{in_seconds}", lambda row: say_scaled(row.step_s, seconds_each)),
        ("\n×", lambda row: say_ratio(row.step_ratio)),
    ]


def _mark(row: ComparisonRow) -> str:
    return _MARKS.get(row.role, "") or ("" if row.finished else "!")


def _say_n(row: ComparisonRow) -> str:
    return f"{MISSING if row.steps is None else row.steps}{_mark(row) or ' '}"


def _standing(row: ComparisonRow, any_controls: bool) -> str:
    return _STANDINGS.get(row.control or "", " ") if any_controls else ""


def _reductions(rows: Sequence[ComparisonRow]) -> set[str]:
    return {row.reduction for row in rows} - {None}  # type: ignore[return-value]  # None is taken out


def _caption(rows: Sequence[ComparisonRow], notes: Sequence[str]) -> Text:
    marks = sorted({_mark(row) for row in rows} & _LEGEND.keys())
    legend = "; ".join(f"{mark} {_LEGEND[mark]}" for mark in marks)
    lines = [legend, _HEADERS] if legend else []
    controlled = [row for row in rows if row.controls]
    if controlled:
        lines.append(
            f"✓ inside, ✗ outside the envelope of {say_controls(controlled)}: what rounding alone makes "
            "of the curve"
        )
    more = len(notes) - _MOST_NOTES
    said = [*notes[:_MOST_NOTES], f"and {more} more notes of the kind."] if more > 0 else notes
    return Text("\n".join([*lines, *(f"- {note}" for note in said)]))
