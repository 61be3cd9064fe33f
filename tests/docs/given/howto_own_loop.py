"""The checkout's folder of docs, and a loop that is wrong; the one in tests is right."""

from pathlib import Path

import torch
from torch import nn

import gaccum_exp

Path("docs").symlink_to(Path(gaccum_exp.__file__).parents[1] / "docs")
Path("conftest.py").write_text("""\
import builtins

import torch
from torch import nn

from gaccum_exp import accumulate_gradients


def my_training_step():
    model, criterion = nn.Linear(8, 3), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = [(torch.randn(size, 8), torch.randint(3, (size,))) for size in (4, 4, 2)]
    accumulate_gradients(model, criterion, window)
    optimizer.step()


builtins.my_training_step = my_training_step
""")

model = nn.Linear(8, 3)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
window = [(torch.randn(size, 8), torch.randint(3, (size,))) for size in (4, 4, 2)]


def my_training_step():
    for inputs, target in window:
        (criterion(model(inputs), target) / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()
