"""Print a comparison on a terminal: its table, its notes, and what it says in a sentence or two."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from rich.table import Table
from rich.text import Text

from gaccum_exp.report.arm_limit import MOST_NOTES
from gaccum_exp.report.compare.batches import BatchComparison
from gaccum_exp.report.compare.columns import COLUMNS, ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.text.batch_table import print_batches
from gaccum_exp.report.text.merged_rows import lines_of
from gaccum_exp.report.text.noise_notes import say_noise
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.terminal import LOOK, console
from gaccum_exp.report.text.wording import MISSING, NOT_AUDITED, say_controls, say_scaled

_MARKS = {"reference": "*", "stand-in": "†", "stored reference": "‡"}
_LEGEND = {
    "*": "the reference: one pass over the same global batch",
    "†": "a stand-in for the missing one-pass reference",
    "‡": "the reference, a stored run of another sweep",
    "!": "not finished",
    "~": "run by another command than its reference, perhaps under another load",
}
_HEADERS = (
    "loss gap: largest difference to its loss curve; weight dist.: relative, of the final weights; "
    "×: ratio to its value"
)
_STANDINGS = {"inside": "✓", "outside": "✗"}
_SCORES = ("eval_accuracy", "eval_perplexity")
"""Of which a table has one."""
_NUMBERS = (
    *("train_loss", "eval_loss", *_SCORES, "max_loss_gap", "weight_distance"),
    *("peak_bytes", "peak_ratio", "step_s", "step_ratio"),
)
_TIMES = ("step_s", "step_ratio")
_FOLDED = ("verdict", "differs")
"""Columns that may take several lines; numbers are never cut."""


def print_comparison(comparison: Comparison, batches: Sequence[BatchComparison] = ()) -> None:
    """Print the table, and what it says in words; then the comparison of different global batches."""
    out = console()
    out.print(render(comparison))
    out.print(summary(comparison), highlight=False)
    if worth := say_worth(comparison, batches):
        out.print(worth, highlight=False)
    print_batches(out, batches)


def say_worth(comparison: Comparison, batches: Sequence[BatchComparison] = ()) -> str:
    """Say what the noise scale tells, a line each; of batches with several rates, at the best one."""
    told = tuple(row.noise.row for of in batches for row in of.rows if row.noise)
    return say_noise(replace(comparison, rows=told) if told else comparison)


def render(comparison: Comparison) -> Table:
    """Return the comparison as a table that fits a terminal of 80 columns, its notes underneath.

    A rule separates groups that have different references. Many arms share lines: see `merged_rows`.
    """
    stored = {row.setting: row for row in comparison.stored}
    every: list[ComparisonRow] = []
    for row in comparison.rows:  # each group's stored reference in front of it
        every += [stored.pop(row.setting), row] if row.setting in stored else [row]
    lines = lines_of(every)
    rows = lines.rows
    reductions = {row.reduction for row in rows} - {None}
    title = "Every arm against its reference" + (f", {reductions.pop()}" if len(reductions) == 1 else "")
    caption = _caption(rows, [note for note in (lines.note, *comparison.notes) if note])
    table = Table(title=title, caption=caption, **LOOK)
    printed: list[Sequence[str]] = []
    for name in _columns(rows, lines.counts):
        header, cells = _printed(name, rows, lines.counts)
        printed.append(cells)
        justify: Literal["left", "right"] = "left" if name in (*_FOLDED, "reduction") else "right"
        no_wrap = name not in _FOLDED
        table.add_column(Text(header), justify=justify, no_wrap=no_wrap, overflow="fold")
    for row, after, *cells in zip(rows, (*rows, None)[1:], *printed, strict=True):
        ends = after is not None and after.setting != row.setting
        style = "bold" if row.is_reference else "dim" if not row.finished else None
        table.add_row(*map(Text, cells), end_section=ends, style=style)
    return table


def _columns(rows: Sequence[ComparisonRow], counts: Mapping[str, int]) -> list[str]:
    # What is the same for all arms has no column.
    several = len({row.reduction for row in rows} - {None}) > 1
    differs = any(row.differs for row in rows)
    any_verdict = any(row.verdict for row in rows)
    batch_is_said = any("global batch" in dict(row.setting.values) for row in rows)
    wanted = {
        "accum_steps": True,
        "runs": bool(counts),
        "verdict": any_verdict,
        # Left out where space is short: it is the global batch over N, and uneven splits have a note.
        "micro_batch_sizes": not ((counts or any_verdict) and several and differs),
        "global_batch_size": len({row.global_batch_size for row in rows}) > 1 and not batch_is_said,
        "reduction": several,
        "differs": differs,
    }
    classes, tokens = (any(getattr(row, n) is not None for row in rows) for n in _SCORES)
    left_out = "eval_accuracy" if tokens and not classes else "eval_perplexity"
    numbers = (name for name in _NUMBERS if name != left_out)
    return [*(name for name, is_wanted in wanted.items() if is_wanted), *numbers]


def _printed(
    name: str, rows: Sequence[ComparisonRow], counts: Mapping[str, int]
) -> tuple[str, list[str]]:
    """Return a column's header, with one unit for all arms, and its cells."""
    if name == "runs":  # of a line of this table, not of an arm
        return "\nruns", [str(counts[row.run_id]) for row in rows]
    column = COLUMNS[name]
    say, header = column.say, column.header
    if column.unit is not None:
        known = [value for row in rows if (value := getattr(row, name)) is not None]
        size, unit = column.unit(max(known, default=0))
        say, header = (lambda value: say_scaled(value, size)), header.format(unit=unit if known else "")
    any_controls = any(row.controls for row in rows)
    any_other_command = any(row.other_command for row in rows)

    def cell(row: ComparisonRow) -> str:
        value = getattr(row, name)
        text = MISSING if value in (None, "", ()) else say(value)
        if name == "accum_steps":
            return text + (_mark(row) or " ")
        if name == "max_loss_gap" and any_controls:
            return text + _STANDINGS.get(row.control or "", " ")
        if name in _TIMES and any_other_command:
            return text + ("~" if row.other_command and value is not None else " ")
        if name == "verdict" and row.role not in ("reference", "stored reference"):
            return row.verdict or NOT_AUDITED  # what others are compared with needs no audit
        return text

    return header, [cell(row) for row in rows]


def _mark(row: ComparisonRow) -> str:
    return _MARKS.get(row.role, "") or ("" if row.finished else "!")


def _caption(rows: Sequence[ComparisonRow], notes: Sequence[str]) -> Text:
    marks = sorted({_mark(row) for row in rows} & _LEGEND.keys())
    marks += ["~"] * any(row.other_command and row.step_s is not None for row in rows)
    legend = "; ".join(f"{mark} {_LEGEND[mark]}" for mark in marks)
    lines = [legend, _HEADERS] if legend else []
    controls = [row.controls for row in rows if row.controls]
    if controls:
        lines.append(
            f"✓ inside, ✗ outside the envelope of {say_controls(controls)}: what rounding alone makes "
            "of the curve"
        )
    more = len(notes) - MOST_NOTES
    said = [*notes[:MOST_NOTES], f"and {more} more notes of the kind."] if more > 0 else notes
    return Text("\n".join([*lines, *(f"- {note}" for note in said)]))
