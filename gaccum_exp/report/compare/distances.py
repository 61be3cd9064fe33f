"""How far two trainings lie apart, in their loss curves and in their final weights.

gap(k)   = |train loss of the one − train loss of the other| after optimizer step k
distance = ‖w − w_ref‖₂ / ‖w_ref‖₂ over all parameters at the end of training, in float64
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from gaccum_exp.core.dtypes import reals, wide
from gaccum_exp.tracking.metrics import TRAIN_LOSS
from gaccum_exp.tracking.records import RunRecord

Parameters = Mapping[str, torch.Tensor]


def largest_loss_gap(run: RunRecord, reference: RunRecord) -> tuple[float | None, int]:
    """Return the largest gap, None when no step is shared, and how many are; NaN if any gap is NaN."""
    global_steps, gaps = loss_gaps(run, reference)
    return (float(np.max(gaps)) if global_steps.size else None), int(global_steps.size)


def loss_gaps(run: RunRecord, reference: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Return the optimizer steps that both runs have, ascending, and |train loss difference| there."""
    (our_steps, ours), (their_steps, theirs) = loss_curve(run), loss_curve(reference)
    global_steps = our_steps
    if not np.array_equal(our_steps, their_steps):
        global_steps, our_places, their_places = np.intersect1d(
            our_steps, their_steps, assume_unique=True, return_indices=True
        )
        ours, theirs = ours[our_places], theirs[their_places]
    with np.errstate(invalid="ignore"):  # inf − inf is NaN, which is what it should be
        return global_steps, np.abs(ours - theirs)


def loss_curve(run: RunRecord, metric: str = TRAIN_LOSS) -> tuple[np.ndarray, np.ndarray]:
    """Return the optimizer steps that have a loss, ascending, and the loss: (steps,) int64, float64."""
    curve = run.curves.get(metric)
    global_steps = np.array(curve.global_steps if curve else (), dtype=np.int64)
    losses = np.array(curve.values if curve else (), dtype=np.float64)
    if np.all(global_steps[1:] > global_steps[:-1]):
        return global_steps, losses
    # Of several values of a step the last one counts, which is the first from behind.
    global_steps, places = np.unique(global_steps[::-1], return_index=True)
    return global_steps, losses[::-1][places]


def weight_distance(ours: Parameters, theirs: Parameters) -> float | None:
    """Return the distance of final weights; None when names or shapes differ: not the same model."""
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        return None
    difference = _norm(wide(ours[name]) - wide(theirs[name]) for name in theirs)
    norm = _norm(wide(tensor) for tensor in theirs.values())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def nan_last(value: float | None) -> float:
    """Order distances: NaN, and what was not measured, after all others."""
    return math.inf if value is None or math.isnan(value) else value


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(reals(tensor).square().sum()) for tensor in tensors))
