"""The peak of a window that is not run: predicted, or, where that cannot be, extrapolated.

Only two micro-batches of a window are taken, however many it has, and the last if it is smaller. The
first finds no gradients; from the second on gradients lie beside the activations, and none that follows
holds more, though a model may refuse a smaller one. So what a prediction costs does not depend on N.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gaccum_exp.core.window import split_sizes
from gaccum_exp.memory.meter import Peak, TrackedWindow
from gaccum_exp.memory.storages import ACTIVATIONS


@dataclass(frozen=True)
class Subject:
    """A step that can be taken under a meter, again and again, without moving what it was made from."""

    modules: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    window: Callable[[Sequence[int]], list[Any]]
    """The sizes of all micro-batches of a window to those of them that tell all."""
    take_step: Callable[[list[Any], TrackedWindow], None]
    """One optimizer step on these micro-batches, within the phases of a meter."""
    entered: Callable[[], AbstractContextManager[Any]]
    """Around the step."""

    def peaks(self, sizes: Sequence[int]) -> dict[str, Peak]:
        """Return the peak of each phase of a window whose micro-batches hold so many samples."""
        window = self.window(sizes)
        with self.entered():
            tracked = TrackedWindow(self.modules, self.optimizer, self.device)
            with tracked:
                self.take_step(window, tracked)
        return tracked.peaks

    def warm_up(self, samples: int) -> None:
        """Take a step that makes the optimizer's state, on a micro-batch of two samples."""
        self.peaks([min(2, samples)])


class Predicted:
    """Peaks of a step on fake tensors."""

    extrapolated_from: tuple[int, ...] = ()

    def __init__(self, subject: Subject, samples: int) -> None:
        self._subject = subject
        subject.warm_up(samples)

    def peaks(self, samples: int, steps: int) -> dict[str, Peak]:
        """Return the peak of each phase of a window of so many samples in so many micro-batches."""
        return self._subject.peaks(split_sizes(samples, steps))


class Extrapolated:
    """Peaks of real steps on two small micro-batches, continued on a straight line.

    What grows with the micro-batch grows in proportion to it, beside what does not grow.
    """

    def __init__(self, subject: Subject, samples: int) -> None:
        large = min(8, samples)
        self.extrapolated_from = (max(1, large // 2), large)
        subject.warm_up(samples)
        # A window of one micro-batch has no gradients beside its activations, others have.
        self._measured = {
            passes: [subject.peaks([size] * passes) for size in self.extrapolated_from]
            for passes in (1, 2)
        }

    def peaks(self, samples: int, steps: int) -> dict[str, Peak]:
        """Return the peak of each phase of a window of so many samples in so many micro-batches."""
        small, large = self.extrapolated_from
        one, other = self._measured[min(2, steps)]
        share = (split_sizes(samples, steps)[0] - small) / max(1, large - small)

        def continued(phase: str) -> Peak:
            low, high = one[phase], other[phase]
            total = round(low.bytes + share * (high.bytes - low.bytes))
            parts = {
                category: max(0, round(size + share * (high.parts[category] - size)))
                for category, size in low.parts.items()
            }
            # At another size the peak may be at another moment, where fewer gradients are there yet.
            parts[ACTIVATIONS] = max(0, parts[ACTIVATIONS] + total - sum(parts.values()))
            return Peak(sum(parts.values()), phase, parts)

        return {phase: continued(phase) for phase in one}


def telling(sizes: Sequence[int]) -> list[int]:
    """Return the sizes of those micro-batches of a window that tell all; it has the largest first.

    >>> telling([2, 2, 1, 1]), telling([3, 3, 3])
    ([2, 2, 1], [3, 3])
    """
    return [*sizes[:2], *(sizes[-1:] if len(sizes) > 2 and sizes[-1] < sizes[1] else [])]


Source = Predicted | Extrapolated
