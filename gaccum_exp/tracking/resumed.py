"""A run that goes on: what its journal has already, and the sink that compares it with what comes again.

A run goes on from its last checkpoint, and the steps between that and the moment at which its process
died are taken once more. What they give is compared with what was recorded, and not recorded again: so
every run that goes on shows that it is the one that was interrupted.
"""

import math
from array import array
from collections import defaultdict
from pathlib import Path

from gaccum_exp.tracking.journal import Journal, decoded
from gaccum_exp.tracking.metrics import (
    EVAL_LOSS,
    GRADIENT_NORM,
    LEARNING_RATE,
    TRAIN_LOSS,
)
from gaccum_exp.tracking.sink import JournalSink, Point

EXACT = (TRAIN_LOSS, "optim/", "eval/")
"""Metrics, or beginnings of their names, that are equal bit for bit where the same is computed again.
Time and memory are not, and are not compared."""
ROUNDED = (TRAIN_LOSS, EVAL_LOSS, LEARNING_RATE, GRADIENT_NORM)
"""Those that are still equal to rounding where sums are taken in another order. Not an accuracy, which
one sample changes."""
ROUNDING = {"fp64": 1e-10, "fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""How far two values may then lie apart at the first step, in units of the largest that the metric had.
The weights go further apart with every step, so that it doubles."""
TELLING = 0.1
"""Beyond that nothing is compared any more."""
FAR = 64
"""Steps after which it is beyond, whatever the precision."""


class UnequalError(RuntimeError):
    """A run that goes on does not give what it gave before it was interrupted."""

    def __init__(self, global_step: int, metric: str, before: float, now: float) -> None:
        super().__init__(
            f"step {global_step}: {metric} is {now!r}, and was {before!r} before the run was "
            "interrupted: its code has changed since, or is not deterministic; resume=never begins anew"
        )


class Recorded:
    """What a journal tells of a run that goes on.

    Args:
        path: of the journal.
    """

    def __init__(self, path: Path) -> None:
        self.tags: dict[str, str] = {}
        """The last value of each."""
        self.seen: dict[str, set[str]] = defaultdict(set)
        """Every value that a tag had: of a run that has gone on before, those of all its processes."""
        self.last: dict[str, float] = {}
        """The last value of each metric."""
        self.last_step = 0
        """The last step that is there, also one in whose window nothing counted."""
        self._points: dict[str, tuple[array[int], array[float]]] = {}
        with open(path, "rb") as file:
            for line in file:
                record = decoded(line.rstrip(b"\n")) or {}
                if record.get("kind") in ("begin", "tags"):
                    self.tags |= record["tags"]
                    for key, value in record["tags"].items():
                        self.seen[key].add(value)
                elif record.get("kind") == "points":
                    for global_step, _, values in record["points"]:
                        if not values or TRAIN_LOSS in values or LEARNING_RATE in values:
                            self.last_step = max(self.last_step, global_step)
                        for key, value in values.items():
                            column = self._points.setdefault(key, (array("q"), array("d")))
                            column[0].append(global_step)
                            column[1].append(value)
                        self.last |= values

    def since(self, global_step: int) -> dict[tuple[int, str], float]:
        """Return what was recorded of a step and those after it, by step and metric."""
        return {
            (step, key): value
            for key, (steps, values) in self._points.items()
            for step, value in zip(steps, values, strict=True)
            if step >= global_step
        }

    def largest(self, metric: str) -> float:
        """Return the largest absolute value that a metric had, of those that are finite."""
        values = self._points[metric][1]
        return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


class ResumedSink(JournalSink):
    """Records what is new of a run that goes on, and compares what comes again.

    Args:
        journal: of the run, which says already that it goes on.
        recorded: what it told before.
        since: the global step from which the run goes on.
    """

    def __init__(self, journal: Journal, recorded: Recorded, since: int) -> None:
        super().__init__(journal)
        self.last = dict(recorded.last)
        self.compared: set[int] = set()
        """The steps of which something was compared."""
        self.recorded = recorded
        self._since = since
        self._before = recorded.since(since)
        self._rounding: float | None = None
        self._over = False
        """Whether a value was not what it had been."""

    def has(self, global_step: int, metric: str) -> bool:
        """Whether an earlier process has recorded a metric of a step that is taken again."""
        return (global_step, metric) in self._before

    def expect_rounding(self, precision: str) -> None:
        """Compare to the rounding of a precision, a key of `ROUNDING`, and not bit for bit."""
        self._rounding = ROUNDING[precision]

    @property
    def how_equal(self) -> str:
        """How what was compared is equal."""
        return "bit for bit" if self._rounding is None else "to rounding"

    def send(self, points: list[Point]) -> None:
        """Write what is new, up to the first value that is not what it was.

        Raises:
            UnequalError: there is such a value; nothing is written from there on.
        """
        if self._over:
            return
        new = list[Point]()
        unequal: UnequalError | None = None
        for point in points:
            unequal = self._compared(point)
            if unequal is not None:
                self._over = True
                break
            values = {k: v for k, v in point.values.items() if not self.has(point.global_step, k)}
            # That of a window in which nothing counted has no values; it tells that the step is over.
            if values or (not point.values and point.global_step > self.recorded.last_step):
                new.append(Point(point.global_step, point.time_ms, values))
        super().send(new)
        if unequal is not None:
            raise unequal

    def _compared(self, point: Point) -> UnequalError | None:
        """Return what is wrong with a point that may have been recorded before."""
        allowed, names = 0.0, tuple[str, ...](EXACT)
        if self._rounding is not None:
            steps = max(0, point.global_step - self._since - 1)
            allowed = self._rounding * 2.0 ** min(steps, FAR)
            names = ROUNDED if allowed <= TELLING else ()
        for key, now in point.values.items():
            if not (key.startswith(names) and self.has(point.global_step, key)):
                continue
            before = self._before[point.global_step, key]
            same = before == now or (math.isnan(before) and math.isnan(now))
            if not same and not abs(before - now) <= allowed * self.recorded.largest(key):
                return UnequalError(point.global_step, key, before, now)
            self.compared.add(point.global_step)
        return None
