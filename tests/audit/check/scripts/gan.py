"""A GAN whose two optimizers accumulate in turn."""

import torch
from torch import nn

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
discriminator = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
opt_g = torch.optim.Adam(generator.parameters(), lr=1e-3)
opt_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
bce = nn.BCEWithLogitsLoss()
accum = 3

for _step in range(6):
    opt_d.zero_grad()
    for _ in range(accum):
        real, noise = torch.randn(8, 6), torch.randn(8, 4)
        fake = generator(noise).detach()
        loss_d = bce(discriminator(real), torch.ones(8, 1)) + bce(discriminator(fake), torch.zeros(8, 1))
        (loss_d / accum).backward()
    opt_d.step()
    opt_g.zero_grad()
    for _ in range(accum):
        noise = torch.randn(8, 4)
        loss_g = bce(discriminator(generator(noise)), torch.ones(8, 1))
        (loss_g / accum).backward()
    opt_g.step()
