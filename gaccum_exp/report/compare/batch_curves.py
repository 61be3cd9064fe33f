"""The loss of an arm against what it has had: samples, optimizer steps, seconds.

The evaluation's loss is what was recorded, and between two evaluations linear. The train loss at a step
is the mean over the last 5 % of the samples before it, and between two steps linear: a single window's
is the noisier the smaller its batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gaccum_exp.report.compare.distances import loss_curve
from gaccum_exp.tracking.metrics import EVAL_LOSS, TRAIN_LOSS
from gaccum_exp.tracking.records import RunRecord

Axis = Literal["samples", "steps", "seconds"]
"""What losses are compared at equal amounts of; steps are the optimizer's."""
AXES: tuple[Axis, ...] = ("samples", "steps", "seconds")
AVERAGED = 0.05
"""The share of the samples before a point over which a train loss is averaged."""


@dataclass(frozen=True, slots=True)
class LossCurve:
    """One arm's loss against each of the axes: arrays of float64, (points,)."""

    values: np.ndarray
    samples: np.ndarray
    steps: np.ndarray
    seconds: np.ndarray
    """NaN where the time of a step is not known."""

    def against(self, axis: Axis) -> np.ndarray:
        """Return where the losses are, ascending."""
        at: np.ndarray = getattr(self, axis)
        return at

    def at(self, axis: Axis, point: float) -> float:
        """Return the loss at a point, linear between two of the curve's."""
        return float(np.interp(point, self.against(axis), self.values))


Curves = Mapping[str, LossCurve]
"""Of one arm, by metric: `train/loss` and, of two evaluations or more, `eval/loss`."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where losses are compared: at an equal amount of what, how much of it, and which loss."""

    axis: Axis
    at: float | None = None
    """The most that all arms have had; None: losses are not compared so."""
    metric: str = ""
    """`eval/loss`, or `train/loss` where an arm has no two evaluations, or its first one later."""
    reason: str = ""
    """Why nothing is compared."""


def samples_after(run: RunRecord, global_steps: np.ndarray) -> np.ndarray:
    """Return how many samples a run of one global batch had been fed after its steps, (steps,).

    A partial window holds fewer, where `accum.partial_window=exact` ends an epoch with one. Of a run
    that does not say how many samples its data set holds, every window is taken for a full one.
    """
    batch = run.global_batch_size or 0
    size = run.training_samples
    if size is None or run.params.get("accum.partial_window", "exact") != "exact":
        return global_steps * float(batch)
    epochs, windows = np.divmod(global_steps, -(-size // batch))
    return epochs * float(size) + windows * float(batch)


def samples_of(run: RunRecord) -> float:
    """Return how many samples a run had been fed at its last recorded loss."""
    global_steps, _ = loss_curve(run, TRAIN_LOSS)
    return float(samples_after(run, global_steps[-1:]).sum())


def curves_of(run: RunRecord, step_s: float = float("nan")) -> Curves:
    """Return an arm's loss curves, given the seconds that a step takes."""
    found = {}
    for metric in (EVAL_LOSS, TRAIN_LOSS):
        global_steps, values = loss_curve(run, metric)
        if global_steps.size < (2 if metric == EVAL_LOSS else 1):
            continue
        samples = samples_after(run, global_steps)
        if metric == TRAIN_LOSS:
            values = _averaged(values, samples)
        found[metric] = LossCurve(
            values, samples, global_steps.astype(np.float64), global_steps * step_s
        )
    return found


def shared_point(axis: Axis, arms: Iterable[Curves]) -> Point:
    """Return the furthest point of all arms, by the evaluation's loss where all have one there."""
    every = list(arms)
    for metric in (EVAL_LOSS, TRAIN_LOSS):
        curves = [of[metric].against(axis) for of in every if metric in of]
        if len(curves) == len(every):
            at = float(min(curve[-1] for curve in curves))
            if all(curve[0] <= at for curve in curves):
                return Point(axis, at, metric)
    return Point(axis, reason="there is no point that all arms have")


def mean_curve(axis: Axis, curves: Sequence[LossCurve]) -> tuple[np.ndarray, np.ndarray]:
    """Return where all curves of some seeds are, (points,), and their losses there, (seeds, points)."""
    at = np.unique(np.concatenate([curve.against(axis) for curve in curves]))
    first = max(curve.against(axis)[0] for curve in curves)
    last = min(curve.against(axis)[-1] for curve in curves)
    at = at[(first <= at) & (at <= last)]
    return at, np.stack([np.interp(at, curve.against(axis), curve.values) for curve in curves])


def _averaged(losses: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return the mean loss of the last samples before each step, at least those of its own window."""
    sizes = np.diff(samples, prepend=0.0)
    before = np.searchsorted(samples, (1 - AVERAGED) * samples, side="right")
    totals = np.concatenate([[0.0], np.cumsum(sizes * losses)])
    counts = np.concatenate([[0.0], np.cumsum(sizes)])
    averaged: np.ndarray = (totals[1:] - totals[before]) / (counts[1:] - counts[before])
    return averaged
