"""Cross entropy over tokens, against torch's own on transposed logits; functions as criteria."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.criteria import FunctionCriterion, TokenCrossEntropy, as_criterion
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.errors import BadInputError

F64 = torch.float64
CLASSES = 5
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25], dtype=F64)


def tokens(*shape: int, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """Logits (..., classes) and labels (...), every third of them ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, CLASSES, generator=generator, dtype=F64)
    labels = torch.randint(CLASSES, shape, generator=generator)
    labels.view(-1)[::3] = ignored
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("shape", [(4, 7), (3, 5), (2, 3, 4), (6,), (1, 1)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_it_is_cross_entropy_on_transposed_logits(
    shape: tuple[int, ...], reduction: str, ignored: int, smoothing: float, weight: Tensor | None
) -> None:
    """Value, shape and gradient, for every option; also where length and vocabulary are equal (3, 5)."""
    options: Any = {
        "weight": weight,
        "ignore_index": ignored,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    logits, labels = tokens(*shape, ignored=ignored)
    if shape == (1, 1):
        labels = (labels * 0 + 3).clone()
    by_torch = logits.detach().clone().requires_grad_()
    expected = nn.CrossEntropyLoss(**options)(
        by_torch.movedim(-1, 1) if len(shape) > 1 else by_torch, labels
    )
    got = TokenCrossEntropy(**options)(logits, labels)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-14, atol=1e-14)
    got.sum().backward()
    expected.sum().backward()
    assert torch.allclose(logits.grad, by_torch.grad, rtol=1e-13, atol=1e-15)


def test_a_single_token_without_a_batch_is_taken_as_torch_takes_it() -> None:
    """Logits (classes,) for a label of no dimension."""
    logits, label = torch.randn(CLASSES, dtype=F64), torch.tensor(3)
    for reduction in ("none", "sum", "mean"):
        got = TokenCrossEntropy(reduction=reduction)(logits, label)
        expected = nn.CrossEntropyLoss(reduction=reduction)(logits, label)
        assert got.shape == expected.shape == ()
        assert torch.allclose(got, expected, rtol=1e-14)


@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_its_denominator_is_counted_before_the_forward_pass(
    ignored: int, smoothing: float, weight: Tensor | None
) -> None:
    """From the labels alone: what its mean divides its sum by."""
    criterion = TokenCrossEntropy(weight=weight, ignore_index=ignored, label_smoothing=smoothing)
    logits, labels = tokens(4, 7, ignored=ignored)
    loss = CriterionLoss(criterion)
    micro_batch = {"input_ids": torch.zeros(4, 7), "labels": labels}
    counted = loss.count(micro_batch)
    assert isinstance(counted, float)
    criterion.reduction = "sum"
    total = criterion(logits, labels)
    criterion.reduction = "mean"
    assert counted == pytest.approx(float((total / criterion(logits, labels)).detach()), rel=1e-14)
    got, denominator = loss(lambda input_ids: logits, micro_batch)  # type: ignore[arg-type]
    assert denominator == counted
    assert torch.allclose(got, total, rtol=1e-14)


def test_logits_of_an_object_are_taken() -> None:
    """As transformers' models put them out, as an attribute or under a key."""
    logits, labels = tokens(4, 7)
    expected = TokenCrossEntropy(reduction="sum")(logits, labels)
    micro_batch = {"input_ids": torch.zeros(4, 7), "labels": labels}
    for outputs in (SimpleNamespace(logits=logits, loss=None), {"logits": logits}, logits, (logits,)):
        model: Any = lambda input_ids, put_out=outputs: put_out  # noqa: E731
        got, n = CriterionLoss(TokenCrossEntropy())(model, micro_batch)
        assert (torch.equal(got, expected), n) == (True, float((labels != -100).sum()))


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        ((4, 5, 7), (4, 7), r"\(4, 5, 7\), the labels are \(4, 7\) int64"),
        ((4, 7, 5), (4, 6), r"\(4, 7, 5\), the labels are \(4, 6\) int64"),
        ((4, 7, 5), (4, 7, 5), r"\(4, 7, 5\), the labels are \(4, 7, 5\) int64"),
        ((28, 5), (4, 7), r"\(28, 5\), the labels are \(4, 7\) int64"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both(
    logits: tuple[int, ...], labels: tuple[int, ...], said: str
) -> None:
    """Transposed logits, other lengths, one-hot labels, and flattened logits that would broadcast."""
    with pytest.raises(BadInputError, match=f"TokenCrossEntropy takes .*{said}"):
        TokenCrossEntropy()(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


def test_probabilities_in_place_of_labels_are_refused() -> None:
    """Soft targets have no place for an ignored label."""
    with pytest.raises(BadInputError, match=r"\(4, 7, 5\), the labels are \(4, 7\) float32"):
        TokenCrossEntropy()(torch.zeros(4, 7, 5), torch.zeros(4, 7))


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_it() -> None:
    """Its mean may divide by anything, so it is counted with a look at its values."""

    class PerPosition(TokenCrossEntropy):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            return total / labels.numel() if self.reduction == "mean" else total

    x, labels = torch.randn(6, 3, CLASSES, dtype=F64), tokens(6, 3)[1]
    assert CriterionLoss(PerPosition()).count((x, labels)) is None
    torch.manual_seed(0)
    model = nn.Linear(CLASSES, CLASSES).double()
    window = list(zip(x.split([1, 2, 3]), labels.split([1, 2, 3]), strict=True))
    loss = accumulate_gradients(model, PerPosition(), window)
    assert loss.denominator == pytest.approx(18)
    expected = torch.autograd.grad(PerPosition()(model(x), labels), list(model.parameters()))
    pairs = zip(model.parameters(), expected, strict=True)
    assert all(torch.allclose(p.grad, g, rtol=1e-12) for p, g in pairs if p.grad is not None)


def test_a_function_with_ignored_labels_is_the_large_batchs_mean_as_its_module_is() -> None:
    """What it divides by is found out, over micro-batches whose counts differ."""
    torch.manual_seed(0)
    model, x, y = (
        nn.Linear(3, CLASSES, dtype=F64),
        torch.randn(9, 3, dtype=F64),
        torch.arange(9) % CLASSES,
    )
    y[:4] = 2
    window = [(x[:5], y[:5]), (x[5:], y[5:])]
    options: Any = {"ignore_index": 2, "weight": WEIGHT}
    nn.functional.cross_entropy(model(x), y, **options).backward()
    expected = model.weight.grad
    model.zero_grad()
    accumulate_gradients(
        model, FunctionCriterion(partial(nn.functional.cross_entropy, **options)), window
    )
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (nn.functional.mse_loss, True),
        (partial(nn.functional.cross_entropy, label_smoothing=0.1), True),
        (nn.MSELoss(), False),
        (nn.MSELoss, False),
        (partial(nn.CrossEntropyLoss, label_smoothing=0.1), False),
        (lambda model, micro_batch: (model, micro_batch), False),
        (max, False),
    ],
)
def test_functions_with_reduction_are_told_from_others(function: Any, takes: bool) -> None:
    """By what they take, partials of them too; a class makes a criterion, and is none."""
    assert isinstance(as_criterion(function), FunctionCriterion) is takes


def off_by(function: Any, window: Any, large_batch: Any) -> float:
    """Return how far the accumulated gradient is from the function's over all samples, relatively."""
    torch.manual_seed(0)
    model = nn.Linear(6, CLASSES, dtype=F64)
    function(model(large_batch[0]), large_batch[1]).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    accumulate_gradients(model, function, window)
    assert model.weight.grad is not None
    return float((model.weight.grad - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "function",
    [
        nn.functional.cross_entropy,
        partial(nn.functional.cross_entropy, label_smoothing=0.1),
        lambda logits, y: nn.functional.cross_entropy(logits, y),
        lambda outputs, labels: nn.functional.cross_entropy(outputs, labels) * 3,
        lambda p, target: -p.log_softmax(-1).gather(1, target[:, None]).mean(),
    ],
)
def test_a_plain_function_of_output_and_target_that_takes_a_mean_is_the_large_batchs(
    function: Any,
) -> None:
    """Though it has no `reduction`, and micro-batches are of unequal sizes."""
    x, y = torch.randn(11, 6, dtype=F64), torch.randint(CLASSES, (11,))
    window = [(x[:4], y[:4]), (x[4:10], y[4:10]), (x[10:], y[10:])]
    assert off_by(function, window, (x, y)) < 1e-12


@pytest.mark.parametrize("how", ["sum", "none"])
def test_a_plain_function_of_sums_or_of_single_losses_is_divided_by_what_the_window_counts(
    how: str,
) -> None:
    """A sum and a vector are as good as a mean: the window's is over all of its samples."""
    x, y = torch.randn(7, 6, dtype=F64), torch.randint(CLASSES, (7,))
    window = [(x[:4], y[:4]), (x[4:6], y[4:6]), (x[6:], y[6:])]
    torch.manual_seed(0)
    model = nn.Linear(6, CLASSES, dtype=F64)
    nn.functional.cross_entropy(model(x), y).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target, reduction=how)

    loss = accumulate_gradients(model, criterion, window)
    assert loss.denominator == 7
    assert torch.allclose(model.weight.grad, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda logits, y: nn.functional.cross_entropy(logits, y, ignore_index=0),
        lambda logits, y: (logits - logits.mean(0)).square().mean(),
        lambda logits, y: logits.square().sum().sqrt(),
    ],
)
def test_a_plain_function_that_does_not_tell_what_it_counts_is_refused(function: Any) -> None:
    """In one sentence, with what to hand over; also one that couples samples."""
    x, y = torch.randn(12, 6, dtype=F64), torch.randint(CLASSES, (12,))
    window, model = [(x[:8], y[:8]), (x[8:], y[8:])], nn.Linear(6, CLASSES, dtype=F64)
    with pytest.raises(BadInputError, match=r"[Hh]and over a criterion of torch\.nn"):
        accumulate_gradients(model, function, window)


def test_a_function_of_unknown_arguments_fails_with_a_word_on_how_it_is_called() -> None:
    """Its names do not say whether it takes a model or outputs: it is called as a loss function."""
    window = [(torch.randn(4, 6), torch.randint(CLASSES, (4,)))] * 2

    def entropy(a: Any, b: Any) -> Any:
        return nn.functional.cross_entropy(a, b)

    with pytest.raises(TypeError) as caught:
        accumulate_gradients(nn.Linear(6, CLASSES), entropy, window)
    assert "as output and target, logits and labels" in caught.value.__notes__[0]


def test_labels_that_are_ignored_late_are_not_taken_for_counted_ones() -> None:
    """Of forty micro-batches one is not clean: its mean is none over all elements of the target."""
    torch.manual_seed(0)
    model, generator = nn.Linear(6, CLASSES, dtype=F64), torch.Generator().manual_seed(0)
    x = torch.randn(160, 6, dtype=F64, generator=generator)
    y = torch.randint(1, CLASSES, (160,), generator=generator)
    y[4 * 18] = 0
    window = list(zip(x.split(4), y.split(4), strict=True))
    with pytest.raises(BadInputError, match="counts something else, as where labels are ignored"):
        accumulate_gradients(
            model, lambda out, y: nn.functional.cross_entropy(out, y, ignore_index=0), window
        )


@pytest.mark.parametrize("names", ["policy, targets", "encoder, labels", "m, y", "student, t"])
def test_a_loss_function_is_one_whatever_its_model_is_called(names: str) -> None:
    """Only the names of an output and a target together make a criterion of a plain function."""
    model, batch = names.split(", ")
    function = eval(f"lambda {names}: ({model}({batch}[0]).square().sum(), {batch}[0].numel())")
    assert as_criterion(function) is None
    window = [(torch.randn(4, 6), torch.randn(4, 1))] * 2
    assert accumulate_gradients(nn.Linear(6, 1), function, window).denominator == 48


def test_a_plain_function_is_looked_at_where_it_gives_a_loss_and_on_tensors_alone() -> None:
    """A hinge is zero beyond its margin; a tuple of outputs is refused in a sentence."""

    def hinge(scores: Tensor, target: Tensor) -> Tensor:
        return (0.05 - scores).clamp(min=0).mean()

    criterion = as_criterion(hinge)
    assert criterion is not None
    scores, target = torch.tensor([-1.0, 2.0]), torch.zeros(2)
    assert float(criterion(scores, target)) == pytest.approx(1.05 / 2)
    of_first = as_criterion(lambda output, target: (output[0] - target).square().mean())
    assert of_first is not None
    with pytest.raises(BadInputError, match="the model's output is a tuple"):
        of_first((scores, scores), target)
