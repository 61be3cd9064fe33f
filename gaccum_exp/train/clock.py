"""How long a window takes, without making it take longer."""

import statistics
import time
from collections import deque
from typing import Any

import torch

WARMUP_WINDOWS = 5
"""Not counted: kernels are chosen, caches filled and optimizer state made in the first windows."""
KEPT_WINDOWS = 1000
"""The latest ones stand for a longer run, so that the clock does not grow with it."""


class WindowClock:
    """Times windows on the host, or on an accelerator by events in its stream, read at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warmup_left = WARMUP_WINDOWS
        self._windows: deque[tuple[Any, Any, int]] = deque(maxlen=KEPT_WINDOWS)

    def now(self) -> Any:
        """Return the present: in seconds, or as an event in the device's stream."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def count_window(self, start: Any) -> None:
        """Take a window that began at `start`, which `now` gave, and has just ended."""
        end = self.now()
        if self._warmup_left >= 0:
            # Of a run no longer than the warm-up, its last window is kept.
            self._warmup_left -= 1
            self._windows.clear()
        self._windows.append((start, end, 0))

    def count_tokens(self, tokens: int) -> None:
        """Say how many tokens the window held that was timed last."""
        start, end, _ = self._windows.pop()
        self._windows.append((start, end, tokens))

    def step_time_s(self) -> float | None:
        """Return the median seconds per window after warm-up; None if nothing was timed."""
        if not self._windows:
            return None
        return statistics.median(self._seconds(start, end) for start, end, _ in self._windows)

    def tokens_per_s(self) -> float | None:
        """Return the median tokens per second after warm-up; None if nothing was timed."""
        if not self._windows:
            return None
        return statistics.median(
            tokens / self._seconds(start, end) for start, end, tokens in self._windows
        )

    def _seconds(self, start: Any, end: Any) -> float:
        if self._device.type == "cpu":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
