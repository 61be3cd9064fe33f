"""Watch windows of a training that a framework runs, each from its first micro-batch to its step."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.watch.watch import Watched, watch


class BiasedAccumulationWarning(UserWarning):
    """The gradient that reached the optimizer is not the large batch's."""


class DueWindows:
    """Watches the windows that are due; between them nothing is attached to the model.

    Args:
        every_n_steps: a window is due where the number of optimizer steps taken before it is a multiple
            of this; the first always is.

    Raises:
        ValueError: every_n_steps is below 1.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be 1 or more")
        self.audits: list[tuple[int, Audit]] = []
        """(optimizer steps taken before the window, its audit)."""
        self._every = every_n_steps
        self._open: tuple[int, Watched, ExitStack] | None = None
        self._begun = -1
        self._warned: set[str] = set()

    def begin(
        self,
        global_step: int,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Watch the window that begins with the next micro-batch, if it is due."""
        if global_step == self._begun or global_step % self._every:
            return
        self.abandon()
        self._begun = global_step
        stack = ExitStack()
        watched = stack.enter_context(watch(model, criterion, optimizer))
        self._open = global_step, watched, stack

    def end(self, global_step: int) -> None:
        """Keep the audit of a window whose step was taken; call it after each micro-batch or step."""
        if self._open is None or global_step == self._open[0]:
            return
        before, watched, _ = self._open
        self.abandon()
        for audit in watched.windows:
            self.audits.append((before, audit))
            if audit.verdict == "biased":
                said = f"gradient accumulation, window after {before} optimizer steps: {audit.report()}"
                self.once(str(audit.cause), said, BiasedAccumulationWarning)

    def abandon(self) -> None:
        """Stop watching; a window without a step has no audit."""
        if self._open is not None:
            self._open[2].close()
            self._open = None

    def restart(self) -> None:
        """Begin a training: forget which window was the last."""
        self.abandon()
        self._begun = -1

    def once(self, about: str, message: str, category: type[Warning] = UserWarning) -> None:
        """Warn, unless this has been warned about before."""
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, category, stacklevel=3)
