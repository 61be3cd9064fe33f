"""timm's models on images of any size, and weights from a file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gaccum_exp.errors import BadInputError
from gaccum_exp.models.timm import TimmModel
from tests.unimportable import unimportable

SMALL = "test_resnet"


def built(name: str = SMALL, **options: Any) -> TimmModel:
    return TimmModel(name, **({"input_shape": (1, 8, 8), "num_classes": 5} | options))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small model with five classes."""
    file = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(built().net.state_dict(), file)
    return file


def test_weights_of_a_file_are_those_of_the_model_but_for_a_last_layer_of_other_classes(
    weights: Path,
) -> None:
    """Five classes stay as they were trained; three are new."""
    there = torch.load(weights)
    for classes, new in ((5, set()), (3, {"fc.weight", "fc.bias"})):
        here = built(num_classes=classes, pretrained=str(weights)).net.state_dict()
        differing = {
            key for key, value in here.items()
            if value.shape != there[key].shape or not torch.equal(value, there[key])
        }  # fmt: skip
        assert differing == new


def test_a_plan_builds_a_model_with_weights_of_a_file_without_memory(weights: Path) -> None:
    """On meta nothing is loaded, of which torch would warn for each parameter."""
    with torch.device("meta"):
        model = built(num_classes=3, pretrained=str(weights))
    assert all(p.is_meta for p in model.parameters())
    assert model.net.get_classifier().out_features == 3


def test_a_model_of_one_size_gets_images_of_that_size_or_is_built_for_another() -> None:
    """A vision transformer takes 160 × 160 as it was published, or what it is asked for."""
    images = torch.zeros(2, 1, 8, 8)
    for model, size in ((built("test_vit"), (160, 160)), (built("test_vit", image_size=32), (32, 32))):
        assert model.size == size
        assert model(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "resnet81"}, r"timm .* has no such model, did you mean 'resnet"),
        ({"name": "test_vit", "image_size": 3}, r"takes no images of 3×3 .*set model\.image_size"),
        ({"image_size": 0}, r"model\.image_size=0"),
        ({"options": {"foo": 1}}, "unexpected keyword argument 'foo'"),
        ({"pretrained": "nowhere.pth"}, r"model\.pretrained=nowhere\.pth: there is no file /"),
        ({"pretrained": __file__}, "is no file of weights"),
        ({"input_shape": (64,)}, r"model=timm needs images of shape \[channels, height, width\]"),
        ({"num_classes": None}, r"model\.num_classes is not known"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_line(options: dict[str, Any], said: str) -> None:
    """By its key."""
    with pytest.raises(BadInputError, match=said) as raised:
        built(**options)
    assert "\n" not in str(raised.value)


def test_weights_of_another_model_are_refused_whatever_the_classes(weights: Path) -> None:
    """timm itself loads what fits, and says nothing, where the number of classes is another."""
    for classes in (5, 3):
        with pytest.raises(BadInputError, match="Missing key"):
            built("test_vit", num_classes=classes, pretrained=str(weights))


def test_without_timm_the_extra_is_named() -> None:
    """In one line, as it is installed."""
    with unimportable("timm"), pytest.raises(BadInputError) as raised:
        built()
    assert str(raised.value) == "model=timm: needs timm: pip install 'gaccum_exp[timm]'"
