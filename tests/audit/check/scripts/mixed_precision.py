"""fp16 under a GradScaler, or bf16."""

import sys

import torch
from torch import nn

dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[sys.argv[1]]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
for _step in range(5):
    for _ in range(4):
        x, y = torch.randn(8, 6), torch.randn(8, 3)
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.mse_loss(model(x), y) / 4
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
