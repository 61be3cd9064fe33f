"""Watch windows of a training that a framework runs, each from its first micro-batch to its step."""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from gaccum_exp.audit.result import SEVERITY, Audit
from gaccum_exp.audit.watch.watch import Watched, watch


class BiasedAccumulationWarning(UserWarning):
    """The gradient that reached the optimizer is not the large batch's."""


class DueWindows:
    """Base of a framework's callback; between windows that are due nothing is attached to the model.

    Args:
        every_n_steps: a window is due where the number of optimizer steps taken before it is a multiple
            of this, as the first is. One that ends an epoch with fewer micro-batches always is.
        criterion: as in `watch`.

    Raises:
        ValueError: every_n_steps is below 1.
    """

    def __init__(self, every_n_steps: int = 1000, criterion: Callable[..., Any] | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be 1 or more")
        self.audits: list[tuple[int, Audit]] = []
        """(optimizer steps taken before the window, its audit), in order."""
        self._every, self._criterion = every_n_steps, criterion
        self._open: tuple[int, Watched, ExitStack] | None = None
        self._warned: set[str] = set()

    def summary(self) -> str:
        """Return in a line how many windows were judged, with which verdicts, and where to look."""
        if not self.audits:
            return "gradient accumulation: no window was judged"
        counts = Counter(audit.verdict for _, audit in self.audits)
        said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in SEVERITY if counts[verdict])
        line = f"gradient accumulation: of the windows judged {said}"
        unsound = [str(before) for before, audit in self.audits if not audit.sound]
        if not unsound:
            return line
        first = ", ".join([*unsound[:4], *(["…"] if len(unsound) > 4 else [])])
        return f"{line}; see .audits of those after {first} optimizer steps"

    def close(self) -> None:
        """Let go of a window in progress; without a step it has no audit."""
        if self._open is not None:
            self._open[2].close()
            self._open = None

    def _begin(
        self,
        global_step: int,
        ranks: int,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        optimizer: Any,
        ends_short: bool = False,
    ) -> None:
        """Watch the window that begins with the next micro-batch, if it is due.

        `ends_short`: it ends its epoch, with fewer micro-batches than the others.
        """
        due = global_step % self._every == 0 or ends_short
        if ranks > 1:
            self._warn_once("ranks", "AuditCallback judges one process only: nothing is audited here")
        elif due and (self._open is None or self._open[0] != global_step):
            self.close()
            stack = ExitStack()
            self._open = global_step, stack.enter_context(watch(model, criterion, optimizer)), stack

    def _end(self, global_step: int) -> None:
        """Keep the audit of a window whose step was taken; call it after each micro-batch or step."""
        if self._open is None or global_step == self._open[0]:
            return
        before, watched, _ = self._open
        self.close()
        for audit in watched.windows:
            self.audits.append((before, audit))
            if audit.verdict == "biased":
                said = f"gradient accumulation, window after {before} optimizer steps: {audit.report()}"
                self._warn_once(str(audit.cause), said, BiasedAccumulationWarning)

    def _warn_once(self, about: str, message: str, category: type[Warning] = UserWarning) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, category, stacklevel=3)
