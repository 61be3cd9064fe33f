"""Whose the error of each layer is: what an audit records of the window that it judged."""

import math
from collections.abc import Sequence
from dataclasses import replace

from gaccum_exp.audit import result
from gaccum_exp.audit.audited_window import SAMPLES, UNITS, AuditedWindow, LayerError, joined, kept
from gaccum_exp.audit.configured_window import ConfiguredWindow
from gaccum_exp.audit.diagnose import SAME64, Deviations, Diagnosis, error_line
from gaccum_exp.audit.rerun.passes import ACCUMULATED64, Rerun
from gaccum_exp.audit.result import Audit, module_said
from gaccum_exp.audit.window_weights import Excess, WindowCounts
from gaccum_exp.core.dtypes import wide
from gaccum_exp.core.gradient import Deviation, Gradient, gaps, norm, squares

NO_SHARES = {
    result.BATCH_STATISTICS: "{culprit} takes in the other samples of a micro-batch",
    result.MOVING_STATE: "{culprit} has a state that moves between micro-batches",
    result.NOT_ADDITIVE: "the large batch's loss is no sum over micro-batches",
    result.RANDOMNESS: "random numbers differ between the passes",
}
"""Why no micro-batch has a share in the gradient of one pass, by cause."""
AT_ONCE = "the loss is taken once, over the outputs of all micro-batches"
ALONE = "one micro-batch is the large batch itself"
UNEXPLAINED = "the micro-batches' gradients, weighed as in one pass, do not add up to that of one pass"
Parts = list[dict[str, float]]
"""Of each micro-batch's part in g_N − g_1 the squared norms by parameter."""


def alone(window: ConfiguredWindow) -> AuditedWindow:
    """Return what is known of a window of one micro-batch."""
    return _described(window, window.counts(), (), ALONE)


def audited(rerun: Rerun, window: ConfiguredWindow, found: Diagnosis, audit: Audit) -> AuditedWindow:
    """Return what is known of a window of several micro-batches.

    Where they are weighed otherwise than in one pass, it runs once more, in float64, and the diagnosis's
    accumulated gradient is used up.

    Args:
        rerun: the runs of the window.
        window: the same.
        found: what they gave; it has deviations.
        audit: names the cause.
    """
    counts = window.counts()
    parts = _parts(rerun, window, counts, found, audit)
    why, shares = (parts, None) if isinstance(parts, str) else (None, parts)
    assert found.deviations is not None
    return _described(window, counts, _layers(window, found.deviations, shares), why)


def _parts(
    rerun: Rerun, window: ConfiguredWindow, counts: WindowCounts, found: Diagnosis, audit: Audit
) -> Parts | str:
    """Return each micro-batch's part of g_N − g_1, or why it has none."""
    if counts.at_once:
        return AT_ONCE
    same = found.measured is not None and found.measured.same_function
    culprit = module_said(audit.culprit or "", audit.culprit_type or "")
    why = NO_SHARES.get(audit.cause or "", UNEXPLAINED).format(culprit=culprit)
    if not counts.weigh_otherwise(window.reduction):
        return [{} for _ in window.sizes] if same else why
    if audit.cause in NO_SHARES and not same:
        return why
    if counts.functions and window.reduction.needs_equal_parts:
        return f"the term {counts.functions[0]!r} is a function of means"
    assert found.accumulated64 is not None
    assert found.one_pass64 is not None
    left, size = found.accumulated64, max(norm(found.accumulated64), norm(found.one_pass64))
    for name, gap in gaps(left, found.one_pass64):
        left[name] = gap  # in its place, for one more gradient of a large model may not fit

    def taken_off(part: Gradient) -> dict[str, float]:
        for name, gradient in part.items():
            left[name] = left[name].sub_(wide(gradient))
        return squares(part)

    other = window.weighed_by(Excess(window.reduction, counts))
    try:
        parts = replace(rerun, window=other).micro_gradients(ACCUMULATED64, taken_off)
    except Exception as error:  # the verdict stands without it
        return f"they could not be run again: {error_line(error)}"
    return parts if norm(left) <= SAME64 * size else why


def _layers(window: ConfiguredWindow, apart: Deviations, parts: Parts | None) -> tuple[LayerError, ...]:
    """Return the errors of the model's layers, in its order."""
    shown = kept(len(window.sizes))

    def error(of: Deviation, names: Sequence[str]) -> float | None:
        found = of.of(names)
        return found if math.isfinite(found) else None

    layers = []
    names = [name for name in window.modules.parameters() if name in apart.own64.gap]
    for layer, inside in joined(names).items():
        reference = Deviation({}, apart.own64.reference)
        floors = [error(of, inside) for of in apart.moved]
        by_micro_batch = None
        if parts is not None:
            by_micro_batch = tuple(
                error(reference._replace(gap=parts[index]), inside) for index in shown
            )
        layers.append(
            LayerError(
                layer,
                len(inside),
                norm=apart.own64.norm(inside) / window.loss_scale,
                error=error(apart.own, inside),
                floor=None if None in floors else max(f for f in floors if f is not None),
                error64=error(apart.own64, inside),
                floor64=error(apart.moved64, inside),
                by_micro_batch=by_micro_batch,
            )
        )
    return tuple(layers)


def _described(
    window: ConfiguredWindow, counts: WindowCounts, layers: tuple[LayerError, ...], why: str | None
) -> AuditedWindow:
    each = counts.micro_batches(window.reduction, window.sizes)
    return AuditedWindow(
        window.reduction.name,
        accum_steps=len(each),
        global_batch_size=sum(window.sizes),
        unit=SAMPLES if all(m.counted == m.samples for m in each) else UNITS,
        micro_batches=tuple(each[index] for index in kept(len(each))),
        layers=layers,
        no_shares=why,
    )
