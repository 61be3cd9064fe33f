"""Any image model of timm by its name there, on images of any size and any number of channels.

The models are as published: many hold BatchNorm, dropout or stochastic depth. One that takes images of
a single size gets them resized to it, bilinearly, as it gets those that are smaller than it can take.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.errors import BadInputError, nearest, with_extra
from gaccum_exp.models.shapes import image_shape, known_classes


class TimmModel(nn.Module):
    """A timm model by name, with its input brought into the size it needs.

    Args:
        name: what `timm.create_model` knows, for example `resnet18` or `vit_tiny_patch16_224`.
        input_shape: (channels, height, width) of one image.
        num_classes: number of outputs.
        pretrained: start from timm's published weights, which are downloaded where they are not on this
            machine, or from a file of weights; the first and the last layer are fitted to the channels
            and the classes.
        image_size: side in pixels to which images are resized, and for which models of one size are
            built; null: the published size for these, and for others as the images are.
        options: further arguments of the model, for example {drop_path_rate: 0.1}.

    Maps (batch, *input_shape) to (batch, num_classes). Raises `BadInputError` on what timm lacks.
    """

    def __init__(
        self,
        name: str,
        input_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        pretrained: bool | str = False,
        image_size: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        with with_extra("model=timm", "timm", "timm"):
            import timm

        if not timm.is_model(name):
            close = nearest(name, timm.list_models())
            raise BadInputError(f"model.name={name}: timm {timm.__version__} has no such model{close}")
        channels, height, width = image_shape(input_shape, "timm")
        if image_size is not None and image_size < 1:
            raise BadInputError(f"model.image_size={image_size} must be at least 1")
        published: dict[str, Any] = timm.get_pretrained_cfg(name).to_dict()
        outputs = known_classes(num_classes)
        given: dict[str, Any] = {"in_chans": channels, "num_classes": outputs, **(options or {})}
        self.size = (height, width)
        """Height and width to which images are resized where they have another."""
        if image_size is not None:
            self.size = (image_size, image_size)
            if published.get("fixed_input_size"):
                given["img_size"] = image_size
        elif published.get("fixed_input_size"):
            self.size = tuple(published["input_size"][1:])
        elif published.get("min_input_size"):
            least = published["min_input_size"][1:]
            self.size = (max(height, least[0]), max(width, least[1]))
        if isinstance(pretrained, str):
            weights = _from_file(pretrained)
            # As many classes as they have, 0 where they have no last layer, so that every name must fit.
            given["num_classes"] = len(weights.get(f"{published.get('classifier')}.weight", ()))
            there = {"state_dict": weights, "num_classes": given["num_classes"]}
            given["pretrained_cfg_overlay"] = there
        try:
            # On meta, where a plan builds it, there is nothing to load weights into.
            loads = bool(pretrained) and torch.get_default_device().type != "meta"
            self.net: nn.Module = timm.create_model(name, pretrained=loads, **given)
            if given["num_classes"] != outputs:
                self.net.reset_classifier(outputs)
        except Exception as error:  # of as many kinds as there are models, options and files
            raise BadInputError(f"model.name={name}: {_said(error)}{_way_out(pretrained)}") from error
        _try_one_image(self, name, (1, channels, height, width))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, num_classes), of images (batch, channels, height, width)."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        logits: Tensor = self.net(images)
        return logits


def _from_file(pretrained: str) -> dict[str, Tensor]:
    """Return the weights of a file by name; no pickle is run."""
    from timm.models import load_state_dict

    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise BadInputError(f"model.pretrained={pretrained}: there is no file {path.absolute()}")
    try:
        weights: dict[str, Tensor] = load_state_dict(str(path))
    except Exception as error:
        raise BadInputError(
            f"model.pretrained={pretrained}: is no file of weights ({_said(error)})"
        ) from None
    return weights


def _try_one_image(model: TimmModel, name: str, shape: tuple[int, ...]) -> None:
    """Find out in evaluation mode what a model's size check or too small a feature map would say."""
    if any(p.is_meta for p in model.parameters()):
        return
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(shape))
    except Exception as error:
        raise BadInputError(
            f"model.name={name}: takes no images of {model.size[0]}×{model.size[1]} ({_said(error)}); "
            "set model.image_size"
        ) from error
    finally:
        model.train()
    if not isinstance(outputs, Tensor):
        raise BadInputError(
            f"model.name={name}: puts out {type(outputs).__name__}, and no logits: bring it with "
            "model=custom and a loss of your own"
        )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _way_out(pretrained: bool | str) -> str:
    if pretrained is True:
        return "; model.pretrained takes a file of weights, too, and false for new ones"
    return f"; the weights are those of model.pretrained={pretrained}" if pretrained else ""
