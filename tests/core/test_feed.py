"""Windows of real micro-batches: the same samples in the same ones, however they are fetched."""

import random
import weakref
from collections import UserDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.feed import windows
from gaccum_exp.core.window import BatchStage, WindowPlan, split_sizes
from gaccum_exp.data.sequences import TokenSequences
from gaccum_exp.errors import BadInputError

SAMPLES = 23
STEPS = range(8)


def tokens(padding: str = "longest", shift_labels: bool = True) -> TokenSequences:
    """23 stretches of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 10, (SAMPLES,), generator=generator)
    starts = torch.cumsum(lengths, 0) - lengths
    row = torch.randint(50, (int(lengths.sum()) + 1,), generator=generator)
    return TokenSequences(row, starts, lengths, list("ab"), shift_labels, padding)


class Behind(Dataset[Any]):
    """A data set of which only the samples, and how they are collated, can be seen."""

    def __init__(self, inner: Any, collate_fn: Any = None) -> None:
        self._inner = inner
        if collate_fn is not None:
            self.collate_fn = collate_fn

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> Any:
        return self._inner[index]


class Drawn(Dataset[Any]):
    """Each sample is its index and a number drawn from each of the host's generators."""

    def __init__(self, fails_at: int = -1) -> None:
        self._fails_at = fails_at

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor, float, float]:
        if index == self._fails_at:
            raise OSError(f"sample {index} cannot be read")
        return index, torch.rand(2), random.random(), float(np.random.rand())


def same(one: Any, other: Any) -> bool:
    """Whether two micro-batches are equal in every type and value."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("rule", ["exact", "drop", "carry"])
@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("control_seed", [None, 1])
def test_gathered_micro_batches_are_those_of_the_loader(
    rule: Any, padding: str, by_length: bool, control_seed: int | None
) -> None:
    """Ragged sequences by index or one by one; partial, sorted, permuted, N that does not divide."""
    data = tokens(padding)
    lengths = data.lengths if by_length else None
    plan = WindowPlan(SAMPLES, 9, 0, rule, lengths=lengths, control_seed=control_seed)
    loaded = windows(Behind(data, data.collate_fn), plan, accum_steps=4, global_steps=STEPS)
    gathered = windows(data, plan, accum_steps=4, global_steps=STEPS)
    for step, (one, other) in enumerate(zip(gathered, loaded, strict=True)):
        assert len(one) == min(4, plan.size(step))
        assert same(one, other), step


def test_a_micro_batch_holds_the_samples_that_the_plan_says() -> None:
    """Sample by sample, written out: the tokens, the labels one place on, padding only at the end."""
    data = tokens()
    plan = WindowPlan(SAMPLES, 9, 0, lengths=data.lengths)
    for step, window in enumerate(windows(data, plan, accum_steps=2, global_steps=STEPS)):
        indices = plan.indices(step).tolist()
        rows = [row for m in window for row in zip(m["input_ids"], m["labels"], strict=True)]
        assert len(rows) == len(indices)
        for index, (ids, labels) in zip(indices, rows, strict=True):
            sample, length = data[index], int(data.lengths[index])
            assert torch.equal(ids[:length], sample["input_ids"])
            assert torch.equal(labels[:length], sample["labels"])
            assert not ids[length:].any()
            assert (labels[length:] == -100).all()
        for m in window:
            assert int((m["labels"] != -100).sum(1).max()) == m["labels"].shape[1]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_n_may_be_a_function_of_the_global_step(behind: bool, workers: int) -> None:
    """By index and through the loader, while windows grow; later windows need no earlier ones."""
    data = tokens()
    dataset: Any = Behind(data, data.collate_fn) if behind else data
    plan = WindowPlan(SAMPLES, [BatchStage(0, 3), BatchStage(4, 12)], 0, by_step=True)
    steps_of = lambda step: 1 if step < 2 else 1 + step % 3  # noqa: E731
    found = list(windows(dataset, plan, accum_steps=steps_of, global_steps=STEPS, workers=workers))
    for step, window in enumerate(found):
        expected = split_sizes(plan.size(step), steps_of(step))
        assert [len(m["labels"]) for m in window] == expected
    resumed = windows(dataset, plan, accum_steps=steps_of, global_steps=range(5, 8), workers=workers)
    assert same(list(resumed), found[5:])
    whole = windows(dataset, plan, accum_steps=1, global_steps=STEPS)
    for one, (other,) in zip(found, whole, strict=True):
        together = [row[row != -100].tolist() for m in one for row in m["labels"]]
        assert together == [row[row != -100].tolist() for row in other["labels"]]


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: a dictionary in behaviour and not by type."""


def encoded(samples: Sequence[Any]) -> Encoding:
    """Collate as transformers' collators do."""
    return Encoding(tokens().collate_fn(samples))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collated_encoding_arrives_as_the_dictionary_that_it_wraps(workers: int) -> None:
    """So that whatever goes through a micro-batch finds its tensors."""
    data = tokens()
    plan = WindowPlan(SAMPLES, 9, 0)
    found = windows(Behind(data, encoded), plan, accum_steps=2, global_steps=STEPS, workers=workers)
    expected = windows(data, plan, accum_steps=2, global_steps=STEPS)
    assert same(list(found), list(expected))


def test_transformers_own_encoding_arrives_as_a_dictionary() -> None:
    """BatchEncoding, as the collators of transformers return it, and it trains."""
    transformers = pytest.importorskip("transformers", reason="the extra `peers` is not installed")
    data = tokens()
    collate: Any = lambda samples: transformers.BatchEncoding(data.collate_fn(samples))  # noqa: E731
    plan = WindowPlan(SAMPLES, 9, 0)
    (window,) = windows(Behind(data, collate), plan, accum_steps=2, global_steps=range(1))
    (expected,) = windows(data, plan, accum_steps=2, global_steps=range(1))
    assert same(window, expected)

    class Model(nn.Embedding):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids).mean(1)

    window = [{**m, "labels": m["labels"][:, 0] % 4} for m in window]
    assert accumulate_gradients(Model(50, 4), nn.CrossEntropyLoss(), window).denominator == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_belongs_to_a_sample_and_its_place_in_the_window(workers: int) -> None:
    """Neither N, nor workers, nor an order inside the window changes what is drawn for it."""
    lengths = torch.arange(SAMPLES) % 5
    plain = WindowPlan(SAMPLES, 9, 0)
    plans = [plain, replace(plain, lengths=lengths), replace(plain, lengths=lengths, control_seed=2)]
    seen: list[list[dict[int, Any]]] = []
    for plan, steps in zip(plans, (1, 4, 3), strict=True):
        found = windows(Drawn(), plan, accum_steps=steps, global_steps=range(4), workers=workers)
        seen.append([])
        for window in found:
            parts = [torch.cat([m[i].view(len(m[0]), -1).double() for m in window]) for i in range(4)]
            rows = torch.cat(parts, 1).tolist()
            seen[-1].append({int(row[0]): row[1:] for row in rows})
    assert seen[0] == seen[1] == seen[2]
    values = [tuple(draws) for window in seen[0] for draws in window.values()]
    assert len(set(values)) == len(values)


def test_a_sample_that_is_twice_in_a_window_is_drawn_twice() -> None:
    """Where a carried window reaches over an epoch, its draws belong to places and not to samples."""
    plan = WindowPlan(SAMPLES, 40, 0, "carry")
    (window,) = windows(Drawn(), plan, accum_steps=1, global_steps=range(1))
    indices, draws = window[0][0].tolist(), window[0][2].tolist()
    assert len(set(indices)) == SAMPLES
    assert len(set(draws)) == 40


@pytest.mark.parametrize("fails", [False, True])
def test_fetching_leaves_the_hosts_generators_as_they_were(fails: bool) -> None:
    """A model that draws from Python's or NumPy's does not notice, not even that a sample failed."""
    plan = WindowPlan(SAMPLES, 9, 0)
    broken = int(plan.indices(1)[4])
    feed = windows(Drawn(broken if fails else -1), plan, accum_steps=2, global_steps=STEPS)
    random.seed(5)
    np.random.seed(5)
    next(feed)
    before = random.getstate(), np.random.get_state()[1].tolist()
    if fails:
        with pytest.raises(OSError, match=f"sample {broken} cannot be read"):
            next(feed)
    else:
        next(feed)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    draws = [random.random(), float(np.random.rand())]
    random.seed(5)
    np.random.seed(5)
    assert draws == [random.random(), float(np.random.rand())]


@pytest.mark.parametrize("workers", [None, 2])
def test_nothing_is_drawn_in_this_process(workers: int | None) -> None:
    """Neither by gathering nor where workers fetch; not from torch's generator either."""
    data: Any = tokens() if workers is None else Drawn()
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate()
    plan = WindowPlan(SAMPLES, 9, 0)
    list(windows(data, plan, accum_steps=2, global_steps=STEPS, workers=workers or 0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_tensors_are_gathered_by_index_as_a_loader_would() -> None:
    """A TensorDataset of several tensors; micro-batches are tuples by index, lists from the loader."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES, 3, generator=generator), torch.arange(SAMPLES)
    data = TensorDataset(x, y)
    plan = WindowPlan(SAMPLES, 9, 0, "carry")
    gathered = windows(data, plan, accum_steps=4, global_steps=STEPS)
    loaded = windows(Behind(data), plan, accum_steps=4, global_steps=STEPS)
    for one, other in zip(gathered, loaded, strict=True):
        assert all(isinstance(m, tuple) for m in one)
        assert same([list(m) for m in one], other)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_window_that_was_handed_out_is_let_go(gathered: bool) -> None:
    """While the next is being fetched, the feed holds none of the micro-batches before it."""
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    class Noting(Behind):
        def collate_fn(self, samples: Any) -> Any:
            return self.noted(self._inner.collate_fn(samples))

        def noted(self, micro_batch: Any) -> Any:
            held.append(sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(micro_batch["labels"]))
            return micro_batch

    if gathered:
        Noting.gather = lambda self, indices: self.noted(self._inner.gather(indices))  # type: ignore[attr-defined]
    feed = windows(Noting(tokens()), WindowPlan(SAMPLES, 9, 0), accum_steps=2, global_steps=STEPS)
    for window in feed:
        assert len(window) == 2
        del window
    assert held == [0, 1] * len(STEPS)


def test_an_n_that_is_none_is_an_error() -> None:
    """Also where a function says it."""
    plan = WindowPlan(SAMPLES, 9, 0)
    for steps in (0, lambda step: -1):
        with pytest.raises((ValueError, BadInputError), match="micro-batches"):
            next(windows(tokens(), plan, accum_steps=steps, global_steps=STEPS))  # type: ignore[arg-type]
