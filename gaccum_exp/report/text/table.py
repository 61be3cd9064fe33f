"""Print a comparison on a terminal: its table, its notes, and what it says in a sentence or two."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple, TextIO

from rich.table import Table
from rich.text import Text

from gaccum_exp.core.step_times import FEWEST_WINDOWS, SOME_LOAD
from gaccum_exp.report.arm_limit import MOST_NOTES
from gaccum_exp.report.compare.batches import BatchComparison
from gaccum_exp.report.compare.columns import COLUMNS, ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.text.batch_table import print_batches
from gaccum_exp.report.text.merged_rows import lines_of
from gaccum_exp.report.text.noise_notes import say_noise
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.terminal import LOOK, console
from gaccum_exp.report.text.wording import MISSING, NOT_AUDITED, say_controls, say_list, say_scaled

_MARKS = {"reference": "*", "stand-in": "†", "stored reference": "‡"}
_LEGEND = {
    "*": "the reference: one pass over the same global batch",
    "†": "a stand-in for the missing one-pass reference",
    "‡": "the reference, a stored run of another sweep",
    "!": "not finished",
    "~": "run by another command than its reference, perhaps under another load",
}
_TO_A_REFERENCE = ("max_loss_gap", "weight_distance", "peak_ratio", "step_ratio")
_HEADERS = (
    "loss gap: largest difference to its loss curve; weight dist.: relative, of the final weights; "
    "×: ratio to its value"
)
_HEADERS_OF_AUDITS = (
    "e64, e: relative error of the gradient in float64 and in the run's precision; floor: how far "
    "rounding alone moves it there"
)
_STANDINGS = {"inside": "✓", "outside": "✗"}
_SCORES = ("eval_accuracy", "eval_perplexity")
"""Of which a table has one."""
_NUMBERS = (
    *("train_loss", "eval_loss", *_SCORES, "max_loss_gap", "weight_distance"),
    *("peak_bytes", "peak_ratio", "step_s", "step_ratio"),
)
_OF_AUDITS = ("e64", "e", "floor", "cause", "blamed")
"""What a table of audits has in place of the numbers of trainings."""
_TIMES = ("step_s", "step_ratio")
_AS_LONG = "≈"
_LEAST_WIDTH = 60
"""Letters; title and notes are as wide as the table."""
_FOLDED = ("verdict", "differs", "cause", "blamed")
"""Columns that may take several lines; numbers are never cut."""


def print_comparison(
    comparison: Comparison, batches: Sequence[BatchComparison] = (), to: TextIO | None = None
) -> None:
    """Print the table, and what it says in words; then the comparison of different global batches.

    Args:
        comparison: of the arms.
        batches: of the global batches.
        to: the stream; None: stdout.
    """
    out = console(to)
    out.print(render(comparison))
    out.print(summary(comparison), highlight=False)
    if worth := say_worth(comparison, batches):
        out.print(worth, highlight=False)
    print_batches(out, batches)


def say_worth(comparison: Comparison, batches: Sequence[BatchComparison] = ()) -> str:
    """Say what the noise scale tells, a line each; of batches with several rates, at the best one."""
    told = tuple(row.noise.row for of in batches for row in of.rows if row.noise)
    return say_noise(replace(comparison, rows=told) if told else comparison)


class TableCells(NamedTuple):
    """A comparison's table as text, whatever it is printed or written as."""

    title: str
    names: tuple[str, ...]
    """Of the columns, as a `ComparisonRow` has them."""
    headers: tuple[str, ...]
    """Of one line or two."""
    lines: tuple[tuple[str, ...], ...]
    rows: tuple[ComparisonRow, ...]
    """What each line shows."""
    ends: frozenset[int]
    """The lines after which another group begins, which has another reference."""
    legend: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def left(self) -> tuple[bool, ...]:
        """Whether a column holds words, which begin on the left, and no numbers."""
        return tuple(name in (*_FOLDED, "reduction") for name in self.names)


def cells_of(comparison: Comparison) -> TableCells:
    """Return what the table of a comparison says. Many arms share lines: see `merged_rows`."""
    stored = {row.setting: row for row in comparison.stored}
    every: list[ComparisonRow] = []
    for row in comparison.rows:  # each group's stored reference in front of it
        every += [stored.pop(row.setting), row] if row.setting in stored else [row]
    # An arm that did not begin has nothing to show; a note says why.
    lines = lines_of([row for row in every if row.accum_steps is not None] or every)
    rows = lines.rows
    reductions = {row.reduction for row in rows} - {None}
    names = _columns(rows, lines.counts)
    columns = [_printed(name, rows, lines.counts) for name in names]
    return TableCells(
        title=(
            "The gradient against that of one pass"
            if _are_audits(rows)
            else "Every arm against its reference"
        )
        + (f", {reductions.pop()}" if len(reductions) == 1 else ""),
        names=tuple(names),
        headers=tuple(header for header, _ in columns),
        lines=tuple(zip(*(cells for _, cells in columns), strict=True)),
        rows=rows,
        ends=frozenset(
            n for n, (row, after) in enumerate(pairwise(rows)) if after.setting != row.setting
        ),
        legend=tuple(_legend(rows)),
        notes=tuple(note for note in (lines.note, *comparison.notes) if note),
    )


def render(comparison: Comparison) -> Table:
    """Return the comparison as a table that fits a terminal of 80 columns, its notes underneath.

    A rule separates groups that have different references.
    """
    cells = cells_of(comparison)
    more = len(cells.notes) - MOST_NOTES
    notes = [f"- {note}" for note in cells.notes[:MOST_NOTES]]
    notes += [f"- and {more} more notes of the kind."] if more > 0 else []
    caption = Text("\n".join([*cells.legend, *notes]))
    table = Table(title=cells.title, caption=caption, min_width=_LEAST_WIDTH, **LOOK)
    for name, header, left in zip(cells.names, cells.headers, cells.left, strict=True):
        justify: Literal["left", "right"] = "left" if left else "right"
        table.add_column(Text(header), justify=justify, no_wrap=name not in _FOLDED, overflow="fold")
    for number, (row, line) in enumerate(zip(cells.rows, cells.lines, strict=True)):
        style = "bold" if row.is_reference else "dim" if not row.finished else None
        table.add_row(*map(Text, line), end_section=number in cells.ends, style=style)
    return table


def _columns(rows: Sequence[ComparisonRow], counts: Mapping[str, int]) -> list[str]:
    # What is the same for all arms has no column, and neither has what no arm got as far as.
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
        "global_batch_size": len({row.global_batch_size for row in rows} - {None}) > 1
        and not batch_is_said,
        "reduction": several,
        "differs": differs,
    }
    classes, tokens = (any(getattr(row, n) is not None for row in rows) for n in _SCORES)
    left_out = ["eval_accuracy" if tokens and not classes else "eval_perplexity"]
    if all(row.step_ratio is None for row in rows):
        left_out.append("step_ratio")  # a line below says why
    numbers = _OF_AUDITS if _are_audits(rows) else [name for name in _NUMBERS if name not in left_out]
    numbers = [name for name in numbers if any(getattr(row, name) is not None for row in rows)]
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
        # An open question's numbers would read like a result.
        is_open = row.verdict == "inconclusive" and name in ("e64", "e", "floor")
        text = MISSING if value in (None, "", ()) or is_open else say(value)
        if name == "accum_steps":
            return text + (_mark(row) or " ")
        if name == "max_loss_gap" and any_controls:
            return text + _STANDINGS.get(row.control or "", " ")
        if name == "step_ratio" and row.step_differs is False:
            text = f"{_AS_LONG}{text}"
        if name in _TIMES and any_other_command:
            return text + ("~" if row.other_command and value is not None else " ")
        if name == "verdict" and row.role not in ("reference", "stored reference"):
            # What others are compared with needs no audit, and what did not begin had none.
            return row.verdict or (MISSING if row.accum_steps is None else NOT_AUDITED)
        return text

    return header, [cell(row) for row in rows]


def _are_audits(rows: Sequence[ComparisonRow]) -> bool:
    return bool(rows) and all(row.is_audit for row in rows)


def _mark(row: ComparisonRow) -> str:
    return _MARKS.get(row.role, "") or ("" if row.finished else "!")


def _legend(rows: Sequence[ComparisonRow]) -> list[str]:
    marks = sorted({_mark(row) for row in rows} & _LEGEND.keys())
    marks += ["~"] * any(row.other_command and row.step_s is not None for row in rows)
    legend = "; ".join(f"{mark} {_LEGEND[mark]}" for mark in marks)
    compared = any(getattr(row, name) is not None for row in rows for name in _TO_A_REFERENCE)
    headers = _HEADERS_OF_AUDITS if _are_audits(rows) else _HEADERS if compared else ""
    lines = [line for line in (legend, headers) if line]
    lines += filter(None, [_say_step_times(rows), _say_load(rows)])
    controls = [row.controls for row in rows if row.controls]
    if controls:
        lines.append(
            f"✓ inside, ✗ outside the envelope of {say_controls(controls)}: what rounding alone makes "
            "of the curve"
        )
    return lines


def _say_step_times(rows: Sequence[ComparisonRow]) -> str:
    """Say of how many windows the step times are the medians, and how far the widest one spreads."""
    timed = [row for row in rows if row.step_s]
    counts = sorted({row.step_windows for row in timed if row.step_windows is not None})
    if not timed:
        return ""
    if not counts:
        return "step: no ratio, since it was not recorded how many windows were timed"
    if counts == [0]:
        return f"step: no window was timed after warm-up; a ratio takes {FEWEST_WINDOWS}"
    ends = say_list(counts) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    said = f"step: median of {ends} window{'' if counts == [1] else 's'} after warm-up"
    if counts[-1] < FEWEST_WINDOWS:
        return f"{said}; a ratio takes {FEWEST_WINDOWS}"
    spreads = {row.accum_steps: spread for row in timed if (spread := _spread(row)) is not None}
    widest = max(spreads, key=lambda n: spreads[n])
    said += f", their quartiles up to {spreads[widest]:.0%} off (N = {widest})"
    if counts[0] < FEWEST_WINDOWS:
        said += f"; a ratio takes {FEWEST_WINDOWS}"
    elif any(row.step_windows is None for row in timed):
        said += "; no ratio where they were not counted"
    if any(row.step_differs is False for row in rows):
        said += f"; {_AS_LONG} no measurable difference: quartiles overlap"
    return said


def _say_load(rows: Sequence[ComparisonRow]) -> str:
    """Say for what part of a training other processes had the processor, where that is no small one."""
    loaded = [row for row in rows if row.step_s and (row.waiting_share or 0.0) > SOME_LOAD]
    if not loaded:
        return ""
    most = max(loaded, key=lambda row: row.waiting_share or 0.0)
    said = (
        f"other processes had the processor for up to {most.waiting_share:.0%} of a training "
        f"(N = {most.accum_steps}), which its times include"
    )
    return f"{said}; no ratio where that differs much" if any(row.other_load for row in rows) else said


def _spread(row: ComparisonRow) -> float | None:
    """Return how far the farther quartile is from the median, relative to that."""
    if not row.step_s or row.step_low_s is None or row.step_high_s is None:
        return None
    return max(row.step_s - row.step_low_s, row.step_high_s - row.step_s) / row.step_s
