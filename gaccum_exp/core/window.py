"""Which samples feed which optimizer step, and how a window is split into micro-batches.

A window is cut from the epoch's samples at the global batch size *before* it is split. Which samples
feed global step k is therefore a function of the seed, the data set's size, the global batch size and
the partial-window rule, and of nothing else: not of N, the reduction, the device or the workers.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from gaccum_exp.core.seeding import derive_seed
from gaccum_exp.errors import BadInputError

PartialWindow = Literal["exact", "drop", "carry", "error"]


def split_sizes(samples: int, accum_steps: int) -> list[int]:
    """Split a window of `samples` into min(accum_steps, samples) micro-batches, as evenly as possible.

    >>> split_sizes(250, 4), split_sizes(3, 8)
    ([63, 63, 62, 62], [1, 1, 1])
    """
    if accum_steps < 1 or samples < 0:
        raise ValueError(f"cannot split {samples} samples into {accum_steps} micro-batches")
    parts = min(accum_steps, samples)
    return [samples // parts + (i < samples % parts) for i in range(parts)]


@dataclass(slots=True)
class WindowPlan:
    """The samples of every window of a training run, by global step.

    partial_window says what becomes of the samples left when the global batch does not divide the
    epoch: `exact` steps on what there is, `drop` leaves them out (other ones every epoch), `carry`
    completes them with the next epoch's first samples, `error` refuses.

    control_seed: permutes the samples inside each window, under this number; None leaves them. The
    windows hold the same samples either way, so the gradients differ by rounding alone.
    """

    samples: int
    global_batch_size: int
    seed: int
    partial_window: PartialWindow = "exact"
    shuffle: bool = True
    control_seed: int | None = None
    _order: tuple[int, torch.Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n, size = self.samples, self.global_batch_size
        if n < 1:
            raise BadInputError("data.train is empty: it holds 0 samples")
        if self.partial_window == "error" and n % size:
            raise BadInputError(
                f"accum.partial_window=error: data.train holds {n} samples, which "
                f"data.global_batch_size={size} does not divide ({n % size} are left over)"
            )
        if self.partial_window == "drop" and n < size:
            raise BadInputError(
                f"accum.partial_window=drop leaves no window: data.train holds {n} samples, fewer "
                f"than data.global_batch_size={size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Windows that begin in one epoch, the partial one counted unless it is dropped."""
        if self.partial_window == "drop":
            return self.samples // self.global_batch_size
        return math.ceil(self.samples / self.global_batch_size)

    @property
    def full_window(self) -> int:
        """Samples of the largest window: the global batch, unless the epoch is smaller."""
        carried = self.partial_window == "carry"
        return self.global_batch_size if carried else min(self.global_batch_size, self.samples)

    def is_full(self, global_step: int) -> bool:
        """Whether this window is as large as they get; a partial one is no measure of time or memory."""
        if self.partial_window != "exact" or self.samples % self.global_batch_size == 0:
            return True
        last = self.steps_per_epoch - 1
        return last == 0 or global_step % self.steps_per_epoch != last

    def steps_in(self, *, epochs: int | None = None, samples: int | None = None) -> int:
        """Return how many windows fit into a number of epochs or samples, never exceeding it."""
        n, size = self.samples, self.global_batch_size
        if epochs is not None:
            if self.partial_window == "carry":
                return epochs * n // size
            return epochs * self.steps_per_epoch
        if samples is None:
            raise ValueError("give epochs or samples")
        if self.partial_window == "exact":
            return samples // n * self.steps_per_epoch + samples % n // size
        return samples // size

    def indices(self, global_step: int) -> torch.Tensor:
        """Return the data set's indices that feed one optimizer step.

        Args:
            global_step: optimizer steps taken before this one, so the first window is 0.

        Returns:
            int64 indices, (window's samples,): the global batch size, or fewer in a partial window.
        """
        drawn = self._drawn(global_step)
        return drawn if self.control_seed is None else drawn[self._permutation(global_step, len(drawn))]

    def positions(self, global_step: int) -> torch.Tensor:
        """Return where in its window each of `indices` was drawn, which no control_seed changes.

        What else is drawn for a sample, e.g. its augmentation, is drawn under this position.

        Returns:
            int64 positions, (window's samples,): 0, 1, 2, … without a control_seed.
        """
        size = len(self._drawn(global_step))
        return torch.arange(size) if self.control_seed is None else self._permutation(global_step, size)

    def _permutation(self, global_step: int, size: int) -> torch.Tensor:
        assert self.control_seed is not None
        seed = derive_seed(self.seed, "control", self.control_seed, global_step)
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed))

    def _drawn(self, global_step: int) -> torch.Tensor:
        """Return the window's indices in the order of the epoch."""
        n, size = self.samples, self.global_batch_size
        if self.partial_window == "carry":
            return self._stream(global_step * size, size)
        epoch, window = divmod(global_step, self.steps_per_epoch)
        start = window * size
        return self._epoch_order(epoch)[start : min(start + size, n)]

    def _stream(self, start: int, count: int) -> torch.Tensor:
        """Return `count` indices of the epochs laid end to end, from position `start`."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.samples)
            piece = self._epoch_order(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(pieces)

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        if self._order is None or self._order[0] != epoch:
            if self.shuffle:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                order = torch.randperm(self.samples, generator=generator)
            else:
                order = torch.arange(self.samples)
            self._order = (epoch, order)
        return self._order[1]
