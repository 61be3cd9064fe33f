"""Reductions: how the loss sums of a window's micro-batches become its gradient. The formulas, once.

For micro-batches i = 1..N (of all ranks) with loss sums Sᵢ and denominators nᵢ, n = Σnᵢ:

    global mean   g = (1/n) Σ ∇Sᵢ             the large batch's mean gradient, always
    mean          g = (1/N) Σ ∇(Sᵢ/nᵢ)        equal to it if and only if all nᵢ are equal (or by luck)
    sum           g = (1/d) Σ ∇Sᵢ             the large batch's sum gradient over a constant d, always

Each loss sum is divided before its backward pass, not the gradients afterwards: that neither overflows
float16 nor rescales gradients that were there before. Counts are numbers or tensors; of several models
trained as one they are tensors (seeds,), and so are the divisors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from gaccum_exp.core.losses.protocol import Denominator

ReductionName = Literal["global_mean", "mean", "sum"]


class Reduction:
    """What each micro-batch's loss sum is divided by, and what follows from it."""

    name: ClassVar[ReductionName]
    needs_window_count: ClassVar[bool] = False
    """Whether n has to be known before the first backward pass."""
    needs_equal_parts: ClassVar[bool] = False
    """Whether it is the large batch's only where all micro-batches count alike."""
    splits_again: ClassVar[bool] = True
    """Whether a window that has begun may go on at another N."""
    criterion_reduction: ClassVar[Literal["sum", "mean"]] = "sum"
    """How a criterion reduces a micro-batch where its mean is not its sum divided by a count."""

    def divisor(
        self, count: Denominator, window_count: Denominator | None, accum_steps: int
    ) -> Denominator:
        """Return what Sᵢ is divided by.

        Args:
            count: nᵢ.
            window_count: n, of all micro-batches; None: not known yet.
            accum_steps: N, the micro-batches of this window.
        """
        raise NotImplementedError

    def one_pass_factor(self, window_count: float) -> float:
        """Return c where one pass over the window gives c × its mean gradient."""
        return 1.0

    def at_batch_share(self, share: float) -> "Reduction":
        """Return the reduction of a window whose global batch is this share of the largest one."""
        return self


class GlobalMean(Reduction):
    """The sum of all losses over the window's denominator."""

    name = "global_mean"
    needs_window_count = True

    def divisor(
        self, count: Denominator, window_count: Denominator | None, accum_steps: int
    ) -> Denominator:
        """Return n."""
        assert window_count is not None, "the window is counted first, or divided when it is"
        return window_count


GLOBAL_MEAN = GlobalMean()


class Mean(Reduction):
    """The mean of the micro-batches' means: the plain loop with loss / N."""

    name = "mean"
    needs_equal_parts = True
    splits_again = False  # its 1/N is spent
    criterion_reduction = "mean"

    def divisor(
        self, count: Denominator, window_count: Denominator | None, accum_steps: int
    ) -> Denominator:
        """Return N·nᵢ."""
        return accum_steps * count


@dataclass(frozen=True)
class Sum(Reduction):
    """The sum of all losses, over a constant."""

    name = "sum"
    constant: Denominator = 1.0
    """d; 1: the literal sum."""

    def divisor(
        self, count: Denominator, window_count: Denominator | None, accum_steps: int
    ) -> Denominator:
        """Return d."""
        return self.constant

    def one_pass_factor(self, window_count: float) -> float:
        """Return n/d."""
        return float(window_count / self.constant)

    def at_batch_share(self, share: float) -> "Sum":
        """Return the sum over that share of the constant; the literal sum has none."""
        return Sum(self.constant * share) if self.constant != 1.0 else self


def reduction_named(name: str, sum_divisor: float = 1.0) -> Reduction:
    """Return the reduction of this name.

    Args:
        name: `global_mean`, `mean` or `sum`.
        sum_divisor: the constant d of `sum`.

    Raises:
        ValueError: there is no such reduction, or `sum_divisor` is given to another one than `sum`.
    """
    reductions = {kind.name: kind for kind in (GlobalMean, Mean, Sum)}
    if name not in reductions:
        raise ValueError(f"reduction={name!r}: not one of global_mean, mean, sum")
    if name == Sum.name:
        return Sum(sum_divisor)
    if sum_divisor != 1.0:
        raise ValueError(f"sum_divisor={sum_divisor} has no meaning under reduction={name!r}")
    return reductions[name]()


def stacked(reductions: Sequence[Reduction]) -> Reduction:
    """Return the reduction of models trained as one, given each one's; they differ in constants only."""
    constants = [one.constant for one in reductions if isinstance(one, Sum)]
    return Sum(torch.tensor(constants, dtype=torch.float64)) if constants else reductions[0]
