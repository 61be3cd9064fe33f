"""Bound how far rounding alone drives loss curves apart, by controls, and judge which go further.

A control is the reference trained again with only the order of the samples inside each window permuted:
the same gradients, summed in another order. With m controls,

    envelope(k) = max over the controls and over steps j ≤ 2k of |loss_control(j) − loss_reference(j)|

The maximum runs over earlier steps because drift accumulates: two curves that have drifted apart cross
now and then, and that they meet at step k is no evidence of what rounding can do there. It runs on to 2k
because drift does not set in at the same step twice: where a ReLU has its kink, the last bit switches a
unit's gradient on or off (a gap of 0.01 was reached at step 28 by one control, at step 88 by another).

A curve is inside if at every step its gap is at most MARGIN × envelope(k). Where the controls have not
moved (yet), the spacing of the recorded numbers at the reference's loss takes the envelope's place: a
difference in the last bit of a float32 is none in training, and at the first step it is all there is.

So wide a margin costs little, since a bias shows in the first steps, when rounding is still small. With
an MLP (ReLU) on digits and three controls, a gradient 1.001 times the right one was outside by step 3,
one 1.0001 times by step 6. Of draws of three controls and one sound curve, from 27 trainings of that MLP
and two CNNs, 0.14 % were outside; at five times the learning rate, where curves drift by up to 1, 0.5 %.
A leap in one curve out of many remains possible: outside is a question, and the audit has the answer.

Under bfloat16 and float16 another order moves next to nothing, since a sum of products is rounded to so
few digits that its order does not show, while N micro gradients are rounded N times. So the controls of
such a reference run in float32: what they show is its distance to the curve without that rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gaccum_exp.report.compare.distances import loss_curve, loss_gaps
from gaccum_exp.tracking.records import RunRecord

MARGIN = 64.0
"""How many times the envelope a curve may reach that only rounding moves.

Without a margin one of m + 1 curves of the same kind is always the furthest: three controls would
accuse every fourth sound arm. For gaps |X₀|, |X₁| with X Gaussian P(|X₀| > c |X₁|) = (2/π) arctan(1/c),
which is 1 % at c = 64, one control. Were gaps Gaussian, three would need 4.3 only; but they leap
(above), and with 4.3 three controls accused 3.7 % of an MLP's sound curves. So what more controls bring
is not given away again: it keeps three controls' errors below 1 % for gaps as heavy-tailed as Cauchy's.
"""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What m controls of one reference show; the sequences run over `global_steps`."""

    reference_run_id: str
    controls: int
    """m"""
    global_steps: tuple[int, ...]
    """Optimizer steps that the reference and at least one control have, ascending."""
    values: tuple[float, ...]
    """envelope(k), never falling."""
    limits: tuple[float, ...]
    """How large a gap is still inside: MARGIN × envelope(k), or × the spacing of the numbers."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a loss curve stands: its word is None where that cannot be said."""

    word: Literal["inside", "outside"] | None = None
    left_at: int | None = None
    """The first optimizer step at which it is outside."""


def envelope_of(reference: RunRecord, controls: Sequence[RunRecord]) -> Envelope | None:
    """Return the envelope of these controls; None if no curve is shared."""
    every, losses = loss_curve(reference)
    largest = np.zeros(every.size)
    seen = np.zeros(every.size, dtype=bool)
    for control in controls:
        shared, gaps = loss_gaps(control, reference)
        places = np.searchsorted(every, shared)
        seen[places] = True
        # A loss that is not finite measures no distance.
        largest[places] = np.maximum(largest[places], np.where(np.isfinite(gaps), gaps, 0.0))
    if not seen.any():
        return None
    global_steps = every[seen]
    running = np.maximum.accumulate(largest[seen])
    values = running[np.searchsorted(global_steps, 2 * global_steps, side="right") - 1]
    limits = MARGIN * np.fmax(values, spacing(losses[seen]))
    columns = (tuple(column.tolist()) for column in (global_steps, values, limits))
    return Envelope(reference.run_id, len(controls), *columns)


def stand(run: RunRecord, reference: RunRecord, envelope: Envelope) -> Standing:
    """Say where a curve stands in its reference's envelope; inside so far, but cut short, is neither."""
    global_steps, gaps = loss_gaps(run, reference)
    judged, places, where = np.intersect1d(
        global_steps, envelope.global_steps, assume_unique=True, return_indices=True
    )
    outside = ~(gaps[places] <= np.array(envelope.limits)[where])  # so is a gap of NaN
    if outside.any():
        return Standing("outside", int(judged[outside][0]))
    return Standing("inside") if judged.size == len(envelope.global_steps) else Standing()


def spacing(losses: np.ndarray) -> np.ndarray:
    """Return the distance to the next number at each loss, in the precision of its record: (steps,)."""
    exact: np.ndarray = np.abs(losses)
    with np.errstate(all="ignore"):  # beyond float32's range, or not finite: not float32 numbers, then
        single = exact.astype(np.float32)
        finite = np.isfinite(exact)
        recorded = single if np.array_equal(single[finite], exact[finite]) else exact
        distances: np.ndarray = np.spacing(recorded).astype(np.float64)
    return distances
