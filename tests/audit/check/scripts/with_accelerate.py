"""A loop under Accelerator.accumulate."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    data = DataLoader(TensorDataset(torch.randn(64, 6), torch.randint(3, (64,))), batch_size=8)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    criterion = nn.CrossEntropyLoss()
    for _ in range(3):
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    main()
