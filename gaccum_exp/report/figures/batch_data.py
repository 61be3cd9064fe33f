"""Prepare what the figure of global batches shows, as plain curves and points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gaccum_exp.report.compare.batch_curves import AXES, Axis, mean_curve
from gaccum_exp.report.compare.batches import BatchComparison, BatchRow
from gaccum_exp.report.text.batch_table import EQUAL, say_critical, say_interval, say_point
from gaccum_exp.report.text.wording import time_unit


@dataclass(frozen=True, slots=True)
class BatchCurve:
    """The loss of one batch, at its best rate: arrays are (points,)."""

    batch: int
    at: np.ndarray
    """Samples, optimizer steps, or the panel's unit of time."""
    mean: np.ndarray
    """Over seeds."""
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, slots=True)
class CurvePanel:
    """Losses against one of the axes."""

    title: str
    axis: str
    loss: str
    point: float
    """Where losses are compared, in the unit of the axis."""
    curves: tuple[BatchCurve, ...]


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """One batch at equal samples."""

    batch: int
    mean: float
    spread: float
    """0 of one seed."""
    is_settled: bool
    """Whether its rate is inside those tried, and lost no seed."""


@dataclass(frozen=True, slots=True)
class NoiseMark:
    """The noise scale at the end of the best batch's training."""

    label: str
    scale: float | None
    low: float
    high: float
    """Infinite where nothing bounds it."""


@dataclass(frozen=True, slots=True)
class SettingPanels:
    """What one setting shows."""

    label: str
    panels: tuple[CurvePanel, ...]
    losses: tuple[BatchLoss, ...]
    loss: str
    limit: float | None
    """The loss up to which a batch is as good as the best."""
    critical: int | None
    critical_label: str
    noise: NoiseMark | None


def batch_panels(comparison: BatchComparison, *, named: bool) -> SettingPanels:
    """Prepare one setting; `named` says whether it is one of several."""
    samples, best, critical = comparison.points["samples"], comparison.best, comparison.critical
    told = best.noise or next((row.noise for row in comparison.rows if row.noise), None)
    noise = None
    if told is not None and told.low:
        metric = " in Adam’s metric" if told.in_adam_metric else ""
        label = f"noise scale{metric}, batch {told.row.global_batch_size}: {say_interval(told)}"
        noise = NoiseMark(label, told.scale, told.low, told.high)
    return SettingPanels(
        label=comparison.setting.label if named else "",
        panels=tuple(
            _curves(comparison, axis) for axis in AXES if comparison.points[axis].at is not None
        ),
        losses=tuple(
            BatchLoss(row.global_batch_size, loss.mean, loss.spread or 0.0, _is_settled(row))
            for row in comparison.rows
            if (loss := row.losses.get("samples")) is not None and math.isfinite(loss.mean)
        ),
        loss=f"{_named(samples.metric)} at {say_point(samples)} samples",
        limit=critical.limit,
        critical=critical.size,
        critical_label=f"critical batch: {say_critical(critical)}",
        noise=noise,
    )


def _is_settled(row: BatchRow) -> bool:
    return row.rate_place == "inside" and not row.diverged


def _curves(comparison: BatchComparison, axis: Axis) -> CurvePanel:
    point = comparison.points[axis]
    assert point.at is not None
    size, unit = time_unit(point.at) if axis == "seconds" else (1.0, "")
    words = {
        "samples": "samples",
        "steps": "optimizer steps",
        "seconds": f"time in {unit}: steps × their median",
    }
    curves = []
    for row in comparison.rows:
        at, losses = mean_curve(axis, [of[point.metric] for of in row.curves])
        curves.append(
            BatchCurve(row.global_batch_size, at / size, losses.mean(0), losses.min(0), losses.max(0))
        )
    title = f"{EQUAL[axis]}: {say_point(point)}"
    return CurvePanel(title, words[axis], _named(point.metric), point.at / size, tuple(curves))


def _named(metric: str) -> str:
    return metric.replace("/", " ")


def notes_of(comparisons: Sequence[BatchComparison], left_out: int) -> tuple[str, ...]:
    """Say what a reader of the figure must know."""
    notes = [
        "Each batch at the learning rate that is best for it at equal samples. Line: mean over seeds; "
        "shade: their range; bars: ± standard deviation. Dotted: where losses are compared."
    ]
    if not all(_is_settled(row) for of in comparisons for row in of.rows):
        notes.append("Hollow: the best rate is at an end of those tried, contested, or lost a seed.")
    reasons = {(EQUAL[p.axis], p.reason) for of in comparisons for p in of.points.values() if p.reason}
    notes += [f"At {equal} nothing is compared: {reason}." for equal, reason in sorted(reasons)]
    if left_out:
        notes.append(f"{left_out} more settings are in batches.csv.")
    return tuple(notes)
