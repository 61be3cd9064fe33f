"""The audit of one window of a configured experiment."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.audit.diagnose import NOT_FINITE, examine, first_line
from gaccum_exp.audit.rerun.passes import Around, Trial
from gaccum_exp.audit.rerun.samples import NotJoinableError, joined, picked, size_of
from gaccum_exp.audit.rerun.sandbox import Parts, modules_in
from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.verdict import scale_of
from gaccum_exp.core.accumulate import accumulate_gradients
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.losses.placement import on_device
from gaccum_exp.core.losses.protocol import LossFn, LossWrapper
from gaccum_exp.core.reductions import ReductionName
from gaccum_exp.core.seeding import random_state_kept, seed_model
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.available import out_of_memory

DESCENT = 16.0
"""What the loss scale is divided by where a gradient overflows; a GradScaler takes smaller steps."""


def audit_window(
    model: nn.Module,
    loss_fn: LossFn | nn.Module,
    window: Sequence[Any],
    *,
    reduction: ReductionName = "global_mean",
    sum_divisor: float = 1.0,
    buffer_dtype: torch.dtype | None = None,
    loss_scale: float = 1.0,
    seed: int = 0,
) -> Audit:
    """Compare the window's accumulated gradient with that of the same samples in one pass.

    Weights, gradients, buffers and random state are left as they were. It costs about a dozen passes
    over the window, half of them in float64.

    Args:
        model: at the weights and in the mode to be audited.
        loss_fn: as for `accumulate_gradients`.
        window: the micro-batches, each any nesting of tensors whose first dimension counts samples.
        reduction: as for `accumulate_gradients`; so are `sum_divisor` and `buffer_dtype`.
        loss_scale: what a GradScaler multiplies the loss by, so that float16 does not lose it.
        seed: of what the model draws.

    Returns:
        The verdict, never an error of the model's: what cannot be run is inconclusive, with the reason.

    Raises:
        BadInputError: the criterion has no such reduction.
    """
    loss_fn = as_loss_fn(loss_fn, reduction)
    blank = Audit("inconclusive", len(window), reduction)
    how = Accumulation(reduction, sum_divisor, buffer_dtype, loss_scale)
    try:
        configured = ConfiguredWindow(model, loss_fn, window, how)
        with random_state_kept():
            return _where_it_fits(configured, blank, seed)
    except BadInputError:
        raise
    except NotJoinableError as error:
        return replace(blank, detail=str(error))
    except Exception as error:  # a stranger's model, on inputs and in a precision that it never met
        return replace(blank, detail=f"the window could not be run again: {first_line(error)}")


def _where_it_fits(window: "ConfiguredWindow", blank: Audit, seed: int) -> Audit:
    """Audit on the window's own device, else on the CPU, else on fewer and fewer of its samples."""
    first = next(iter(window.parts.parameters().values()), torch.empty(0)).device
    host = torch.device("cpu")
    told = ""
    while True:
        # float64 is not to be had on every kind of device.
        for device in (host,) if first.type in ("cpu", "mps") else (first, host):
            try:
                seed_model(seed, first)
                audit = _audited(window, blank, device)
                where = f" on the {device.type}" if device != first else ""
                return replace(audit, detail=_said(audit.detail, f"audited{told}{where}", told + where))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                refusal = str(error)
        if max(window.sizes) < 2:
            return replace(blank, detail=f"too large to be audited here: {refusal}")
        window = window.halved()
        told = f" on a slice of {sum(window.sizes)} samples ({refusal})"


def _said(detail: str | None, where: str, elsewhere: str) -> str | None:
    return "; ".join(part for part in (detail, where if elsewhere else None) if part) or None


@dataclass(frozen=True, slots=True)
class Accumulation:
    """How a window is accumulated, in the words of `accumulate_gradients`."""

    reduction: ReductionName
    sum_divisor: float = 1.0
    buffer_dtype: torch.dtype | None = None
    loss_scale: float = 1.0


class ConfiguredWindow:
    """A window under `accumulate_gradients`: in N passes as it is cut, in one pass with N = 1."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, micro_batches: Sequence[Any], how: Accumulation
    ) -> None:
        self.parts = Parts(model, *modules_in(loss_fn))
        self.sizes = [size_of(micro_batch) for micro_batch in micro_batches]
        self.how = how
        self._model, self._loss_fn = model, on_device(loss_fn)
        self._micro_batches = list(micro_batches)
        self._whole = joined(self._micro_batches, self.sizes)

    def halved(self) -> "ConfiguredWindow":
        """Return the window with the first half of each micro-batch's samples, rounded up."""
        halves = [
            picked(m, torch.arange(-(-size // 2)), size)
            for m, size in zip(self._micro_batches, self.sizes, strict=True)
        ]
        return ConfiguredWindow(self._model, self._loss_fn, halves, self.how)

    def descaled(self) -> "ConfiguredWindow":
        """Return the window with a smaller loss scale, as a GradScaler takes when gradients overflow."""
        how = replace(self.how, loss_scale=max(1.0, self.how.loss_scale / DESCENT))
        return ConfiguredWindow(self._model, self._loss_fn, self._micro_batches, how)

    def accumulate(self, around: Around, lift: Callable[[Any], Any]) -> None:
        """Run as training does."""
        self._run([lift(m) for m in self._micro_batches], around)

    def one_pass(
        self, around: AbstractContextManager[None], lift: Callable[[Any], Any], order: Tensor | None
    ) -> None:
        """Run the same with N = 1."""
        whole = self._whole if order is None else picked(self._whole, order, sum(self.sizes))
        self._run([lift(whole)], lambda index: around)

    def forward(self, index: int | None, lift: Callable[[Any], Any]) -> tuple[Tensor, Any]:
        """Return loss sum and denominator of one micro-batch, or of all samples."""
        micro_batch = self._whole if index is None else self._micro_batches[index]
        return self._loss_fn(self._model, lift(micro_batch))

    def additive(self, parts: Sequence[tuple[float, Any]], whole: tuple[float, Any]) -> bool:
        """Whether the micro-batches' loss sums add up."""
        total = sum(loss for loss, _ in parts)
        return math.isclose(total, whole[0], rel_tol=1e-9, abs_tol=1e-12)

    def recounted(self, counts: Sequence[float]) -> "ConfiguredWindow | None":
        """Return the same window under the reduction that weighs by what each micro-batch counts."""
        if self.how.reduction != "mean":
            return None
        how = replace(self.how, reduction="global_mean")
        return ConfiguredWindow(self._model, self._loss_fn, self._micro_batches, how)

    def _run(self, micro_batches: list[Any], around: Around) -> None:
        accumulate_gradients(
            self._model,
            _Following(self._loss_fn, around),
            micro_batches,
            reduction=self.how.reduction,
            sum_divisor=self.how.sum_divisor,
            backward=lambda loss: torch.autograd.backward(loss * self.how.loss_scale),
            buffer_dtype=self.how.buffer_dtype,
        )


class _Following(LossWrapper):
    """The loss function, saying when a micro-batch's forward pass begins and ends."""

    def __init__(self, loss_fn: LossFn, around: Around) -> None:
        super().__init__(loss_fn)
        self._around, self._next = around, 0

    @contextmanager
    def around(self, micro_batch: Any) -> Iterator[Any]:
        index, self._next = self._next, self._next + 1
        with self._around(index):
            yield micro_batch


def _audited(window: ConfiguredWindow, blank: Audit, device: torch.device) -> Audit:
    """Audit at the loss scale, or at a smaller one where the gradient overflows."""
    audit, asked = _audited_as_scaled(window, blank, device), window.how.loss_scale
    while audit.detail == NOT_FINITE and window.how.loss_scale > 1.0:
        window = window.descaled()
        audit = _audited_as_scaled(window, blank, device)
    scale = window.how.loss_scale
    used = f"at a loss scale of {scale:g}, since the gradient overflows at {asked:g}"
    overflowed = scale != asked and audit.detail != NOT_FINITE
    return replace(
        audit,
        detail=_said(audit.detail, used, used if overflowed else ""),
        parameters=tuple(replace(row, norm=row.norm / scale) for row in audit.parameters),
    )


def _audited_as_scaled(window: ConfiguredWindow, blank: Audit, device: torch.device) -> Audit:
    trial = Trial(window, device=device)
    if len(window.sizes) == 1:  # the reference itself
        trial.record()
        _, denominator = trial.loss_of_all()
        scale = denominator / window.how.sum_divisor if window.how.reduction == "sum" else 1.0
        return replace(blank, verdict="identical", e64=0.0, e=0.0, scale=scale, denominator=denominator)
    examined = examine(trial, None, blank)
    audit = examined.audit
    if examined.accumulated64 is None or examined.one_pass64 is None or audit.denominator is None:
        return audit
    # One pass under `sum` is the mean gradient times denominator / divisor.
    summed = window.how.reduction == "sum"
    per_mean = audit.denominator / window.how.sum_divisor if summed else 1.0
    along = scale_of(examined.accumulated64, examined.one_pass64)
    return replace(audit, scale=None if along is None else along * per_mean)
