"""The hooks that record a training, deliver its metrics, and end it at a loss that is not finite."""

from typing import Any

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.hooks import Hook, Values
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import moves_weights

FINITE_EVERY = 50
"""Global steps between two looks at the losses: each look waits for the device once."""


class Recording(Hook):
    """Records every window's metrics, and counts the windows that were no steps."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._steps = self._empty = self._skipped = 0

    def after(self, state: TrainState, window: Any, values: Values) -> None:
        """Record the metrics of a window.

        Raises:
            BadInputError: no later window can be a step.
        """
        self._sink.record(state.global_step, values)
        self._empty += not values
        self._skipped += bool(values) and not moves_weights(values)
        self._steps += moves_weights(values)
        if values.get(metrics.LOSS_SCALE) == 0:
            raise BadInputError(
                f"runtime.precision=fp16: the loss scale has sunk to 0 after {self._skipped} windows "
                "without a finite gradient; use runtime.precision=bf16 or a smaller learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the last value of each metric."""
        counts = {"steps": self._steps, "empty": self._empty, "skipped": self._skipped}
        return counts | {"last": dict(self._sink.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from there."""
        self._steps, self._empty, self._skipped = state["steps"], state["empty"], state["skipped"]
        self._sink.last = state["last"] | self._sink.last

    def end(self, state: TrainState) -> None:
        """Record the counts, where there are such windows.

        Raises:
            BadInputError: a training without a single step is not finished: it never began.
        """
        counts = {metrics.EMPTY_WINDOWS: self._empty, metrics.SKIPPED_WINDOWS: self._skipped}
        if self._empty or self._skipped:
            self._sink.record(state.global_step, {key: float(n) for key, n in counts.items() if n})
        if not self._steps and not self._skipped:
            raise BadInputError("nothing in data.train counts: the denominator of every window is 0")
        if not self._steps:
            raise BadInputError(
                "runtime.precision=fp16: no window had a finite gradient, so none was a step"
            )


class Delivery(Hook):
    """Delivers what is recorded from time to time and at the end, and shows how far the training is."""

    def __init__(self, sink: Sink, progress: Progress) -> None:
        self._sink, self._progress = sink, progress

    def before(self, state: Any, window: Any) -> None:
        """Show that the training begins."""
        self._progress.begin(state.global_step)

    def after(self, state: Any, window: Any, values: Values) -> None:
        """Deliver if it is time."""
        if self._sink.due or state.done:
            self._sink.deliver()
        self._progress.advance(state.global_step, self._sink.last)


class FiniteLoss(Hook):
    """Ends a training whose loss is not finite, at a fixed interval of global steps.

    Not where metrics happen to be delivered: where it stops would then depend on how fast the store is.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def after(self, state: Any, window: Any, values: Values) -> None:
        """Look at the losses since the last time.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite; the curve up to it is kept.
        """
        if state.global_step % FINITE_EVERY == 0 or state.done:
            self._sink.require_finite()


def recording_hooks(sink: Sink, progress: Progress, evaluation: Hook) -> list[Hook]:
    """Return what records any training: a window's own metrics first, then its evaluation, then all."""
    return [Delivery(sink, progress), FiniteLoss(sink), evaluation, Recording(sink)]
