"""How long a window takes, without making it take longer."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WARMUP_WINDOWS = 5
"""Not counted: kernels are chosen, caches filled and optimizer state made in the first windows."""


class WindowClock:
    """Times windows on the host, or on an accelerator by events in its stream, read at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._windows: list[tuple[Any, Any]] = []

    @contextmanager
    def window(self) -> Iterator[None]:
        """Time the block, one window."""
        start = self._now()
        yield
        self._windows.append((start, self._now()))

    def step_time_s(self) -> float | None:
        """Return the median seconds per window after warm-up; None if nothing was timed.

        Of a run no longer than the warm-up, the last window stands for it.
        """
        counted = self._windows[WARMUP_WINDOWS:] or self._windows[-1:]
        return statistics.median(self._seconds(*times) for times in counted) if counted else None

    def _now(self) -> Any:
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
