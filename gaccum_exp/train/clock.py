"""How long a window takes, without making it take longer."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gaccum_exp.core.feed import Window
from gaccum_exp.core.losses.micro_batch import tokens_in
from gaccum_exp.core.step_times import waited_s
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.hooks import WINDOW, Hook, Values
from gaccum_exp.train.state import TrainState

WARMUP_WINDOWS = 5
"""Not counted: kernels are chosen, caches filled and optimizer state made in the first windows."""
KEPT_WINDOWS = 1000
"""The latest ones stand for a longer run, so that the clock does not grow with it."""


class StepClock(Hook):
    """Times windows on the host, or on an accelerator by events in its stream, read at the end.

    A window's time runs from the end of the one before, so that fetching it counts. Full windows in the
    N that the run is named after are timed, unless another hook disturbs them.

    Args:
        device: the run's.
        sink: takes the medians at the end, and of the time the quartiles and how many windows it is of.
        disturbed: whether another hook slows the window of a global step down.
    """

    phases = frozenset({WINDOW})
    measures_split = True

    def __init__(
        self,
        device: torch.device,
        sink: Sink,
        disturbed: Callable[[int], bool] = lambda global_step: False,
    ) -> None:
        self._device, self._sink, self._disturbed = device, sink, disturbed
        self._start: Any = None
        self._began: tuple[float, float | None] = 0.0, None
        """When the training began, and what it had waited for a processor by then, in seconds."""
        self._warmup_left = WARMUP_WINDOWS
        self._windows: deque[tuple[Any, Any, int]] = deque(maxlen=KEPT_WINDOWS)
        self._earlier: list[tuple[float, int]] = []
        """Seconds and tokens of the windows before an interruption; of those after it, the warm-up does
        not count either."""

    def state_dict(self) -> dict[str, Any]:
        """Return seconds and tokens of the windows, and whether these count."""
        seconds, tokens = zip(*self._measured(), strict=True) if self._measured() else ((), ())
        return {
            "seconds": torch.tensor(seconds, dtype=torch.float64),
            "tokens": torch.tensor(tokens, dtype=torch.int64),
            "warm": self._is_warm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them for earlier ones."""
        if state["warm"]:
            self._earlier = list(zip(state["seconds"].tolist(), state["tokens"].tolist(), strict=True))

    def begin(self, state: TrainState) -> None:
        """Start the first window's time."""
        self._began = time.perf_counter(), waited_s()
        self._start = self._now()

    @contextmanager
    def around(self, phase: str, state: TrainState, window: Window) -> Iterator[None]:
        """Take a window that is a measure of time; the time of an attempt that failed begins anew."""
        global_step = state.global_step
        whole = state.begun is None
        timed = whole and self._is_measure(state) and not self._disturbed(global_step)
        try:
            yield
        except Exception:
            self._start = self._now()
            raise
        if not timed:
            return
        end = self._now()
        counts = (tokens_in(m, state.ignore_index) for m in window) if state.counts_tokens else ()
        self.count(self._start, end, sum(int(n) for n in counts if n is not None))

    def after(self, state: TrainState, window: Window, values: Values) -> None:
        """Start the next window's time, when all other hooks are done with this one."""
        self._start = self._now()

    def end(self, state: TrainState) -> None:
        """Record the medians, the time's quartiles, how many windows were timed after warm-up, and what
        part of the training other processes had the processor."""
        step_s = self.step_time_s()
        if step_s is None:
            return
        recorded = {metrics.STEP_TIME_S: step_s, metrics.SAMPLES_PER_S: state.plan.full_window / step_s}
        seconds = [of_window for of_window, _ in self._measured()] if self._is_warm else []
        recorded[metrics.STEP_WINDOWS] = len(seconds)
        if len(seconds) > 1:
            low_s, _, high_s = statistics.quantiles(seconds, n=4, method="inclusive")
            recorded |= {metrics.STEP_TIME_LOW_S: low_s, metrics.STEP_TIME_HIGH_S: high_s}
        tokens_per_s = self.tokens_per_s()
        if tokens_per_s:
            recorded[metrics.TOKENS_PER_S] = tokens_per_s
        share = self.waiting_share()
        if share is not None:
            recorded[metrics.WAITING_SHARE] = share
        self._sink.record(state.global_step, recorded)

    def count(self, start: Any, end: Any, tokens: int = 0) -> None:
        """Take the time of one window, and how many tokens it held."""
        if self._warmup_left >= 0:
            # Of a run no longer than the warm-up, its last window is kept.
            self._warmup_left -= 1
            self._windows.clear()
        self._windows.append((start, end, tokens))

    def step_time_s(self) -> float | None:
        """Return the median seconds per window after warm-up; None if nothing was timed."""
        measured = self._measured()
        return statistics.median(seconds for seconds, _ in measured) if measured else None

    def tokens_per_s(self) -> float | None:
        """Return the median tokens per second after warm-up; None if nothing was timed."""
        measured = self._measured()
        return statistics.median(tokens / seconds for seconds, tokens in measured) if measured else None

    def waiting_share(self) -> float | None:
        """Return the share of the time since the beginning in which this thread was ready and had no
        processor; None where the system does not tell."""
        (began_s, before_s), now_s = self._began, waited_s()
        if before_s is None or now_s is None:
            return None
        return (now_s - before_s) / (time.perf_counter() - began_s)

    @property
    def _is_warm(self) -> bool:
        """Whether what is measured are windows after warm-up."""
        return self._warmup_left < 0 or bool(self._earlier)

    def _measured(self) -> list[tuple[float, int]]:
        """Return seconds and tokens of the windows after warm-up, the latest."""
        if self._earlier and self._warmup_left >= 0:
            return self._earlier
        here = [(self._seconds(start, end), tokens) for start, end, tokens in self._windows]
        return [*self._earlier, *here][-KEPT_WINDOWS:]

    def _is_measure(self, state: TrainState) -> bool:
        """Whether the window is full, and in as many micro-batches as the run is named after."""
        stage = state.settings.stages[state.plan.stage_of(state.global_step)]
        named = stage.accum_steps == state.settings.accum_steps
        return named and state.plan.is_largest(state.global_step)

    def _now(self) -> Any:
        """Return the present: in seconds, or as an event in the device's stream."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if self._device.type == "cpu":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
