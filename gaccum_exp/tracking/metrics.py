"""What a run measures, by name, and the sink that takes it off the training loop's hands.

Values may be tensors on the run's device. They stay there until a delivery, so recording never waits for
the device, and a delivery reads all of them at once.
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_LOSS = "train/loss"
LEARNING_RATE = "optim/lr"
GRADIENT_NORM = "optim/grad_norm"
EVAL_LOSS = "eval/loss"
EVAL_ACCURACY = "eval/accuracy"
EVAL_PERPLEXITY = "eval/perplexity"
EMPTY_WINDOWS = "train/empty_windows"
LOSS_SCALE = "optim/loss_scale"
SKIPPED = "optim/skipped"
SKIPPED_WINDOWS = "train/skipped_windows"
PEAK_BYTES = "memory/peak_bytes"
TRACKED_PEAK_BYTES = "memory/tracked_peak_bytes"
PREDICTED_PEAK_BYTES = "memory/predicted_peak_bytes"
OOM_EVENTS = "memory/oom_events"
STEPS_NOW = "accum/steps"
RESIDENT_SET_BYTES = "memory/resident_set_bytes"
AUDIT_E64 = "audit/e64"
AUDIT_E = "audit/e"
AUDIT_FLOOR = "audit/floor"
COMPILED_ERROR = "compile/error"
COMPILED_FLOOR = "compile/floor"
STEP_TIME_S = "time/step_s"
SAMPLES_PER_S = "throughput/samples_per_s"
TOKENS_PER_S = "throughput/tokens_per_s"

DELIVERY_INTERVAL_S = 2.0
DELIVERY_WINDOWS = 1000
"""A buffer of so many windows is delivered before its time, so that it cannot grow without bound."""


@dataclass(frozen=True, slots=True)
class Point:
    """The metrics of one global step."""

    step: int
    time_ms: int
    values: dict[str, float]


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"{TRAIN_LOSS} is {loss} at step {step}")


class Sink:
    """Buffers metrics and delivers them at intervals. `send` says where to; here, nowhere."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        """The last delivered value of each metric."""
        self._recorded: list[tuple[int, int, Mapping[str, float | Tensor]]] = []
        self._read: list[Point] = []
        self._not_finite: NonFiniteLossError | None = None
        self._last_delivery_s = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for a delivery."""
        waited = time.monotonic() - self._last_delivery_s
        return waited > DELIVERY_INTERVAL_S or len(self._recorded) >= DELIVERY_WINDOWS

    def record(self, global_step: int, values: Mapping[str, float | Tensor]) -> None:
        """Take the metrics of a global step: numbers, or 0-dim tensors that are read later."""
        self._recorded.append((global_step, time.time_ns() // 1_000_000, values))

    def deliver(self) -> list[Point]:
        """Send what was recorded since the last delivery, and return it.

        The curve ends with the first loss that is not finite, however late somebody asks for it.
        """
        self._read_recorded()
        points, self._read = self._read, []
        for point in points:
            self.last |= point.values
        self.send(points)
        self._last_delivery_s = time.monotonic()
        return points

    def require_finite(self) -> None:
        """Look at every loss recorded so far.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite; the curve up to it has been delivered.
        """
        self._read_recorded()
        if self._not_finite is not None:
            self.deliver()
            raise self._not_finite

    def _read_recorded(self) -> None:
        """Bring what was recorded to the host, up to the first loss that is not finite."""
        points, self._recorded = _on_host(self._recorded), []
        for point in points:
            if self._not_finite is None:
                self._read.append(point)
                loss = point.values.get(TRAIN_LOSS, 0.0)
                if not math.isfinite(loss):
                    self._not_finite = NonFiniteLossError(point.step, loss)

    def send(self, points: list[Point]) -> None:
        """Bring points to where they are kept."""

    def describe(self, tags: Mapping[str, str]) -> None:
        """Attach what is a word and not a number, e.g. where the memory peak falls."""

    def close(self, status: str, failure: str | None = None) -> None:
        """End the run: FINISHED, FAILED (with the reason) or KILLED."""


def _on_host(recorded: list[tuple[int, int, Mapping[str, float | Tensor]]]) -> list[Point]:
    """Bring all tensors to the host with one copy for each device and type, not one a value."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for _, _, values in recorded:
        for value in values.values():
            if isinstance(value, Tensor):
                alike[value.device, value.dtype].append(value.detach())
    host = {kind: iter(torch.stack(tensors).tolist()) for kind, tensors in alike.items()}

    def number(value: float | Tensor) -> float:
        return float(next(host[value.device, value.dtype]) if isinstance(value, Tensor) else value)

    return [
        Point(step, time_ms, {key: number(value) for key, value in values.items()})
        for step, time_ms, values in recorded
    ]


def memory_part(name: str) -> str:
    """Return the metric of a part of the memory, in bytes: `activations`, `allocator_reserved`."""
    return f"memory/{name}_bytes"
