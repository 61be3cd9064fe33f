"""Windows of real micro-batches, in order, on the host.

Two ways to fetch, with the same samples in the same micro-batches. Tensors in memory are gathered by
index, a whole window's micro-batches at a time, which is the fast way. Any other map-style data set goes
through a DataLoader, one micro-batch a batch, and every sample is drawn under a seed of its own, so that
random augmentation depends neither on N nor on the number of workers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from gaccum_exp.core.seeding import derive_seed, seed_host
from gaccum_exp.core.window import WindowPlan, split_sizes

Collate = Callable[[list[Any]], Any]
Window = list[Any]
"""The micro-batches of one optimizer step, on the host, pinned where a device will fetch them."""


def windows(
    dataset: Dataset[Any],
    plan: WindowPlan,
    *,
    steps: int,
    global_steps: range,
    workers: int = 0,
    pin: bool = False,
    collate: Collate | None = None,
) -> Iterator[Window]:
    """Yield the window of every global step in `global_steps`.

    Args:
        dataset: map-style; a TensorDataset is fetched by index.
        plan: says which samples.
        steps: micro-batches per window, N.
        global_steps: e.g. range(0, 140); later windows do not depend on earlier ones.
        workers: DataLoader worker processes; they change speed only.
        pin: put micro-batches into page-locked memory, for copies that do not wait.
        collate: list of samples -> micro-batch; torch's default if None.
    """
    if type(dataset) is TensorDataset and collate is None:
        for global_step in global_steps:
            yield gather(dataset.tensors, plan.indices(global_step), steps, pin)
        return
    loader: DataLoader[Any] = DataLoader(
        SeededSamples(dataset, plan.seed),
        batch_sampler=_micro_batch_keys(plan, steps, global_steps),
        collate_fn=collate or default_collate,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader's own draws must not touch the global generator
    )
    micro_batches = iter(loader)
    for global_step in global_steps:
        count = len(split_sizes(len(plan.indices(global_step)), steps))
        yield [next(micro_batches) for _ in range(count)]


def gather(tensors: Sequence[Tensor], indices: Tensor, steps: int, pin: bool) -> Window:
    """Return the micro-batches of the samples at `indices`, fetched from tensors in memory."""
    return [
        tuple(_rows(tensor, part, pin) for tensor in tensors)
        for part in torch.split(indices, split_sizes(len(indices), steps))
    ]


def _rows(tensor: Tensor, indices: Tensor, pin: bool) -> Tensor:
    if not pin:
        return tensor.index_select(0, indices)
    rows = torch.empty((len(indices), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    return torch.index_select(tensor, 0, indices, out=rows)


class SeededSamples(Dataset[Any]):
    """A data set whose every draw of a sample is seeded by where in the run it happens."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        """Return sample `index` as drawn for one position of one window: (step, position, index)."""
        global_step, position, index = key
        seed_host(derive_seed(self._seed, "sample", global_step, position))
        return self._dataset[index]


def _micro_batch_keys(
    plan: WindowPlan, steps: int, global_steps: range
) -> Iterator[list[tuple[int, int, int]]]:
    """The DataLoader's batch sampler: for each micro-batch, where in the run its samples are drawn."""
    for global_step in global_steps:
        indices = plan.indices(global_step).tolist()
        keys = [(global_step, position, index) for position, index in enumerate(indices)]
        start = 0
        for size in split_sizes(len(keys), steps):
            yield keys[start : start + size]
            start += size
