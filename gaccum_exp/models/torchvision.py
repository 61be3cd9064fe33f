"""Any model of torchvision for classification or segmentation, on images of any size, grey or in colour.

torchvision's models expect three channels and often a minimum size. Here a grey image is repeated
to three channels, and an image smaller than the model's minimum (torchvision states it in the
metadata of each model's weights, which are not downloaded for it) is resized, bilinearly. The
models are otherwise as published: many hold BatchNorm, dropout or stochastic depth.

Models for segmentation give logits for every pixel; their auxiliary ones are left out. Video models get
the image as every frame of a clip. The names `quantized_*` give the float models
from which torchvision makes its quantised ones.
"""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from gaccum_exp.errors import BadInputError, nearest
from gaccum_exp.models.shapes import image_shape, known_classes

OTHER_TASKS = {
    models.detection: "detection",
    models.optical_flow: "optical flow",
}

# Families, by the name of torchvision's module, that accept one image size only.
FIXED_SIZE = ("vision_transformer", "maxvit", "mvit")

# Auxiliary heads make the forward pass return a tuple while training, and the published
# initialisation of these two draws from a truncated normal distribution for seconds.
WITHOUT_HEADS = {"aux_logits": False, "init_weights": False}
FAMILY_OPTIONS = {"googlenet": WITHOUT_HEADS, "inception": WITHOUT_HEADS}

DOWNLOAD_TIMEOUT_S = 5.0


def classification_names() -> list[str]:
    """Return the names of torchvision's models for images and clips with one label each."""
    others = {name for module in OTHER_TASKS for name in models.list_models(module=module)}
    return sorted(set(models.list_models()) - others - set(segmentation_names()))


def segmentation_names() -> list[str]:
    """Return the names of torchvision's models for images with one label for each pixel."""
    return sorted(models.list_models(module=models.segmentation))


class TorchvisionModel(nn.Module):
    """A torchvision model by name, with its input brought into the shape it needs.

    Args:
        name: what `torchvision.models.get_model` knows, for example `resnet18`.
        input_shape: (channels, height, width) of one image, 1 or 3 channels.
        num_classes: number of outputs.
        weights: torchvision's weights to start from, for example `DEFAULT` or `IMAGENET1K_V1`, read from
            torch's hub folder or downloaded; the last layer is new where the number of classes differs.
        image_size: side in pixels to which images are resized; null: only those that the model cannot
            take. Vision transformers, MaxViT and MViT take one size, the published one (224 for most)
            unless the first two are built for another.

    Maps (batch, *input_shape) to (batch, num_classes), or for segmentation to (batch, num_classes,
    height, width). Raises `BadInputError` on what torchvision lacks.
    """

    def __init__(
        self,
        name: str,
        input_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        weights: str | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        name = name.lower()
        _check_name(name)
        channels, height, width = image_shape(input_shape, "torchvision")
        if channels not in (1, 3):
            raise BadInputError(f"model.name={name} takes images of 1 or 3 channels, not {channels}")
        if image_size is not None and image_size < 1:
            raise BadInputError(f"model.image_size={image_size} must be at least 1")
        family = models.get_model_builder(name).__module__.rpartition(".")[2]
        options: dict[str, Any] = dict(
            FAMILY_OPTIONS.get(family, {}), num_classes=known_classes(num_classes)
        )
        meta = [chosen.meta for chosen in _published(name, weights)]
        least: tuple[int, int] = min(entry["min_size"] for entry in meta)
        size = (height, width)
        if image_size is not None:
            size = (image_size, image_size)
        elif family in FIXED_SIZE:
            size = least
        elif height < least[0] or width < least[1]:
            size = (max(height, least[0]), max(width, least[1]))
        self.size = size
        """Height and width to which images are resized where they have another."""
        self.of_pixels = name in segmentation_names()
        """Whether there are logits for each pixel."""
        if self.of_pixels:
            options["weights_backbone"] = None
        if family == "vision_transformer":
            options["image_size"] = size[0]
        if family == "maxvit":
            options["input_size"] = size

        self.frames: int | None = None
        """Length of the clip that is made of an image; None for a model of images."""
        if name in models.list_models(module=models.video):
            self.frames = meta[0].get("min_temporal_size", 1)

        try:
            self.net: nn.Module = models.get_model(name, weights=None, **options)
        except (AssertionError, ValueError) as error:
            # Nothing but the size is the user's among the options.
            raise _unfit_size(name, image_size, error) from error
        if image_size is not None:
            self._check_size(name, image_size, (1, channels, height, width))
        if weights is not None:
            _start_from(self.net, name, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, num_classes, …), of images (batch, channels, height, width)."""
        size = images.shape[-2:]
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.frames is not None:
            images = images.unsqueeze(2).expand(-1, -1, self.frames, -1, -1)
        logits: Tensor = self.net(images)["out"] if self.of_pixels else self.net(images)
        if self.of_pixels and logits.shape[-2:] != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits

    def _check_size(self, name: str, image_size: int, shape: tuple[int, ...]) -> None:
        # torchvision finds out in the forward pass that an image is too small, and says it there
        # in terms of kernels; one pass in evaluation mode tells before the training begins.
        self.eval()
        try:
            with torch.no_grad():
                self(torch.zeros(shape))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise _unfit_size(name, image_size, error) from error
        self.train()


def _unfit_size(name: str, image_size: int | None, error: Exception) -> BadInputError:
    reason = " ".join(str(error).split())
    return BadInputError(f"model.image_size={image_size} does not fit {name}: {reason}")


def _check_name(name: str) -> None:
    known = [*classification_names(), *segmentation_names()]
    if name in known:
        return
    for module, task in OTHER_TASKS.items():
        if name in models.list_models(module=module):
            raise BadInputError(
                f"model.name={name} is a model for {task}, and model=torchvision takes those for "
                "classification and segmentation: bring it with model=custom and a loss of your own"
            )
    close = nearest(name, known)
    raise BadInputError(
        f"model.name={name} is no model of torchvision for classification or segmentation{close}"
    )


def _published(name: str, weights: str | None) -> list[models.WeightsEnum]:
    # A float model starts from float weights; the others are for its quantised form.
    known = models.get_model_weights(name.removeprefix("quantized_"))
    if weights is None:
        return list(known)
    if weights not in known.__members__:
        raise BadInputError(
            f"model.weights={weights} is none of {name}'s: {', '.join(known.__members__)}"
            + nearest(weights, known.__members__)
        )
    return [known[weights]]


def _start_from(net: nn.Module, name: str, weights: str) -> None:
    """Copy into `net` all published weights but those of a head with other classes."""
    chosen = _published(name, weights)[0]
    trained = _trained(name, weights, chosen.url)
    if hasattr(trained, "transform_input"):
        # These weights were trained on inputs that were normalised in another way.
        net.transform_input = trained.transform_input
    own, theirs = net.state_dict(), trained.state_dict()
    labels = len(chosen.meta["categories"])
    for key, value in own.items():
        if value.shape == theirs[key].shape:
            value.copy_(theirs[key])
        elif theirs[key].shape[0] != labels:
            raise BadInputError(
                f"model.weights={weights} of {name} do not fit model.image_size: {key} has the shape "
                f"{list(theirs[key].shape)} there and {list(value.shape)} here"
            )


def _trained(name: str, weights: str, url: str) -> nn.Module:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        trained: nn.Module = models.get_model(name, weights=weights)
    except OSError as error:
        wanted = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        raise BadInputError(
            f"model.weights={weights} of {name} are not on this machine (looked for {wanted}) and "
            f"cannot be downloaded ({error}): put the file from {url} there, "
            "or leave model.weights=null"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return trained
