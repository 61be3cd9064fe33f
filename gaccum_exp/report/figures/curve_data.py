"""Prepare what the figure of loss curves shows, as plain curves.

Each arm has its own; of too many, those with the same N are one, their median and range, or those with
neighbouring N where a legend cannot name all.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.distances import loss_curve, loss_gaps
from gaccum_exp.report.compare.rounding_envelope import Envelope, spacing
from gaccum_exp.report.figures.panels import (
    Panel,
    groups_of,
    is_crowded,
    label_of,
    panels_of,
    rows_of,
    subject,
)
from gaccum_exp.report.text.wording import say_controls
from gaccum_exp.tracking.metrics import TRAIN_LOSS
from gaccum_exp.tracking.records import RunRecord

Group = tuple[int, ...]
"""The N that are drawn alike."""
Points = tuple[np.ndarray, np.ndarray]
"""Optimizer steps, ascending, and values at them."""


@dataclass(frozen=True, slots=True)
class CurveRow:
    """A curve: an arm's, or what several have in common. All arrays are (steps,)."""

    group: Group
    name: str
    """The run's id, or `median-N` with the least N of several runs."""
    is_reference: bool
    global_steps: np.ndarray
    values: np.ndarray
    range: Points | None = None
    """The least and the greatest value of several runs."""


@dataclass(frozen=True, slots=True)
class PanelRows:
    """What one panel shows."""

    title: str
    losses: tuple[CurveRow, ...]
    gaps: tuple[CurveRow, ...]
    """|difference to the reference|, of all but references."""
    envelopes: tuple[Envelope, ...]
    """What rounding alone makes of the panel's references."""
    largest_gaps: tuple[CurveRow, ...] = ()
    """The largest of the differences up to each step: two curves that lie apart cross now and then, and
    that they meet at a step says nothing of how far they are."""
    last_digit: Points | None = None
    """Where no control shows what rounding does, the least that differences can be other than 0: the
    last digit of the references' losses, the largest up to each step."""

    @property
    def has_losses(self) -> bool:
        """Whether any of its losses is a number."""
        return any(np.isfinite(curve.values).any() for curve in self.losses)


@dataclass(frozen=True, slots=True)
class LossRows:
    """What the figure shows."""

    title: str
    groups: Mapping[Group, tuple[str, bool]]
    """What a legend says of those that are drawn alike, and whether a reference is among them."""
    is_crowded: bool
    controls: str
    """How many controls the envelopes are of, in words; empty: none."""
    panels: tuple[PanelRows, ...]
    notes: tuple[str, ...]


def loss_rows(comparison: Comparison, runs: Mapping[str, RunRecord]) -> LossRows:
    """Prepare the loss figure; `runs`, by id, must hold the stored references too."""
    panels = panels_of(comparison)
    crowded = is_crowded(panels)
    groups = groups_of(panels)
    repeated = any(len(rows) > 1 for panel in panels for rows in panel.by_n.values())
    controls = [row.controls for row in comparison.rows if row.controls]

    def loss_of(row: ComparisonRow) -> Points:
        curve = runs[row.run_id].curves.get(TRAIN_LOSS)
        if crowded or curve is None:
            return loss_curve(runs[row.run_id])
        return np.array(curve.global_steps), np.array(curve.values)

    def gap_of(row: ComparisonRow) -> Points | None:
        if row.is_reference or row.reference_run_id is None:
            return None
        return loss_gaps(runs[row.run_id], runs[row.reference_run_id])

    def largest_of(row: ComparisonRow) -> Points | None:
        points = gap_of(row)
        return None if points is None else (points[0], np.maximum.accumulate(points[1]))

    return LossRows(
        title=f"Train loss: {subject(comparison, runs)}"
        + ("; a curve for each of repeated runs" if repeated and not crowded else ""),
        groups={
            group: (label_of(group, panels), any(row.is_reference for row in rows_of(group, panels)))
            for group in groups
        },
        is_crowded=crowded,
        controls=say_controls(controls) if controls else "",
        panels=tuple(
            PanelRows(
                panel.title,
                _curves(panel, groups, crowded, loss_of),
                _curves(panel, groups, crowded, gap_of),
                _envelopes(panel, comparison, crowded),
                _curves(panel, groups, crowded, largest_of),
                _last_digit(panel, comparison, runs),
            )
            for panel in panels
        ),
        notes=comparison.reference_notes,
    )


def curve_range(curves: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the steps of curves, and the least, the median and the greatest value at each: (steps,).

    A value that is not finite counts as missing; where all are missing, NaN is returned.
    """
    global_steps = np.unique(np.concatenate([steps for steps, _ in curves]))
    values = np.full((len(curves), global_steps.size), np.nan)
    for line, (at, of) in zip(values, curves, strict=True):
        line[np.searchsorted(global_steps, at)] = np.where(np.isfinite(of), of, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of steps at which every value is missing
        low, median, high = (of(values, axis=0) for of in (np.nanmin, np.nanmedian, np.nanmax))
    return global_steps, low, median, high


def _curves(
    panel: Panel,
    groups: Sequence[Group],
    crowded: bool,
    points_of: Callable[[ComparisonRow], Points | None],
) -> tuple[CurveRow, ...]:
    """Return the panel's curves, those of references first; of a crowd one for each group."""
    points = {row.run_id: of_row for row in panel.rows if (of_row := points_of(row)) is not None}
    if not crowded:
        group_of = {n: group for group in groups for n in group}
        return tuple(
            CurveRow(group_of[row.accum_steps or 0], row.run_id, row.is_reference, *points[row.run_id])
            for row in sorted(panel.rows, key=lambda row: not row.is_reference)
            if row.run_id in points
        )
    found = []
    for group in groups:
        rows = rows_of(group, [panel])
        curves = [points[row.run_id] for row in rows if row.run_id in points]
        if curves:
            steps, low, median, high = curve_range(curves)
            is_reference = any(row.is_reference for row in rows)
            name = f"median-{group[0]}"
            found.append(CurveRow(group, name, is_reference, steps, median, (low, high)))
    return tuple(found)


def _envelopes(panel: Panel, comparison: Comparison, crowded: bool) -> tuple[Envelope, ...]:
    # Of too many arms the widest at each step.
    compared_with = {row.reference_run_id for row in panel.rows}
    envelopes = [e for e in comparison.envelopes if e.reference_run_id in compared_with]
    if not crowded or not envelopes:
        return tuple(envelopes)
    steps, *_, values = curve_range([(np.array(e.global_steps), np.array(e.values)) for e in envelopes])
    *_, limits = curve_range([(np.array(e.global_steps), np.array(e.limits)) for e in envelopes])
    widest = (tuple(column.tolist()) for column in (steps, values, limits))
    return (Envelope("widest", max(e.controls for e in envelopes), *widest),)


def _last_digit(panel: Panel, comparison: Comparison, runs: Mapping[str, RunRecord]) -> Points | None:
    references = {row.reference_run_id for row in panel.rows if not row.is_reference} - {None}
    if references & {envelope.reference_run_id for envelope in comparison.envelopes}:
        return None
    curves = [loss_curve(runs[run_id]) for run_id in sorted(filter(None, references))]
    digits = [(steps, np.maximum.accumulate(spacing(losses))) for steps, losses in curves if steps.size]
    if not digits:
        return None
    steps, *_, widest = curve_range(digits)
    return steps, widest
