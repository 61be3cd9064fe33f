"""Windows of real micro-batches, in order, on the host.

Two ways to fetch, with the same samples in the same micro-batches. Tensors in memory are gathered by
index, a whole window's micro-batches at a time, which is the fast way. Any other map-style data set goes
through a DataLoader, one micro-batch a batch, and every sample is drawn under a seed of its own, so that
random augmentation depends neither on N nor on the number of workers.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from gaccum_exp.core.seeding import derive_seed, seed_host
from gaccum_exp.core.window import WindowPlan, split_sizes

Window = list[Any]
"""The micro-batches of one optimizer step, on the host, pinned where a device will fetch them."""


def windows(
    dataset: Dataset[Any],
    plan: WindowPlan,
    *,
    accum_steps: int,
    global_steps: range,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Window]:
    """Yield the window of every global step in `global_steps`.

    Args:
        dataset: map-style; a TensorDataset is fetched by index. A `collate_fn` of its own makes a
            micro-batch of a list of samples.
        plan: says which samples.
        accum_steps: micro-batches per window, N.
        global_steps: e.g. range(0, 140); later windows do not depend on earlier ones.
        workers: DataLoader worker processes; they change speed only.
        pin: put micro-batches into page-locked memory, for copies that do not wait.
    """
    if type(dataset) is TensorDataset:
        for global_step in global_steps:
            yield gather(dataset.tensors, plan.indices(global_step), accum_steps, pin)
        return
    loader: DataLoader[Any] = DataLoader(
        SeededSamples(dataset, plan.seed),
        batch_sampler=_micro_batch_keys(plan, accum_steps, global_steps),
        collate_fn=getattr(dataset, "collate_fn", default_collate),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader's own draws must not touch the global generator
    )
    micro_batches = iter(loader)
    for global_step in global_steps:
        count = len(split_sizes(len(plan.indices(global_step)), accum_steps))
        with _host_generators_kept():
            window = [next(micro_batches) for _ in range(count)]
        yield window
        del window


@contextmanager
def _host_generators_kept() -> Iterator[None]:
    """Fetching in this process seeds Python and NumPy; a model that draws from them must not notice.

    Else its draws would depend on the number of workers. torch's generator is seeded before every pass.
    """
    states = random.getstate(), np.random.get_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def gather(tensors: Sequence[Tensor], indices: Tensor, accum_steps: int, pin: bool) -> Window:
    """Return the micro-batches of the samples at `indices`, fetched from tensors in memory."""
    return [
        tuple(_rows(tensor, part, pin) for tensor in tensors)
        for part in torch.split(indices, split_sizes(len(indices), accum_steps))
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
        """Return sample `index` as drawn at one position of one window: (step, position, index)."""
        global_step, position, index = key
        seed_host(derive_seed(self._seed, "sample", global_step, position))
        return self._dataset[index]


def _micro_batch_keys(
    plan: WindowPlan, accum_steps: int, global_steps: range
) -> Iterator[list[tuple[int, int, int]]]:
    """The DataLoader's batch sampler: for each micro-batch, where in the run its samples are drawn."""
    for global_step in global_steps:
        places = plan.positions(global_step).tolist(), plan.indices(global_step).tolist()
        keys = [(global_step, position, index) for position, index in zip(*places, strict=True)]
        start = 0
        for size in split_sizes(len(keys), accum_steps):
            yield keys[start : start + size]
            start += size
