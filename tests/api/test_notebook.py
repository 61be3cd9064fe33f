"""A notebook runs sweeps of its own classes, and shows progress and result as they are read."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.program import environment

CELLS = (
    """
import torch
from torch import nn
from gaccum_exp import sweep

SCALE = 2.0

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return SCALE * self.layer(x)

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((6,), index / 20), index % 3
""",
    """
result = sweep(
    model=lambda: Net(), criterion=nn.CrossEntropyLoss(), data=Points(),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    accum_steps=[1, 2], global_batch_size=8, steps=3, device="cpu",
)
result
""",
    "result.figure('loss')",
    "print(result)",
)


def test_a_notebook_shows_progress_in_lines_and_the_top_of_the_page(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With classes, lambdas and globals of its own, in real processes; nothing is shown twice."""
    monkeypatch.chdir(home)
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # where it is set, kernels show nothing of other processes
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    _, swept, drawn, printed = (cell.outputs for cell in notebook.cells)
    assert "N=2 · 2 of 2: 3/3  loss" in text_of(swept)
    assert len(text_of(swept).splitlines()) < 12
    (shown,) = (output.data for output in swept if output.output_type != "stream")
    assert "N\u00a0=\u00a02 is equivalent to the large batch</strong>" in shown["text/html"]
    assert "N = 2 is equivalent to the large batch" in shown["text/plain"]
    assert drawn[0].data["image/png"]
    assert [output.output_type for output in printed] == ["stream"]


def text_of(outputs: list[Any]) -> str:
    """Return what a cell has printed."""
    return "".join(output.text for output in outputs if output.output_type == "stream")
