"""Blocks under torch.utils.checkpoint, with a short last micro-batch in every window."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


torch.manual_seed(0)
net = Net()
optimizer = torch.optim.AdamW(net.parameters())
x, y = torch.randn(27, 16), torch.randn(27, 1)
for _step in range(4):
    batches = list(zip(x.split(8), y.split(8), strict=True))
    for inputs, target in batches:
        loss = ((net(inputs) - target) ** 2).mean() / len(batches)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
