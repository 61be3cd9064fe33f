"""The same, with the gradient of the large batch in every step."""

from itertools import islice

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gaccum_exp import accumulate_gradients

accumulate = 4

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
loader = DataLoader(data, batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0])  # of the classes
criterion = nn.CrossEntropyLoss(weight=weight)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(3):
    micro_batches = iter(loader)
    while window := list(islice(micro_batches, accumulate)):  # the last one of an epoch may be shorter
        loss = accumulate_gradients(model, criterion, window)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.mean:.3f}")
