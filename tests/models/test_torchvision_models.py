"""torchvision's classification models on small grey images, any number of classes."""

import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

from gaccum_exp.errors import BadInputError
from gaccum_exp.models.torchvision import TorchvisionModel, classification_names

# One of each family. RegNet does not build without memory, so it stands among the trained ones.
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mvit_v2_s",
    "quantized_googlenet",
    "r3d_18",
    "resnext50_32x4d",
    "s3d",
    "shufflenet_v2_x0_5",
    "swin3d_t",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_16",
    "vit_h_14",
]
TRAINED = [
    "googlenet",
    "mobilenet_v3_small",
    "quantized_shufflenet_v2_x0_5",
    "regnet_x_400mf",
    "resnet18",
    "squeezenet1_1",
]
SMALL_NAME = "shufflenet_v2_x0_5"


def built(name: str, shape: tuple[int, ...] = (1, 8, 8), **options: Any) -> TorchvisionModel:
    """Build for ten classes unless told otherwise."""
    return TorchvisionModel(name, **({"input_shape": shape, "num_classes": 10} | options))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_small_grey_images(name: str) -> None:
    """A training pass over 1×8×8 images gives one row of ten logits each."""
    with torch.device("meta"):
        assert built(name)(torch.empty(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_every_parameter(name: str) -> None:
    """No head is left out of the backward pass, and the logits are numbers."""
    torch.manual_seed(0)
    model = built(name)
    logits = model(torch.randn(4, 1, 8, 8))
    assert logits.shape == (4, 10)
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []


def test_names_are_torchvisions_without_other_tasks() -> None:
    """Image, video and float quantisable models are known; detectors and the like are not."""
    names = classification_names()
    assert {"resnet18", "r3d_18", "quantized_resnet18"} <= set(names)
    others = {"fasterrcnn_resnet50_fpn", "fcn_resnet50", "raft_small"}
    assert others <= set(models.list_models())
    assert not others & set(names)


def test_quantised_names_give_float_models() -> None:
    """The parameters are float32, and so can be trained."""
    parameters = list(built("quantized_shufflenet_v2_x0_5").parameters())
    assert {value.dtype for value in parameters} == {torch.float32}
    assert len(parameters) == len(list(built("shufflenet_v2_x0_5").parameters()))


def test_grey_is_repeated_to_three_channels() -> None:
    """A grey image gives what three equal channels give."""
    torch.manual_seed(0)
    model = built(SMALL_NAME).eval()
    grey = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("name", "shape", "image_size", "seen"),
    [
        ("resnet18", (3, 8, 8), None, (8, 8)),
        ("alexnet", (3, 8, 8), None, (63, 63)),
        ("alexnet", (3, 70, 40), None, (70, 63)),
        ("alexnet", (3, 90, 80), None, (90, 80)),
        ("resnet18", (3, 40, 40), 24, (24, 24)),
        ("vit_b_32", (3, 300, 300), None, (224, 224)),
        ("vit_h_14", (3, 8, 8), None, (224, 224)),
        ("vit_b_32", (3, 8, 8), 64, (64, 64)),
    ],
)
def test_images_are_resized_only_as_far_as_the_model_needs(
    name: str, shape: tuple[int, int, int], image_size: int | None, seen: tuple[int, int]
) -> None:
    """Images that the model takes are left alone, smaller sides are raised to its least."""
    with torch.device("meta"):
        model = built(name, shape, image_size=image_size)
        sizes = []
        model.net.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-2:]))
        model(torch.empty(2, *shape))
    assert sizes == [seen]


def test_video_models_see_the_image_as_every_frame() -> None:
    """The clip has the model's least length, and each of its frames is the image."""
    with torch.device("meta"):
        model = built("mvit_v2_s")
        clips = []
        model.net.register_forward_pre_hook(lambda _, args: clips.append(args[0].shape))
        model(torch.empty(2, 1, 8, 8))
    assert clips == [(2, 3, 16, 224, 224)]


def test_trial_pass_for_a_size_leaves_no_trace() -> None:
    """Trying an image size moves neither the generator nor the weights nor BatchNorm's averages."""
    torch.manual_seed(0)
    plain = built(SMALL_NAME)
    after_plain = torch.get_rng_state()
    torch.manual_seed(0)
    tried = built(SMALL_NAME, image_size=16)
    assert torch.equal(after_plain, torch.get_rng_state())
    assert tried.training
    for key, value in tried.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet19"}, "did you mean 'resnet1"),
        ({"name": "fasterrcnn_resnet50_fpn"}, "a model for detection"),
        ({"name": "raft_small"}, "a model for optical flow"),
        ({"shape": (2, 8, 8)}, "1 or 3 channels, not 2"),
        ({"shape": (64,)}, "[channels, height, width]"),
        ({"num_classes": None}, "model.num_classes is not known"),
        ({"weights": "IMAGENET1K_V2"}, "did you mean 'IMAGENET1K_V1'"),
        ({"name": "vit_b_32", "image_size": 60}, "model.image_size=60 does not fit vit_b_32"),
        ({"name": "alexnet", "image_size": 16}, "model.image_size=16 does not fit alexnet"),
        ({"image_size": 0}, "model.image_size=0"),
    ],
)
def test_impossible_values_are_bad_input(options: dict[str, Any], words: str) -> None:
    """The message has the key and the value, or the nearest name, in one line."""
    with pytest.raises(BadInputError) as caught, torch.device("meta"):
        built(**({"name": SMALL_NAME} | options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class TestWeights:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty hub folder of torch's, on a machine where every request fails."""
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        for variable in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")
            monkeypatch.delenv(variable.upper(), raising=False)
        for variable in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        # urllib reads the proxies once and keeps them.
        monkeypatch.setattr(urllib.request, "_opener", None)
        return tmp_path / "hub" / "checkpoints"

    @pytest.fixture
    def published(self, hub: Path) -> dict[str, torch.Tensor]:
        """Weights under the file name that torchvision looks for, with a head of 1,000 classes."""
        torch.manual_seed(1)
        state: dict[str, torch.Tensor] = models.get_model(SMALL_NAME).state_dict()
        hub.mkdir(parents=True)
        weights = models.get_model_weights(SMALL_NAME)["IMAGENET1K_V1"]
        torch.save(state, hub / weights.url.rpartition("/")[2])
        return state

    @pytest.mark.parametrize("name", [SMALL_NAME, f"quantized_{SMALL_NAME}"])
    def test_all_but_a_head_of_other_classes_is_copied(
        self, published: dict[str, torch.Tensor], name: str
    ) -> None:
        """Ten classes get a new last layer upon the published ones."""
        own = built(name, weights="IMAGENET1K_V1").net.state_dict()
        different = [key for key in own if not torch.equal(own[key], published.get(key, own[key]))]
        new = [key for key in own if key not in published or own[key].shape != published[key].shape]
        assert set(new) == {"fc.weight", "fc.bias"}
        assert different == new or set(different) <= set(new)

    def test_head_of_as_many_classes_is_copied_too(self, published: dict[str, torch.Tensor]) -> None:
        """For the 1,000 classes of the weights nothing is left as it was drawn."""
        own = built(SMALL_NAME, weights="DEFAULT", num_classes=1000).net.state_dict()
        assert [key for key in own if not torch.equal(own[key], published[key])] == []

    def test_absent_weights_are_named_with_where_to_put_them(self, hub: Path) -> None:
        """Without a network one line says which file is missing, and from where it comes."""
        with pytest.raises(BadInputError) as caught:
            built(SMALL_NAME, weights="IMAGENET1K_V1")
        weights = models.get_model_weights(SMALL_NAME)["IMAGENET1K_V1"]
        for word in (str(hub), weights.url, "IMAGENET1K_V1", "cannot be downloaded"):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)
