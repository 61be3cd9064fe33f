"""The gradient noise of a watched window, from its micro gradients with the large batch's shares."""

from collections.abc import Sequence
from dataclasses import replace

from gaccum_exp.audit import result
from gaccum_exp.audit.rerun.passes import ACCUMULATED, Rerun
from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.watch.taped_window import TapedWindow
from gaccum_exp.audit.watch.term_shares import TermShares
from gaccum_exp.core.gradient import Gradient, add, dot
from gaccum_exp.core.noise_scale import Noise, Share, window_noise

NO_GRADIENT_EACH = (
    *(result.BATCH_STATISTICS, result.NOT_ADDITIVE, result.MOVING_STATE, result.STALE_OR_MISSING),
    result.UNKNOWN,
)
"""Causes for which the micro gradients, run again, are not parts of the large batch's gradient."""


def noise_of_window(
    audit: Audit, window: TapedWindow, rerun: Rerun, shares: Sequence[TermShares]
) -> Noise | str:
    """Return what a window tells of its noise, or why it tells nothing.

    That its micro gradients, each times a constant, make up the gradient of one pass is what has shown
    that no micro-batch has a part in another's. What else the loop does with their weights is no matter.

    Args:
        audit: the verdict on it.
        window: which has run in either way.
        rerun: of it.
        shares: of its micro-batches, term by term.
    """
    if len(window.sizes) < 2:
        return (
            "a window of one micro-batch has no micro gradients to compare: split it into 2 at least, 8 "
            "tell more"
        )
    none_each = any(finding.cause in NO_GRADIENT_EACH for finding in audit.findings)
    if none_each or audit.verdict == "inconclusive":
        return f"the window is {audit.verdict} ({audit.cause or audit.detail})"
    if len(shares) > 1:
        return "its loss has several terms, each with a noise of its own"
    (term,) = shares
    if term.coefficients is None or window.of_the_whole(window.column_of(0)):
        return "its loss couples samples, so that none has a gradient of its own"
    amounts = term.counts or [float(n) for n in term.sizes]
    n = sum(amounts)
    if not term.summed:  # the large batch's own parts, which say what counts where nothing else does
        amounts = [n * c for c in term.coefficients]
    each = [c / (n if term.summed else 1.0) for c in term.coefficients]
    total: Gradient = {}
    dots: list[tuple[float, float]] = []

    def look(gradient: Gradient) -> None:
        dots.append((dot(gradient, gradient), dot(gradient, total) if total else 0.0))
        add(total, gradient)

    parts = window.weighed([each], [1.0], [term.coefficients])
    replace(rerun, window=parts).micro_gradients(ACCUMULATED, look)
    if len(dots) != len(window.sizes):
        return "its micro-batches run more than once"
    of = zip(window.sizes, amounts, strict=True)
    noise = window_noise([Share(b, k, 1 / n if k else 0.0) for b, k in of], dots)
    return "in fewer than 2 of its micro-batches anything counts" if noise is None else noise
