"""Hooks: what watches a training, or steps in, without the loop knowing it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from gaccum_exp.core.strategies import AccumulatorState

WINDOW = "window"
"""From the first forward pass of a window to the end of its optimizer step."""
PASSES = "forward/backward"
MICRO_BATCH = "micro-batch"
OPTIMIZER_STEP = "optimizer step"

Values = Mapping[str, float | Tensor]
"""Metrics of a window by name, on the run's device; empty where nothing in it counted."""


class Hook:
    """Watches a training at the points that it overrides. `state` is the `TrainState`.

    Of several hooks the first in the list is the outermost: it comes first in `begin` and `before`,
    enters first around a phase, and comes last in `after`, `redo` and `end`.
    """

    phases: frozenset[str] = frozenset()
    """The phases that it goes `around`."""

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


class Hooks:
    """The hooks of one training, in order, called at the points that they override only."""

    def __init__(self, hooks: Iterable[Hook] = ()) -> None:
        hooks = list(hooks)
        self._around = {
            phase: [hook.around for hook in hooks if phase in hook.phases]
            for phase in (WINDOW, PASSES, MICRO_BATCH, OPTIMIZER_STEP)
        }
        self._begin, self._before = _overriding("begin", hooks), _overriding("before", hooks)
        inward = hooks[::-1]
        self._after_micro_batch = _overriding("after_micro_batch", inward)
        self._after, self._redo = _overriding("after", inward), _overriding("redo", inward)
        self._end = _overriding("end", inward)

    def begin(self, state: Any) -> None:
        """Call every hook's `begin`."""
        for begin in self._begin:
            begin(state)

    def before(self, state: Any, window: Any) -> None:
        """Call every hook's `before`."""
        for before in self._before:
            before(state, window)

    def around(self, phase: str, state: Any, window: Any) -> AbstractContextManager[Any]:
        """Enter every hook's `around` of a phase."""
        entered = self._around[phase]
        if not entered:
            return _NOTHING
        if len(entered) == 1:
            return entered[0](phase, state, window)
        stack = ExitStack()
        for around in entered:
            stack.enter_context(around(phase, state, window))
        return stack

    def around_micro_batch(
        self, state: Any, window: Any
    ) -> Callable[[AccumulatorState], AbstractContextManager[Any]] | None:
        """Return what is entered around each micro-batch; None where no hook asks for it."""
        if not self._around[MICRO_BATCH] and not self._after_micro_batch:
            return None

        @contextmanager
        def around(accumulator: AccumulatorState) -> Iterator[None]:
            with self.around(MICRO_BATCH, state, window):
                yield
            for look in self._after_micro_batch:
                look(state, accumulator)

        return around

    def after(self, state: Any, window: Any, values: Values) -> None:
        """Call every hook's `after`."""
        for after in self._after:
            after(state, window, values)

    def redo(self, state: Any, window: Any, error: Exception) -> bool:
        """Ask the hooks, the innermost first, until one has the window again."""
        return any(redo(state, window, error) for redo in self._redo)

    def end(self, state: Any) -> None:
        """Call every hook's `end`."""
        for end in self._end:
            end(state)


_NOTHING: AbstractContextManager[Any] = nullcontext()


def _overriding(method: str, hooks: Iterable[Hook]) -> list[Callable[..., Any]]:
    """Return the hooks' own versions of a method: what does nothing is not called in every window."""
    return [
        getattr(hook, method)
        for hook in hooks
        if getattr(type(hook), method) is not getattr(Hook, method) or method in vars(hook)
    ]
