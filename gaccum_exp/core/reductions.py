"""Reductions: how the loss sums of a window's micro-batches become its gradient. The formulas, once.

For micro-batches i = 1..N (of all ranks) with loss sums Sᵢ and denominators nᵢ, n = Σnᵢ:

    global mean   g = (1/n) Σ ∇Sᵢ             the large batch's mean gradient, always
    mean          g = (1/N) Σ ∇(Sᵢ/nᵢ)        equal to it if and only if all nᵢ are equal (or by luck)
    sum           g = (1/d) Σ ∇Sᵢ             the large batch's sum gradient over a constant d, always

A loss of several terms t has a weight w_t and sums and counts of its own for each, and its gradient is
Σ_t w_t g_t. A term f(ΣSᵢ/n), f a function of the window's means v = ΣSᵢ/n, has

    global mean   g = (1/n) Σ ⟨∇f(v), ∇Sᵢ⟩    the large batch's, always
    mean          g = (1/N) Σ ∇f(Sᵢ/nᵢ)       equal to it if f is linear and all nᵢ are equal
    sum           there is none: a sum has no means

Each loss sum is divided before its backward pass, not the gradients afterwards: that neither overflows
float16 nor rescales gradients that were there before. Counts are numbers or tensors; of several models
trained as one they are tensors (seeds,), and so are the divisors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gaccum_exp.core.losses.protocol import Denominator
from gaccum_exp.errors import BadInputError

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
    has_means: ClassVar[bool] = True
    """Whether a function can be taken of its means."""
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

    def of_term(self, name: str) -> "Reduction":
        """Return the reduction of one term of several."""
        return self

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
    has_means = False
    constant: Denominator | Mapping[str, float] = 1.0
    """d, or that of each term; 1: the literal sum."""

    def divisor(
        self, count: Denominator, window_count: Denominator | None, accum_steps: int
    ) -> Denominator:
        """Return d."""
        assert not isinstance(self.constant, Mapping), "a term has its own"
        return self.constant

    def one_pass_factor(self, window_count: float) -> float:
        """Return n/d; NaN where each term has its own."""
        return math.nan if isinstance(self.constant, Mapping) else float(window_count / self.constant)

    def of_term(self, name: str) -> "Sum":
        """Return the sum over the term's own constant.

        Raises:
            BadInputError: it has none.
        """
        if not isinstance(self.constant, Mapping):
            return self
        if name not in self.constant:
            raise BadInputError(
                f"accum.sum_scale=constant: term {name!r} counts nothing in the first window, so there "
                "is no constant for it; use accum.sum_scale=none or accum.reduction=global_mean"
            )
        return Sum(self.constant[name])

    def at_batch_share(self, share: float) -> "Sum":
        """Return the sum over that share of the constant; the literal sum has none."""
        if isinstance(self.constant, Mapping):
            return Sum({name: constant * share for name, constant in self.constant.items()})
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


def quotient(total: Tensor, by: Denominator) -> Tensor | None:
    """Return total / by; nothing, or zero times the total, where nothing counts."""
    if isinstance(by, Tensor):
        # On a device the count stays there: x / inf is the zero that zero elements give.
        return total / torch.where(by == 0, torch.inf, by)
    return total / by if by else None


def stacked(reductions: Sequence[Reduction]) -> Reduction:
    """Return the reduction of models trained as one, given each one's; they differ in constants only."""
    constants = [one.constant for one in reductions if isinstance(one, Sum)]
    return Sum(torch.tensor(constants, dtype=torch.float64)) if constants else reductions[0]
