"""Trainings that are stopped, and go on from a checkpoint in a state that was built anew."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.train.build import build
from gaccum_exp.train.checkpoint.files import newest
from gaccum_exp.train.checkpoint.hook import Writer
from gaccum_exp.train.checkpoint.snapshot import restore
from gaccum_exp.train.hooks import Hook, Hooks
from gaccum_exp.train.loop import hooks_of, train
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.stopping import Stop, StoppedError
from tests.support import Collected, settings

Curves = dict[tuple[int, str], float]


class AskAt(Hook):
    """Asks for an end after a micro-batch, or the next one."""

    def __init__(self, stop: Stop, global_step: int, passes: int) -> None:
        self._stop, self._at = stop, (global_step, passes)

    def after_micro_batch(self, state: TrainState, accumulator: AccumulatorState) -> None:
        if (state.global_step, accumulator.passes_done) >= self._at:
            self._stop.asked = StoppedError("enough", 143)


class Training:
    """One that is built and watched as a run's is."""

    def __init__(self, *overrides: str, folder: Path | None = None) -> None:
        self.state, self.sink, self.stop = build(settings(*overrides)), Collected(), Stop()
        progress = Progress("test", self.state.total_steps)
        writer = None if folder is None else Writer(folder)
        self.hooks, self.audits = hooks_of(
            self.state, self.sink, progress, stop=self.stop, checkpoints=writer
        )

    def hook(self, kind: type[Hook]) -> Any:
        """Return its hook of a kind."""
        return next(hook for hook in self.hooks if isinstance(hook, kind))

    def train(self, *more: Hook) -> "Training":
        """Train to the end, these hooks being the innermost."""
        self.hooks += more
        train(self.state, self.hooks)
        self.sink.deliver()
        return self

    @property
    def weights(self) -> torch.Tensor:
        """All parameters and buffers."""
        modules = self.state.modules
        values = [*modules.parameters(), *modules.buffers()]
        return torch.cat([value.detach().double().flatten() for value in values])

    @property
    def curves(self) -> Curves:
        """What was recorded, but times and memory."""
        return {
            (point.global_step, key): value
            for point in self.sink.points
            for key, value in point.values.items()
            if not key.startswith(("time/", "throughput/", "memory/"))
        }


def stopped_at(folder: Path, at: tuple[int, int], *overrides: str) -> Training:
    """Return a training that was stopped after a micro-batch of the window of a global step."""
    training = Training(*overrides, folder=folder)
    with pytest.raises(StoppedError):
        training.train(AskAt(training.stop, *at))
    return training


def gone_on(folder: Path, *overrides: str, more: Hooks | None = None) -> tuple[Training, str | None]:
    """Return a training that was built anew and has gone on to its end, and what was said."""
    path = newest(folder)
    assert path is not None
    training = Training(*overrides, folder=folder)
    torch.rand(3)  # whatever a process draws beforehand
    said = restore(path, training.state, training.hooks)
    return training.train(*(more or [])), said
