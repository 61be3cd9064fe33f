"""A training that testifies of itself: what it has trained, written past everything that records it.

Every optimizer step appends a line to a file (`O_APPEND`, one `write`: whole, in order, and out of the
process's hands), with the numbers that the program is going to record, to the bit. The learning rate is
drawn anew for every step, so that no two points of a run have the same value by chance.
"""

import os
import random
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import TensorDataset

from gaccum_exp.core.gradient import gradient_norm

SUMS: deque[float] = deque(maxlen=64)
"""The loss sums of this process's last training passes."""
RUNNING: list["SGD"] = []
"""The optimizer that has stepped last."""
BATCH = 2
"""Samples of a window: a power of two, so that no division rounds."""
EVALUATED = 32
"""Samples of the evaluation set, one batch; no other batch has so many."""


class SGD(torch.optim.SGD):
    """As torch's own; each step is noted, and may take longer.

    Args:
        truth: the file to append to.
        sweep: the id of the command that trains.
        arm: what tells the arms of a sweep apart.
        accum_steps: N.
        pause_s: how long a step waits, so that a training of some seconds has few windows.
    """

    def __init__(
        self, params: Any, lr: float = 0.01, *, truth: str, sweep: str, arm: str, accum_steps: int,
        pause_s: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr)
        self.truth, self.arm, self.accum_steps, self.pause_s = (
            truth,
            f"{sweep} {arm}",
            accum_steps,
            pause_s,
        )
        self.taken = 0
        self._rates = random.Random(self.arm)

    def step(self, closure: Any = None) -> Any:
        """Step, note it, and draw the next step's learning rate."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(isinstance(p, FakeTensor) for p in parameters):  # only predicted
            return super().step(closure)
        norm = float(gradient_norm(parameters))
        rate = self.param_groups[0]["lr"]
        loss = super().step(closure)
        self.taken += 1
        RUNNING[:] = [self]
        sums = list(SUMS)[-self.accum_steps :]
        self.note("step", sum(sums) / BATCH, rate, norm)
        for group in self.param_groups:
            group["lr"] = 0.01 * self._rates.random()
        if self.pause_s:
            time.sleep(self.pause_s)
        return loss

    def note(self, kind: str, *values: float) -> None:
        """Append a line: kind, sweep and arm, process, global step, seconds of the clock, values."""
        numbers = " ".join(value.hex() for value in values)
        line = f"{kind} {self.arm} {os.getpid()} {self.taken} {time.time():.6f} {numbers}\n"
        descriptor = os.open(self.truth, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


class SquaredError:
    """The sum of squared errors, by the core's contract, that tells the optimizer beside it."""

    def count(self, micro_batch: tuple[Tensor, Tensor]) -> int:
        """Samples."""
        return len(micro_batch[0])

    def __call__(self, model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        """Inputs (batch, 2) and targets (batch, 1) -> loss sum and samples."""
        x, y = micro_batch
        evaluates = not torch.is_grad_enabled() and len(x) == EVALUATED and bool(RUNNING)
        if evaluates:
            RUNNING[0].note("evaluating")
        loss = (model(x) - y).square().sum()
        if not isinstance(loss, FakeTensor):
            if evaluates:
                RUNNING[0].note("evaluated", float(loss) / len(x))
            elif torch.is_grad_enabled():
                SUMS.append(float(loss.detach()))
        return loss, len(x)


class Linear(nn.Linear):
    """A line through the plane in float64, whose evaluation may take longer."""

    def __init__(self, pause_s: float = 0.0) -> None:
        super().__init__(2, 1, dtype=torch.float64)
        self.pause_s = pause_s

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> (batch, 1)."""
        if self.pause_s and not self.training and not isinstance(x, FakeTensor):
            time.sleep(self.pause_s)
        return super().forward(x)


def points(samples: int = 512, seed: int = 0) -> TensorDataset:
    """Return points in the plane with a number each; in memory, to be fetched by index."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * noise)
