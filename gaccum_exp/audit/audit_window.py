"""The audit of one window of a configured experiment."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gaccum_exp.audit.causes.padding import difference_by_padding
from gaccum_exp.audit.configured_window import ConfiguredWindow
from gaccum_exp.audit.diagnose import NOT_FINITE, Diagnosis, diagnose, error_line
from gaccum_exp.audit.optimizer_steps import judged_by_steps
from gaccum_exp.audit.rerun.passes import ACCUMULATED, ACCUMULATED64, RECORDING, Rerun
from gaccum_exp.audit.result import BATCH_STATISTICS, Audit, ordered
from gaccum_exp.audit.several_causes import Judged, causes_of_passes
from gaccum_exp.audit.verdict import scale_of
from gaccum_exp.audit.window_shares import alone, audited
from gaccum_exp.core.adam_a import AdamA
from gaccum_exp.core.gradient import Gradient
from gaccum_exp.core.joined_samples import NotJoinableError
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.losses.protocol import LossFn
from gaccum_exp.core.modes import without_graph
from gaccum_exp.core.reductions import GLOBAL_MEAN, Reduction
from gaccum_exp.core.seeding import random_state_kept, seed_model
from gaccum_exp.core.strategies import IN_PLACE, InPlace
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.available import out_of_memory


def audit_window(
    model: nn.Module,
    loss_fn: LossFn | nn.Module,
    window: Sequence[Any],
    *,
    reduction: Reduction = GLOBAL_MEAN,
    strategy: InPlace = IN_PLACE,
    loss_scale: float = 1.0,
    seed: int = 0,
) -> Audit:
    """Compare the window's accumulated gradient with that of the same samples in one pass.

    Weights, gradients, buffers and random state are left as they were. It costs about a dozen passes
    over the window, half of them in float64.

    Args:
        model: at the weights and in the mode to be audited.
        loss_fn: as for `accumulate_gradients`.
        window: the micro-batches, each any nesting of tensors of one number of samples, and of lists
            with an entry per sample; where shapes leave a choice, the first dimension counts samples.
        reduction: of the window.
        strategy: by which its micro gradients are held.
        loss_scale: what a GradScaler multiplies the loss by, so that float16 does not lose it.
        seed: of what the model draws.

    Returns:
        The verdict; an error of the model's is one too: inconclusive, with the reason.

    Raises:
        BadInputError: the criterion has no such reduction; or the strategy does not suit the model.
    """
    loss_fn = as_loss_fn(loss_fn, reduction.name, whole_window=strategy.takes_window_at_once)
    if len(window) > 1:
        strategy.require(reduction)
        strategy.inspect(model, loss_fn, window)  # else it would look in the middle of a recorded pass
    blank = Audit("inconclusive", len(window), reduction.name)
    try:
        configured = ConfiguredWindow(model, loss_fn, window, reduction, strategy, loss_scale)
        with random_state_kept():
            return _where_it_fits(configured, blank, seed)
    except BadInputError:
        raise
    except NotJoinableError as error:
        return replace(blank, detail=str(error))
    except Exception as error:  # a user's model may fail on inputs or in a precision that it never met
        return replace(blank, detail=f"the window could not be run again: {error_line(error)}")


def _where_it_fits(window: ConfiguredWindow, blank: Audit, seed: int) -> Audit:
    """Audit on the window's own device, else on the CPU, else on fewer and fewer of its samples."""
    own = next(iter(window.modules.parameters().values()), torch.empty(0)).device
    host, sliced = torch.device("cpu"), ""
    while True:
        # Some kinds of device have no float64.
        for device in (host,) if own.type in ("cpu", "mps") else (own, host):
            try:
                seed_model(seed, own)
                audit = _at_a_fitting_loss_scale(window, blank, device)
                elsewhere = sliced + (f" on the {device.type}" if device != own else "")
                return audit.noting(f"audited{elsewhere}") if elsewhere else audit
            except Exception as error:
                if not out_of_memory(error):
                    raise
                refusal = str(error)
        if max(window.sizes) < 2:
            return replace(blank, detail=f"too large to be audited here: {refusal}")
        window = window.halved()
        sliced = f" on a slice of {sum(window.sizes)} samples ({refusal})"


def _at_a_fitting_loss_scale(window: ConfiguredWindow, blank: Audit, device: torch.device) -> Audit:
    """Audit at the loss scale, or at a smaller one where the gradient overflows."""
    audit, asked = _audited(window, blank, device), window.loss_scale
    while audit.detail == NOT_FINITE and window.loss_scale > 1.0:
        window = window.descaled()
        audit = _audited(window, blank, device)
    scale = window.loss_scale
    if scale != asked and audit.detail != NOT_FINITE:
        audit = audit.noting(f"at a loss scale of {scale:g}, since the gradient overflows at {asked:g}")
    rows = tuple(replace(row, norm=row.norm / scale) for row in audit.parameters)
    return replace(audit, parameters=rows)


def _audited(window: ConfiguredWindow, blank: Audit, device: torch.device) -> Audit:
    rerun, reduction = Rerun(window, device), window.reduction
    replayed = rerun.gradient(RECORDING)
    if len(window.sizes) == 1:  # the reference itself
        _, n = without_graph(lambda: rerun.forward(ACCUMULATED64, None))
        scale, denominator = (v if math.isfinite(v) else None for v in (reduction.one_pass_factor(n), n))
        audit = replace(blank, verdict="identical", e64=0.0, e=0.0, scale=scale, denominator=denominator)
        audit = replace(audit, window=alone(window))
    else:
        audit = _of_gradient(rerun, replayed, window, blank)
    if isinstance(window.strategy, AdamA) and audit.verdict not in ("biased", "inconclusive"):
        steps = replace(rerun, window=window.with_steps(window.strategy))
        return judged_by_steps(steps, audit, window.strategy.remedy)
    return audit


def _of_gradient(rerun: Rerun, replayed: Gradient, window: ConfiguredWindow, blank: Audit) -> Audit:
    found = diagnose(rerun, replayed, blank)
    audit = _explained(rerun, found, window)
    if found.deviations is None:
        return audit
    of_window = audited(rerun, window, found, audit)
    if audit.verdict == "biased":

        def again(undone: Rerun) -> Judged:
            of_rest = diagnose(undone, undone.gradient(ACCUMULATED), blank)
            return Judged(_explained(undone, of_rest, window), of_rest, undone)

        causes = causes_of_passes(Judged(audit, found, rerun), again)
        audit = audit.led_by(found.completed(ordered(causes)))
    return replace(audit, window=of_window)


def _explained(rerun: Rerun, found: Diagnosis, window: ConfiguredWindow) -> Audit:
    """Return the audit of a diagnosis, with what the configuration tells of its cause and its scale."""
    audit = window.naming_denominators(window.naming_terms(found.audit))
    if found.measured is not None and not audit.sound and audit.cause != BATCH_STATISTICS:
        why = difference_by_padding(rerun)
        if why is not None:
            return replace(audit, verdict="inconclusive", cause=None, remedy=None, detail=why)
    if found.accumulated64 is None or found.one_pass64 is None:
        return audit
    # Several terms have no denominator in common, and their sum is no multiple of their mean.
    n = math.nan if audit.denominator is None else audit.denominator
    along = scale_of(found.accumulated64, found.one_pass64)
    per_mean = window.reduction.one_pass_factor(n)
    known = along is not None and math.isfinite(per_mean)
    return replace(audit, scale=along * per_mean if along is not None and known else None)
