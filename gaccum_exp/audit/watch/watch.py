"""`watch`: audit any training loop from outside."""

from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gaccum_exp.audit import result
from gaccum_exp.audit.rerun.sandbox import NamedModules, modules_in
from gaccum_exp.audit.result import Audit, Check, worst
from gaccum_exp.audit.watch.judge import judge
from gaccum_exp.audit.watch.loop_checks import reported_loss
from gaccum_exp.audit.watch.moving_state import MovingState
from gaccum_exp.audit.watch.tape import Observations, TapedMicroBatch
from gaccum_exp.audit.watch.tracer import LoopTracer
from gaccum_exp.core.gradient import Gradient
from gaccum_exp.core.seeding import random_state_kept

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_original_module",
    "AcceleratedOptimizer": "optimizer",
    "_FabricOptimizer": "optimizer",
    "LightningOptimizer": "_optimizer",
}
"""Wrappers of a module or an optimizer, by class name, and the attribute that holds it."""


class Watched:
    """The audits, window by window; other attributes are those of the worst."""

    def __init__(self) -> None:
        self.windows: list[Audit] = []
        """One audit per optimizer step that was judged."""
        self.left_over = 0
        """Backward passes after the last optimizer step of the block."""

    @property
    def worst(self) -> Audit:
        """The audit of the worst window."""
        if self.windows:
            return worst(self.windows)
        if not self.left_over:
            return Audit("inconclusive", 0, "mean", detail="no optimizer step was seen")
        return Audit(
            "inconclusive", self.left_over, "mean", cause=result.STALE_OR_MISSING,
            detail=f"{self.left_over} backward passes, and no optimizer step",
            remedy="step where the epoch ends, or use fewer micro-batches per window",
        )  # fmt: skip

    @property
    def checks(self) -> tuple[Check, ...]:
        """The faults outside the gradient, of all windows, each once."""
        return tuple({c.name: c for audit in self.windows for c in audit.checks}.values())

    @property
    def sound(self) -> bool:
        """Whether every window was the large batch's, up to rounding, and no check found a fault."""
        return bool(self.windows) and all(audit.sound for audit in self.windows)

    def __getattr__(self, name: str) -> Any:
        if name in Audit.__slots__:
            return getattr(self.worst, name)
        raise AttributeError(name)

    def __str__(self) -> str:
        return self.worst.report()


class watch:  # noqa: N801  # used as a function
    """Watch a training loop, and judge the gradient of every optimizer step in the block.

        with watch(model, criterion, optimizer) as audit:
            my_training_step()
        print(audit.verdict, audit.cause, audit.remedy)

    The loop runs once, in its own precision, and ends as it would have unwatched, bit for bit.
    Judging a window costs about a dozen further passes over its samples, on copies of the weights.

    Args:
        model: the module that the loop calls, wrapped or not.
        criterion: a module or function that the loop calls on the model's outputs; a function that
            calls the model itself (`lit.training_step`, a `compute_loss(model, batch)`); or None: a loss
            of `torch.nn.functional`, or the model's own `loss`.
        optimizer: whose `step` ends a window, wrapped or not.
        steps: which optimizer steps of the block to judge, the first being 0; None: all.
        batch_dim: the dimension of the model's inputs that counts samples; None: that on which the
            shapes of inputs, outputs and targets agree.
        also: what the loop uses and nothing shows: modules, tensors, objects that hold tensors (a
            teacher in compiled code, an average of the weights). What moves there is found, too.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Any] | None,
        optimizer: torch.optim.Optimizer,
        *,
        steps: Container[int] | None = None,
        batch_dim: int | None = None,
        also: Sequence[Any] = (),
    ) -> None:
        model, optimizer = _unwrapped(model), _unwrapped(optimizer)
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        self._modules = NamedModules(model, *modules_in(criterion), compared=stepped)
        compared = {n: p for n, p in self._modules.parameters().items() if n in self._modules.compared}
        moving = MovingState(self._modules, also)
        self._tracer = LoopTracer(
            model, criterion, optimizer, self._modules, compared, self._reached, moving
        )
        self._judged, self._dim = steps, batch_dim
        self._global_step = 0
        self._watched = Watched()
        self._unreported: list[TapedMicroBatch] = []
        self._stack = ExitStack()

    def __enter__(self) -> Watched:
        self._stack.enter_context(self._tracer())
        return self._watched

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._close_reports()
        self._watched.left_over = self._tracer.seen.tape.backwards
        self._tracer.seen = Observations()  # which holds gradients

    def _reached(self, seen: Observations, gradient: Gradient) -> None:
        global_step, self._global_step = self._global_step, self._global_step + 1
        self._close_reports()
        if self._judged is None or global_step in self._judged:
            with random_state_kept():
                self._watched.windows.append(judge(seen, gradient, self._modules, self._dim))
            self._unreported = seen.tape.micro_batches()

    def _close_reports(self) -> None:
        # A loop reports a window's loss after its step: until the next one, it may still be read.
        found = reported_loss(self._unreported)
        self._unreported = []
        if found is not None:
            last = self._watched.windows[-1]
            self._watched.windows[-1] = replace(last, checks=(*last.checks, found))


def _unwrapped(wrapped: Any) -> Any:
    while type(wrapped).__name__ in WRAPPERS:
        wrapped = getattr(wrapped, WRAPPERS[type(wrapped).__name__])
    return wrapped
