"""Own criteria whose denominator reads outputs or learns, is capped, or shows its coupling late."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses import asked_criterion
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.errors import BadInputError

F64 = torch.float64
SIZES = [[4, 4, 3], [1, 2, 1, 6], [1, 1, 1], [2] * 11]
Window = list[tuple[Tensor, Tensor]]


class Own(nn.Module):
    """A criterion of one's own: a sum, and what it is divided by."""

    reduction = "mean"

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        total, n = self.parts(o, t)
        return total if self.reduction == "sum" else total / n


def kept(o: Tensor, t: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return (F.cross_entropy(o, t, reduction="none") * k).sum(), k.sum().clamp(min=1)


class Ohem(Own):
    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return kept(o, t, F.cross_entropy(o.detach(), t, reduction="none") > 0.7)


class Confident(Own):
    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return kept(o, t, o.detach().softmax(-1).amax(-1) > 0.6)


class Large(Own):
    """A threshold that few random outputs are about."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return kept(o, t, o.detach().abs().amax(1) > 1.7)


class PositiveOutputs(Own):
    """All losses, over what is said to be foreground."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o, t, reduction="sum"), (o[:, 0].sigmoid() > 0.5).sum().clamp(min=1)


class Soft(Own):
    """Weights without gradient, that add up."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o, t, reduction="sum"), o.detach().sigmoid().sum()


class ByMethod(Own):
    def denominator(self, o: Tensor, t: Tensor) -> Tensor:
        return (o[:, 0] > 0).sum().clamp(min=1)

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o, t, reduction="sum"), self.denominator(o, t)


class Temperature(Own):
    """What is learned in the sum alone is no reason to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.ones((), dtype=F64))

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o * self.t, t, reduction="sum"), len(t)


def window(sizes: list[int]) -> Window:
    g = torch.Generator().manual_seed(5)
    return [
        (torch.randn(n, 4, generator=g, dtype=F64), torch.randint(0, 3, (n,), generator=g))
        for n in sizes
    ]


def net() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Linear(4, 3).double()
    model.weight.data *= 2
    return model


def by_hand(criterion: nn.Module, micro_batches: Window, reduction: str) -> Tensor:
    model = net()
    parameters = [*model.parameters(), *criterion.parameters()]
    if reduction == "global_mean":
        x, y = (torch.cat(column) for column in zip(*micro_batches, strict=True))
        loss = criterion(model(x), y)
    else:
        loss = sum(criterion(model(x), y) for x, y in micro_batches) / len(micro_batches)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def accumulated(criterion: nn.Module, micro_batches: Window, reduction: Any = "global_mean") -> Tensor:
    model = net()
    parameters = [*model.parameters(), *criterion.parameters()]
    for parameter in parameters:
        parameter.grad = None
    accumulate_gradients(model, criterion, micro_batches, reduction=reduction)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", [Ohem, Confident, Large, PositiveOutputs, Soft, ByMethod, Temperature])
@pytest.mark.parametrize("reduction", ["global_mean", "mean"])
def test_what_outputs_decide_is_counted_of_the_models_own(
    kind: type[Own], sizes: list[int], reduction: str
) -> None:
    """Random outputs stand for none that a threshold looks at."""
    micro_batches = window(sizes)
    expected = by_hand(kind(), micro_batches, reduction)
    assert (accumulated(kind(), micro_batches, reduction) - expected).norm() <= 1e-12 * expected.norm()


class LearnedWeights(Own):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=F64))

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        w = self.w.exp()[t]
        return (F.cross_entropy(o, t, reduction="none") * w).sum(), w.sum()


class LearnedScale(Own):
    """It stands in a list, and what it scales is a count."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones((), dtype=F64))])

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o, t, reduction="sum"), len(t) * self.scales[0]


class SparseCentres(LearnedWeights):
    """The weights come from an embedding with sparse gradients, after a call that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.of_class = nn.Embedding(3, 1, sparse=True).double()
        self.calls = 0

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        self.calls += 1
        w = self.of_class(t)[:, 0].exp()
        return (F.cross_entropy(o, t, reduction="none") * w).sum(), w.sum()


@pytest.mark.parametrize("kind", [LearnedWeights, LearnedScale, SparseCentres])
def test_a_denominator_that_learns_is_refused_by_name(kind: type[Own]) -> None:
    """Its own gradient would be lost."""
    with pytest.raises(
        BadInputError, match=f"{kind.__name__}: its mean is not its sum divided by a count"
    ):
        accumulate_gradients(net(), kind(), window([3, 2]))


@pytest.mark.parametrize("kind", [LearnedWeights, LearnedScale])
def test_under_mean_what_learns_has_the_criterions_own_gradient(kind: type[Own]) -> None:
    """Of each micro-batch's own mean."""
    micro_batches = window([3, 2, 2])
    expected = by_hand(kind(), micro_batches, "mean")
    assert (accumulated(kind(), micro_batches, "mean") - expected).norm() <= 1e-12 * expected.norm()


def test_a_method_whose_denominator_has_a_gradient_is_refused() -> None:
    """As where the criterion's mean shows it."""

    class Area(ByMethod):
        def denominator(self, o: Tensor, t: Tensor) -> Tensor:
            return o.sigmoid().sum()

    with pytest.raises(BadInputError, match="Area: its denominator has a gradient"):
        accumulate_gradients(net(), Area(), window([3, 2]))


class Contrastive(Own):
    """One sample by itself has no loss."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o @ o.flip(1).T, torch.arange(len(o)), reduction="sum"), len(o)


class Mining(Own):
    """Positives, and three times as many of the hardest negatives."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        positive = (t > 0).to(o.dtype)
        loss, n = (
            F.binary_cross_entropy_with_logits(o[:, 0], positive, reduction="none"),
            int((t > 0).sum()),
        )
        hardest = (loss * (1 - positive)).topk(min(len(loss) - n, 3 * n)).values
        return (loss * positive).sum() + hardest.sum(), max(1, n)


class Centred(Own):
    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return (o - o.mean(0)).square().sum(), len(t)


class Hardest(Own):
    """A triplet of every sample: without another class in its micro-batch it has none."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        same, between = t[:, None] == t, (o[:, None] - o).square().sum(-1)
        nearest = between.masked_fill(same, 1e3).amin(1)
        return F.relu(1 + (between * same).amax(1) - nearest).sum(), len(t)


class Middle(Own):
    """Over those whose loss is above the micro-batch's median."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        loss = F.cross_entropy(o, t, reduction="none")
        return loss.sum(), (loss.detach() >= loss.detach().median()).sum()


class Greatest(Own):
    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        loss = F.cross_entropy(o, t, reduction="none")
        return loss.sum(), loss.detach().max()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", [Contrastive, Mining, Centred, Hardest, Middle, Greatest])
def test_what_couples_samples_is_refused_however_few_a_micro_batch_holds(
    kind: type[Own], sizes: list[int]
) -> None:
    """Micro-batches are looked at joined: the first by itself need not show it."""
    if (kind, sizes) == (Mining, [4, 4, 3]):
        sizes = [2, 2, 1]  # else every negative is among the hardest
    with pytest.raises(
        BadInputError, match=f"{kind.__name__}: its (sum|denominator) over a batch is not"
    ):
        accumulate_gradients(net(), kind(), window(sizes))


class Capped(Own):
    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o, t, reduction="sum"), (t > 0).sum().clamp(min=1, max=5)


class CappedMethod(Capped):
    def denominator(self, o: Tensor, t: Tensor) -> Tensor:
        return (t > 0).sum().clamp(min=1, max=5)


class CappedHigh(Own):
    """A cap that the first micro-batches joined stay below, and the window does not."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o, t, reduction="sum"), min(len(t), 31)


@pytest.mark.parametrize(("kind", "sizes"), [
    (Capped, [4, 4, 3]), (Capped, [2] * 11), (Capped, [1, 1, 1]), (CappedMethod, [4, 4, 3]),
    (CappedMethod, [2] * 11), (CappedHigh, [2] * 21), (CappedHigh, [2] * 4),
])  # fmt: skip
def test_a_denominator_that_is_capped_is_capped_for_the_window(
    kind: type[Own], sizes: list[int]
) -> None:
    """`clamp(max=…)` is of the window's count, as the large batch has it."""
    micro_batches = window(sizes)
    expected = by_hand(kind(), micro_batches, "global_mean")
    assert (accumulated(kind(), micro_batches) - expected).norm() <= 1e-12 * expected.norm()


class Share(Own):
    """A cap that grows with the batch is none."""

    def parts(self, o: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(o, t, reduction="sum"), min(float((t > 0).sum()) + 1e-3, 0.5 * len(t))


def test_a_cap_that_grows_with_the_batch_is_refused() -> None:
    """What the window would be divided by does not follow from what its parts are divided by."""
    with pytest.raises(BadInputError, match="Share: its denominator over a batch"):
        accumulate_gradients(net(), Share(), window([2] * 11))


def test_later_micro_batches_cost_one_sum_and_one_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the outputs' values are read: joined they are looked at in the first ones only."""
    asked: list[int] = []
    answer = asked_criterion.CriterionCopies._answer

    def counted(self: Any, *arguments: Any) -> Tensor:
        asked.append(1)
        return answer(self, *arguments)

    monkeypatch.setattr(asked_criterion.CriterionCopies, "_answer", counted)
    loss_fn, model = CriterionLoss(Soft()), net()
    accumulate_gradients(model, loss_fn, window([3] * 9))
    asked.clear()
    accumulate_gradients(model, loss_fn, window([3, 3]))
    assert len(asked) <= 2 * 2 + 2
