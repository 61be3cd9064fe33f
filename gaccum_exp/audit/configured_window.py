"""A window of a configured experiment as one that can be run again."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.audit.optimizer_steps import Steps
from gaccum_exp.audit.rerun.passes import Cast, ForwardContext
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.result import LOSS_SCALE, NOT_ADDITIVE, UNEQUAL_DENOMINATORS, UNKNOWN, Audit
from gaccum_exp.audit.verdict import listed, remedy_of_counts
from gaccum_exp.audit.window_weights import Count, WindowCounts
from gaccum_exp.core.accumulate import accumulate
from gaccum_exp.core.adam_a import AdamA
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
from gaccum_exp.core.module_state import modules_of
from gaccum_exp.core.reductions import GLOBAL_MEAN, Reduction
from gaccum_exp.core.sample_reading import sample_layouts
from gaccum_exp.core.strategies import IN_PLACE, InPlace
from gaccum_exp.core.window_loss import LossTotal, WindowTerms, counted_as

DESCENT = 16.0
"""Divisor of the loss scale where a gradient overflows; a GradScaler takes smaller steps."""


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
        return self.weighed_by(GLOBAL_MEAN)

    def weighed_by(self, reduction: Reduction) -> "ConfiguredWindow":
        """Return the same window under another reduction."""
        other = copy.copy(self)
        other.reduction = reduction
        return other

    def counts(self) -> WindowCounts:
        """Return what was counted in the forward passes, which have been made."""
        passes: list[int | None] = [*range(len(self.sizes))] if len(self.sizes) > 1 else [None]
        at_once = len(passes) > 1 and self.strategy.takes_window_at_once
        if self._terms:
            by_terms, of_whole = [self._terms[index] for index in passes], self._terms[None]
            parts = [{name: _count_of(term) for name, term in terms.items()} for terms in by_terms]
            whole = {name: _count_of(term) for name, term in of_whole.items()}
            every = {name: term for terms in (*by_terms, of_whole) for name, term in terms.items()}
            totals = {n: sum(terms[n].denominator for terms in by_terms if n in terms) for n in every}
            window = {name: float(term.divides_by(totals[name])) for name, term in every.items()}
            functions = [name for name, term in every.items() if term.of is not None]
            return WindowCounts(parts, whole, window, functions, at_once)
        parts = [{"": Count(*self._pairs[index][1:])} for index in passes]
        total = sum(part[""].n for part in parts)
        window = {"": float(window_denominator(self._loss_fn, total))}
        return WindowCounts(parts, {"": Count(*self._pairs[None][1:])}, window, at_once=at_once)

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


def _count_of(term: Term) -> Count:
    return Count(float(term.denominator), float(term.divides_by(term.denominator)))
