"""A loop's model and its windows."""

import torch
from torch import nn

torch.manual_seed(0)
model, criterion = nn.Linear(8, 3), nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
windows = [[(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(4)] for _ in range(64)]
