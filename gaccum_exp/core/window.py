"""The plan of a training's windows: which samples feed which optimizer step, and how they are split.

A window is cut from the epoch's samples at the global batch size *before* it is split. Which samples
feed global step k is therefore a function of the seed, the data set's size, the global batch size and
the partial-window rule, and of nothing else: not of N, the reduction, the device or the workers.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, slots=True)
class BatchStage:
    """A part of the training whose windows have one size."""

    start: int
    """The epoch, or the global step, from which it holds; the first stage's is 0."""
    global_batch_size: int


@dataclass(frozen=True, slots=True)
class _StageStart:
    """Where in the epochs a stage begins."""

    first_step: int
    epoch: int
    offset: int
    """Samples of that epoch before it."""
    size: int


@dataclass(slots=True)
class WindowPlan:
    """The samples of every window of a training run, by global step.

    Args:
        samples: of the data set.
        global_batch_size: of every window, or the stages of a batch that changes in training (batch
            warm-up): in the order of their starts, the first at 0.
        seed: of the epochs' orders.
        partial_window: how the samples are used that are left where the global batch does not divide
            the epoch: `exact` steps on what there is, `drop` leaves them out (other ones every epoch),
            `carry` completes them with the next epoch's first samples, `error` refuses.
        shuffle: every epoch in an order of its own.
        control_seed: permutes the samples inside each window, under this number; None leaves them. The
            windows hold the same samples either way, so the gradients differ by rounding alone.
        lengths: of every sample, (samples,); the samples of a window are then ordered by them, the
            shortest first, so that micro-batches hold samples of like length. None leaves them.
        by_step: stages start at a global step, not at an epoch.
    """

    samples: int
    global_batch_size: int | Sequence[BatchStage]
    seed: int
    partial_window: PartialWindow = "exact"
    shuffle: bool = True
    control_seed: int | None = None
    lengths: torch.Tensor | None = None
    by_step: bool = False
    stages: Sequence[BatchStage] = field(init=False, repr=False)
    """One, unless the global batch changes in training."""
    largest_batch: int = field(init=False, repr=False)
    """The global batch size of the largest stage."""
    stage_starts: list[int] = field(init=False, repr=False)
    """The first window of every stage."""
    _places: list[_StageStart] = field(init=False, repr=False)
    _order: tuple[int, torch.Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise BadInputError("data.train is empty: it holds 0 samples")
        asked = self.global_batch_size
        self.stages = (BatchStage(0, asked),) if isinstance(asked, int) else asked
        self.largest_batch = max(stage.global_batch_size for stage in self.stages)
        for size in {stage.global_batch_size for stage in self.stages}:
            self._check(size)
        self._places, self.stage_starts = [], []
        for stage in self.stages:
            place = self._begin(stage)
            self._check_rest(place)
            self._places.append(place)
            self.stage_starts.append(place.first_step)

    @property
    def full_window(self) -> int:
        """Samples of the largest window: the global batch, unless the epoch is smaller."""
        carried = self.partial_window == "carry"
        return self.largest_batch if carried else min(self.largest_batch, self.samples)

    def size(self, global_step: int) -> int:
        """Return how many samples a window holds."""
        _, offset, size = self._locate(global_step)
        return size if self.partial_window == "carry" else min(size, self.samples - offset)

    def stage_of(self, global_step: int) -> int:
        """Return the number of the stage that a window belongs to."""
        return bisect_right(self.stage_starts, global_step) - 1

    def ends_epoch(self, global_step: int) -> bool:
        """Whether the next window begins in a later epoch."""
        return self._locate(global_step + 1)[0] > self._locate(global_step)[0]

    def in_one_epoch(self, global_step: int) -> bool:
        """Whether all samples of a window are of one epoch, so that none is there twice."""
        first = self.position(global_step)
        return first // self.samples == (first + self.size(global_step) - 1) // self.samples

    def is_largest(self, global_step: int) -> bool:
        """Whether it is as large as windows of any stage get: only such a one is a measure of time."""
        return self.size(global_step) == self.full_window

    def position(self, global_step: int) -> int:
        """Return the samples of the data set that are passed by before a window, over all epochs."""
        epoch, offset, _ = self._locate(global_step)
        return epoch * self.samples + offset

    def step_at(self, position: int) -> int:
        """Return the window of a plan without stages that holds the sample at a position.

        Of a sample that is left out, it is the next one.
        """
        size = self.largest_batch
        if self.partial_window == "carry":
            return position // size
        epoch, offset = divmod(position, self.samples)
        every = self._windows_in(self.samples, size)
        return epoch * every + offset // size

    def in_stages(self, stages: Sequence[BatchStage]) -> "WindowPlan":
        """Return the plan with stages that each begin at a global step."""
        return replace(self, global_batch_size=tuple(stages), by_step=True)

    def steps_in(self, *, epochs: int | None = None, samples: int | None = None) -> int:
        """Return how many windows fit into a number of epochs or samples, never exceeding it."""
        if epochs is None and samples is None:
            raise ValueError("give epochs or samples")
        n, carried = self.samples, self.partial_window == "carry"
        if epochs is not None:
            place = next(p for p in reversed(self._places) if (p.epoch, p.offset) <= (epochs, 0))
            if carried:
                return place.first_step + ((epochs - place.epoch) * n - place.offset) // place.size
            return place.first_step + self._steps_to(place, epochs)
        assert samples is not None
        taken, windows = 0, 0
        for place, following in zip(self._places, [*self._places[1:], None], strict=True):
            limit = None if following is None else following.first_step - place.first_step
            fit = self._steps_of(place, samples - taken)
            if limit is None or fit < limit:
                return windows + fit
            taken += sum(self.size(k) for k in range(place.first_step, place.first_step + limit))
            windows += limit
        return windows

    def indices(self, global_step: int) -> torch.Tensor:
        """Return the data set's indices that feed one optimizer step.

        Args:
            global_step: optimizer steps taken before this one, so the first window is 0.

        Returns:
            int64 indices, (window's samples,): the global batch size, or fewer in a partial window.
        """
        drawn = self._drawn(global_step)
        order = self._order_within(global_step, drawn)
        return drawn if order is None else drawn[order]

    def positions(self, global_step: int) -> torch.Tensor:
        """Return where in its window each of `indices` was drawn, which no order inside it changes.

        What else is drawn for a sample, e.g. its augmentation, is drawn under this position.

        Returns:
            int64 positions, (window's samples,): 0, 1, 2, … where the window is not reordered.
        """
        drawn = self._drawn(global_step)
        order = self._order_within(global_step, drawn)
        return torch.arange(len(drawn)) if order is None else order

    def _order_within(self, global_step: int, drawn: torch.Tensor) -> torch.Tensor | None:
        order = None
        if self.lengths is not None:
            order = torch.argsort(self.lengths[drawn], stable=True)
        if self.control_seed is not None:
            seed = derive_seed(self.seed, "control", self.control_seed, global_step)
            control = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
            order = control if order is None else order[control]
        return order

    def _drawn(self, global_step: int) -> torch.Tensor:
        """Return the window's indices in the order of the epoch."""
        epoch, offset, size = self._locate(global_step)
        if self.partial_window == "carry":
            return self._stream(epoch * self.samples + offset, size)
        return self._epoch_order(epoch)[offset : offset + size]

    def _locate(self, global_step: int) -> tuple[int, int, int]:
        """Return the epoch in which a window begins, where in it, and the size asked for."""
        place = self._places[self.stage_of(global_step)]
        windows, size = global_step - place.first_step, place.size
        if self.partial_window == "carry":
            epoch, offset = divmod(place.offset + windows * size, self.samples)
            return place.epoch + epoch, offset, size
        first = self._windows_in(self.samples - place.offset, size)
        if windows < first:
            return place.epoch, place.offset + windows * size, size
        epoch, window = divmod(windows - first, self._windows_in(self.samples, size))
        return place.epoch + 1 + epoch, window * size, size

    def _begin(self, stage: BatchStage) -> _StageStart:
        """Return where a stage begins, given those before it."""
        if not self._places:
            return _StageStart(0, 0, 0, stage.global_batch_size)
        before = self._places[-1]
        if self.by_step:
            return _StageStart(stage.start, *self._end_before(stage.start), stage.global_batch_size)
        if self.partial_window == "carry":  # the first window that begins in that epoch
            left = (stage.start - before.epoch) * self.samples - before.offset
            step = before.first_step + max(0, math.ceil(left / before.size))
        else:
            step = before.first_step + self._steps_to(before, stage.start)
        epoch, offset, _ = self._locate(step)
        return _StageStart(step, epoch, offset, stage.global_batch_size)

    def _end_before(self, global_step: int) -> tuple[int, int]:
        """Return epoch and offset at which the window before ends: a smaller one may still fit in."""
        before = self._places[-1]
        if global_step == before.first_step:
            return before.epoch, before.offset
        epoch, offset, _ = self._locate(global_step - 1)
        return divmod(epoch * self.samples + offset + self.size(global_step - 1), self.samples)

    def _steps_to(self, place: _StageStart, epoch: int) -> int:
        """Return the windows from a place to the beginning of a later epoch."""
        if epoch <= place.epoch:
            return 0
        first = self._windows_in(self.samples - place.offset, place.size)
        return first + (epoch - place.epoch - 1) * self._windows_in(self.samples, place.size)

    def _steps_of(self, place: _StageStart, samples: int) -> int:
        """Return how many windows from a place on hold so many samples at most."""
        n, size = self.samples, place.size
        if self.partial_window != "exact":
            return samples // size
        left = n - place.offset
        if samples < left:
            return samples // size
        epochs, rest = divmod(samples - left, n)
        every = self._windows_in(n, size)
        return self._windows_in(left, size) + epochs * every + rest // size

    def _windows_in(self, samples: int, size: int) -> int:
        """Return the windows that begin in so many samples at an epoch's end."""
        return samples // size if self.partial_window == "drop" else math.ceil(samples / size)

    def _check(self, size: int) -> None:
        n = self.samples
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

    def _check_rest(self, place: _StageStart) -> None:
        left, size = self.samples - place.offset, place.size
        if self.partial_window == "error" and left % size:
            raise BadInputError(
                f"accum.partial_window=error: at global step {place.first_step}, where "
                f"data.global_batch_size becomes {size}, the epoch still holds {left} samples, which "
                f"that does not divide ({left % size} are left over)"
            )

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
