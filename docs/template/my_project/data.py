"""A data set: anything with `__len__` and `__getitem__`."""

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Waves(Dataset[dict[str, Tensor]]):
    """Sine waves with noise, each known for a length of its own.

    Args:
        samples: number of waves.
        longest: their length, of which a part at the end is not known.
        noise: its standard deviation.
        seed: draws other waves.
    """

    def __init__(self, samples: int = 256, longest: int = 64, noise: float = 0.3, seed: int = 0) -> None:
        drawn = torch.Generator().manual_seed(seed)
        times = torch.arange(longest)
        periods = 8 + 24 * torch.rand(samples, 1, generator=drawn)
        lengths = torch.randint(longest // 8, longest + 1, (samples, 1), generator=drawn)
        self.clean = torch.sin(2 * torch.pi * times / periods)
        self.noisy = self.clean + noise * torch.randn(samples, longest, generator=drawn)
        self.known = times < lengths

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "noisy": self.noisy[index],
            "clean": self.clean[index],
            "known": self.known[index],
        }
