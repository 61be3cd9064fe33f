"""Losses over features that a loop keeps: a part per micro-batch, or a gradient taken once.

Each loop is measured against the loss of all samples at once, by hand in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from tests.audit.loops import stepped

D = torch.float64
Views = Sequence[tuple[Tensor, Tensor]]
N = 3


class Tower(nn.Module):
    """Encodes both views; has a scale that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.double()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.encoder(a), self.encoder(b), self.scale.exp()


def info_nce(a: Tensor, b: Tensor, scale: Any = 2.0) -> Tensor:
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def triplet(a: Tensor, b: Tensor, scale: Any = 1.0) -> Tensor:
    return scale * (1 + torch.cdist(a, b).diagonal()[:, None] - torch.cdist(a, b)).relu().mean()


def correlation(a: Tensor, b: Tensor, scale: Any = 1.0) -> Tensor:
    c = (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)
    return scale * (c - torch.eye(len(c), dtype=D)).square().sum()


LOSSES = [info_nce, triplet, correlation]
Loss = Callable[..., Tensor]


def window() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 5, dtype=D), torch.randn(n, 5, dtype=D)) for n in (4, 2, 3)]


def without_graph(model: nn.Module, views: Views) -> list[list[Tensor]]:
    """Return the features of each micro-batch, view by view."""
    with torch.no_grad():
        return [list(each) for each in zip(*[model(*pair)[:2] for pair in views], strict=True)]


def put_back(model: nn.Module, loss: Loss, by: float, views: Views) -> None:
    """Take the loss of all features, those of one micro-batch alive among the kept ones."""
    kept = without_graph(model, views)
    for i, pair in enumerate(views):
        alive = model(*pair)
        rows = [[*k[:i], z, *k[i + 1 :]] for k, z in zip(kept, alive, strict=False)]
        (loss(*map(torch.cat, rows)) / by).backward()


def written_over(model: nn.Module, loss: Loss, by: float, views: Views) -> None:
    """The same, with the rows of the kept features written over."""
    kept = [torch.cat(k) for k in without_graph(model, views)]
    start = 0
    for pair in views:
        rows = [k.clone() for k in kept]
        for k, z in zip(rows, model(*pair), strict=False):
            k[start : start + len(z)] = z
        start += len(pair[0])
        (loss(*rows) / by).backward()


def with_surrogates(model: nn.Module, loss: Loss, by: float, views: Views) -> None:
    """Take the gradient at all features once, and each micro-batch's features times its part."""
    kept = [torch.cat(k).requires_grad_() for k in without_graph(model, views)]
    loss(*kept).backward()
    start = 0
    for pair in views:
        parts = [k.grad[start : start + len(pair[0])] for k in kept]  # type: ignore[index]
        start += len(pair[0])
        dots = [(z * g).sum() for z, g in zip(model(*pair), parts, strict=False)]
        (sum(dots) / by).backward()  # type: ignore[union-attr]


def with_gradients(model: nn.Module, loss: Loss, by: float, views: Views) -> None:
    """The same by the gradients that a backward pass may be given."""
    kept = [torch.cat(k).requires_grad_() for k in without_graph(model, views)]
    gradients = torch.autograd.grad(loss(*kept), kept)
    start = 0
    for pair in views:
        parts = [g[start : start + len(pair[0])] / by for g in gradients]
        start += len(pair[0])
        torch.autograd.backward(list(model(*pair)[:2]), parts)


FORMS = [put_back, written_over, with_surrogates]


@pytest.mark.parametrize("given", [True, False], ids=["criterion", "no criterion"])
@pytest.mark.parametrize("loss", LOSSES, ids=[loss.__name__ for loss in LOSSES])
@pytest.mark.parametrize("form", FORMS, ids=[form.__name__ for form in FORMS])
def test_each_micro_batchs_part_is_added_and_divided_by_nothing(
    form: Callable[..., None], loss: Loss, given: bool
) -> None:
    """A loss over kept features is the large batch's, and divided by N it is not."""
    views = window()
    for by in (1, N):
        found = stepped(
            Tower(),
            loss if given else None,
            lambda m, _, by=by: form(m, loss, by, views),
            lambda m: loss(*m(*map(torch.cat, zip(*views, strict=True)))[:2]),
        )
        assert (found.gap <= found.rounding) == (by == 1)
        assert found.audit.sound == (by == 1), str(found.audit)
        assert found.audit.cause == (None if by == 1 else "loss scale"), str(found.audit)


def test_a_gradient_of_features_may_be_given_to_the_backward_pass() -> None:
    """Outputs that are back-propagated with a gradient of their own are a window that is seen."""
    views = window()
    found = stepped(
        Tower(),
        None,
        lambda m, _: with_gradients(m, info_nce, 1, views),
        lambda m: info_nce(*m(*map(torch.cat, zip(*views, strict=True)))[:2]),
    )
    assert found.gap <= found.rounding
    assert found.audit.accum_steps == N
    assert found.audit.verdict != "biased", str(found.audit)


@pytest.mark.parametrize("given", [True, False], ids=["criterion", "no criterion"])
def test_features_of_the_micro_batch_alone_are_not_those_of_the_window(given: bool) -> None:
    """Gradients taken once per micro-batch are no large batch's, however they are handed on."""
    views = window()

    def passes(model: nn.Module, _: Any) -> None:
        for pair in views:
            with_surrogates(model, info_nce, N, [pair])

    found = stepped(
        Tower(),
        info_nce if given else None,
        passes,
        lambda m: info_nce(*m(*map(torch.cat, zip(*views, strict=True)))[:2]),
    )
    assert found.gap > 1e-3
    assert not found.audit.sound, str(found.audit)


def test_a_scale_that_all_share_is_counted_by_every_micro_batch() -> None:
    """What every micro-batch's loss takes as a whole gets its gradient N times, and is named."""
    views = window()

    def passes(model: Any, _: Any) -> None:
        kept = without_graph(model, views)
        for i, pair in enumerate(views):
            *alive, scale = model(*pair)
            rows = [[*k[:i], z, *k[i + 1 :]] for k, z in zip(kept, alive, strict=True)]
            info_nce(*map(torch.cat, rows), scale=scale).backward()

    found = stepped(
        Tower(), info_nce, passes, lambda m: info_nce(*m(*map(torch.cat, zip(*views, strict=True))))
    )
    assert found.gap > 1e-3
    assert (found.audit.verdict, found.audit.cause) == ("biased", "loss scale")
    assert "3 × the large batch's at scale" in found.audit.remedy


def test_a_target_of_the_micro_batchs_own_features_stays_without_graph() -> None:
    """Features that a loop detaches as a target are meant so, and not taken for kept ones."""
    views = window()

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return -F.cosine_similarity(z, target, dim=1).mean()

    def passes(model: Any, _: Any) -> None:
        total = sum(len(a) for a, _ in views)
        for a, b in views:
            z, t, _ = model(a, b)
            (loss(z, t.detach()) * len(a) / total).backward()

    def large(model: Any) -> Tensor:
        z, t, _ = model(*map(torch.cat, zip(*views, strict=True)))
        return loss(z, t.detach())

    found = stepped(Tower(), loss, passes, large)
    assert found.gap <= found.rounding
    assert found.audit.sound, str(found.audit)


def test_the_remedy_for_a_loss_that_couples_samples_is_judged_right() -> None:
    """`strategy=cached` is the large batch, with parameters that the loss reads itself, too."""
    views = window()

    def loss_fn(model: Any, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        a, b, _ = model(*pair)
        return info_nce(a, b, model.scale) * len(a), len(a)

    found = stepped(
        Tower(),
        None,
        lambda m, _: accumulate_gradients(m, loss_fn, views, strategy="cached"),
        lambda m: info_nce(*m(*map(torch.cat, zip(*views, strict=True)))[:2], m.scale),
    )
    assert found.gap <= found.rounding
    assert found.audit.accum_steps == N
    assert found.audit.sound, str(found.audit)
