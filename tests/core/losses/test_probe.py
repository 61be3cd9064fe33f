"""What unknown criteria count, and what a window is divided by where that is no sum over its parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses import asked_criterion
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.seeding import random_states, same_states
from gaccum_exp.errors import BadInputError

F64 = torch.float64
Window = list[tuple[Tensor, Tensor]]


class Own(nn.Module):
    """A criterion of one's own: single losses, and what their sum is divided by."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def single(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def divisor(self, target: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        total = self.single(logits, target).sum()
        return total if self.reduction == "sum" else total / self.divisor(target)


class Positives(Own):
    """The detectors' way: at least one."""

    def divisor(self, target: Tensor) -> Any:
        return target.sum().clamp(min=1)


class PythonMax(Own):
    def divisor(self, target: Tensor) -> Any:
        return max(1, int(target.sum()))


class Smoothed(Own):
    """A weight at every sample, and a number that keeps it from zero."""

    def divisor(self, target: Tensor) -> Any:
        return target.sum() + 1.0


class Tiny(Own):
    def divisor(self, target: Tensor) -> Any:
        return target.sum() + 1e-8


class TinyClamp(Own):
    def divisor(self, target: Tensor) -> Any:
        return target.sum().clamp(min=1e-6)


class HighClamp(Own):
    """A clamp that most micro-batches are below, and the window is not."""

    def divisor(self, target: Tensor) -> Any:
        return target.sum().clamp(min=4)


class ClampedWeights(Own):
    """Weights below one, so that a part of a count is hidden by the clamp."""

    def divisor(self, target: Tensor) -> Any:
        return (0.3 * target).sum().clamp(min=1)


class ClampAndTiny(Own):
    def divisor(self, target: Tensor) -> Any:
        return target.sum().clamp(min=2) + 1e-3


class Masked(Own):
    """Mean square over what is not masked: nothing of an empty micro-batch is left."""

    def single(self, logits: Tensor, target: Tensor) -> Tensor:
        return (logits - target).square() * (target > 0)

    def divisor(self, target: Tensor) -> Any:
        return (target > 0).sum().clamp(min=1)


class MaskedHighly(Masked):
    """An empty micro-batch has a loss of zero, which does not show the clamp."""

    def divisor(self, target: Tensor) -> Any:
        return (target > 0).sum().clamp(min=4)


class MaskedMean(Masked):
    """Over all, masked or not: an empty micro-batch has no loss, and counts all the same."""

    def divisor(self, target: Tensor) -> Any:
        return target.numel()


class Hinged(Positives):
    """Zero over a wide range, where a probe of its values sees nothing."""

    def single(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.relu(logits - 1) + F.relu(-1 - logits)


class Constant(Own):
    def divisor(self, target: Tensor) -> Any:
        return 7.0


class OwnMethod(Positives):
    """It says itself what it divides by, clamp included."""

    def denominator(self, logits: Tensor, target: Tensor) -> Tensor:
        return target.sum().clamp(min=1)


class Weighted(Own):
    def divisor(self, target: Tensor) -> Any:
        return (1 + 3 * target).sum()


DIVIDED = (
    Positives, PythonMax, Smoothed, Tiny, TinyClamp, HighClamp, ClampedWeights, ClampAndTiny, Masked,
    MaskedHighly, MaskedMean, Hinged, Constant, OwnMethod, Weighted,
)  # fmt: skip
TARGETS = {
    "mixed": [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    "empty first": [[0, 0, 0], [0, 1, 1, 0], [0, 0]],
    "empty all": [[0, 0, 0], [0, 0]],
    "one positive first": [[0, 1, 0, 0], [1, 1, 0, 1]],
    "one in all": [[0, 0], [0, 1], [0]],
    "single samples": [[0], [0], [1], [1], [1]],
    "one pass": [[0, 1, 1]],
}


def window(targets: list[list[int]], dtype: torch.dtype = F64) -> Window:
    torch.manual_seed(0)
    return [
        (3 * torch.randn(len(row), 5, dtype=F64).to(dtype), torch.tensor(row, dtype=dtype))
        for row in targets
    ]


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(5, 1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, 0]


def joined(micro_batches: Window) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*micro_batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", DIVIDED)
def test_a_window_is_divided_as_the_large_batch_is(kind: type[Own], targets: str) -> None:
    """Loss and gradient are the criterion's own on all samples at once, whatever is empty."""
    micro_batches = window(TARGETS[targets])
    large, small = Net(), Net()
    inputs, target = joined(micro_batches)
    mean = kind()(large(inputs), target)
    mean.backward()
    found = accumulate_gradients(small, kind(), micro_batches)
    expected, got = large.layer.weight.grad, small.layer.weight.grad
    assert expected is not None
    got = torch.zeros_like(expected) if got is None else got
    assert (got - expected).norm() <= 1e-12 * expected.norm()
    if found.denominator:
        assert abs(found.mean - mean) <= 1e-12 * mean.abs()
    else:
        assert mean == 0


@pytest.mark.parametrize("kind", DIVIDED)
def test_under_mean_each_micro_batch_keeps_the_criterions_own_mean(kind: type[Own]) -> None:
    """As the plain loop with loss / N has it, a clamp in every one."""
    micro_batches = window(TARGETS["mixed"])
    plain, small = Net(), Net()
    for inputs, target in micro_batches:
        (kind()(plain(inputs), target) / len(micro_batches)).backward()
    accumulate_gradients(small, kind(), micro_batches, reduction="mean")
    expected, got = plain.layer.weight.grad, small.layer.weight.grad
    assert expected is not None
    assert got is not None
    assert (got - expected).norm() <= 1e-12 * expected.norm()


def test_in_float32_a_clamp_is_no_less_exact_than_the_passes_are() -> None:
    """What is counted comes from float64, whatever the model computes in."""
    micro_batches = window(TARGETS["mixed"], torch.float32)
    large, small = Net(torch.float32), Net(torch.float32)
    inputs, target = joined(micro_batches)
    Positives()(large(inputs), target).backward()
    found = accumulate_gradients(small, Positives(), micro_batches)
    assert found.denominator == 5
    assert torch.allclose(small.layer.weight.grad, large.layer.weight.grad, rtol=1e-5)  # type: ignore[arg-type]


class Root(Own):
    def divisor(self, target: Tensor) -> Any:
        return target.sum().clamp(min=1).sqrt()


class Batch(Own):
    """A clamp that grows with the batch: a ratio to every micro-batch, and none to the window."""

    def divisor(self, target: Tensor) -> Any:
        return torch.maximum(target.sum(), target.new_tensor(0.25 * len(target)))


class Kinds(Own):
    """As many as there are different targets."""

    def divisor(self, target: Tensor) -> Any:
        return len(target.unique())


class Joint(Own):
    def divisor(self, target: Tensor) -> Any:
        return (target.sum() ** 2 + 1).sqrt()


@pytest.mark.parametrize("kind", [Root, Batch, Kinds, Joint])
@pytest.mark.parametrize("targets", ["mixed", "empty first", "one positive first", "single samples"])
def test_what_is_no_function_of_a_count_is_refused_by_name(kind: type[Own], targets: str) -> None:
    """Nothing is divided silently by a sum that the large batch does not have."""
    with pytest.raises(BadInputError, match=f"{kind.__name__}: its denominator over a batch is not"):
        accumulate_gradients(Net(), kind(), window(TARGETS[targets]))


class AlwaysMean(Own):
    """It never looks at its reduction."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.single(logits, target).mean()


@pytest.mark.parametrize("targets", TARGETS)
def test_that_a_reduction_changes_nothing_is_said_where_it_is_true(targets: str) -> None:
    """A criterion that ignores it is told so; a clamp with one positive or none is not."""
    with pytest.raises(BadInputError, match="its `reduction` changes nothing"):
        accumulate_gradients(Net(), AlwaysMean(), window(TARGETS[targets]))
    accumulate_gradients(Net(), Positives(), window(TARGETS[targets]))


def test_a_loss_of_several_windows_is_counted_by_what_earlier_ones_have_shown() -> None:
    """Kept for a training, it divides each window rightly, whichever clamp or count comes when."""
    loss_fn = CriterionLoss(ClampedWeights())
    orders = ["empty all", "one positive first", "mixed", "single samples", "empty first", "mixed"]
    for targets in orders:
        micro_batches = window(TARGETS[targets])
        found = accumulate_gradients(Net(), loss_fn, micro_batches)
        counted = 0.3 * sum(sum(row) for row in TARGETS[targets])
        assert found.denominator == pytest.approx(max(1.0, counted), rel=1e-12)


class Stateful(Positives):
    """Counts its calls, keeps a centre and its last loss, and is weighed by the count."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.register_buffer("calls", torch.zeros((), dtype=F64))
        self.centre = torch.zeros((), dtype=F64)
        self.last: Tensor | None = None
        self.history: list[float] = []

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.centre = 0.9 * self.centre + 0.1 * logits.detach().mean()
        self.last = super().forward(logits, target) / self.calls
        self.history.append(float(self.last.detach()))
        return self.last


def test_a_probe_leaves_a_criterions_state_alone_and_is_not_misled_by_it() -> None:
    """The sum and the mean are asked of copies in the same state; the original saw the passes only."""
    criterion = Stateful()
    micro_batches = window(TARGETS["mixed"])
    found = accumulate_gradients(Net(), criterion, micro_batches)
    assert found.denominator == 5
    assert criterion.calls == len(criterion.history) == len(micro_batches)


def test_a_criterion_that_is_reweighted_is_asked_as_it_is_then() -> None:
    """Weights that change in training, in place or by another tensor, change what is counted."""

    class Reweighted(Own):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones((), dtype=F64))

        def single(self, logits: Tensor, target: Tensor) -> Tensor:
            return self.weight * super().single(logits, target)

        def divisor(self, target: Tensor) -> Any:
            return self.weight * len(target)

    criterion = Reweighted()
    loss_fn, (inputs, target) = CriterionLoss(criterion), window([[0, 1, 0]])[0]
    counted = []
    for weight in (1.0, 3.0, 2.0):
        criterion.weight.fill_(weight)
        counted.append(loss_fn.of_outputs(Net()(inputs), [target])[1])
    criterion.weight = torch.tensor(5.0, dtype=F64)
    counted.append(loss_fn.of_outputs(Net()(inputs), [target])[1])
    assert counted == pytest.approx([3, 9, 6, 15])


class Running(Own):
    """Divided by a running mean of its counts, as some detectors do."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.running = 100.0

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self.running = 0.9 * self.running + 0.1 * float(target.sum())
        return super().forward(logits, target)

    def divisor(self, target: Tensor) -> Any:
        return self.running


@pytest.mark.parametrize("targets", ["mixed", "one positive first", "single samples"])
def test_a_divisor_that_moves_with_every_pass_is_refused(targets: str) -> None:
    """No number that the window could be divided by is the large batch's."""
    with pytest.raises(BadInputError, match="Running: its denominator"):
        accumulate_gradients(Net(), Running(), window(TARGETS[targets]))


class Noisy(Positives):
    """It drops single losses."""

    def single(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.dropout(super().single(logits, target), 0.5)


class TrainingNoise(Positives):
    """It drops single losses in training only."""

    def single(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.dropout(super().single(logits, target), 0.5, self.training)


class NoisyMean(AlwaysMean):
    def single(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.dropout(super().single(logits, target), 0.5, self.training)


def test_a_criterion_that_draws_in_training_is_inspected_as_in_evaluation() -> None:
    """Where sums can be compared; what ignores its reduction is not excused by its noise."""
    loss_fn = CriterionLoss(TrainingNoise())
    found = accumulate_gradients(Net(), loss_fn, window(TARGETS["mixed"]))
    assert found.denominator == 5
    assert loss_fn.criterion.training
    with pytest.raises(BadInputError, match="changes nothing"):
        accumulate_gradients(Net(), NoisyMean(), window(TARGETS["mixed"]))


def test_a_domain_is_not_left_where_a_loss_of_zero_asks_for_other_outputs() -> None:
    """An empty micro-batch of probabilities counts nothing, and raises nothing."""
    micro_batches = window(TARGETS["empty first"])

    class Sigmoid(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    class Strict(Masked):
        def single(self, logits: Tensor, target: Tensor) -> Tensor:
            return F.binary_cross_entropy(logits, target, reduction="none") * (target > 0)

    assert accumulate_gradients(Sigmoid(), Strict(), micro_batches).denominator == 2


@pytest.mark.parametrize("kind", [Positives, ClampedWeights, OwnMethod, Smoothed])
def test_large_micro_batches_are_counted_in_parts(
    kind: type[Own], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no copies of what hardly fits into memory once are made, nor any of it kept."""
    monkeypatch.setattr("gaccum_exp.core.losses.probe.MOST_AT_ONCE", 2)
    micro_batches = window(TARGETS["mixed"])
    inputs, target = joined(micro_batches)
    found = accumulate_gradients(Net(), kind(), micro_batches)
    assert found.mean == pytest.approx(float(kind()(Net()(inputs), target).detach()), rel=1e-12)


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that draw."""

    drawn = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "own"), [(Positives, 0), (Noisy, 3), (OwnMethod, 0)])
def test_a_probe_draws_where_nobody_looks(kind: type[Own], own: int) -> None:
    """Neither a mode nor a generator notices it; what the criterion itself draws is seen once a pass."""
    micro_batches = window(TARGETS["empty first"])
    model, loss_fn = Net(), CriterionLoss(kind())
    states = random_states()
    with Watching() as watching:
        accumulate_gradients(model, loss_fn, micro_batches)
    assert watching.drawn == own
    assert same_states(random_states(), states) is (own == 0)


def test_a_probe_works_in_a_transformed_function() -> None:
    """`torch.func` hands on tensors of its own; their shapes are enough."""
    inputs, target = window(TARGETS["one pass"])[0]
    model, loss_fn = Net(), CriterionLoss(Positives())
    parameters = dict(model.named_parameters())

    def mean(parameters: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, parameters, (inputs,))
        loss_sum, n = loss_fn.of_outputs(outputs, [target])
        return loss_sum / n

    gradient = torch.func.grad(mean)(parameters)["layer.weight"]
    Positives()(model(inputs), target).backward()
    assert torch.allclose(gradient, model.layer.weight.grad, rtol=1e-12)  # type: ignore[arg-type]


def test_a_clamp_of_the_first_window_costs_later_ones_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch that counts more than the least seen is asked for one sum and one mean."""
    asked: list[int] = []
    answer: Callable[..., Tensor] = asked_criterion.CriterionCopies._answer

    def counted(self: Any, *arguments: Any) -> Tensor:
        asked.append(1)
        return answer(self, *arguments)

    monkeypatch.setattr(asked_criterion.CriterionCopies, "_answer", counted)
    loss_fn = CriterionLoss(Positives())
    accumulate_gradients(Net(), loss_fn, window([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]))
    asked.clear()
    accumulate_gradients(Net(), loss_fn, window([[1, 1, 0, 0], [1, 1, 1, 0]]))
    assert len(asked) == 4


class OfLists(nn.Module):
    """A distance to every point of a sample's own list, over all points."""

    reduction = "mean"

    def forward(self, outputs: Tensor, points: list[Tensor]) -> Tensor:
        assert len(outputs) == len(points)
        pairs = zip(outputs, points, strict=True)
        total = torch.stack([(output - of).square().sum() for output, of in pairs]).sum()
        return total / max(1, sum(map(len, points))) if self.reduction == "mean" else total


@pytest.mark.parametrize("counts", [[[2, 1, 3], [1, 4]], [[2, 1, 3], [0, 0]], [[2, 0], [1], [0]]])
def test_targets_in_a_list_belong_to_their_samples(counts: list[list[int]]) -> None:
    """A batch that is cut in two, to see whether its parts add up, is cut with its lists."""
    torch.manual_seed(0)
    dtype = torch.float64
    model = nn.Linear(3, 2, dtype=dtype)
    window = [
        {
            "input": torch.randn(len(of), 3, dtype=dtype),
            "labels": [torch.randn(n, 2, dtype=dtype) for n in of],
        }
        for of in counts
    ]
    loss = accumulate_gradients(model, OfLists(), window)
    found = model.weight.grad
    assert found is not None
    points = [of for micro_batch in window for of in micro_batch["labels"]]
    large = OfLists()(model(torch.cat([m["input"] for m in window])), points)
    (expected,) = torch.autograd.grad(large, [model.weight])
    assert float(loss.mean) == pytest.approx(large.item(), rel=1e-13)
    assert torch.allclose(found, expected, rtol=1e-12)
