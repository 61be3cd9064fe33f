"""A package, and a model of pairs."""

import shutil
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: F401

import gaccum_exp
from gaccum_exp import accumulate_gradients  # noqa: F401
from gaccum_exp.core.losses.protocol import at_least  # noqa: F401

shutil.copy(Path(gaccum_exp.__file__).parents[1] / "tests/docs/given/my_pkg.py", ".")


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(8, 4), nn.Linear(6, 4)
        self.temperature = nn.Parameter(torch.zeros(()))


model = Pairs()
window = [(torch.randn(size, 8), torch.randn(size, 6)) for size in (5, 3)]
