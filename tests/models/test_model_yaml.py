"""Every model block composes from its YAML file and builds for the data it is given."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

CONF = Path(__file__).parents[2] / "conf"
FILLED = {"gpt": {"vocab_size": 5}, "transformers": {"num_classes": 5}}
"""What the data set tells a model that is not for images of five classes."""
SMALL = {
    "timm": ("model.name=test_resnet",),
    "transformers": ("+model.config={n_layer:1,n_embd:4,n_head:1}",),
}
"""What makes a model small whose file's own is not."""
BUILT_IN = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "custom")


def composed(block: str, *overrides: str) -> DictConfig:
    """Compose one file of the group `model` with overrides from a command line."""
    with initialize_config_dir(str(CONF), version_base=None):
        node = compose(f"model/{block}", overrides=list(overrides)).model
    assert isinstance(node, DictConfig)
    return node


def filled(block: str) -> dict[str, Any]:
    """Return the keys that are null in a model's file and filled in from the data set."""
    return FILLED.get(block, {"input_shape": [1, 8, 8], "num_classes": 5})


class Net(nn.Linear):
    """A stranger's model."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 2)


@pytest.mark.parametrize("block", BUILT_IN)
def test_every_block_composes_and_builds(block: str) -> None:
    """Filled in with the shape and the classes of the data, each file gives logits."""
    node = composed(block, *SMALL.get(block, ()))
    assert all(node[key] is None for key in filled(block))
    model = instantiate(node, **filled(block))
    assert isinstance(model, nn.Module)
    if block in FILLED:
        outputs = model(torch.tensor([[0, 1, 2], [2, 3, 4]]))
        assert getattr(outputs, "logits", outputs).shape == (2, 3, 5)
    else:
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("block", BUILT_IN)
def test_every_argument_is_a_key_with_the_same_default(block: str) -> None:
    """The YAML file shows every argument that there is, so that none is hidden in the code."""
    node = composed(block)
    arguments = inspect.signature(get_object(node._target_)).parameters
    assert set(arguments) == set(node) - {"_target_"}
    given = OmegaConf.to_container(node)
    assert isinstance(given, dict)
    for name, argument in arguments.items():
        default = argument.default
        if default is not inspect.Parameter.empty:
            plain = list(default) if isinstance(default, tuple) else default
            assert (given[name] or None) == (plain or None), name  # {} stands for None


def test_strangers_model_is_used_by_its_target() -> None:
    """model=custom takes a target and the arguments added to it."""
    node = composed("custom", f"model._target_={__name__}.Net", "+model.hidden=3")
    assert instantiate(node)(torch.randn(4, 3)).shape == (4, 2)
