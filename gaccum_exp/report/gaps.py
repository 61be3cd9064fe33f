"""How far two loss curves lie apart.

gap(k) = |train loss of the one − train loss of the other| after optimizer step k
"""

import numpy as np

from gaccum_exp.records import RunRecord


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
    ours, theirs = losses_of(run), losses_of(reference)
    steps = np.array(sorted(ours.keys() & theirs.keys()), dtype=np.int64)
    with np.errstate(invalid="ignore"):  # inf − inf is NaN, which is what it should be
        gaps = np.array([np.float64(ours[int(k)]) - theirs[int(k)] for k in steps], dtype=float)
    return steps, np.abs(gaps)


def losses_of(run: RunRecord) -> dict[int, float]:
    """Return the train loss by optimizer step."""
    curve = run.curves.get("train/loss")
    return dict(zip(curve.steps, curve.values, strict=True)) if curve else {}
