"""What a table shows of more arms than anyone reads: a line for those that repeat each other.

Of losses and times a line has the median, of verdicts and standings the worst, of all else the largest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gaccum_exp.report.compare.row import ComparisonRow
from gaccum_exp.report.compare.swept_keys import Swept
from gaccum_exp.report.text.findings import rank

MOST_ROWS = 60
"""So many arms still have a line each."""


@dataclass(frozen=True, slots=True)
class Condensed:
    """The lines of a table, and what to say of them."""

    rows: tuple[ComparisonRow, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many arms a line sums up, by its run id; empty where each has its own."""
    said: str = ""


def condense(rows: Sequence[ComparisonRow]) -> Condensed:
    """Sum up arms that differ in the seed alone, or in all but N and reduction, until they are few.

    If they are still too many, the references stay, and those whose verdicts and gaps stand out.
    """
    if len(rows) <= MOST_ROWS:
        return Condensed(tuple(rows))
    together = _together(rows, lambda row: (row.setting.repeated_label, row.steps))
    by_seed = len(together) <= MOST_ROWS
    if not by_seed:
        together = _together(rows, lambda row: (row.setting.reduction, row.steps))
    is_summed = len(together) < len(rows)
    lines = [_sum_up(alike, by_seed=by_seed) for alike in together]
    by_rank = sorted(range(len(lines)), key=lambda i: (not lines[i].is_reference, _remarkable(lines[i])))
    kept = sorted(by_rank[:MOST_ROWS])
    said = []
    if is_summed:
        shared = "the seed alone" if by_seed else "other settings than N and reduction"
        said.append(
            f"{len(rows)} arms on {len(lines)} lines: those that differ in {shared} share one, which "
            "has the median of losses and times, the worst verdict, and of all else the largest."
        )
    if len(kept) < len(lines):
        what = "lines" if is_summed else "arms"
        said.append(
            f"{len(lines) - len(kept)} of {len(lines)} {what} are left out, whose verdicts and gaps "
            "stand out least."
        )
    said.append("comparison.csv has a line for each arm.")
    counts = {line.run_id: len(alike) for line, alike in zip(lines, together, strict=True)}
    return Condensed(tuple(lines[i] for i in kept), counts if is_summed else {}, " ".join(said))


def _together(
    rows: Sequence[ComparisonRow], key_of: Callable[[ComparisonRow], tuple[object, int | None]]
) -> list[list[ComparisonRow]]:
    """Sort rows into those of equal keys: settings in the order of their first rows, then by N."""
    found: dict[object, dict[int | None, list[ComparisonRow]]] = {}
    for row in rows:
        setting, steps = key_of(row)
        found.setdefault(setting, {}).setdefault(steps, []).append(row)
    return [
        of_setting[steps]
        for of_setting in found.values()
        for steps in sorted(of_setting, key=lambda n: math.inf if n is None else n)
    ]


def _sum_up(rows: Sequence[ComparisonRow], *, by_seed: bool) -> ComparisonRow:
    worst = min(rows, key=_remarkable)
    values = tuple(pair for pair in worst.setting.values if by_seed and pair[0] != "seed")
    unfinished = [row for row in rows if not row.finished]
    batches = {row.global_batch_size for row in rows}
    return replace(
        worst,
        role=worst.role if all(row.is_reference for row in rows) else "candidate",
        setting=Swept(worst.reduction, values),
        status=(unfinished or [worst])[0].status,
        global_batch_size=worst.global_batch_size if len(batches) == 1 else None,
        micro_batch_sizes=tuple(sorted({n for row in rows for n in row.micro_batch_sizes})[::-1]),
        train_loss=_median([row.train_loss for row in rows]),
        eval_loss=_median([row.eval_loss for row in rows]),
        eval_accuracy=_median([row.eval_accuracy for row in rows]),
        step_s=_median([row.step_s for row in rows]),
        step_ratio=_median([row.step_ratio for row in rows]),
        max_loss_gap=_largest([row.max_loss_gap for row in rows]),
        weight_distance=_largest([row.weight_distance for row in rows]),
        peak_bytes=max((row.peak_bytes for row in rows if row.peak_bytes is not None), default=None),
        peak_ratio=_largest([row.peak_ratio for row in rows]),
    )


def _remarkable(row: ComparisonRow) -> tuple[bool, int, bool, float]:
    """Order rows by how much they want to be seen."""
    gap = row.max_loss_gap
    return row.finished, rank(row), row.control != "outside", -_nan_last(0.0 if gap is None else gap)


def _ascending(values: Sequence[float | None]) -> list[float]:
    return sorted((value for value in values if value is not None), key=_nan_last)


def _median(values: Sequence[float | None]) -> float | None:
    known = _ascending(values)
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else None


def _largest(values: Sequence[float | None]) -> float | None:
    known = _ascending(values)
    return known[-1] if known else None


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
