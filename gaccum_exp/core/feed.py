"""The feed: windows of real micro-batches, in order, on the host.

Two ways to fetch, with the same samples in the same micro-batches. What lies in memory is gathered by
index, a micro-batch at a time, which is the fast way: the tensors of a TensorDataset, and data sets with
`gather(indices) -> micro_batch`, which draw nothing at random. Any other map-style data set goes through
a DataLoader, one micro-batch a batch, and every sample is drawn under a seed of its own, so that random
augmentation depends neither on N nor on the number of workers.
"""

import random
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from gaccum_exp.core.seeding import derive_seed, drawn_since, random_state_kept, seed_host
from gaccum_exp.core.window import WindowPlan, split_sizes

Window = list[Any]
"""The micro-batches of one optimizer step, on the host, pinned where a device will fetch them."""


def windows(
    dataset: Dataset[Any],
    plan: WindowPlan,
    *,
    accum_steps: int | Callable[[int], int | list[int]],
    global_steps: range,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Window]:
    """Yield the window of every global step in `global_steps`.

    Args:
        dataset: map-style; a TensorDataset, or one with `gather`, is fetched by index. A `collate_fn`
            of its own makes a micro-batch of a list of samples.
        plan: says which samples.
        accum_steps: micro-batches per window, N; or that, or their sizes, as a function of the global
            step.
        global_steps: e.g. range(0, 140); later windows do not depend on earlier ones.
        workers: DataLoader worker processes; they change speed only.
        pin: put micro-batches into page-locked memory, for copies that do not wait.
    """

    def sizes(global_step: int) -> list[int]:
        n = accum_steps if isinstance(accum_steps, int) else accum_steps(global_step)
        return split_sizes(plan.size(global_step), n) if isinstance(n, int) else n

    fetch = _by_index(dataset, pin)
    if fetch is not None:
        for global_step in global_steps:
            yield fetch(plan.indices(global_step), sizes(global_step))
        return
    loader: DataLoader[Any] = DataLoader(
        SeededSamples(dataset, plan.seed),
        batch_sampler=_micro_batch_keys(plan, sizes, global_steps),
        collate_fn=_Collate(getattr(dataset, "collate_fn", default_collate)),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader's own draws must not touch the global generator
    )
    micro_batches = iter(loader)
    for global_step in global_steps:
        with _host_generators_kept():
            window = [next(micro_batches) for _ in sizes(global_step)]
        yield window
        del window


def draws_samples(dataset: Dataset[Any]) -> bool:
    """Return whether random numbers are drawn where a sample is fetched, as augmentation draws them."""
    if type(dataset) is TensorDataset or hasattr(dataset, "gather"):
        return False
    with random_state_kept():
        seed_host(0)
        _Collate(getattr(dataset, "collate_fn", default_collate))([dataset[0]])
        return drawn_since(0)


@contextmanager
def _host_generators_kept() -> Iterator[None]:
    """Restore Python's and NumPy's generators, which fetching in this process seeds.

    Else what a model draws from them would depend on the number of workers. torch's generator is seeded
    before every pass.
    """
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _by_index(dataset: Dataset[Any], pin: bool) -> Callable[[Tensor, list[int]], Window] | None:
    """Return a function of indices and micro-batch sizes that fetches a window; None: there is none."""
    if type(dataset) is TensorDataset:

        def rows(indices: Tensor, sizes: list[int]) -> Window:
            # A window at once: a small model's pass takes no longer than a few calls of torch.
            whole = (_rows(t, indices, pin).split_with_sizes(sizes) for t in dataset.tensors)
            return list(zip(*whole, strict=True))

        return rows
    gather: Callable[[Tensor], Any] | None = getattr(dataset, "gather", None)
    if gather is None:
        return None

    def gathered(indices: Tensor, sizes: list[int]) -> Window:
        window = [gather(part) for part in torch.split(indices, sizes)]
        return tree_map_only(Tensor, Tensor.pin_memory, window) if pin else window

    return gathered


def _rows(tensor: Tensor, indices: Tensor, pin: bool) -> Tensor:
    if not pin:
        return tensor.index_select(0, indices)
    rows = torch.empty((len(indices), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    return torch.index_select(tensor, 0, indices, out=rows)


class _Collate:
    """Collates samples into a micro-batch; of transformers' BatchEncoding, the dictionary inside it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        micro_batch = self._collate(samples)
        return dict(micro_batch) if isinstance(micro_batch, UserDict) else micro_batch


class SeededSamples(Dataset[Any]):
    """A data set that seeds each draw of a sample by its place in the run."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        """Return sample `index` as drawn at one position of one window: (step, position, index)."""
        global_step, position, index = key
        seed_host(derive_seed(self._seed, "sample", global_step, position))
        return self._dataset[index]


def _micro_batch_keys(
    plan: WindowPlan, sizes: Callable[[int], list[int]], global_steps: range
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield, for the DataLoader, where in the run the samples of each micro-batch are drawn."""
    for global_step in global_steps:
        places = plan.positions(global_step).tolist(), plan.indices(global_step).tolist()
        keys = [(global_step, position, index) for position, index in zip(*places, strict=True)]
        start = 0
        for size in sizes(global_step):
            yield keys[start : start + size]
            start += size
