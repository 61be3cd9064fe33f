"""The ready files of models and data, from the configuration to a verdict and a step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import Dataset

from gaccum_exp.audit.result import Audit
from gaccum_exp.train.audits import audit
from gaccum_exp.train.build import build
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step
from tests.support import settings

GPT2 = (
    "model=transformers", "+model.config={n_layer:1,n_embd:8,n_head:2,n_positions:16,resid_pdrop:0,"
    "embd_pdrop:0,attn_pdrop:0}", "data=text", "data.shift_labels=false", "data.context=12",
    "data.layout=paragraphs", "criterion=model_loss", "optimizer=adamw", "data.global_batch_size=8",
    "accum.steps=3", "runtime.device=cpu",
)  # fmt: skip


class LabelledTokens(Dataset[dict[str, Any]]):
    """Sequences of tokens with one label each."""

    classes = ("even", "odd")

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(index, index + 5) % 9 + 1
        return {"input_ids": ids, "attention_mask": torch.ones(5), "labels": index % 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Paragraphs of unequal length."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join("abcde"[n % 5] * (3 + 7 * n % 11) + "x" for n in range(40)))
    return f"data.root={file}"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images whose masks have unequal numbers of pixels that count."""
    root = tmp_path_factory.mktemp("scenes")
    drawn = np.random.default_rng(0)
    for number in range(8):
        for split in ("train", "val"):
            mask = drawn.integers(0, 3, (8, 8), dtype=np.uint8)
            mask[number + 1 :] = 255
            image = drawn.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            for kind, pixels in (("images", image), ("masks", mask)):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / split / kind / f"{number}.png")
    return f"data.root={root}"


def judged(*overrides: str) -> tuple[TrainState, Audit]:
    """Build, judge the first window, and take its step."""
    state = build(settings(*overrides))
    window = next(state.windows_from(0))
    found = audit(state, window, 0)
    assert torch.isfinite(torch.as_tensor(take_step(state, window)["train/loss"]))
    return state, found


@pytest.mark.parametrize(("reduction", "verdict"), [("mean", "biased"), ("global_mean", "equivalent")])
def test_the_mean_of_means_is_biased_on_masks_and_the_global_mean_is_not(
    scenes: str, reduction: str, verdict: str
) -> None:
    """Micro-batches have unequal numbers of pixels that count; a convolution is a model for pixels."""
    model = ("model=custom", "model._target_=torch.nn.Conv2d", "+model.in_channels=3",
             "+model.out_channels=3", "+model.kernel_size=3", "+model.padding=1")  # fmt: skip
    _, found = judged("data=segmentation", scenes, "data.num_classes=3", "data.image_size=8", *model,
                      "data.workers=0", "data.global_batch_size=6", "accum.steps=3",
                      "runtime.device=cpu", f"accum.reduction={reduction}")  # fmt: skip
    assert found.verdict == verdict
    if verdict == "biased":
        assert found.cause == "unequal denominators"


def test_torchvisions_models_for_segmentation_give_logits_for_every_pixel(scenes: str) -> None:
    """Of the images' own size, without auxiliary ones; BatchNorm is found."""
    name = "lraspp_mobilenet_v3_large"
    _, found = judged("data=segmentation", scenes, "data.num_classes=3", "data.image_size=32",
                      "model=torchvision", f"model.name={name}", "data.workers=0",
                      "data.global_batch_size=4", "accum.steps=2", "runtime.device=cpu")  # fmt: skip
    assert found.verdict == "biased"
    assert found.cause == "batch statistics"


@pytest.mark.parametrize(("reduction", "verdict"), [("mean", "biased"), ("global_mean", "equivalent")])
def test_a_model_of_transformers_counts_its_tokens(text: str, reduction: str, verdict: str) -> None:
    """By its own loss, given the count of the whole window."""
    _, found = judged(*GPT2, text, f"accum.reduction={reduction}")
    assert found.verdict == verdict


def test_under_lora_adapters_alone_are_trained_by_tokens_too(text: str) -> None:
    """Every other weight stays what it was, and the gradient is the large batch's."""
    state, found = judged(*GPT2, text, "model.lora=2")
    assert found.verdict == "equivalent"
    trained = [name for name, p in state.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    take_step(state, next(state.windows_from(1)))
    moved = {name for name, p in state.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= set(trained)


def test_a_models_memory_is_predicted_under_lora_with_groups_by_name(text: str) -> None:
    """Its step is taken on tensors without values: nothing in it reads them."""
    groups = "optimizer.param_groups=[{names:*lora_B*,lr:0.01}]"
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    state = build(settings(*GPT2, text, "model.lora=2", groups), fake=fake)
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.001, 0.01]


@pytest.mark.parametrize("criterion", ["model_loss", "cross_entropy"])
def test_a_classifier_of_transformers_takes_sequences_with_one_label(criterion: str) -> None:
    """By its own loss or by a criterion of its logits; padding has a token although GPT-2 names none."""
    _, found = judged(*GPT2[:2], "model.task=classifier", "+model.config.vocab_size=10", "data=custom",
                      f"data.train._target_={__name__}.LabelledTokens", "data.global_batch_size=7",
                      "accum.steps=3", "runtime.device=cpu", f"criterion={criterion}")  # fmt: skip
    assert found.verdict == "equivalent"


def test_a_table_is_learned_by_the_mlp(tmp_path: Path) -> None:
    """A regression has one output, and `num_classes` says so."""
    rows = "\n".join(f"{n},{'ab'[n % 2]},{2 * n + n % 2}" for n in range(30))
    (tmp_path / "t.csv").write_text(f"x,kind,y\n{rows}\n")
    state, found = judged("data=csv", f"data.file={tmp_path}/t.csv", "data.target=y",
                          "data.task=regression", "criterion=mse", "model=mlp", "model.hidden=[4]",
                          "data.global_batch_size=8", "accum.steps=3", "optimizer.lr=0.0001",
                          "runtime.device=cpu")  # fmt: skip
    assert found.verdict == "equivalent"
    outputs = state.model(torch.zeros(2, 3))
    assert isinstance(outputs, Tensor)
    assert outputs.shape == (2, 1)


def test_timms_models_take_the_datas_channels_and_classes() -> None:
    """Grey images of ten classes; BatchNorm is found."""
    state, found = judged("model=timm", "model.name=test_resnet", "data.global_batch_size=8",
                          "accum.steps=2", "runtime.device=cpu")  # fmt: skip
    assert found.cause == "batch statistics"
    assert state.model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
