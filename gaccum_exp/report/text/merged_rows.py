"""Sum up the lines of a table of too many arms.

Of losses and times a line has the median, of verdicts and standings the worst, of all else the largest.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gaccum_exp.report.arm_limit import MOST_ARMS
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.distances import nan_last
from gaccum_exp.report.compare.swept_keys import Setting
from gaccum_exp.report.text.verdict_notes import rank

_MEDIANS = (
    *("train_loss", "eval_loss", "eval_accuracy", "eval_perplexity"),
    *("step_s", "step_low_s", "step_high_s", "step_ratio"),
)
_LARGESTS = ("max_loss_gap", "weight_distance", "peak_bytes", "peak_ratio", "waiting_share")


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a table, and what to say of them."""

    rows: tuple[ComparisonRow, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many arms a line sums up, by its run id; empty where each has its own."""
    note: str = ""


def lines_of(rows: Sequence[ComparisonRow]) -> Lines:
    """Sum up arms that differ in the seed alone, or in all but N and reduction, until they are few.

    If they are still too many, the references stay, and those whose verdicts and gaps stand out.
    """
    if len(rows) <= MOST_ARMS:
        return Lines(tuple(rows))
    alike = _together(rows, lambda row: row.setting.repeated_label)
    by_seed = len(alike) <= MOST_ARMS
    if not by_seed:
        alike = _together(rows, lambda row: row.setting.reduction)
    is_summed = len(alike) < len(rows)
    lines = [_sum_up(repeated, by_seed=by_seed) for repeated in alike]
    by_rank = sorted(range(len(lines)), key=lambda i: (not lines[i].is_reference, _prominence(lines[i])))
    kept = sorted(by_rank[:MOST_ARMS])
    notes = []
    if is_summed:
        shared = "the seed alone" if by_seed else "other settings than N and reduction"
        notes.append(
            f"{len(rows)} arms on {len(lines)} lines: those that differ in {shared} share one, which "
            "has the median of losses and times, the worst verdict, and of all else the largest."
        )
    if len(kept) < len(lines):
        what = "lines" if is_summed else "arms"
        notes.append(
            f"{len(lines) - len(kept)} of {len(lines)} {what} are left out, whose verdicts and gaps "
            "stand out least."
        )
    notes.append("comparison.csv has a line for each arm.")
    counts = {line.run_id: len(repeated) for line, repeated in zip(lines, alike, strict=True)}
    return Lines(tuple(lines[i] for i in kept), counts if is_summed else {}, " ".join(notes))


def all_differ(rows: Iterable[ComparisonRow]) -> bool | None:
    """Whether all step times differ measurably, in one direction; None: none is compared."""
    known = [(row.step_differs, (row.step_ratio or 0) > 1) for row in rows]
    known = [pair for pair in known if pair[0] is not None]
    return len(set(known)) == 1 and known[0][0] if known else None


def _together(
    rows: Sequence[ComparisonRow], setting_of: Callable[[ComparisonRow], str | None]
) -> list[list[ComparisonRow]]:
    # Rows of equal setting and N, in the order of settings, then by N.
    found: dict[str | None, dict[float, list[ComparisonRow]]] = {}
    for row in rows:
        n = math.inf if row.accum_steps is None else row.accum_steps
        found.setdefault(setting_of(row), {}).setdefault(n, []).append(row)
    return [of_setting[n] for of_setting in found.values() for n in sorted(of_setting)]


def _sum_up(rows: Sequence[ComparisonRow], *, by_seed: bool) -> ComparisonRow:
    numbers: dict[str, Any] = {}
    for name in (*_MEDIANS, *_LARGESTS):
        known = sorted((v for row in rows if (v := getattr(row, name)) is not None), key=nan_last)
        # Not statistics.median, which sorts NaN anywhere.
        median = known and (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
        numbers[name] = None if not known else median if name in _MEDIANS else known[-1]
    worst = min(rows, key=_prominence)
    values = tuple(pair for pair in worst.setting.values if by_seed and pair[0] != "seed")
    setting = Setting(worst.reduction, values)
    unfinished = [row for row in rows if not row.finished]
    batches = {row.global_batch_size for row in rows}
    return replace(
        worst,
        role=worst.role if all(row.is_reference for row in rows) else "candidate",
        setting=setting,
        differs=setting.text,
        status=(unfinished or [worst])[0].status,
        step_windows=min((n for row in rows if (n := row.step_windows) is not None), default=None),
        step_differs=all_differ(rows),
        other_command=any(row.other_command for row in rows),
        other_load=any(row.other_load for row in rows),
        global_batch_size=worst.global_batch_size if len(batches) == 1 else None,
        micro_batch_sizes=tuple(sorted({n for row in rows for n in row.micro_batch_sizes})[::-1]),
        **numbers,
    )


def _prominence(row: ComparisonRow) -> tuple[bool, int, bool, float]:
    """Order rows by how much they have to be seen."""
    gap = row.max_loss_gap
    return row.finished, rank(row.verdict), row.control != "outside", -(nan_last(gap) if gap else 0.0)
