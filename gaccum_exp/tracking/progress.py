"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from gaccum_exp.tracking.metrics import EVAL_ACCURACY, TRAIN_LOSS
from gaccum_exp.tracking.sink import Point

LINE_EVERY_S = 25.0
"""Between two plain lines of a run; its end has one, too."""


class Progress:
    """Shows one run's progress and its last loss: in a few plain lines where a bar has no terminal."""

    def __init__(self, name: str, total: int, *, alone: bool = True) -> None:
        # A bar needs a terminal to itself: not `CI`, nor a pipe, nor arms side by side.
        self._name, self._total = name, total
        self._plain = not alone or bool(os.environ.get("CI")) or not sys.stderr.isatty()
        self._last_draw_s = time.monotonic() if self._plain else 0.0
        self._notes: dict[str, float] = {}
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[notes]}"), console=Console(stderr=True), disable=self._plain,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=total, notes="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, done: int) -> None:
        """Show that `done` optimizer steps are taken; draw at most ten times a second."""
        now = time.monotonic()
        if self._plain:
            if now - self._last_draw_s > LINE_EVERY_S or done == self._total:
                # Where nobody listens any more, as behind `| head`, a training goes on.
                with suppress(OSError, ValueError):
                    line = f"{self._name}: {done}/{self._total}{self._text()}"
                    print(line, file=sys.stderr, flush=True)
                self._last_draw_s = now
        elif now - self._last_draw_s > 0.1 or done == self._total:
            self._bar.update(self._task, completed=done, notes=self._text())
            self._last_draw_s = now

    def note(self, points: list[Point]) -> None:
        """Show the last loss and accuracy among the points delivered."""
        for point in points:
            for key in (TRAIN_LOSS, EVAL_ACCURACY):
                if key in point.values:
                    self._notes[key] = point.values[key]

    def _text(self) -> str:
        return "".join(f"  {key} {value:.4f}" for key, value in self._notes.items())
