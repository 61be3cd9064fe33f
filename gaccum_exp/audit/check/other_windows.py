"""What the windows that were not judged count, as far as the data tells without a pass of the model."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data.dataloader import _DatasetKind

from gaccum_exp.core.nesting import tensors_in
from gaccum_exp.core.seeding import random_state_kept

PATIENCE_S = 1.0
"""How long data are read for their labels, at most."""
MOST_BATCHES = 1 << 16


@dataclass(frozen=True, slots=True)
class Data:
    """What a data loader that shuffles indices reads, for an epoch after the script's end."""

    batches: Any
    """The lists of indices of an epoch."""
    fetched: Callable[[Any], Any]
    """A micro-batch of such a list."""
    ignored: int = -100
    """The label that the loss does not count."""


def data_of(loader: Any) -> Data | None:
    """Return the data behind a data loader's iterator; None where it reads no indices."""
    if getattr(loader, "_dataset_kind", None) != _DatasetKind.Map or not loader._auto_collation:
        return None
    dataset, collate = loader._dataset, loader._collate_fn

    def fetched(indices: Any) -> Any:
        several = getattr(dataset, "__getitems__", None)
        return collate(several(indices) if several else [dataset[i] for i in indices])

    return Data(loader._index_sampler, fetched)


@dataclass(frozen=True, slots=True)
class Counts:
    """What each micro-batch of an epoch counts."""

    each: list[int]
    unit: str
    """samples | labels that count"""

    def unequal(self, n: int) -> list[int]:
        """Return the numbers, from 0, of windows of N micro-batches that count unequally."""
        windows = [self.each[k : k + n] for k in range(0, len(self.each) - n + 1, n)]
        return [number for number, counts in enumerate(windows) if len(set(counts)) > 1]

    def said(self, n: int, judged: int) -> str | None:
        """Return a sentence on windows that count unequally, if there are any beside those `judged`."""
        unequal = self.unequal(n)
        if not unequal:
            return None
        first = next((k for k in unequal if k >= judged), unequal[-1])
        counts = ", ".join(map(str, self.each[first * n : first * n + n][:8]))
        number, verb = len(unequal), "has" if len(unequal) == 1 else "have"
        return (
            f"Others count unequally: of {len(self.each) // n} windows that the data loader gives "
            f"{number} {verb} micro-batches with different numbers of {self.unit} (window {first + 1}: "
            f"{counts}). A mean of each, divided by N, is not the large batch's there; the sum of the "
            "losses, divided once by what the window counts, is. "
            f"--windows {max(first, judged) + 1} judges such a one."
        )


def counts_of(data: Data) -> Counts | None:
    """Return the samples of an epoch's micro-batches; where these are equal, the labels that count.

    None: all are equal, as far as could be read. Labels are read for a second at most.
    """
    with random_state_kept():
        try:
            batches = [indices for indices, _ in zip(data.batches, range(MOST_BATCHES), strict=False)]
            sizes = [len(indices) for indices in batches]
        except Exception:  # of the script's own sampler
            return None
        whole = sizes[:-1] if len(sizes) > 1 and sizes[-1] < sizes[0] else sizes  # its end is said apart
        if len(set(whole)) > 1:
            return Counts(whole, "samples")
        labels = list(_labels(data, batches[: len(whole)]))
    columns = list(zip(*labels, strict=False)) if labels else []
    # Of what no label is ignored in, padding may differ, which says nothing of a loss.
    ignoring = [column for column in columns if any(kept < every for kept, every in column)]
    varying = [column for column in ignoring if len({kept for kept, _ in column}) > 1]
    return Counts([kept for kept, _ in varying[-1]], "labels that count") if varying else None


def _labels(data: Data, batches: Sequence[Any]) -> Iterator[list[tuple[int, int]]]:
    """Yield of each micro-batch, for each tensor of integers, how many are not ignored, and all."""
    began = time.monotonic()
    for indices in batches:
        if time.monotonic() - began > PATIENCE_S:
            return
        try:
            tensors = tensors_in(data.fetched(indices))
        except Exception:  # of the script's own data
            return
        integers = [t for t in tensors if not (t.is_floating_point() or t.is_complex())]
        yield [(int((t != data.ignored).sum()), t.numel()) for t in integers]
