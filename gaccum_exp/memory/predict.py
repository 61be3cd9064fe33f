"""Predict the peak of a window without running it, or, where that cannot be done, extrapolate it.

Only two micro-batches of a window are taken, and the last if it is smaller, so that the cost does not
depend on N. From the second on gradients lie beside the activations, and none that follows holds more,
though a model may refuse a smaller one. Where the loss is of the whole window, the outputs of all others
are there as well.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gaccum_exp.core.strategies import IN_PLACE, InPlace
from gaccum_exp.core.window import split_sizes
from gaccum_exp.memory.meter import Meter, Peak, TensorMeter
from gaccum_exp.memory.storages import ACTIVATIONS


@dataclass(frozen=True)
class MeteredStep:
    """An optimizer step that can be taken under a meter again and again, on copies of what trains."""

    modules: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    window: Callable[[Sequence[int]], list[Any]]
    """From the sizes of a window's micro-batches to those micro-batches that decide its peak."""
    take: Callable[[list[Any], Meter], None]
    """Take the step on these micro-batches, within the phases of a meter."""
    context: Callable[[], AbstractContextManager[Any]]
    """What the step is taken in."""
    strategy: InPlace = IN_PLACE
    """By which it accumulates."""

    def peaks(self, sizes: Sequence[int]) -> dict[str, Peak]:
        """Return the peak of each phase of a window whose micro-batches hold so many samples."""
        window = self.window(sizes)
        with self.context():
            meter = TensorMeter(self.modules, self.optimizer, self.device)
            with meter:
                self.take(window, meter)
        return meter.peaks


class Predicted:
    """Predict the peaks of a step by taking it on fake tensors."""

    extrapolated_from: tuple[int, ...] = ()

    def __init__(self, step: MeteredStep, samples: int) -> None:
        self._step = step
        step.peaks([min(2, samples)])  # makes the optimizer's state

    def peaks(self, samples: int, accum_steps: int) -> dict[str, Peak]:
        """Return the peak of each phase of a window of so many samples in so many micro-batches."""
        return self._step.peaks(split_sizes(samples, accum_steps))


class Extrapolated:
    """Extrapolate the peaks of real steps on two small micro-batches along a straight line."""

    def __init__(self, step: MeteredStep, samples: int) -> None:
        large = min(8, samples)
        self.extrapolated_from = (max(1, large // 2), large)
        step.peaks([min(2, samples)])  # makes the optimizer's state
        # A window of one micro-batch has no gradients beside its activations, others have.
        self._measured = {
            passes: [step.peaks([size] * passes) for size in self.extrapolated_from] for passes in (1, 2)
        }

    def peaks(self, samples: int, accum_steps: int) -> dict[str, Peak]:
        """Return the peak of each phase of a window of so many samples in so many micro-batches."""
        small, large = self.extrapolated_from
        one, other = self._measured[min(2, accum_steps)]
        factor = (split_sizes(samples, accum_steps)[0] - small) / max(1, large - small)

        def continued(low: Peak, high: Peak) -> Peak:
            total = round(low.bytes + factor * (high.bytes - low.bytes))
            parts = {
                category: max(0, round(size + factor * (high.parts[category] - size)))
                for category, size in low.parts.items()
            }
            # At another size the peak may be at another moment, where fewer gradients are there yet.
            parts[ACTIVATIONS] = max(0, parts[ACTIVATIONS] + total - sum(parts.values()))
            return Peak(sum(parts.values()), low.phase, parts)

        return {phase: continued(low, other[phase]) for phase, low in one.items()}


def decisive_sizes(sizes: Sequence[int], strategy: InPlace = IN_PLACE) -> list[int]:
    """Return the sizes of the micro-batches that decide a window's peak, given the largest first.

    Where the loss is of the whole window all samples are there, and those of the others in one.

    >>> decisive_sizes([2, 2, 1, 1]), decisive_sizes([3, 3, 3])
    ([2, 2, 1], [3, 3])
    """
    decisive = [*sizes[:2], *(sizes[-1:] if len(sizes) > 2 and sizes[-1] < sizes[1] else [])]
    others = sum(sizes) - sum(decisive)
    return [*decisive, others] if others and strategy.takes_window_at_once else decisive


PeakSource = Predicted | Extrapolated
