"""The audit against a list made by reading torchvision's source: experiments/certificate/expected.py."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from experiments.certificate.build import CLASSES, SHAPE, audit, is_right, named, window, written
from experiments.certificate.expected import EXPECTED, FAMILIES, LEFT_OUT
from gaccum_exp.audit.result import Audit
from gaccum_exp.models.torchvision import TorchvisionModel, classification_names
from tests.shortened import shortened

SMALL = (3, 32, 32)
# Small ones of all kinds, and the split: N, and samples that N does not divide.
AUDITED = [
    ("efficientnet_b0", 2, 5),
    ("googlenet", 2, 5),
    ("mc3_18", 2, 3),
    ("mnasnet0_5", 2, 5),
    ("mobilenet_v3_small", 2, 5),
    ("quantized_shufflenet_v2_x0_5", 3, 7),
    ("regnet_y_400mf", 2, 5),
    ("resnet18", 4, 9),
    ("shufflenet_v2_x0_5", 2, 5),
    ("squeezenet1_1", 3, 7),
]
# These families have no small member, and so their classes are built as deep and not as wide.
NARROW: dict[str, Callable[[], nn.Module]] = {
    "convnext_tiny": lambda: models.ConvNeXt(
        [
            CNBlockConfig(width, following, depth)
            for width, following, depth in ((8, 16, 3), (16, 32, 3), (32, 64, 9), (64, None, 3))
        ],
        stochastic_depth_prob=0.1,
        num_classes=CLASSES,
    ),
    "swin_t": lambda: models.SwinTransformer(
        [4, 4], 12, [2, 2, 6, 2], [1, 2, 4, 8], [7, 7], stochastic_depth_prob=0.2, num_classes=CLASSES
    ),
    "vit_b_16": lambda: models.VisionTransformer(32, 8, 12, 4, 32, 64, num_classes=CLASSES),
}
# RegNet counts its blocks with tensors that need memory, so it does not build on `meta`.
BUILT = sorted(name for name in EXPECTED if not name.startswith("regnet"))
BUILT_IN_MEMORY = ["regnet_x_400mf", "regnet_y_400mf"]


@pytest.mark.parametrize(
    ("name", "steps", "samples"),
    shortened(AUDITED, ["mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1"]),
)
def test_verdict_and_culprits_are_those_read_from_the_source(
    name: str, steps: int, samples: int
) -> None:
    """Verdict, first culprit, its class, and the first culprit of each cause."""
    agrees_with_the_list(audit(named(name, SMALL), window(samples, steps, SMALL)), name)


@pytest.mark.parametrize(("name", "steps"), [("convnext_tiny", 3), ("swin_t", 2), ("vit_b_16", 3)])
def test_the_same_of_families_without_a_small_member(name: str, steps: int) -> None:
    """Attention, LayerNorm and stochastic depth: nothing mixes samples, and draws are replayed."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(net=NARROW[name]()))
    agrees_with_the_list(audit(model, window(2 * steps + 1, steps, SMALL)), name)


def agrees_with_the_list(found: Audit, name: str) -> None:
    family = EXPECTED[name]
    assert is_right(found, family), (
        f"{found.verdict}, {written(found.culprits)}: {found.detail}; "
        f"expected {family.verdict}, {written(family.culprits)}"
    )


def test_the_list_names_every_classification_model() -> None:
    """Each once, and what is left out is on it, with a reason."""
    named = [name for family in FAMILIES for name in family.names.split()]
    assert sorted(named) == classification_names()
    assert set(LEFT_OUT) <= set(named)
    assert all(LEFT_OUT.values())


@pytest.mark.parametrize("name", [*BUILT, *BUILT_IN_MEMORY])
def test_every_culprit_of_the_list_is_a_module_of_that_class(name: str) -> None:
    """In the model as it is built, so a renamed layer is noticed."""
    family = EXPECTED[name]
    with torch.device("cpu" if name in BUILT_IN_MEMORY else "meta"):
        model = TorchvisionModel(name, SHAPE, CLASSES, image_size=family.image_size)
    modules = dict(model.named_modules())
    for culprit in family.culprits:
        assert type(modules[culprit.name]).__name__ == culprit.type


def as_expected(name: str) -> Audit:
    """Return the audit that the list wants."""
    family = EXPECTED[name]
    first = family.culprits[0]
    return Audit(
        family.verdict, 3, "global_mean",
        culprit=first.name, culprit_type=first.type, culprits=family.culprits,
    )  # fmt: skip


def test_an_audit_that_blames_another_layer_is_not_right() -> None:
    """Nor one with another verdict, another class, or one culprit too few."""
    family = EXPECTED["efficientnet_b0"]
    first = family.culprits[0]
    right = as_expected("efficientnet_b0")
    assert is_right(right, family)
    for wrong in (
        replace(right, verdict="stochastic"),
        replace(right, culprit="net.features.1.0.block.0.1"),
        replace(right, culprit_type="BatchNorm3d"),
        replace(right, culprits=(first,)),
    ):
        assert not is_right(wrong, family)
