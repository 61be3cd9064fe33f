"""What counted in a window, and what each micro-batch's loss is weighed by, there and in one pass.

One pass divides the loss sum of all samples by one divisor d. Where that sum is the sum over micro-
batches of Sᵢ, micro-batch i has the share ∇Sᵢ/d in the gradient g_1 of one pass, and under a reduction
that divides Sᵢ by dᵢ

    g_N − g_1 = Σ (1/dᵢ − 1/d) ∇Sᵢ

So a window that is accumulated with the divisors 1/(1/dᵢ − 1/d) has the error for its gradient, and its
micro gradients are the parts of the error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gaccum_exp.audit.audited_window import MicroBatchShare, TermShare
from gaccum_exp.core.losses.protocol import Denominator
from gaccum_exp.core.reductions import Reduction


class Count(NamedTuple):
    """What a loss, or one term of it, counts in one pass."""

    n: float
    divides_by: float
    """What is divided by for so large a count: that itself, unless it is clamped."""


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """What a window's loss counts, by the name of the term; where it has no terms, by the empty name."""

    parts: list[dict[str, Count]]
    """Of each micro-batch."""
    whole: dict[str, Count]
    """Of all samples in one pass."""
    window: dict[str, float]
    """What is divided by for the counts of all micro-batches together."""
    functions: Sequence[str] = ()
    """The terms that are functions of means."""
    at_once: bool = False
    """Whether the loss is taken once, over the outputs of all micro-batches."""

    def weights(self, reduction: Reduction, term: str, of: Count) -> tuple[float, float]:
        """Return 1/dᵢ and 1/d of a micro-batch that counts so much; 0 where nothing counts."""
        by, steps = reduction.of_term(term) if term else reduction, len(self.parts)
        whole = self.whole[term].divides_by if term in self.whole else 0.0
        one = _reciprocal(by.divisor(whole, whole, 1))
        if self.at_once:
            return one, one
        return _reciprocal(by.divisor(of.divides_by, self.window[term], steps)), one

    def weigh_otherwise(self, reduction: Reduction) -> bool:
        """Whether the loss of some micro-batch is weighed otherwise than in one pass."""
        weights = (
            self.weights(reduction, term, of) for part in self.parts for term, of in part.items() if of.n
        )
        return any(not math.isclose(own, one, rel_tol=1e-12) for own, one in weights)

    def micro_batches(self, reduction: Reduction, sizes: Sequence[int]) -> list[MicroBatchShare]:
        """Return each micro-batch with its samples, counts and weights."""
        found = []
        for index, (part, size) in enumerate(zip(self.parts, sizes, strict=True)):
            place, terms = (index, sum(sizes[:index]), size), []
            for name, of in part.items():
                own, one = self.weights(reduction, name, of)
                terms.append(TermShare(name, of.n, own or None, one or None))
            if list(part) == [""]:
                only = terms[0]
                share = MicroBatchShare(*place, only.counted, only.weight, only.one_pass_weight)
            else:
                share = MicroBatchShare(*place, terms=tuple(terms))
            found.append(share)
        return found


@dataclass(frozen=True)
class Excess(Reduction):
    """What a reduction gives each micro-batch beyond what one pass does: its gradient is g_N − g_1."""

    of: Reduction
    counts: WindowCounts
    term: str = ""

    def of_term(self, name: str) -> "Excess":
        """Return that of one term."""
        return Excess(self.of, self.counts, name)

    def divisor(
        self, count: Denominator, window_count: Denominator | None, accum_steps: int
    ) -> Denominator:
        """Return 1/(1/dᵢ − 1/d); what window and one pass count is known already."""
        own, one = self.counts.weights(self.of, self.term, Count(math.nan, float(count)))
        return 1 / (own - one) if own != one else math.inf


def _reciprocal(divisor: Denominator) -> float:
    return 1 / float(divisor) if divisor else 0.0
