"""Loops with several terms that divide by another number than their window's N, all of them or some."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from gaccum_exp.audit.result import Audit
from gaccum_exp.audit.watch.divisions import Scaling, faults_of
from gaccum_exp.audit.watch.drawn_weights import drawn
from gaccum_exp.audit.watch.scalars import Factor
from gaccum_exp.core.seeding import random_state_kept, random_states

N, BETA = 4, 0.3
"""By what the loops divide, and a weight that is no literal."""
Terms = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Weighed = Callable[[tuple[Tensor, ...]], Tensor]


def two_means(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    out = model(x)
    return F.cross_entropy(out, y), BETA * F.mse_loss(out, z)


def mean_and_sum(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    out = model(x)
    return F.cross_entropy(out, y), BETA * (out - z).square().sum() / len(x)


def mean_and_penalty(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    out = model(x)
    return F.cross_entropy(out, y), 0.01 * sum(w.square().sum() for w in model.parameters())


def three(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    out = model(x)
    spread = 0.1 * out.square().sum() / 100
    return F.cross_entropy(out, y), 0.5 * F.mse_loss(out, z), spread


def all_divided(terms: tuple[Tensor, ...]) -> Tensor:
    return sum(terms) / N


def twice(terms: tuple[Tensor, ...]) -> Tensor:
    return sum(terms) / N / N


def first_alone(terms: tuple[Tensor, ...]) -> Tensor:
    return terms[0] / N + sum(terms[1:])


def judged(terms: Terms, weighed: Weighed, present: int, scaler: bool = False) -> tuple[Audit, float]:
    """Return the audit of a window, and how far it is from the loss of all samples, by hand in float64.

    Where the loss has a sum with a constant divisor, which literally grows with the batch, it is as the
    loop has it at N micro-batches.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    window = [(torch.randn(6, 5), torch.randint(3, (6,)), torch.randn(6, 3)) for _ in range(present)]
    scale = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaler)
    with watch() as found:
        for x, y, z in window:
            scale.scale(weighed(terms(model, x, y, z))).backward()
        scale.step(optimizer)
    reached = [p.grad.double() for p in model.parameters() if p.grad is not None]
    model.double()
    x, y, z = (torch.cat(each) for each in zip(*window, strict=True))
    whole = torch.autograd.grad(sum(terms(model, x.double(), y, z.double())), list(model.parameters()))
    gap = sum(float((a - b).square().sum()) for a, b in zip(reached, whole, strict=True)) ** 0.5
    return found.worst, gap / sum(float(b.square().sum()) for b in whole) ** 0.5


WINDOW = "divide by the number in this window"
OF_LARGE = "× the large batch's"
BY_4 = f"{OF_LARGE}: 3 micro-batches, each divided by 4: {WINDOW}"
PENALTY = "of the penalty on the weights the gradient"
LEFT = "window's gradients were left over"


@pytest.mark.parametrize(
    ("terms", "weighed", "present", "said"),
    [
        (two_means, all_divided, 4, None),
        (two_means, all_divided, 3, f"gradient is 0.75 {BY_4}"),
        (two_means, twice, 3, "divided by 4 twice: divide once, by the number in this window"),
        (mean_and_sum, all_divided, 3, f"gradient is 0.75 {BY_4}"),
        (mean_and_penalty, all_divided, 5, LEFT),
        (mean_and_penalty, first_alone, 3, f"{PENALTY} is 3 {OF_LARGE}: the loss is not divided by N"),
        (mean_and_penalty, first_alone, 4, f"{PENALTY} is 4 {OF_LARGE}: divide it as the other terms"),
    ],
)  # fmt: skip
def test_what_the_terms_are_divided_by_is_what_is_said(
    terms: Terms, weighed: Weighed, present: int, said: str | None
) -> None:
    """The distance is that of the loss of all samples; of one term alone it is "as the other terms"."""
    audit, gap = judged(terms, weighed, present)
    assert audit.e == pytest.approx(gap, rel=1e-4, abs=1e-6), str(audit)
    assert (audit.verdict == "biased") == (said is not None), str(audit)
    assert said is None or said in str(audit), str(audit)


def test_a_sum_with_a_divisor_of_its_own_is_named_as_taken_and_no_other_term_is_blamed() -> None:
    """Under a GradScaler, too: the sum shares the division by 4, and the means' remedy holds for all."""
    audit, _ = judged(three, all_divided, 3, scaler=True)
    assert audit.e == pytest.approx(0.25, rel=1e-4)
    assert WINDOW in str(audit)
    audit, _ = judged(three, sum, 4)
    assert f"of cross_entropy and mse_loss the gradient is 4 {OF_LARGE}: the loss is not" in str(audit)
    assert "is taken as it is" in str(audit)
    assert "square().sum() / 100" in str(audit)


def test_a_sum_over_one_micro_batch_beside_a_mean_divided_by_n_is_not_called_equivalent() -> None:
    """The divisor may be a constant of the loss, or the samples of a micro-batch: then it is wrong."""
    audit, gap = judged(mean_and_sum, first_alone, 4)
    assert gap > 0.1
    assert audit.verdict == "inconclusive"
    assert "is divided by 6, and not by N = 4" in str(audit)


def test_the_mean_of_two_terms_in_a_window_of_two_is_no_second_division() -> None:
    """Though 2 is N: it stands in the source, and the division by N does not."""

    def of_two(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        terms = two_means(model, x, y, z)
        return ((terms[0] + terms[1]) / 2,)

    present = 2
    audit, gap = judged(of_two, lambda terms: terms[0] / present, present)
    assert gap < 1e-6
    assert audit.sound, str(audit)


def mean(total: float, *factors: Factor, name: str = "loss") -> Scaling:
    return Scaling(name, False, [total / 2] * 2, total, 1.0, factors)


def test_a_variable_weight_hides_no_division() -> None:
    """0.1 is no division by 10; a division that all terms share, by no N of the window, is one."""
    by_4, weight = Factor(0.25, divides=True), Factor(0.1)
    found = faults_of(
        [mean(0.5, by_4), mean(0.05, weight, by_4)], 2, constants_outside=True, rescaled=False
    )
    assert found.factors == [0.5, 0.5]
    assert found.division() == "2 micro-batches, each divided by 4"
    right = Factor(0.5, divides=True)
    found = faults_of(
        [mean(1.0, right), mean(0.1, weight, right)], 2, constants_outside=True, rescaled=False
    )
    assert found.factors == [1.0, 1.0]


def test_the_mean_of_terms_is_told_apart_from_a_window_of_fewer_or_left_open() -> None:
    """(a + b) / 4 in a window of two is half of the loss, or the mean of both terms divided by two."""
    by_4, by_2 = Factor(0.25, divides=True), Factor(0.5, divides=True)
    each = [mean(0.5, by_4, name="a"), mean(0.5, by_4, name="b")]
    found = faults_of(each, 2, constants_outside=True, rescaled=False)
    assert found.doubt is not None
    each = [mean(0.5, by_2, by_2, name="a"), mean(0.5, by_2, by_2, name="b")]
    assert faults_of(each, 2, constants_outside=True, rescaled=False).doubt is None


def test_weights_are_called_drawn_where_the_same_draw_gives_them_again() -> None:
    """From the state before; a schedule between draws for the data is not."""
    with random_state_kept():
        states, weights = [], []
        for draw in (lambda: np.random.beta(0.2, 0.2), lambda: 1 - random.betavariate(0.4, 0.4)):
            states.append(random_states())
            weights.append(draw())
        assert drawn(weights, states)
        assert not drawn([0.7, 0.5], states)
        assert not drawn([], [])
