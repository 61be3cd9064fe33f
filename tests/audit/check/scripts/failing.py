"""Fails by itself: before its first step, or after it."""

import sys

import torch
from torch import nn

model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _step in range(int(sys.argv[1])):
    for _ in range(2):
        (model(torch.randn(4, 2)).square().mean() / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
model(torch.randn(4, 3))
