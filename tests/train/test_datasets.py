"""What arms share: data sets that cannot be another one after a training, and no others."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tests.program import Program, sweep_here
from tests.strangers import Net, Points
from tests.support import STRANGER

made: Counter[str] = Counter()
"""How often each of the functions below has been called."""


@pytest.fixture(autouse=True)
def _nothing_made_yet(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    sweep_here(monkeypatch)


def tensors(samples: int = 24) -> TensorDataset:
    """Tensors, the same every time."""
    made["tensors"] += 1
    points = Points(samples)
    samples = [points[i] for i in range(len(points))]
    return TensorDataset(torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples]))


def drawn() -> TensorDataset:
    """Tensors that depend on the seed."""
    made["drawn"] += 1
    x = torch.randn(24, 2, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long())


class Counted(Points):
    """A stranger's own kind of data set: what a training does to it is not known."""

    def __init__(self) -> None:
        made["Counted"] += 1
        super().__init__()


def sweep(program: Program, dataset: str, *arguments: str) -> None:
    target = f"data.train._target_=tests.train.test_datasets.{dataset}"
    done = program("-m", *STRANGER, target, "data.global_batch_size=8", "train.steps=1", *arguments)
    assert done.status == 0, done.err


def test_tensors_are_loaded_once_in_a_sweep_and_again_in_the_next(program: Program) -> None:
    """Not once for each arm; and another sweep of this process may find other files."""
    sweep(program, "tensors", "accum.steps=1,2,4")
    assert made["tensors"] == 1
    sweep(program, "tensors", "accum.steps=1,2")
    assert made["tensors"] == 2


def test_what_is_drawn_is_loaded_for_every_seed(program: Program) -> None:
    """Arms of one seed have the same samples, those of another seed have others."""
    sweep(program, "drawn", "seed=0,1", "accum.steps=1,2")
    assert made["drawn"] == 2
    digests: dict[str, set[str]] = {}
    for run in program.arms():
        digests.setdefault(run.params["seed"], set()).add(run.tags["data_digest"])
    assert [len(of_seed) for of_seed in digests.values()] == [1, 1]
    assert len(set().union(*digests.values())) == 2


def test_a_strangers_data_set_is_each_arms_own(program: Program) -> None:
    """It might count, draw or change while it is fetched from."""
    sweep(program, "Counted", "accum.steps=1,2,4")
    assert made["Counted"] == 3


class WritesOnItsInput(Net):
    """Works in place, on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


def test_what_a_model_does_to_its_input_is_not_done_to_the_next_arms_data(program: Program) -> None:
    """The same arm alone and last of three has the same curves: micro-batches are copies."""
    model = "model._target_=tests.train.test_datasets.WritesOnItsInput"
    evaluated = "data.eval._target_=tests.train.test_datasets.tensors"
    sweep(program, "tensors", model, evaluated, "train.steps=6")
    (alone,) = program.arms()
    sweep(program, "tensors", model, evaluated, "train.steps=6", "optimizer.lr=0.4,0.2,0.1")
    last = max(program.arms(), key=lambda run: run.start_time_ms)
    assert last.params["optimizer.lr"] == alone.params["optimizer.lr"]
    assert last.curves["train/loss"] == alone.curves["train/loss"]
    assert last.curves["eval/loss"] == alone.curves["eval/loss"]


def test_other_settings_of_the_data_are_loaded(program: Program) -> None:
    """The same function with another argument, and back again: the last one only is kept."""
    sweep(program, "tensors", "+data.train.samples=24,16,24")
    assert made["tensors"] == 3
    digests = [run.tags["data_digest"] for run in program.arms()]
    assert digests[0] == digests[2] != digests[1]
