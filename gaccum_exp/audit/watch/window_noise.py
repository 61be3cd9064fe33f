"""The gradient noise of a watched window, from its micro gradients with the large batch's shares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gaccum_exp.audit import result
from gaccum_exp.audit.rerun.passes import ACCUMULATED, Rerun
from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.watch.taped_window import TapedWindow
from gaccum_exp.audit.watch.term_shares import TermShares
from gaccum_exp.core.gradient import Gradient, add, dot
from gaccum_exp.core.micro_gradients import AdamMetric
from gaccum_exp.core.noise_scale import Noise, Share, window_noise

NO_GRADIENT_EACH = (
    *(result.BATCH_STATISTICS, result.NOT_ADDITIVE, result.MOVING_STATE, result.STALE_OR_MISSING),
    result.UNKNOWN,
)
"""Causes for which the micro gradients, run again, are not parts of the large batch's gradient."""


@dataclass(slots=True)
class AskedNoise:
    """What a window is asked to tell of its noise, and what it tells."""

    metrics: Mapping[str, AdamMetric] = field(default_factory=dict)
    """Of an Adam-like optimizer before its step, by parameter."""
    told: Noise | str | None = None
    """The noise, or why there is none; None: nothing was run again."""
    adam: Noise | None = None
    """The noise in Adam's metric, where every parameter has one."""

    def of_window(
        self, audit: Audit, window: TapedWindow, rerun: Rerun, shares: Sequence[TermShares]
    ) -> None:
        """Take what a window tells.

        That its micro gradients, each times a constant, make up the gradient of one pass is what has
        shown that no micro-batch has a part in another's. What else the loop does with their weights is
        no matter.

        Args:
            audit: the verdict on it.
            window: which has run in either way.
            rerun: of it.
            shares: of its micro-batches, term by term.
        """
        why = _why_none(audit, window, shares)
        counts = [_counts(term) for term in shares]
        if why is None and not _alike(counts):
            why = (
                "the terms of its loss count its micro-batches differently (one its samples, say, and "
                "one its tokens), so that they have no noise scale in common"
            )
        if why is not None:
            self.told = why
            return
        by = shares[0].whole_weight * (sum(counts[0]) if shares[0].summed else 1.0)
        every = window.weighed(
            [[c * term.whole_weight / by for c in term.coefficients or ()] for term in shares],
            [1.0] * len(shares),
            [term.coefficients for term in shares],
        )
        rerun, total = replace(rerun, window=every), Gradient()
        dots: list[tuple[float, float]] = []
        in_metric: list[tuple[float, float]] = []
        weights = {name: metric.weights(metric.second_moment) for name, metric in self.metrics.items()}

        def look(gradient: Gradient) -> None:
            dots.append((dot(gradient, gradient), dot(gradient, total)))
            if gradient.keys() <= weights.keys():
                scaled = {name: g * weights[name].to(g) for name, g in gradient.items()}
                in_metric.append((dot(scaled, gradient), dot(scaled, total)))
            add(total, gradient)

        rerun.micro_gradients(ACCUMULATED, look)
        if len(dots) != len(window.sizes):
            self.told = "its micro-batches run more than once"
            return
        n = sum(counts[0])
        pairs = zip(window.sizes, counts[0], strict=True)
        each = [Share(samples, counted, 1 / n if counted else 0.0) for samples, counted in pairs]
        self.told = window_noise(each, dots) or "in fewer than 2 of its micro-batches anything counts"
        if len(in_metric) == len(dots):
            self.adam = window_noise(each, in_metric)


def _why_none(audit: Audit, window: TapedWindow, shares: Sequence[TermShares]) -> str | None:
    """Return why a window tells no noise; None: it does, as far as that is known before it runs."""
    if len(window.sizes) < 2:
        return (
            "a window of one micro-batch has no micro gradients to compare: split it into 2 at least, 8 "
            "tell more"
        )
    none_each = any(finding.cause in NO_GRADIENT_EACH for finding in audit.findings)
    if none_each or audit.verdict == "inconclusive":
        return f"the window is {audit.verdict} ({audit.cause or audit.detail})"
    if not shares:
        return "what its micro-batches count was not found out"
    for number, term in enumerate(shares):
        if term.coefficients is None or window.of_the_whole(window.column_of(number)):
            return "its loss couples samples, so that none has a gradient of its own"
        if not term.whole_weight:
            return "by what its loss is multiplied is not known"
    return None


def _counts(term: TermShares) -> list[float]:
    """Return by how much each micro-batch counts in a term."""
    counts = term.counts or [float(size) for size in term.sizes]
    if term.summed or term.coefficients is None:
        return counts
    # The large batch's own parts say what counts where nothing else does.
    return [sum(counts) * c for c in term.coefficients]


def _alike(counts: Sequence[Sequence[float]]) -> bool:
    """Whether micro-batches have the same parts in every term."""
    first, *others = ([k / sum(each) for k in each] if sum(each) else each for each in counts)
    return all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
        for other in others
        for a, b in zip(first, other, strict=True)
    )
