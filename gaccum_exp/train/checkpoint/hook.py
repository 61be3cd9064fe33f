"""The hook that takes checkpoints of a training: at intervals, where it is stopped, inside long windows.

What is to be written is copied in the training's thread and written in another one, one checkpoint at a
time. One that cannot be written is a warning: the training goes on.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gaccum_exp.core.feed import Window
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.errors import first_line
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.checkpoint import files
from gaccum_exp.train.checkpoint.attributes import copied
from gaccum_exp.train.checkpoint.encoding import Encoded, NotKeptError, encode
from gaccum_exp.train.checkpoint.parts import moving, parts_of
from gaccum_exp.train.checkpoint.snapshot import Tree, goes_on_inside, may_begin_again, snapshot
from gaccum_exp.train.checkpoint.unkept import Unkept
from gaccum_exp.train.hooks import WINDOW, Hook, Values
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.stopping import Stop, StoppedError, worker_was_ended

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
COPIED = 0.01
"""The share of a window's time that a copy of its start may take, where it can do without."""
WORTH = 0.05
"""The share of the training's time that checkpoints may cost unsaid."""
TELLING = 3
"""Checkpoints before that share is taken: the first one imports what writes."""


class Checkpoints(Hook):
    """Takes a checkpoint every so many steps or minutes, and where the training is asked to stop.

    Inside a window where it is stopped there, or where the window alone takes longer than
    `every_minutes`. What was recorded up to a checkpoint is flushed before. Only an unfinished training
    needs its checkpoints: whoever has kept the final weights removes them.

    Args:
        writer: of the training's checkpoints.
        sink: of its metrics.
        stop: asked to end it.
        hooks: of the training, whose state belongs to it.
        audited: whether the window of a global step is audited first. An audit can be interrupted
            anywhere, so what is to be kept is copied before it.
    """

    phases = frozenset({WINDOW})

    def __init__(
        self,
        writer: "Writer",
        sink: Sink,
        stop: Stop,
        hooks: Iterable[Hook],
        audited: Callable[[int], bool] = lambda global_step: False,
    ) -> None:
        self._sink, self._stop, self._hooks, self._audited = sink, stop, hooks, audited
        self._writer = writer
        self._on = True
        self._at: tuple[int, int] | None = None
        """The global step and the micro-batches done of the last one, or at the beginning."""
        self._before_audit: tuple[str, Encoded] | None = None
        self._inside = False
        self._at_start: Tree | None = None
        """What passes move, where the window in hand may have to begin again."""
        self._versions: list[int] = []
        """Of the parameters where that begins."""
        self._unkept: Unkept | None = None
        """As it was before the first window."""
        self._tried = False
        """Whether a window was taken, which may move what cannot be kept."""
        self._taken_s = self._window_s = self._begun_s = 0.0
        self._copy_s, self._took_s = 0.0, math.inf
        """Of the last copy of what passes move, and of the last window."""
        self._cost_s = 0.0
        self._count = 0

    def begin(self, state: TrainState) -> None:
        """Say of a training that cannot be kept, before it begins, that it has no checkpoints."""
        done = 0 if state.begun is None else state.begun.passes_done
        self._at = state.global_step, done
        self._taken_s = self._window_s = self._begun_s = time.monotonic()
        self._unkept = Unkept(state)
        self._try(state)

    def before(self, state: TrainState, window: Window) -> None:
        """Copy what the training is before an audit, where that may have to be kept."""
        self._inside, self._before_audit = False, None
        if self._on and self._audited(state.global_step) and (state.global_step, 0) != self._at:
            encoded = self._encoded(state) if state.begun is None else None
            if encoded is not None:
                self._before_audit = files.name_of(state.global_step), encoded
        self._window_s = time.monotonic()

    @contextmanager
    def around(self, phase: str, state: TrainState, window: Window) -> Iterator[None]:
        """Know what is inside a window, and keep what one needs that may have to begin again."""
        self._inside, self._before_audit, self._at_start = True, None, None
        begins_again = not goes_on_inside(state)
        if state.begun is not None:
            self._at_start = state.begun_at_start
        elif self._on and (begins_again or may_begin_again(state, cheaply=self._copies_cheaply)):
            start_s = time.monotonic()
            self._at_start = copied(moving(parts_of(state)))
            self._copy_s = time.monotonic() - start_s
            self._versions = [p._version for p in state.parameters] if begins_again else []
        start_s = time.monotonic()
        yield
        self._inside, self._took_s = False, time.monotonic() - start_s

    @property
    def _copies_cheaply(self) -> bool:
        """Whether a copy of what passes move takes next to no part of a window's time."""
        return self._copy_s <= COPIED * self._took_s

    def after_micro_batch(self, state: TrainState, accumulator: AccumulatorState) -> None:
        """Take one inside a window where the training is to stop, or the window takes too long."""
        if not self._on:
            return
        asked = self._stop.asked is not None
        if not asked:
            minutes = state.settings.checkpoint.every_minutes
            since_s = max(self._taken_s, self._window_s)
            if minutes is None or time.monotonic() - since_s < 60 * minutes or self._writer.busy:
                return
        moved = [p._version for p in state.parameters] if self._versions else []
        if moved == self._versions:  # a closure may be evaluated at other weights
            self._take(state, accumulator)
        if asked:
            self._writer.wait()

    def after(self, state: TrainState, window: Window, values: Values) -> None:
        """Take one at the end of a window, where that is due and the last one is written."""
        if self._on and not self._tried:
            self._tried = True
            self._try(state)
        if not self._on or state.done or self._at is None or self._writer.busy:
            return
        when = state.settings.checkpoint
        due = (
            when.every_steps and state.global_step // when.every_steps > self._at[0] // when.every_steps
        )
        minutes = when.every_minutes
        if due or (minutes is not None and time.monotonic() - self._taken_s >= 60 * minutes):
            self._take(state)

    def end(self, state: TrainState) -> None:
        """Wait for the one that is being written."""
        self._writer.wait()

    def interrupted(self, state: TrainState, error: BaseException) -> None:
        """Take one between two windows where the training is stopped there; wait until it is written."""
        if self._on and not self._inside and self._at is not None and self._stops(error):
            if self._before_audit is not None:
                self._write(*self._before_audit, state)
            elif state.begun is None and (state.global_step, 0) != self._at:
                self._take(state)
        self._writer.wait()

    def _stops(self, error: BaseException) -> bool:
        if isinstance(error, StoppedError) or self._stop.asked is not None:
            return True
        # A batch system ends data workers too, and theirs may be the first word of it.
        return worker_was_ended(error) and self._stop.comes_within(1.0)

    def _take(self, state: TrainState, accumulator: AccumulatorState | None = None) -> None:
        """Copy what the training is, and have it written; not where its loss is not finite any more."""
        done = 0
        if accumulator is not None and goes_on_inside(state):
            done = accumulator.passes_done
        if (state.global_step, done) == self._at:
            return
        start_s = time.monotonic()
        self._sink.flush()
        if not self._sink.finite:
            return
        encoded = self._encoded(state, accumulator)
        if encoded is not None:
            self._writer.wait()
            self._cost_s += time.monotonic() - start_s
            self._at = state.global_step, done
            self._write(files.name_of(*self._at), encoded, state)

    def _write(self, name: str, encoded: Encoded, state: TrainState) -> None:
        now_s, when = time.monotonic(), state.settings.checkpoint
        self._count += 1
        cost_s, trained_s = self._cost_s + self._writer.cost_s, now_s - self._begun_s
        if self._count == TELLING + 1 and cost_s > WORTH * trained_s:
            key = "every_steps" if when.every_steps else "every_minutes"
            log.warning(
                "checkpoints take %.0f %% of the training's time (%.3g s of %.3g s, %.2g s each): "
                "a larger checkpoint.%s costs less",
                100 * cost_s / trained_s, cost_s, trained_s, cost_s / TELLING, key,
            )  # fmt: skip
        self._taken_s = now_s
        self._writer.start(name, encoded, when.keep)

    def _try(self, state: TrainState) -> None:
        """Find out whether the training can be kept, without a copy of it."""
        self._encoded(state, stage=lambda tensor: tensor)

    def _encoded(
        self, state: TrainState, accumulator: AccumulatorState | None = None, **how: Any
    ) -> Encoded | None:
        """Return what the training is; None: it cannot be kept, which is said once."""
        assert self._unkept is not None
        try:
            encoded = encode(snapshot(state, self._hooks, accumulator, self._at_start), **how)
            moved = next(Unkept(state).moved_since(self._unkept), None)
            if moved is None:
                return encoded
            why = (
                f"{moved} moves, and checkpoints keep numbers, strings, tensors, arrays, containers of "
                "them, and what a module's get_extra_state or an optimizer's own state_dict returns"
            )
        except NotKeptError as error:
            why = str(error)
        except Exception as error:  # of the user's own `get_extra_state`, or `state_dict`
            why = f"{type(error).__name__}: {first_line(error)}"
        self._on = False
        log.warning("no checkpoints: an interrupted training would begin again, since %s", why)
        self._writer.drop()
        return None


class Writer:
    """Writes checkpoints in another thread, one at a time, and removes old ones.

    Args:
        folder: of them all; made with the first one.
        run: the token of the run that they are of.
    """

    def __init__(self, folder: Path, run: str = "") -> None:
        self._folder, self._run = folder, run
        self._thread: threading.Thread | None = None
        self._said: str | None = None
        self._first = True
        self.cost_s = 0.0
        """Processor time of writing, without the first time, which imports what writes."""

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, name: str, encoded: Encoded, keep: int) -> None:
        """Write a checkpoint, once the one before is written; keep so many."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(name, encoded, keep), name=FOLDER)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def drop(self) -> None:
        """Remove what was written: it lacks something, or is not needed any more."""
        self.wait()
        files.remove(self._folder)

    def _write(self, name: str, encoded: Encoded, keep: int) -> None:
        start_s = time.thread_time()
        try:
            written = files.write(self._folder, name, encoded, self._run)
            files.prune(self._folder, written, keep)
        except Exception as error:  # a disk that is full, a folder that is gone: no end of the training
            why = first_line(error)
            if why != self._said:
                self._said = why
                log.warning("checkpoint %s cannot be written (%s): the training goes on", name, why)
        else:
            if self._said is not None:
                log.warning("checkpoints can be written again: %s", self._folder / name)
            self._said = None
        if not self._first:
            self.cost_s += time.thread_time() - start_s
        self._first = False
