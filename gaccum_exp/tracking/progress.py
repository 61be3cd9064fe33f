"""Progress of a training: a bar on a terminal of its own, lines now and then elsewhere."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from gaccum_exp.tracking.metrics import EVAL_ACCURACY, TRAIN_LOSS

LINE_EVERY_S = 28.0
"""Between two lines where there is no bar, so that silence is no longer than half a minute."""
DRAW_EVERY_S = 0.1
RATE_S = 30.0
"""So far back steps per second reach."""
_BAR_WIDTH = 6
"""Characters that a bar has at least, with the spaces around it."""
_SHOWN = {TRAIN_LOSS: "loss", EVAL_ACCURACY: "acc"}


class Progress:
    """Shows how far a training is: its last loss, its speed, and what is left.

    Args:
        name: of the training, a short one.
        total: optimizer steps.
        alone: whether it has the terminal to itself.
        following_s: estimates the seconds of what its sweep does after it from what it takes itself;
            None: it is of no sweep, or others run beside it.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        alone: bool = True,
        following_s: Callable[[float], float] | None = None,
    ) -> None:
        self._name, self._total, self._following_s = name, total, following_s
        # A bar needs a terminal to itself: not `CI`, nor a pipe, nor arms side by side.
        dumb = bool(os.environ.get("CI")) or os.environ.get("TERM") == "dumb"
        self._plain = not alone or dumb or not sys.stderr.isatty()
        self._start_s = time.monotonic()
        self._last_draw_s = self._start_s if self._plain else 0.0
        self._seen: deque[tuple[float, int]] = deque()
        """When how many steps were taken, of the last `RATE_S`."""
        column = Column(no_wrap=True)
        self._bar = Bar(
            TextColumn("{task.description}", table_column=column), BarColumn(bar_width=None),
            TextColumn("{task.fields[said]}", table_column=column.copy()),
            console=Console(stderr=True), disable=self._plain, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, said="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, done: int) -> None:
        """Show that a training begins, of which so many optimizer steps are taken already."""
        if self._plain or self._bar.live.is_started:
            return
        said = f"{done}/{self._total}"
        self._bar.update(self._task, description=self._label(said), completed=done, said=said)
        self._bar.start()  # not before: what is said until then would leave an empty bar behind

    def advance(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Show that `done` optimizer steps are taken, if it is time, and the last values of metrics."""
        now_s = time.monotonic()
        if not self._seen:  # the first step, with its audit, says nothing of the speed of the others
            self._seen.append((now_s, done))
        every_s = LINE_EVERY_S if self._plain else DRAW_EVERY_S
        if now_s - self._last_draw_s <= every_s and done < self._total:
            return
        self._last_draw_s = now_s
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and now_s - self._seen[1][0] > RATE_S:
            self._seen.popleft()
        said = self._said(now_s, done, values or {})
        if not self._plain:
            self._bar.update(self._task, description=self._label(said), completed=done, said=said)
            return
        # Where nobody listens any more, as behind `| head`, a training goes on. In one piece, since
        # other arms may speak at the same time.
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{self._name}: {said}\n")
            sys.stderr.flush()

    def _label(self, said: str) -> str:
        """Return as much of the name as a line has room for, its end in any case: the arm's number."""
        room = max(12, self._bar.console.width - len(said) - _BAR_WIDTH)
        name = self._name if len(self._name) <= room else f"{self._name[: room - 9]}…{self._name[-8:]}"
        return escape(name)

    def _said(self, now_s: float, done: int, values: Mapping[str, float]) -> str:
        """Return what is said beside a name: `120/400  loss 0.1234  8.3/s  0:34 left, sweep 2:10`."""
        taken_s, over = now_s - self._start_s, done >= self._total
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        rate = (last - first) / (last_s - first_s) if last_s > first_s else 0.0
        said = [f"{done}/{self._total}"]
        shown = _SHOWN if over or self._plain else {TRAIN_LOSS: "loss"}  # a bar needs its place
        said += [f"{word} {values[key]:.4g}" for key, word in shown.items() if key in values]
        if rate:
            said.append(_say_rate(rate))
        if over:
            said.append(f"in {say_time(taken_s) if taken_s >= 10 else f'{taken_s:.1f} s'}")
        elif rate:
            left_s = (self._total - done) / rate
            left = f"{say_time(left_s)} left"
            following_s = self._following_s(taken_s + left_s) if self._following_s is not None else 0.0
            if following_s:
                left += f", sweep {say_time(left_s + following_s)}"
            said.append(left)
        return "  ".join(said)


def say_time(seconds: float) -> str:
    """`0:07`, `12:34`, `3:02:01`, `25 h`, or `4 d 3 h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if 10 <= hours < 72:
        return f"{hours} h"
    if hours >= 72:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _say_rate(per_s: float) -> str:
    """Return steps per second, or seconds per step where that is the larger number."""
    if per_s >= 1:
        return f"{per_s:.3g}/s" if per_s < 1000 else f"{per_s:.0f}/s"
    return f"{1 / per_s:.3g} s each"
