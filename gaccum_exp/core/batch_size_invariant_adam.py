"""Batch-size-invariant Adam: the same training at a fixed micro-batch, however many make a window."""

from typing import ClassVar

import torch
from torch import Tensor

from gaccum_exp.core.adam_a import AdamA
from gaccum_exp.core.losses.protocol import Denominator
from gaccum_exp.core.reductions import Reduction
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.errors import BadInputError


class BatchSizeInvariantAdam(AdamA):
    """Takes v from the mean of the squared micro gradients, and scales rate and moments by their number.

    With gᵢ the gradient of micro-batch i's mean loss, wᵢ its share in the window (nᵢ/n, or 1/N under
    `mean`) and κ = N/`base_steps` (Wang & Aitchison 2024, arXiv 2402.18824: v from squares that are
    averaged, where Adam squares the average; learning rate and 1 − β scaled by the number of
    micro-batches):

        m ← β₁'m + (1 − β₁') Σwᵢgᵢ      v ← β₂'v + (1 − β₂') Σwᵢgᵢ²      θ ← θ − κη·m̂/(√v̂ + ε)

    Ours, since the paper's 1 − κ(1 − β) passes 1 where κ is large (β₁ = 0.9, κ > 10): β' = β^κ, equal to
    it to first order in 1 − β. At fixed weights m and v are then what κ windows of `base_steps`
    micro-batches leave in them, but for the order of these. So is the bias correction, 1 − β^Σκ over the
    windows so far, and decoupled weight decay, 1 − κηλ; ε stays. Ours, too: the weights wᵢ of unequal
    micro-batches, with which v has the expectation that equal ones of n/N would give it.

    The claim is of a *fixed micro-batch*: curves against samples agree over N while κ steps of the small
    window move the weights little. A last window of an epoch, split into as many and smaller
    micro-batches, would be scaled as a whole one: carry its samples over, or drop them. At a fixed
    global batch the micro-batch shrinks as N grows, and v holds more of the noise: take `base_steps` = N
    there (`strategy.base_steps=${accum.steps}`), so that κ = 1, and expect shorter steps. With N =
    `base_steps` = 1 it is Adam. Micro gradients are dropped as they come, as under AdamA, which is why
    it refuses what AdamA refuses. The recorded rate is η.
    """

    name: ClassVar[str] = "batch_size_invariant_adam"
    remedy: ClassVar[str] = (
        "v is the mean of squared micro gradients, and rate and moments are scaled by their number: "
        "strategy=in_place takes the large batch's step; this one is to be compared over N, at a fixed "
        "micro-batch"
    )

    def __init__(self, base_steps: int = 1) -> None:
        super().__init__()
        if isinstance(base_steps, bool) or not isinstance(base_steps, int) or base_steps < 1:
            raise BadInputError(f"strategy.base_steps={base_steps}: must be an integer of at least 1")
        self.base_steps = base_steps
        """The micro-batches of a window for which learning rate and β₁, β₂ are given."""

    def scales_at(self, accum_steps: int) -> bool:
        """Return whether κ is other than 1."""
        return accum_steps != self.base_steps

    def require(self, reduction: Reduction) -> None:
        """Refuse a sum: the squares are of means.

        Raises:
            BadInputError: that reduction.
        """
        if not reduction.has_means:
            raise BadInputError(
                f"accum.reduction={reduction.name} has no meaning under strategy={self.name}, which "
                "squares the gradients of micro-batches' means: use accum.reduction=global_mean"
            )

    def base_windows(self, state: AccumulatorState) -> float:
        """Return κ."""
        return len(state.counts) / self.base_steps

    def weight_of_square(self, state: AccumulatorState) -> Denominator:
        """Return 1/wᵢ, of wᵢgᵢ² = (wᵢgᵢ)²/wᵢ."""
        if state.last_share is None:
            raise BadInputError(
                f"strategy={self.name}: the loss has several terms, each with a count of its own, and a "
                "micro-batch no share in the window: give it as one sum and denominator, or use "
                "strategy=in_place"
            )
        count, divisor = state.last_share
        if isinstance(count, Tensor):
            return torch.where(count == 0, 0.0, divisor / count)
        return divisor / count if count else 0.0
