"""Which parts of a model are its blocks."""

import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gaccum_exp.core.blocks import find_blocks
from gaccum_exp.models.cnn import CNN
from gaccum_exp.models.gpt import GPT
from gaccum_exp.models.mlp import MLP

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TORCHVISION = {
    "resnet18": {"BasicBlock": 8},
    "resnet50": {"Bottleneck": 16},
    "vit_b_16": {"EncoderBlock": 12},
    "swin_t": {"stage": 1, "SwinTransformerBlock": 12, "PatchMerging": 3},
    "convnext_tiny": {"stage": 1, "CNBlock": 18},
    "mobilenet_v3_small": {"Conv2dNormActivation": 2, "InvertedResidual": 11, "stage": 1},
    "densenet121": {"_DenseLayer": 58, "_Transition": 3},
    "vgg11": {"stage": 10},
}
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 24,
}
TRANSFORMERS = {
    "Llama": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 2}, {"LlamaDecoderLayer": 3}),
    "Bert": ("BertForSequenceClassification", SIZES, {"BertLayer": 3}),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 8, "n_head": 2, "n_layer": 3}, {"GPT2Block": 3}),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2},
        {"T5Block": 4},
    ),
    "Albert": ("AlbertModel", SIZES | {"embedding_size": 8}, {"AlbertLayer": 1}),
}


def kinds(model: nn.Module) -> dict[str, int]:
    """Count a model's blocks by class, having seen that their names lead to them."""
    blocks = find_blocks(model)
    for block in blocks:
        assert model.get_submodule(block.name.partition("[")[0]) is block.module
    return dict(Counter("stage" if b.is_segment else type(b.module).__name__ for b in blocks))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_models_have_the_blocks_that_their_papers_name(name: str) -> None:
    """The outermost: a block of convolutions, not each of them, and the layers of a dense block."""
    with torch.device("meta"):
        assert kinds(getattr(torchvision.models, name)()) == TORCHVISION[name]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers_have_their_layers_as_blocks(name: str) -> None:
    """Whichever list they stand in; a layer that ALBERT uses three times is one."""
    transformers = pytest.importorskip("transformers")
    model_class, sizes, expected = TRANSFORMERS[name]
    with torch.device("meta"):
        model = getattr(transformers, model_class)(getattr(transformers, f"{name}Config")(**sizes))
    assert kinds(model) == expected


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: GPT(layers=3, vocab_size=9), ["blocks.0", "blocks.1", "blocks.2"]),
        (
            lambda: CNN(input_shape=(1, 8, 8), num_classes=3),
            ["features[0:3]", "features[3:6]", "features[6:9]", "features[9:12]"],
        ),
        (
            lambda: MLP([4, 4], dropout=0.5, input_shape=(5,), num_classes=3),
            ["layers[1:4]", "layers[4:7]"],
        ),
        (lambda: MLP([], input_shape=(5,), num_classes=3), []),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), ["[0:2]"]),
        (lambda: nn.Sequential(nn.Dropout(inplace=True), nn.Linear(3, 3)), []),
        (lambda: nn.Linear(3, 3), []),
    ],
)
def test_blocks_are_named_as_python_reaches_them(
    make: Callable[[], nn.Module], names: list[str]
) -> None:
    """Stages of a Sequential are slices; what precedes its first matrix and single layers are none."""
    assert [block.name for block in find_blocks(make())] == names


class Pair(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)


class Backbone(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{i}": block for i, block in enumerate(blocks)})


class Skip(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        # a backbone in a Sequential is no block but what it is built of
        (
            nn.Sequential(Backbone(Pair(), Pair()), nn.Linear(3, 3)),
            ["0.blocks.block0", "0.blocks.block1"],
        ),
        # that it occurs twice makes it one
        (nn.Sequential(Backbone(Pair()), Backbone(Pair())), ["0", "1"]),
        # nothing inside it is one
        (nn.Sequential(Pair(), nn.Linear(3, 3)), ["0"]),
        # lists in lists
        (nn.ModuleList([nn.ModuleList([Pair()]), nn.ModuleList([Pair()])]), ["0.0", "1.0"]),
        # two names
        (
            nn.ModuleList([nn.ModuleList([pair := Pair()]), nn.ModuleList([pair, Pair()])]),
            ["0.0", "1.1"],
        ),
        # containers in a container
        (
            nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in "ab")),
            ["0[0:2]", "1[0:2]"],
        ),
        # a Sequential with a forward pass of its own, alone and repeated
        (Skip(nn.Linear(3, 3), nn.ReLU()), []),
        (nn.ModuleList([Skip(nn.Linear(3, 3), nn.ReLU()) for _ in "ab"]), ["0", "1"]),
        # without parameters
        (nn.ModuleList([Backbone(), Backbone()]), []),
        # a layer with a parametrized weight is still a layer
        (nn.ModuleList([spectral_norm(nn.Linear(3, 3)), spectral_norm(nn.Linear(3, 3))]), []),
        (nn.ModuleList([nn.Sequential(nn.ReLU(), nn.Dropout()), nn.Identity()]), []),
    ],
)
def test_blocks_are_the_outermost_that_are_repeated(model: nn.Module, names: list[str]) -> None:
    """One that is alone of its class yields to those inside it; a container never is one."""
    assert [block.name for block in find_blocks(model)] == names
