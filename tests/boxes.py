"""A stranger's detector: images of several sizes, each with some boxes, in lists of records."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Record = dict[str, Tensor]


class Scenes(Dataset[Record]):
    """Images (3, height, 6), with boxes (count, 4)."""

    def __init__(
        self, samples: int = 12, form: str = "records", counts: tuple[int, ...] = (1, 2, 3)
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        kind: Any = {"generator": generator, "dtype": torch.float64}
        self._scenes = [
            {
                "image": torch.randn(3, 5 + i % 3, 6, **kind),
                "boxes": torch.rand(counts[i % len(counts)], 4, **kind),
            }
            for i in range(samples)
        ]
        self._form = form

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Record:
        return self._scenes[index]

    def collate_fn(self, records: list[Record]) -> Any:
        """As detectors' collate functions do: a list of records, or lists side by side."""
        if self._form == "records":
            return records
        sides = [r["image"] for r in records], [{"boxes": r["boxes"]} for r in records]
        return sides if self._form == "pair" else {"images": sides[0], "targets": sides[1]}


class Detector(nn.Module):
    """One box an image; (3, height, width) each -> (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.box = nn.Conv2d(3, 4, 3, padding=1).double(), nn.Linear(4, 4).double()

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.box(torch.stack([torch.tanh(self.conv(i[None])).mean((2, 3))[0] for i in images]))


class BoxLoss:
    """Sum over all boxes of the distance to their image's; counts boxes."""

    def count(self, micro_batch: Any) -> int:
        return sum(len(boxes) for boxes in self._sides(micro_batch)[1])

    def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, int]:
        images, boxes = self._sides(micro_batch)
        found = model(images)
        loss = sum((found[k] - each).abs().sum() for k, each in enumerate(boxes))
        assert isinstance(loss, Tensor)
        return loss, self.count(micro_batch)

    @staticmethod
    def _sides(micro_batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        if isinstance(micro_batch, dict):
            micro_batch = micro_batch["images"], micro_batch["targets"]
        if isinstance(micro_batch, list):
            return [r["image"] for r in micro_batch], [r["boxes"] for r in micro_batch]
        return micro_batch[0], [target["boxes"] for target in micro_batch[1]]
