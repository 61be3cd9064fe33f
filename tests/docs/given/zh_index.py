"""A loop with its model."""

import torch
from torch import nn

model = nn.Linear(8, 3)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def my_training_step():
    for size in (4, 4, 2):
        (criterion(model(torch.randn(size, 8)), torch.randint(3, (size,))) / 3).backward()
    optimizer.step()
