"""A stranger's package in the working directory, used exactly as the README says."""

import csv

import pytest

from tests.program import Program, in_a_process

PACKAGE = """
import torch
from torch import nn
from torch.utils.data import Dataset


class Net(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, x):
        return self.layers(x)


class Points(Dataset):
    def __init__(self, seed=0, samples=40):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 3, generator=generator)
        self.y = self.x.sum(1, keepdim=True).sin()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]
"""
CALL = (
    "model=custom", "model._target_=my_pkg.Net", "+model.hidden=32",
    "data=custom", "data.train._target_=my_pkg.Points",
)  # fmt: skip
EVALUATION = ("data.eval._target_=my_pkg.Points", "+data.eval.seed=1")
MEAN_SQUARE = "criterion._target_=torch.nn.MSELoss"
SHORT = ("train.epochs=3", "data.global_batch_size=12", "runtime.device=cpu")


@pytest.mark.slow
def test_a_package_in_the_working_directory_is_swept_and_compared(program: Program) -> None:
    """By `python -m`, where N divides neither batch nor data; and compared again later."""
    folder = program.folder
    (folder / "my_pkg.py").write_text(PACKAGE)
    ended = in_a_process(folder, "-m", "accum.steps=1,5", *CALL, *EVALUATION, MEAN_SQUARE, *SHORT)
    assert ended.status == 0, ended.err
    (table,) = (folder / "multirun").rglob("comparison.csv")
    with table.open() as file:
        reference, arm = csv.DictReader(file)
    assert (reference["accum_steps"], arm["accum_steps"]) == ("1", "5")
    assert reference["eval_loss"]
    assert not reference["eval_accuracy"]  # there are no classes
    assert float(arm["max_loss_gap"]) < 1e-3 * float(reference["train_loss"])
    again = program.report(table.parent.name, "--out", "again")
    assert again.status == 0, again.err
    assert (folder / "again/comparison.csv").read_bytes() == table.read_bytes()


def test_evaluation_is_optional(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same package without `data.eval`: trained, and nothing evaluated."""
    (program.folder / "my_pkg.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(program.folder)
    assert program(*CALL, MEAN_SQUARE, *SHORT).status == 0
    (run,) = program.arms()
    assert len(run.curves["train/loss"].global_steps) == 12
    assert not any(key.startswith("eval/") for key in run.metrics)
