"""`audit_window` at the edges: gradients of zero, odd windows, modules that change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.core.reductions import Mean, reduction_named
from tests.audit.support import CE, CLASSES, FEATURES, HIDDEN, Fn, net, window
from tests.boxes import BoxLoss, Detector, Scenes

SIZES = (4, 4, 3)
SOUND = ("equivalent", "identical")


def nothing_counts(model: nn.Module, micro_batch: Any) -> Any:
    return (model(micro_batch[0]) * 0).sum(), len(micro_batch[0])


def biased_only(scale: float) -> nn.Module:
    """Only a shift of all logits is trained, of which cross entropy knows nothing."""
    torch.manual_seed(0)

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
            self.shift = nn.Parameter(torch.randn(1) * scale)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.shift

    return Shift()


def test_a_gradient_of_zero_is_inconclusive() -> None:
    """There is nothing to compare."""
    found = audit_window(net(), nothing_counts, window(4, 3))
    assert found.verdict == "inconclusive"
    assert found.detail is not None
    assert "zero" in found.detail


@pytest.mark.parametrize("sizes", [(4, 4, 3), (1, 1), (2, 1), (1, 1, 1)])
def test_a_gradient_of_zero_but_for_rounding_is_inconclusive(sizes: tuple[int, ...]) -> None:
    """Two roundings of zero are far apart, and neither is a gradient."""
    assert audit_window(biased_only(1.0), CE, window(*sizes)).verdict == "inconclusive"


def test_the_same_micro_batch_again_and_again_is_a_window() -> None:
    """The very same tensors, as when one overfits a batch."""
    (part,) = window(4)
    for reduction in ("global_mean", "mean", "sum"):
        found = audit_window(net(), CE, [part] * 3, reduction=reduction_named(reduction))
        assert found.verdict in SOUND, (reduction, found.report())


def test_micro_batches_of_two_samples_with_a_dict_first_are_a_window() -> None:
    """A pair of (dict, labels) is no list of two samples."""

    def loss_fn(model: nn.Module, micro_batch: Any) -> Any:
        inputs, labels = micro_batch
        return F.cross_entropy(model(inputs["x"]), labels, reduction="sum"), len(labels)

    parts = [({"x": x}, y) for x, y in window(2, 2, 2)]
    assert audit_window(net(), loss_fn, parts).verdict in SOUND


@pytest.mark.parametrize(
    ("form", "sizes"), [("records", (2, 2, 2)), ("pair", (3, 2, 1)), ("sides", (2, 1))]
)
def test_a_detector_on_lists_of_images_and_boxes_is_audited(form: str, sizes: tuple[int, ...]) -> None:
    """In every structure that a collate function gives: sound by boxes, biased by the mean of means."""
    scenes, start, parts = Scenes(form=form, counts=(1, 2, 4)), 0, []
    for size in sizes:
        parts.append(scenes.collate_fn([scenes[i] for i in range(start, start + size)]))
        start += size
    torch.manual_seed(0)
    found = audit_window(Detector(), BoxLoss(), parts)
    assert found.verdict in SOUND, found.report()
    found = audit_window(Detector(), BoxLoss(), parts, reduction=Mean())
    assert (found.verdict, found.cause) == ("biased", "unequal denominators"), found.report()


def test_a_batch_in_front_of_time_stays_a_batch() -> None:
    """Where inputs, outputs and labels have both dimensions, the first one counts samples."""
    torch.manual_seed(0)
    model = nn.LSTM(FEATURES, HIDDEN, batch_first=True)

    def loss_fn(model: nn.Module, micro_batch: Any) -> Any:
        x, y = micro_batch
        return F.mse_loss(model(x)[0], y, reduction="sum"), y.numel()

    parts = [(torch.randn(3, 4, FEATURES), torch.randn(3, 4, HIDDEN)) for _ in range(2)]
    assert audit_window(model, loss_fn, parts).verdict in SOUND


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embedding(ids)).transpose(1, 2)


def test_sequences_of_unequal_length_are_never_accused_for_their_padding() -> None:
    """Joined at the length of the longest, a label made up is none of the user's."""
    torch.manual_seed(0)
    parts = [(torch.randint(7, (2, t)), torch.randint(7, (2, t))) for t in (4, 6, 3)]
    found = audit_window(Tagger(), CE, parts)
    assert found.verdict in (*SOUND, "inconclusive"), found.report()


def transposed_flat(x: Tensor) -> Tensor:
    return x.reshape(-1, 3, 2).transpose(0, 1).reshape(-1, 2)


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.linear = Fn(transposed_flat), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flat(x)).reshape(3, len(x), 2).transpose(0, 1).reshape(len(x), HIDDEN)


class Discarding(nn.Module):
    """Runs a BatchNorm and does nothing with what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return x


@pytest.mark.parametrize("middle", [TimeMajor, Discarding])
def test_a_module_that_changes_no_gradient_is_not_blamed_for_the_counts(
    middle: Callable[[], nn.Module],
) -> None:
    """Unequal micro-batches under `mean` beside rows in another order, and a BatchNorm without use."""
    assert audit_window(net(middle()), CE, window(*SIZES)).verdict == "equivalent"
    found = audit_window(net(middle()), CE, window(*SIZES), reduction=Mean())
    assert (found.verdict, found.cause) == ("biased", "unequal denominators")


@pytest.mark.parametrize("sizes", [(3, 0, 2), (0, 3, 2), (3, 2, 0)])
def test_a_micro_batch_without_samples_is_judged_like_any_other(sizes: tuple[int, ...]) -> None:
    """It has no sample that any module's output could be compared by."""
    audit = audit_window(net(nn.LayerNorm(HIDDEN)), CE, window(*sizes))
    assert audit.verdict == "equivalent"
