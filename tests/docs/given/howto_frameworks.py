"""A module of Lightning."""

import torch
from lightning import LightningModule, Trainer  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(58, 8), torch.randint(3, (58,))), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


lit = Lit()
