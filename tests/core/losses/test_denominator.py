"""What each criterion divides by, against the criterion itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.losses.denominator import ReducedAs
from gaccum_exp.errors import BadInputError

# torch's own advice on KLDivLoss, whose `mean` is under test here.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

B, C = 6, 4
F64 = torch.float64


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def labels(*shape: int, classes: int = C) -> Tensor:
    return torch.randint(classes, shape)


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape).double() * 2 - 1


def some_ignored(*shape: int) -> Tensor:
    target = labels(*shape)
    target.view(-1)[::3] = -100
    return target


def probabilities(*shape: int) -> Tensor:
    return draw(*shape).softmax(1)


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=F64)

# criterion, outputs, targets: every loss of torch.nn that takes `reduction`
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Callable[[], Any]]] = {
    "L1": (nn.L1Loss, lambda: draw(B, 3), lambda: draw(B, 3)),
    "MSE": (nn.MSELoss, lambda: draw(B, 3, 2), lambda: draw(B, 3, 2)),
    "SmoothL1": (nn.SmoothL1Loss, lambda: draw(B), lambda: draw(B)),
    "Huber": (nn.HuberLoss, lambda: draw(B, 3), lambda: draw(B, 3)),
    "BCE": (nn.BCELoss, lambda: torch.rand(B, 3, dtype=F64), lambda: labels(B, 3, classes=2).double()),
    "BCE weighted": (
        lambda: nn.BCELoss(weight=torch.tensor([1.0, 5.0, 2.0], dtype=F64)),
        lambda: torch.rand(B, 3, dtype=F64),
        lambda: labels(B, 3, classes=2).double(),
    ),
    "BCEWithLogits pos_weight": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 1.0], dtype=F64)),
        lambda: draw(B, 2),
        lambda: labels(B, 2, classes=2).double(),
    ),
    "SoftMargin": (nn.SoftMarginLoss, lambda: draw(B, 3), lambda: signs(B, 3)),
    "KLDiv mean": (nn.KLDivLoss, lambda: draw(B, C).log_softmax(1), lambda: probabilities(B, C)),
    "KLDiv batchmean": (
        lambda: nn.KLDivLoss(reduction="batchmean"),
        lambda: draw(B, C).log_softmax(1),
        lambda: probabilities(B, C),
    ),
    "PoissonNLL": (nn.PoissonNLLLoss, lambda: draw(B, 2), lambda: torch.rand(B, 2, dtype=F64) * 5),
    "GaussianNLL": (
        nn.GaussianNLLLoss,
        lambda: (draw(B, 2), torch.rand(B, 2, dtype=F64) + 0.5),
        lambda: draw(B, 2),
    ),
    "HingeEmbedding": (nn.HingeEmbeddingLoss, lambda: draw(B, 3).abs(), lambda: signs(B, 3)),
    "MarginRanking": (nn.MarginRankingLoss, lambda: (draw(B), draw(B)), lambda: signs(B)),
    "CosineEmbedding": (nn.CosineEmbeddingLoss, lambda: (draw(B, 3), draw(B, 3)), lambda: signs(B)),
    "MultiMargin": (nn.MultiMarginLoss, lambda: draw(B, C), lambda: labels(B)),
    "MultiMargin weighted": (
        lambda: nn.MultiMarginLoss(weight=WEIGHT),
        lambda: draw(B, C),
        lambda: labels(B),
    ),
    "MultiLabelMargin": (
        nn.MultiLabelMarginLoss,
        lambda: draw(B, C),
        lambda: torch.tensor([[0, 2, -1, 0]] * B),
    ),
    "MultiLabelSoftMargin": (
        nn.MultiLabelSoftMarginLoss,
        lambda: draw(B, C),
        lambda: labels(B, C, classes=2).double(),
    ),
    "Triplet": (nn.TripletMarginLoss, lambda: (draw(B, 3), draw(B, 3), draw(B, 3)), lambda: ()),
    "Triplet distance": (
        nn.TripletMarginWithDistanceLoss,
        lambda: (draw(B, 3), draw(B, 3), draw(B, 3)),
        lambda: (),
    ),
    "NLL": (nn.NLLLoss, lambda: draw(B, C).log_softmax(1), lambda: labels(B)),
    "NLL 2d weighted": (
        lambda: nn.NLLLoss(weight=WEIGHT),
        lambda: draw(B, C, 2, 3).log_softmax(1),
        lambda: some_ignored(B, 2, 3),
    ),
    "CE": (nn.CrossEntropyLoss, lambda: draw(B, C), lambda: labels(B)),
    "CE ignored": (nn.CrossEntropyLoss, lambda: draw(B, C), lambda: some_ignored(B)),
    "CE ignore_index": (
        lambda: nn.CrossEntropyLoss(ignore_index=1),
        lambda: draw(B, C, 5),
        lambda: labels(B, 5),
    ),
    "CE weighted": (
        lambda: nn.CrossEntropyLoss(weight=WEIGHT),
        lambda: draw(B, C),
        lambda: some_ignored(B),
    ),
    "CE weighted smoothed": (
        lambda: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        lambda: draw(B, C, 2),
        lambda: some_ignored(B, 2),
    ),
    "CE soft": (nn.CrossEntropyLoss, lambda: draw(B, C), lambda: probabilities(B, C)),
    "CE soft weighted smoothed": (
        lambda: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        lambda: draw(B, C, 3),
        lambda: probabilities(B, C, 3),
    ),
}  # fmt: skip
if hasattr(nn, "LinearCrossEntropyLoss"):
    CASES["LinearCE"] = (
        lambda: nn.LinearCrossEntropyLoss(3, C).double(),
        lambda: draw(B, 3),
        lambda: some_ignored(B),
    )


def in_order(criterion: nn.Module, outputs: Any, targets: Any) -> list[Any]:
    """Forward's arguments by hand: Gaussian NLL alone takes its target between two outputs."""
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    targets = list(targets) if isinstance(targets, tuple) else [targets]
    if isinstance(criterion, nn.GaussianNLLLoss):
        return [outputs[0], *targets, outputs[1]]
    return [*outputs, *targets]


def listed(targets: Any) -> list[Any]:
    return list(targets) if isinstance(targets, tuple) else [targets]


@pytest.mark.parametrize("name", CASES)
def test_the_denominator_is_the_criterions_own(name: str) -> None:
    """sum / denominator is the criterion's own mean, for every loss of torch.nn."""
    torch.manual_seed(3)
    make, make_outputs, make_targets = CASES[name]
    criterion, outputs, targets = make(), make_outputs(), make_targets()
    own_mean = criterion(*in_order(criterion, outputs, targets))
    loss_sum, denominator = CriterionLoss(criterion).of_outputs(outputs, listed(targets))
    assert abs(loss_sum / denominator - own_mean) <= 1e-12 * abs(own_mean)
    counted = CriterionLoss(criterion).count((None, *listed(targets)))
    assert counted == (None if name.startswith("Triplet") else denominator)


def test_every_loss_of_torch_nn_has_a_case() -> None:
    """A loss that torch adds is noticed here. CTC and the adaptive softmax have tests of their own."""
    known = {type(make()) for make, _, _ in CASES.values()}
    losses = {
        loss
        for loss in vars(nn).values()
        if isinstance(loss, type) and loss.__name__.endswith("Loss") and issubclass(loss, nn.Module)
    }
    assert losses - known == {nn.CTCLoss, nn.AdaptiveLogSoftmaxWithLoss} - known


@pytest.mark.parametrize("name", [name for name in CASES if "batchmean" not in name])
def test_the_probe_finds_what_the_closed_form_says(name: str) -> None:
    """A subclass with its own forward is unknown, so its denominator comes from sum over mean.

    `batchmean` is left out: it is recognised by that word, whatever the class.
    """
    torch.manual_seed(4)
    make, make_outputs, make_targets = CASES[name]
    known, outputs, targets = make(), make_outputs(), make_targets()
    kind = type(known)
    unknown = make()
    unknown.__class__ = type(
        "Unknown", (kind,), {"forward": lambda self, *args: kind.forward(self, *args)}
    )
    if isinstance(known, nn.GaussianNLLLoss):
        unknown.__class__.forward = lambda self, input, target, var: kind.forward(
            self, input, target, var
        )
    expected = CriterionLoss(known).of_outputs(outputs, listed(targets))[1]
    got = CriterionLoss(unknown).of_outputs(outputs, listed(targets))[1]
    assert abs(got - expected) <= 1e-9 * expected


class Own(nn.Module):
    """A criterion that says itself what it divides by."""

    reduction = "mean"

    def denominator(self, output: Tensor, target: Tensor) -> Tensor:
        return (target > 0).sum()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        total = ((output - target).square() * (target > 0)).sum()
        return total if self.reduction == "sum" else total / self.denominator(output, target)


def test_a_criterions_own_method_comes_first() -> None:
    """Neither a closed form nor a probe is asked."""
    output, target = draw(B), torch.tensor([1.0, -1, 2, -2, 3, -3], dtype=F64)
    loss_sum, n = CriterionLoss(Own()).of_outputs(output, [target])
    assert n == 3
    assert torch.isclose(loss_sum / n, Own()(output, target))


class Wrapper(nn.Module):
    """A stranger's criterion around another one, as in many repositories."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.inner = nn.CrossEntropyLoss(reduction=reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return 2 * self.inner(logits / 2, target)


class Ignoring(Wrapper):
    """It has a `reduction` and does not look at it."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target)


class Contrastive(nn.Module):
    """In-batch negatives: not a sum over samples."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        scores = embeddings @ embeddings.T
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)), reduction=self.reduction)


def test_a_wrapped_criterion_is_reduced_inside_as_well() -> None:
    """The reduction is set for the call on every module that has one, and put back."""
    criterion, logits, target = Wrapper(), draw(B, C), labels(B)
    loss_sum, n = CriterionLoss(criterion).of_outputs(logits, [target])
    assert n == pytest.approx(B)
    assert torch.isclose(loss_sum / n, criterion(logits, target))
    assert criterion.reduction == criterion.inner.reduction == "mean"


class Focal(nn.Module):
    """The usual focal loss: single cross entropies, weighed and then reduced; its alpha is no buffer."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.alpha = torch.tensor([0.2, 1.0, 0.5, 2.0])
        self.single = nn.CrossEntropyLoss(reduction="none")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        ce = self.single(logits, target)
        loss = self.alpha.to(ce)[target] * (1 - (-ce).exp()) ** 2 * ce
        return loss.sum() if self.reduction == "sum" else loss.mean()


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
def test_a_focal_loss_keeps_its_single_losses_single(reduction: str) -> None:
    """Its inner criterion is not reduced, and the mean is over the batch."""
    logits, target = draw(B, C), labels(B)
    loss_sum, n = CriterionLoss(Focal(), reduction).of_outputs(logits, [target])
    assert n == pytest.approx(B)
    assert torch.isclose(loss_sum, Focal("sum")(logits, target))
    assert torch.isclose(loss_sum / n, Focal("mean")(logits, target))


def refused(criterion: nn.Module) -> dict[str, str]:
    """Reduction -> the reason for which it is refused on a batch of labels."""
    reasons = {}
    for reduction in ("global_mean", "mean", "sum"):
        try:
            CriterionLoss(criterion, reduction).of_outputs(draw(B, C), [labels(B)])
        except BadInputError as error:
            reasons[reduction] = str(error)
    named = f"is refused for criterion {type(criterion).__name__}"
    assert all(f"{reduction} {named}" in reason for reduction, reason in reasons.items())
    return reasons


def test_a_loss_that_is_no_sum_over_samples_is_refused_by_name() -> None:
    """global_mean has no meaning there; the other two are left to the user."""
    reasons = refused(Contrastive())
    assert list(reasons) == ["global_mean"]
    assert "its sum over a batch is not the sum over the batch's parts" in reasons["global_mean"]


def test_a_criterion_that_ignores_its_reduction_has_no_sum_either() -> None:
    """What looked like a sum would be a sum of means, and nobody would be told."""
    reasons = refused(Ignoring())
    assert list(reasons) == ["global_mean", "sum"]
    assert "its `reduction` changes nothing" in reasons["sum"]


class Needy(Contrastive):
    """It takes labels of one kind only, as the probe cannot know."""

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        raise TypeError("not like this")


def test_a_criterion_that_cannot_be_probed_says_why() -> None:
    """Instead of failing with the stranger's own error from a place that the user does not know."""
    with pytest.raises(BadInputError, match=r"Needy.*could not be asked.*TypeError: not like this"):
        CriterionLoss(Needy()).of_outputs(draw(B, C), [labels(B)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_do_not_cost_the_loss_its_digits(dtype: torch.dtype) -> None:
    """60,000 losses of about 1.4 add up to more than float16 holds and bfloat16 resolves."""
    logits, target = torch.randn(60_000, C), labels(60_000)
    loss_sum, _ = CriterionLoss(nn.CrossEntropyLoss()).of_outputs(logits.to(dtype), [target])
    expected = nn.functional.cross_entropy(logits.to(dtype).double(), target, reduction="sum")
    assert abs(loss_sum - expected) < 1e-5 * expected


def test_a_criterion_reweighted_later_is_counted_with_its_new_weights() -> None:
    """A loss function is kept for the whole training, and class weights may be scheduled."""
    criterion = nn.CrossEntropyLoss(weight=torch.ones(C, dtype=F64))
    loss, target = CriterionLoss(criterion), torch.tensor([0, 1, 1])
    assert loss.count((None, target)) == 3
    criterion.weight = WEIGHT
    assert loss.count((None, target)) == 4.5


def ctc_window() -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    lengths = torch.tensor([2, 5, 3, 1, 4, 2])
    x = draw(6, 12, 5)
    targets = torch.randint(1, 5, (6, 5))
    rows = [slice(0, 2), slice(2, 4), slice(4, 6)]
    return [(x[r], targets[r], torch.full((2,), 12), lengths[r]) for r in rows]


class CTCNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(5, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).log_softmax(-1).transpose(0, 1)  # (time, batch, classes)


def test_ctc_is_refused_under_global_mean_and_sum_is_offered() -> None:
    """Its mean is not its sum divided by a count."""
    with pytest.raises(BadInputError, match=r"refused for criterion CTCLoss.*accum.reduction=sum"):
        accumulate_gradients(CTCNet(), nn.CTCLoss(), ctc_window(), reduction="global_mean")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ctc_accumulates_its_own_mean_or_its_sum(reduction: str) -> None:
    """On equal micro-batches its mean of means is the large batch's own mean, its sum the sum."""
    window = ctc_window()
    whole = [torch.cat(parts) for parts in zip(*window, strict=True)]
    large = CTCNet()
    nn.CTCLoss(reduction=reduction)(large(whole[0]), *whole[1:]).backward()
    small = CTCNet()
    accumulate_gradients(small, nn.CTCLoss(), window, reduction=reduction)  # type: ignore[arg-type]
    assert torch.allclose(small.head.weight.grad, large.head.weight.grad, rtol=1e-12)


def test_the_probe_is_not_fooled_by_a_loss_of_zero_or_by_bfloat16() -> None:
    """The live loss is 0, where sum / mean is NaN, and bfloat16, where it is off."""

    class Unknown(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target)

    perfect = torch.randn(B, 3).bfloat16()
    loss_sum, n = CriterionLoss(Unknown()).of_outputs(perfect, [perfect])
    assert loss_sum == 0
    assert n == B * 3


def test_a_broadcast_is_refused_with_both_shapes() -> None:
    """(6, 1) against (6,) would be 36 elements."""
    with pytest.raises(BadInputError, match=r"\(6, 1\).*\(6,\)"):
        CriterionLoss(nn.MSELoss()).of_outputs(draw(B, 1), [draw(B)])


def test_a_criterion_without_reduction_is_refused() -> None:
    """And the way out is said."""
    with pytest.raises(BadInputError, match="AdaptiveLogSoftmaxWithLoss has no attribute `reduction`"):
        CriterionLoss(nn.AdaptiveLogSoftmaxWithLoss(4, 10, [5]))


def test_a_reduction_set_for_a_moment_is_put_back_after_an_error() -> None:
    """The user's criterion is left as it was."""
    criterion = nn.CrossEntropyLoss()
    logits, wrong = draw(B, C), draw(B, C + 1)
    with pytest.raises(RuntimeError), ReducedAs(criterion, "sum"):
        criterion(logits, wrong)
    assert criterion.reduction == "mean"
    with ReducedAs(criterion, "sum"):
        assert criterion.reduction == "sum"


def test_what_a_criterion_ignores_and_weighs_is_read_when_it_counts() -> None:
    """A criterion whose settings are changed in training is counted as it is then."""
    criterion = nn.CrossEntropyLoss()
    loss = CriterionLoss(criterion)
    micro_batch = torch.zeros(4, 3), torch.tensor([0, 1, 1, 2])
    assert loss.count(micro_batch) == 4
    criterion.ignore_index = 1
    assert loss.count(micro_batch) == 2
    criterion.weight = torch.tensor([1.0, 5.0, 3.0])
    assert loss.count(micro_batch) == 4
    criterion.weight = torch.tensor([2.0, 5.0, 3.0])
    assert loss.count(micro_batch) == 5
    criterion.weight = None
    assert loss.count(micro_batch) == 2
