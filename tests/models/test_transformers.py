"""transformers' models by architecture and by folder, and adapters beside their weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gaccum_exp.errors import BadInputError
from gaccum_exp.models.transformers import transformers_model
from tests.unimportable import unimportable

SMALL = {"n_layer": 1, "n_embd": 4, "n_head": 1, "n_positions": 8}


def built(name: str = "gpt2", **options: Any) -> Any:
    return transformers_model(name, **({"config": SMALL, "num_classes": 7} | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights as save_pretrained writes them, of seven tokens."""
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    built().save_pretrained(path)
    return str(path)


def test_a_folders_weights_are_those_that_were_written(folder: str) -> None:
    """In float32, whatever they were computed in; its tokens may be more than the data have."""
    torch.manual_seed(3)
    written = built().state_dict()
    found = built(folder, config=None, num_classes=5).state_dict()
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], written[key]) for key in found)


def test_a_classifiers_adapters_and_its_new_last_layer_are_trained() -> None:
    """With named layers, as LoraConfig takes them."""
    model = built(task="classifier", lora={"r": 2, "target_modules": ["c_attn"]})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"lora_A" in name or "lora_B" in name or "score" in name for name in trained} == {True}
    assert any("score" in name for name in trained)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "gpt3"}, r"no architecture of transformers, did you mean .* nothing is downloaded"),
        ({"name": str(Path(__file__).parent)}, "the folder has no config.json"),
        ({"name": "t5", "config": {}}, r"model\.name=t5: "),
        ({"name": "vit", "config": {}}, r"model\.name=vit: "),
        ({"config": {"n_layers": 2}}, r"model\.config\.n_layers: GPT2Config .*did you mean 'n_layer'"),
        ({"config": SMALL | {"n_head": 3}}, r"model\.name=gpt2: .*divisible"),
        ({"task": "clasifier"}, "did you mean 'classifier'"),
        ({"lora": {"rank": 3}}, r"model\.lora\.rank: LoraConfig takes no such argument"),
        ({"lora": 0}, r"model\.lora=0: "),
        ({"lora": {"target_modules": ["q_proj"]}}, r"this model's layers are c_attn, c_fc, c_proj"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_line(options: dict[str, Any], said: str) -> None:
    """By its key; a value that an architecture does not know would be kept, and never read."""
    with pytest.raises(BadInputError, match=said) as raised:
        built(**options)
    assert "\n" not in str(raised.value)


def test_data_of_more_tokens_than_a_folders_model_are_refused(folder: str) -> None:
    """Their ids would lie beyond its embedding."""
    with pytest.raises(BadInputError, match=r"model\.num_classes=9: the weights of .* know 7 tokens"):
        built(folder, config=None, num_classes=9)


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_without_a_package_the_extra_is_named(package: str) -> None:
    """In one line, as it is installed."""
    with unimportable(package), pytest.raises(BadInputError, match=f"needs {package}: pip install"):
        built(lora=2)
