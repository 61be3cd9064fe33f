"""The training loop: window after window, one optimizer step each; everything else is a hook."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.audits import WindowAudits
from gaccum_exp.train.checkpoint.hook import Checkpoints, Writer
from gaccum_exp.train.clock import StepClock
from gaccum_exp.train.compiled import CompiledCheck
from gaccum_exp.train.evaluation import Evaluation
from gaccum_exp.train.hooks import WINDOW, Hook, Hooks, Stopping, Values
from gaccum_exp.train.memory_meters import MemoryMeters
from gaccum_exp.train.noise_scale import NoiseScale
from gaccum_exp.train.out_of_memory import FinerSplit
from gaccum_exp.train.recording import recording_hooks
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step
from gaccum_exp.train.stopping import NEVER, Stop


class Trainable(Protocol):
    """What a training is to the loop: one model's state, or that of several trained as one."""

    global_step: int
    split_factor: int

    @property
    def done(self) -> bool:
        """Whether the training is over."""

    def windows_from(self, first: int) -> Iterator[Any]:
        """Yield its windows in order, from a global step on."""


def train(state: Trainable, hooks: Hooks, step: Callable[[Any, Any, Hooks], Values] = take_step) -> None:
    """Train to the end.

    Args:
        state: of the training, at any global step; moves on.
        hooks: what watches it.
        step: takes the optimizer step on one window and returns its metrics.

    Raises:
        Exception: what a window or a hook raises, and no hook has redone.
        StoppedError: somebody wants it to end.
    """
    windows = Windows()
    try:
        hooks.begin(state)
        while not state.done:
            window = windows.next(state)
            hooks.before(state, window)
            try:
                with hooks.around(WINDOW, state, window):
                    values = step(state, window, hooks)
            except Exception as error:
                if not hooks.redo(state, window, error):
                    raise
                continue
            state.global_step += 1
            hooks.after(state, window, values)
            del window  # or two of them are on the host while the next one is fetched
        hooks.end(state)
    except BaseException as error:
        hooks.interrupted(state, error)
        raise


class Windows:
    """The windows of a training in order; one that does not follow its predecessor is fetched anew."""

    def __init__(self) -> None:
        self._following: tuple[int, int] | None = None
        self._windows: Iterator[Any] = iter(())

    def next(self, state: Trainable) -> Any:
        """Return the window of the state's global step, split as the state says."""
        if self._following != (state.global_step, state.split_factor):
            self._windows = state.windows_from(state.global_step)
        self._following = state.global_step + 1, state.split_factor
        return next(self._windows)


def hooks_of(
    state: TrainState,
    sink: Sink,
    progress: Progress,
    *,
    budget_bytes: int | None = None,
    stop: Stop = NEVER,
    checkpoints: Writer | None = None,
) -> tuple[Hooks, WindowAudits]:
    """Return the hooks of a run's training, the outermost first, and of these the one that audits.

    Args:
        state: of the training.
        sink: takes metrics and tags.
        progress: shows how far the training is.
        budget_bytes: what a window may hold on a CPU under `accum.on_oom=increase_steps`.
        stop: ends it.
        checkpoints: writes its checkpoints; None: there are none.
    """
    audits, meters = WindowAudits(state, sink, stop), MemoryMeters(state, sink, budget_bytes)
    hooks: list[Hook] = [
        Stopping(stop),
        StepClock(state.device, sink, lambda k: meters.due(k) or audits.due(k)),
        *recording_hooks(sink, progress, Evaluation(sink, state, stop=stop)),
        *([FinerSplit(sink)] if state.settings.accum.on_oom == "increase_steps" else []),
        meters,
        audits,
        *([CompiledCheck(sink)] if state.settings.runtime.compile else []),
        *([NoiseScale(state, sink)] if NoiseScale.asked_for(state) else []),
    ]
    watching = Hooks(hooks)
    when = state.settings.checkpoint
    if checkpoints is not None and (when.every_steps or when.every_minutes):
        # Looks after the others and before the clock goes on; inside a window, before it is stopped.
        watching.insert(2, Checkpoints(checkpoints, sink, stop, watching, audits.due))
    return watching, audits
