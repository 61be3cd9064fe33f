"""What a loss function may return and count, and what is said of all else."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.protocol import at_least, count, window_denominator
from gaccum_exp.errors import BadInputError

F64 = torch.float64


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def window(sizes: tuple[int, ...] = (3, 2, 2)) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=g, dtype=F64), torch.randint(0, 3, (n,), generator=g))
        for n in sizes
    ]


def gradient(loss_fn: Any, micro_batches: Any = None, **how: Any) -> Tensor:
    model = net()
    accumulate_gradients(model, loss_fn, micro_batches or window(), **how)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def singles(model: nn.Module, micro_batch: Any) -> Tensor:
    return F.cross_entropy(model(micro_batch[0]), micro_batch[1], reduction="none")


def jaccard(model: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
    p, y = model(micro_batch[0]).sigmoid(), F.one_hot(micro_batch[1], 3).double()
    return (p + y - 2 * p * y).sum(), (p + y - p * y).sum()


def attention(model: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
    outputs = model(micro_batch[0])
    weights = outputs[:, 0].exp()
    return (weights * F.cross_entropy(outputs, micro_batch[1], reduction="none")).sum(), weights.sum()


@pytest.mark.parametrize("strategy", ["in_place", "cached"])
@pytest.mark.parametrize("loss_fn", [
    jaccard, attention,
    lambda m, b: {"iou": jaccard(m, b)},
    lambda m, b: {"iou": (jaccard(m, b)[0], at_least(jaccard(m, b)[1]), 0.5)},
], ids=["jaccard", "attention", "term", "clamped term"])  # fmt: skip
def test_a_denominator_with_a_gradient_is_refused(loss_fn: Any, strategy: str) -> None:
    """It would be lost without a word, wherever the sum is taken."""
    with pytest.raises(BadInputError, match=r"denominator has a gradient.*detach.*torch.stack"):
        gradient(loss_fn, strategy=strategy)


@pytest.mark.parametrize("strategy", ["in_place", "cached"])
@pytest.mark.parametrize("of", [jaccard, attention])
def test_the_remedy_of_that_refusal_is_the_large_batchs_gradient(of: Any, strategy: str) -> None:
    """A function of the window's sums, and a denominator that was detached."""
    model, whole = net(), tuple(torch.cat(column) for column in zip(*window(), strict=True))
    total, n = of(model, whole)
    right, constant = (
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(total / by, model.parameters(), retain_graph=True)]
        )
        for by in (n, n.detach())
    )

    def function(m: nn.Module, part: Any) -> Any:
        return {"loss": (torch.stack(of(m, part)), None, 1.0, lambda v: v[0] / v[1])}

    def detached(m: nn.Module, part: Any) -> Any:
        loss_sum, by = of(m, part)
        return loss_sum, by.detach()

    assert (gradient(function, strategy=strategy) - right).norm() <= 1e-12 * right.norm()
    assert (gradient(detached, strategy=strategy) - constant).norm() <= 1e-12 * constant.norm()


@pytest.mark.parametrize(("returned", "said"), [
    (lambda loss, n: loss.sum(), r"returns a 0-dim tensor: let it return \(loss_sum, denominator\)"),
    (lambda loss, n: (loss.sum(), n, {}), "returns a tuple of 3: let it return"),
    (lambda loss, n: None, "returns None: let it return"),
    (lambda loss, n: (loss, n), r"its loss sum is a tensor of shape \(3,\)"),
    (lambda loss, n: (float(loss.sum().detach()), n), "its loss sum is a float"),
    (lambda loss, n: (loss.sum().detach(), n), "loss sum of micro-batch 1 has no graph"),
    (lambda loss, n: (loss.sum(), torch.ones(n)), r"denominator is a tensor of shape \(3,\).*mask.sum"),
    (lambda loss, n: (loss.sum(), None), "its denominator is None"),
    (lambda loss, n: (loss.sum(), [n]), "its denominator is a list of 1"),
    (lambda loss, n: {"ce": (loss.sum(), n, None)}, "term 'ce': its weight is None"),
    (lambda loss, n: {"ce": (loss.sum(), n, torch.ones(2))}, r"weight is a tensor of shape \(2,\)"),
    (lambda loss, n: {"ce": (loss.sum(), torch.ones(n))}, r"'ce': its denominator is a tensor of shape"),
    (lambda loss, n: {"ce": (loss.sum(), n, 1.0, {})}, "term 'ce': is neither"),
    (lambda loss, n: {"ce": ("0.5", n)}, "term 'ce': is neither"),
])  # fmt: skip
def test_what_is_no_result_is_said_in_our_words(returned: Any, said: str) -> None:
    """What came, and what to return, without a number of a tensor's."""
    with pytest.raises(BadInputError, match=said):
        gradient(lambda m, b: returned(singles(m, b), len(b[1])))


@pytest.mark.parametrize("n", [np.int64(3), np.float32(3), torch.tensor([3.0]), torch.tensor(3), True])
def test_any_number_is_a_denominator(n: Any) -> None:
    """NumPy's, and tensors of one element."""
    found = gradient(lambda m, b: (singles(m, b).sum(), n), window((3,)))
    expected = gradient(lambda m, b: (singles(m, b).sum(), float(n)), window((3,)))
    assert torch.allclose(found, expected, rtol=1e-14)


class Returning(nn.Module):
    reduction = "mean"

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, o: Tensor, t: Tensor) -> Any:
        return self.how(F.cross_entropy(o, t, reduction="none"))


@pytest.mark.parametrize(
    "how", [{}, {"reduction": "sum"}, {"reduction": "mean"}, {"strategy": "cached"}]
)
@pytest.mark.parametrize(("returned", "said"), [
    (lambda loss: loss, r"a tensor of shape \(\d,\)"), (lambda loss: {"loss": loss.mean()}, "a dict"),
    (lambda loss: (loss.mean(), loss), "a tuple of 2"), (lambda loss: 0.0, "a float"),
    (lambda loss: None, "None"),
])  # fmt: skip
def test_a_criterion_that_returns_no_loss_is_told_what_it_returns(
    returned: Any, said: str, how: dict[str, Any]
) -> None:
    """From the first, under every reduction: no other reduction would help."""
    with pytest.raises(BadInputError, match=f"criterion Returning returns {said}.*return one loss"):
        gradient(Returning(returned), **how)


class Counting:
    """Counts labels that are not 0, or says so wrongly."""

    def __init__(self, says: Any, terms: bool) -> None:
        self.says, self.terms = says, terms

    def count(self, micro_batch: Any) -> Any:
        n = self.says(micro_batch[1])
        return {"ce": n} if self.terms else n

    def __call__(self, model: nn.Module, micro_batch: Any) -> Any:
        k = micro_batch[1] > 0
        pair = (singles(model, micro_batch) * k).sum(), k.sum()
        return {"ce": pair} if self.terms else pair


@pytest.mark.parametrize("terms", [False, True])
def test_a_count_that_contradicts_the_denominator_is_an_error(terms: bool) -> None:
    """With both numbers; one that is right counts."""
    labels = window()[0][1]
    said = (
        f"gives {len(labels)}, and the loss function returns the denominator {int((labels > 0).sum())}"
    )
    with pytest.raises(BadInputError, match=said):
        gradient(Counting(len, terms))
    right = Counting(lambda t: (t > 0).sum(), terms)
    assert torch.allclose(gradient(right), gradient(right.__call__), rtol=1e-13)


def test_a_count_of_a_term_that_is_left_out_is_an_error() -> None:
    """What it counts would be divided by, and nothing of it added."""

    class LeavingOut(Counting):
        def __call__(self, model: nn.Module, micro_batch: Any) -> Any:
            loss = singles(model, micro_batch)
            found = {"other": (loss.sum(), len(loss))}
            return found if len(loss) == 2 else found | super().__call__(model, micro_batch)

    with pytest.raises(BadInputError, match=r"'ce': count.* returns the denominator 0"):
        gradient(LeavingOut(len, True), window((2, 3)))


def test_rounding_is_no_contradiction() -> None:
    """Weights added up in float32 or rounded to half precision are what was counted in float64."""
    weights = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=F64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def loss_fn(m: nn.Module, b: Any, dtype: torch.dtype = dtype) -> Any:
            return singles(m, b).sum(), weights.sum().to(dtype)

        loss_fn.count = lambda b: float(weights.sum())  # type: ignore[attr-defined]
        gradient(loss_fn)


def test_a_partial_function_counts_as_what_it_is_a_part_of() -> None:
    """Its count, its clamp and its criterion are there, and a wrong count is an error."""

    class Clamped(Counting):
        criterion = nn.CrossEntropyLoss()

        def window_denominator(self, n: Any) -> Any:
            return max(100.0, n)

        def __call__(self, model: nn.Module, micro_batch: Any, scale: float = 1.0) -> Any:
            total, n = super().__call__(model, micro_batch)
            return scale * total, n

    right, wrong = Clamped(lambda t: int((t > 0).sum()), False), Clamped(len, False)
    twice = partial(partial(right, scale=2.0))
    assert count(twice, window()[0]) == right.count(window()[0])
    assert window_denominator(twice, 3) == 100.0
    assert torch.allclose(gradient(twice), 2 * gradient(right), rtol=1e-14)
    with pytest.raises(BadInputError, match="gives 3, and the loss function returns"):
        gradient(partial(wrong, scale=2.0))


@pytest.mark.parametrize("empty", [
    lambda o: (0.0, 0), lambda o: (0.0, 0, 7.0), lambda o: (0.0, at_least(0)),
    lambda o: (o.sum() * 0, 0), lambda o: (o.sum() * 0, at_least(0)),
], ids=["README", "weighed", "clamped", "tensor", "clamped tensor"])  # fmt: skip
@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
def test_an_empty_term_has_no_weight_to_compare(empty: Any, order: list[int], reduction: str) -> None:
    """As README has it, `(0.0, 0)` stands beside the same term with a weight."""
    micro_batches = [(part, bool(there)) for part, there in zip(window((2,) * 4), order, strict=False)]

    def loss_fn(model: nn.Module, micro_batch: Any, left_out: bool = False) -> Any:
        (x, _), there = micro_batch
        o = model(x)
        found = {"class": (o.square().sum(), len(o))}
        if there or not left_out:
            found["box"] = (o.abs().sum(), at_least(len(o)), 0.5) if there else empty(o)
        return found

    got = gradient(loss_fn, micro_batches, reduction=reduction)
    expected = gradient(partial(loss_fn, left_out=True), micro_batches, reduction=reduction)
    assert torch.allclose(got, expected, rtol=1e-13)


def test_a_window_of_empty_terms_alone_has_the_other_terms() -> None:
    """Nothing of the clamped one is left, in the loss as well."""

    def loss_fn(model: nn.Module, micro_batch: Any) -> Any:
        loss = singles(model, micro_batch)
        return {"class": (loss.sum(), len(loss)), "box": (0.0, at_least(0))}

    found = accumulate_gradients(net(), loss_fn, window())
    alone = accumulate_gradients(net(), lambda m, b: (singles(m, b).sum(), len(b[1])), window())
    assert torch.allclose(found.mean, alone.mean, rtol=1e-14)
