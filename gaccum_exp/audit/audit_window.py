"""The audit of one window of a configured experiment."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.audit.causes.padding import difference_by_padding
from gaccum_exp.audit.diagnose import NOT_FINITE, diagnose, error_line
from gaccum_exp.audit.optimizer_steps import Steps, judged_by_steps
from gaccum_exp.audit.rerun.passes import ACCUMULATED64, RECORDING, Cast, ForwardContext, Rerun
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.result import (
    BATCH_STATISTICS,
    LOSS_SCALE,
    NOT_ADDITIVE,
    UNEQUAL_DENOMINATORS,
    UNKNOWN,
    Audit,
)
from gaccum_exp.audit.verdict import listed, remedy_of_counts, scale_of
from gaccum_exp.core.accumulate import accumulate
from gaccum_exp.core.adam_a import AdamA
from gaccum_exp.core.gradient import Gradient
from gaccum_exp.core.joined_samples import NotJoinableError
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.losses.placement import on_device
from gaccum_exp.core.losses.protocol import (
    LossFn,
    LossWrapper,
    Term,
    count,
    criterion_of,
    terms_of,
    window_denominator,
)
from gaccum_exp.core.modes import without_graph
from gaccum_exp.core.module_state import modules_of
from gaccum_exp.core.reductions import GLOBAL_MEAN, Reduction
from gaccum_exp.core.sample_reading import sample_layouts
from gaccum_exp.core.seeding import random_state_kept, seed_model
from gaccum_exp.core.strategies import IN_PLACE, InPlace
from gaccum_exp.core.window_loss import LossTotal, WindowTerms, counted_as
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.available import out_of_memory

DESCENT = 16.0
"""Divisor of the loss scale where a gradient overflows; a GradScaler takes smaller steps."""


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


def _where_it_fits(window: "ConfiguredWindow", blank: Audit, seed: int) -> Audit:
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


def _at_a_fitting_loss_scale(window: "ConfiguredWindow", blank: Audit, device: torch.device) -> Audit:
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


def _audited(window: "ConfiguredWindow", blank: Audit, device: torch.device) -> Audit:
    rerun, reduction = Rerun(window, device), window.reduction
    replayed = rerun.gradient(RECORDING)
    if len(window.sizes) == 1:  # the reference itself
        _, n = without_graph(lambda: rerun.forward(ACCUMULATED64, None))
        scale, denominator = (v if math.isfinite(v) else None for v in (reduction.one_pass_factor(n), n))
        audit = replace(blank, verdict="identical", e64=0.0, e=0.0, scale=scale, denominator=denominator)
    else:
        audit = _of_gradient(rerun, replayed, window, blank)
    if isinstance(window.strategy, AdamA) and audit.verdict not in ("biased", "inconclusive"):
        steps = replace(rerun, window=window.with_steps(window.strategy))
        return judged_by_steps(steps, audit, window.strategy.remedy)
    return audit


def _of_gradient(rerun: Rerun, replayed: Gradient, window: "ConfiguredWindow", blank: Audit) -> Audit:
    found = diagnose(rerun, replayed, blank)
    audit = found.completed(window.naming_denominators(window.naming_terms(found.audit)))
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


class ConfiguredWindow:
    """A window under `accumulate_gradients`: in N passes as it is cut, in one pass with N = 1."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        micro_batches: Sequence[Any],
        reduction: Reduction,
        strategy: InPlace = IN_PLACE,
        loss_scale: float = 1.0,
    ) -> None:
        self.reduction, self.loss_scale, self.strategy = reduction, loss_scale, strategy
        self._accumulating = self._in_one_pass = strategy.adding_up
        self.modules = NamedModules(model, *modules_of(loss_fn))
        self._model, self._loss_fn = model, on_device(loss_fn)
        self.moves: dict[str, int] = {}
        self.moved_beside: list[tuple[Any, list[Any]]] = []
        self._micro_batches = list(micro_batches)
        label = getattr(criterion_of(loss_fn), "ignore_index", None)
        self._layout = sample_layouts(self._micro_batches, guess=True)[0]
        if label is not None:  # which the target is padded with, after the inputs
            self._layout = self._layout.with_labels_last(fill=label)
        self.sizes, self.differing = self._layout.sizes, self._layout.differing
        self._whole = self._layout.joined(self._micro_batches)
        self._pairs: dict[int | None, tuple[float, float, float]] = {}
        """Loss sum, count and denominator of the forward passes by themselves, as in `_terms`."""
        self._terms: dict[int | None, dict[str, Term]] = {}
        """Of the forward passes by themselves, of each micro-batch and of all samples (None)."""

    def halved(self) -> "ConfiguredWindow":
        """Return the window with the first half of each micro-batch's samples, rounded up."""
        halves = [
            self._layout.picked(m, torch.arange(-(-size // 2)))
            for m, size in zip(self._micro_batches, self.sizes, strict=True)
        ]
        how = self.reduction, self.strategy, self.loss_scale
        return ConfiguredWindow(self._model, self._loss_fn, halves, *how)

    def descaled(self) -> "ConfiguredWindow":
        """Return the window with a smaller loss scale, as a GradScaler takes when gradients overflow."""
        other = copy.copy(self)
        other.loss_scale = max(1.0, self.loss_scale / DESCENT)
        return other

    def accumulate(self, context: ForwardContext, cast: Cast) -> None:
        """Run as training does."""
        self._run([cast(m) for m in self._micro_batches], context, self._accumulating)

    def one_pass(self, context: AbstractContextManager[None], cast: Cast, order: Tensor | None) -> None:
        """Run the same with N = 1."""
        whole = self._whole if order is None else self._layout.picked(self._whole, order)
        self._run([cast(whole)], lambda index: context, self._in_one_pass)

    def forward(self, index: int | None, cast: Cast) -> tuple[Tensor, Any]:
        """Return loss sum and denominator of one micro-batch, or of all samples.

        Of a loss with terms their total, which has no denominator: NaN.
        """
        # Padded as in the one pass, so that module by module samples can be compared.
        each = (self.padded_alone() or self)._micro_batches
        micro_batch = cast(self._whole if index is None else each[index])
        result = self._loss_fn(self._model, micro_batch)
        if not isinstance(result, Mapping):
            loss, n = result
            self._pairs[index] = (
                float(loss.detach()),
                float(n),
                float(window_denominator(self._loss_fn, n)),
            )
            return loss, window_denominator(self._loss_fn, n) if index is None else n
        self._terms[index] = counted_as(terms_of(result), count(self._loss_fn, micro_batch))
        total = LossTotal(self._loss_fn)
        total.add(result)
        return total.loss().loss_sum, math.nan

    def with_steps(self, strategy: AdamA) -> "ConfiguredWindow":
        """Return the window with steps for gradients: the strategy's; in one pass its optimizer's."""
        other = copy.copy(self)
        modules = (self._model, criterion_of(self._loss_fn))
        parameters = list(nn.ModuleList(m for m in modules if m is not None).parameters())
        other._accumulating = Steps(strategy, parameters, plain=False)
        other._in_one_pass = Steps(strategy, parameters, plain=True)
        return other

    def padded_alone(self) -> "ConfiguredWindow | None":
        """Return the window whose micro-batches are as long as the longest; None: they are."""
        if not self._layout.padded:
            return None
        other = copy.copy(self)
        other._micro_batches = [self._layout.padded_alone(m) for m in self._micro_batches]
        return other

    def additive(self, parts: Sequence[tuple[float, Any]], whole: tuple[float, Any]) -> bool:
        """Whether the micro-batches' loss sums add up, of terms each one's."""
        if self._terms:
            sums, of_whole = WindowTerms(1), WindowTerms(1)
            for index, terms in self._terms.items():
                (of_whole if index is None else sums).add(terms)
            pairs = ((s, of_whole.sums.get(name)) for name, s in sums.sums.items())
            return all(t is not None and torch.allclose(s, t, rtol=1e-9, atol=1e-12) for s, t in pairs)
        total = sum(loss for loss, _ in parts)
        return math.isclose(total, whole[0], rel_tol=1e-9, abs_tol=1e-12)

    def holding(self, owners: Sequence[Any] | None) -> "ConfiguredWindow":
        """Return this window: nothing moves between its passes."""
        return self

    def with_first_values(self) -> "ConfiguredWindow | None":
        """Return the window with the first micro-batch's value of all that differs; None: none does."""
        if not self.differing:
            return None
        other = copy.copy(self)
        other._micro_batches = self._layout.with_first_values(self._micro_batches)
        return other

    def recounted(self, counts: Sequence[float]) -> "ConfiguredWindow | None":
        """Return the same window under the reduction that weighs by what each micro-batch counts."""
        if not self.reduction.needs_equal_parts:
            return None
        other = copy.copy(self)
        other.reduction = GLOBAL_MEAN
        return other

    def naming_terms(self, audit: Audit) -> Audit:
        """Return the audit, with the term that has unequal denominators where it found such."""
        if audit.cause != UNEQUAL_DENOMINATORS or not self._terms:
            return audit
        parts = [self._terms[index] for index in range(len(self.sizes))]
        names = {name: term for part in parts for name, term in part.items()}
        for name in names:
            counts = [float(part[name].denominator) if name in part else 0.0 for part in parts]
            if len(set(counts)) > 1:
                said = remedy_of_counts(self.sizes, counts)
                return replace(audit, remedy=said.replace("their loss", f"their term {name!r}"))
        functions = ", ".join(repr(name) for name, term in names.items() if term.of is not None)
        said = (
            f"{self.reduction.name} takes the function {functions} of each micro-batch's means, and not "
            "of the window's: use accum.reduction=global_mean"
        )
        return replace(audit, cause=NOT_ADDITIVE, remedy=said)

    def naming_denominators(self, audit: Audit) -> Audit:
        """Return an audit whose cause is a denominator that is the same whatever a micro-batch holds."""
        parts = [self._pairs[index] for index in range(len(self.sizes)) if index in self._pairs]
        whole = self._pairs.get(None)
        if whole is None or len(parts) < 2 or any(part[2] != whole[2] for part in parts):
            return audit
        if audit.cause == LOSS_SCALE and self.reduction.needs_equal_parts:
            said = (
                f"each micro-batch's loss sum is divided by a constant, {whole[2]:.6g}, as the large "
                "batch's is, so that nothing is left to be divided by N: use global_mean"
            )
            return replace(audit, remedy=said)
        # Means, each called the sum of so many: the large batch's is that of all samples.
        weighed = sum(part[0] * size for part, size in zip(parts, self.sizes, strict=True))
        means = math.isclose(weighed / sum(self.sizes), whole[0], rel_tol=1e-9, abs_tol=1e-12)
        if means and audit.cause in (NOT_ADDITIVE, UNKNOWN) and len(set(self.sizes)) > 1:
            said = (
                f"the loss function returns the denominator {whole[2]:.6g} for every micro-batch, and "
                f"they hold {listed(self.sizes)} samples: return the losses' sum and what it counts"
            )
            return replace(audit, cause=UNEQUAL_DENOMINATORS, remedy=said, detail=None)
        return audit

    def _run(self, window: list[Any], context: ForwardContext, strategy: InPlace) -> None:
        # Each an object of its own, to be known by: a window may hold one twice.
        micro_batches = [copy.copy(micro_batch) for micro_batch in window]
        accumulate(
            self._model,
            _Following(self._loss_fn, context, micro_batches),
            micro_batches,
            self.reduction,
            strategy,
            backward=lambda loss: torch.autograd.backward(loss * self.loss_scale),
        )


class _Following(LossWrapper):
    """A loss function whose calls each enter the context of their micro-batch.

    A micro-batch may come twice: under strategy=cached, and where terms are counted in a pass of their
    own. What is none of the window's is the call for the loss alone, over all outputs (None).
    """

    def __init__(self, loss_fn: LossFn, context: ForwardContext, micro_batches: Sequence[Any]) -> None:
        super().__init__(loss_fn)
        self._context = context
        self._indices = {id(micro_batch): index for index, micro_batch in enumerate(micro_batches)}

    @contextmanager
    def around(self, micro_batch: Any) -> Iterator[Any]:
        with self._context(self._indices.get(id(micro_batch))):
            yield micro_batch
