"""A reader's package."""

import torch
from torch import nn
from torch.utils.data import Dataset


class Net(nn.Module):
    def __init__(self, hidden=8, input_shape=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, x):
        return self.layers(x)


class Points(Dataset):
    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(96, 2, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.x[index].sum(0, keepdim=True)


class Conversations(Dataset):
    """Some tokens, the first of which are a question and do not count."""

    classes = tuple(range(64))

    def __len__(self):
        return 48

    def __getitem__(self, index):
        tokens = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        labels = tokens.clone()
        labels[: index % 8] = -100
        return {"input_ids": tokens, "labels": labels}


class Reviews(Conversations):
    classes = ("bad", "good")

    def __getitem__(self, index):
        return {"input_ids": super().__getitem__(index)["input_ids"], "labels": torch.tensor(index % 2)}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.aux = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x):
        return {"out": self.out(x), "aux": self.aux(x)}


class Rooms(Dataset):
    """Pictures with classes and distances of their pixels."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        drawn = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        mask = drawn.argmax(0)
        mask[: index % 8] = 255
        return drawn, {"mask": mask, "depth": drawn[:1]}


def my_loss(model, micro_batch):
    inputs, target = micro_batch
    return nn.functional.cross_entropy(model(inputs), target, reduction="sum"), len(target)
