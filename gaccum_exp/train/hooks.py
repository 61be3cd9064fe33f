"""Hooks: what watches a training, or steps in, without the loop knowing it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.train.stopping import Stop

WINDOW = "window"
"""From the first forward pass of a window to the end of its optimizer step."""
PASSES = "forward/backward"
MICRO_BATCH = "micro-batch"
OPTIMIZER_STEP = "optimizer step"

Values = Mapping[str, float | Tensor]
"""Metrics of a window by name, on the run's device; empty where nothing in it counted."""


@runtime_checkable
class Stateful(Protocol):
    """A hook that carries something over from window to window, which checkpoints keep."""

    measures_split: bool

    def state_dict(self) -> dict[str, Any]:
        """Return it as a tree of tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back, before the training begins."""
        ...


class Hook:
    """Watches a training at the points that it overrides. `state` is the `TrainState`.

    Of several hooks the first in the list is the outermost: it comes first in `begin` and `before`,
    enters first around a phase, and comes last in `after`, `redo` and `end`.
    """

    phases: frozenset[str] = frozenset()
    """The phases that it goes `around`."""
    measures_split: bool = False
    """Whether what it keeps was measured of a window as it is split, and is worth nothing otherwise."""

    def begin(self, state: Any) -> None:
        """Prepare, once the training is built."""

    def before(self, state: Any, window: Any) -> None:
        """Look at a window that is about to be used; it may come again after a `redo`."""

    def around(self, phase: str, state: Any, window: Any) -> AbstractContextManager[Any]:
        """Return what is entered around a phase."""
        return nullcontext()

    def after_micro_batch(self, state: Any, accumulator: AccumulatorState) -> None:
        """Look at the gradients so far, after each micro-batch's backward pass."""

    def after(self, state: Any, window: Any, values: Values) -> None:
        """Take the metrics of a window; `state.global_step` is the number of windows used by now."""

    def redo(self, state: Any, window: Any, error: Exception) -> bool:
        """Answer an error inside a window: True to have it again, split as the state says now."""
        return False

    def end(self, state: Any) -> None:
        """Conclude, after the last window."""

    def interrupted(self, state: Any, error: BaseException) -> None:
        """Learn of an error, or a request to stop, that ends the training before its time."""


class Hooks(list[Hook]):
    """The hooks of one training, the outermost first."""

    def begin(self, state: Any) -> None:
        """Call every hook's `begin`."""
        for hook in self:
            hook.begin(state)

    def before(self, state: Any, window: Any) -> None:
        """Call every hook's `before`."""
        for hook in self:
            hook.before(state, window)

    def around(self, phase: str, state: Any, window: Any) -> AbstractContextManager[Any]:
        """Return what enters every hook's `around` of a phase."""
        entered = [hook for hook in self if phase in hook.phases]
        if len(entered) < 2:
            return entered[0].around(phase, state, window) if entered else nullcontext()
        stack = ExitStack()
        for hook in entered:
            stack.enter_context(hook.around(phase, state, window))
        return stack

    def around_micro_batch(
        self, state: Any, window: Any
    ) -> Callable[[AccumulatorState], AbstractContextManager[Any]] | None:
        """Return what is entered around each micro-batch; None where no hook asks for it."""
        if not any(MICRO_BATCH in hook.phases for hook in self):
            return None
        return lambda accumulator: self.around(MICRO_BATCH, state, window)

    def after_micro_batch(self, state: Any) -> Callable[[AccumulatorState], None] | None:
        """Return what is called after each micro-batch; None where no hook looks there."""
        plain = Hook.after_micro_batch
        looking = [hook for hook in reversed(self) if type(hook).after_micro_batch is not plain]

        def after(accumulator: AccumulatorState) -> None:
            for hook in looking:
                hook.after_micro_batch(state, accumulator)

        return after if looking else None

    def after(self, state: Any, window: Any, values: Values) -> None:
        """Call every hook's `after`."""
        for hook in reversed(self):
            hook.after(state, window, values)

    def redo(self, state: Any, window: Any, error: Exception) -> bool:
        """Ask the hooks until one has the window again."""
        return any(hook.redo(state, window, error) for hook in reversed(self))

    def end(self, state: Any) -> None:
        """Call every hook's `end`."""
        for hook in reversed(self):
            hook.end(state)

    def interrupted(self, state: Any, error: BaseException) -> None:
        """Call every hook's `interrupted`."""
        for hook in reversed(self):
            hook.interrupted(state, error)


class Stopping(Hook):
    """Ends a training that somebody wants to end, before a window or after a micro-batch."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def before(self, state: Any, window: Any) -> None:
        """Look, before anything is done for this window."""
        self._stop.look()

    def after_micro_batch(self, state: Any, accumulator: AccumulatorState) -> None:
        """Look, with the micro-batch in the window's gradients."""
        if self._stop.asked is not None:
            self._stop.look()
