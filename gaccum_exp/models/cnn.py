"""A small convolutional network with a choice of normalisation.

The normalisation is what matters here. `batch` makes a sample's output depend on the micro-batch
that it is in, so that accumulating over it gives another gradient than the large batch; `group`
(Wu & He 2018, arXiv 1803.08494), `layer` and `none` treat each sample by itself.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gaccum_exp.errors import BadInputError, nearest
from gaccum_exp.models.shapes import image_shape, known_classes

MAX_GROUPS = 8
SMALLEST_SIDE = 2

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    # The number of groups has to divide the number of channels, whatever the width.
    "group": lambda channels: nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels),
    # One group over all channels and positions: layer normalisation for images of any size.
    "layer": lambda channels: nn.GroupNorm(1, channels),
}


class CNN(nn.Module):
    """3×3 convolutions, each with normalisation and SiLU, a mean over positions, one linear layer.

    The first convolution has w channels; each of the next halves the image and doubles the
    channels, up to 4w, until the shorter side is at most 2; one more stays at that size. So 8×8
    images pass 4 convolutions of w, 2w, 4w, 4w channels (61,000 parameters at width 16), 32×32
    images 6, and whatever the size the last one sees all of the image.

    The activation is smooth on purpose. Where ReLU has its kink, a difference in the last bit switches a
    unit's gradient on or off, and curves that differ by rounding alone drift visibly apart.

    Args:
        norm: `none`, `batch`, `group` (up to 8 groups) or `layer`.
        width: the channels w of the first convolution.
        input_shape: (channels, height, width) of one image.
        num_classes: number of outputs.

    Maps (batch, *input_shape) to (batch, num_classes). Raises `BadInputError` on unusable values.
    """

    def __init__(
        self,
        norm: str = "group",
        width: int = 16,
        input_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise BadInputError(f"model.norm={norm} is none of {', '.join(NORMS)}{nearest(norm, NORMS)}")
        if width < 1:
            raise BadInputError(f"model.width={width} must be at least 1")
        channels, *sides = image_shape(input_shape, "cnn")
        side = min(sides)
        stages = [(width, 1)]
        while side > SMALLEST_SIDE:
            stages.append((min(2 * stages[-1][0], 4 * width), 2))
            side = math.ceil(side / 2)
        stages.append((stages[-1][0], 1))
        layers: list[nn.Module] = []
        for outputs, stride in stages:
            # A normalisation subtracts the mean and adds its own shift, so a bias would do nothing.
            bias = norm == "none"
            layers += [
                nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=bias),
                NORMS[norm](outputs),
                nn.SiLU(),
            ]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, known_classes(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, num_classes), of images (batch, channels, height, width)."""
        # A plain mean, since adaptive pooling has no deterministic backward pass on CUDA.
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits
