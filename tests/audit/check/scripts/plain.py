"""A loop as people write it, with a fault that can be planted."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--accum", type=int, default=4)
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--fault", default="none")
args = parser.parse_args()

torch.manual_seed(0)
data = TensorDataset(torch.randn(args.samples, 6), torch.randint(3, (args.samples,)))
loader = DataLoader(data, batch_size=8, shuffle=True)
norm = nn.BatchNorm1d(16) if args.fault == "batch_norm" else nn.LayerNorm(16)
model = nn.Sequential(nn.Linear(6, 16), norm, nn.ReLU(), nn.Linear(16, 3))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)

for epoch in range(3):
    for i, (inputs, labels) in enumerate(loader):
        loss = criterion(model(inputs), labels)
        if args.fault != "not_divided":
            loss = loss / args.accum
        loss.backward()
        if args.fault == "schedule":
            schedule.step()
        window_ends = i % args.accum == 0 if args.fault == "off_by_one" else (i + 1) % args.accum == 0
        if window_ends:
            optimizer.step()
            if args.fault != "no_zero_grad":
                optimizer.zero_grad()
            print(f"epoch {epoch}, micro-batch {i}: loss {loss.item():.3f}")
