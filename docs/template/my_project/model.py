"""A model: any `torch.nn.Module`."""

from torch import Tensor, nn


class Denoiser(nn.Module):
    """Two convolutions over time, with a norm between them; (batch, length) -> (batch, length)."""

    def __init__(self, width: int = 8, kernel: int = 9) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, kernel, padding=kernel // 2)
        self.norm = nn.GroupNorm(1, width)
        self.last = nn.Conv1d(width, 1, kernel, padding=kernel // 2)

    def forward(self, noisy: Tensor) -> Tensor:
        """Return the waves without their noise."""
        hidden = self.norm(self.first(noisy.unsqueeze(1))).relu()
        denoised: Tensor = self.last(hidden)
        return denoised.squeeze(1)
