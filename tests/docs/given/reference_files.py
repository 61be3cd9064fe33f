"""A model and its weights."""

import torch
from torch import nn

model = nn.Linear(8, 3)
torch.save(nn.Linear(8, 3).state_dict(), "weights.pt")
