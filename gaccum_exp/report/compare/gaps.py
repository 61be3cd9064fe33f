"""How far two loss curves lie apart.

gap(k) = |train loss of the one − train loss of the other| after optimizer step k
"""

import numpy as np

from gaccum_exp.tracking.records import RunRecord


def largest_loss_gap(run: RunRecord, reference: RunRecord) -> tuple[float | None, int]:
    """Return the largest |train loss − reference's| over the steps that both have, and their number.

    NaN when a difference is NaN (a loss of NaN, or both infinite); None when no step is shared.
    """
    steps, gaps = loss_gaps(run, reference)
    return (float(np.max(gaps)) if steps.size else None), int(steps.size)


def loss_gaps(run: RunRecord, reference: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Return the optimizer steps that both runs have, ascending, and |train loss difference|.

    Returns:
        steps: (shared steps,) int64; gaps: (shared steps,) float64.
    """
    (our_steps, ours), (their_steps, theirs) = loss_curve(run), loss_curve(reference)
    steps = our_steps
    if not np.array_equal(our_steps, their_steps):
        steps, our_places, their_places = np.intersect1d(
            our_steps, their_steps, assume_unique=True, return_indices=True
        )
        ours, theirs = ours[our_places], theirs[their_places]
    with np.errstate(invalid="ignore"):  # inf − inf is NaN, which is what it should be
        return steps, np.abs(ours - theirs)


def loss_curve(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Return the optimizer steps with a train loss, ascending, and the loss; both empty without any.

    Returns:
        steps: (steps,) int64; losses: (steps,) float64.
    """
    curve = run.curves.get("train/loss")
    steps = np.array(curve.steps if curve else (), dtype=np.int64)
    losses = np.array(curve.values if curve else (), dtype=np.float64)
    if np.all(steps[1:] > steps[:-1]):
        return steps, losses
    # Of several values of a step the last one counts, which is the first from behind.
    steps, places = np.unique(steps[::-1], return_index=True)
    return steps, losses[::-1][places]
