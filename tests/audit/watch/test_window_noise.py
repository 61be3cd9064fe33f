"""The noise scale of a loop that is watched, against that of the package's own accumulation."""

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import noise_scale, watch
from gaccum_exp.audit.watch.watch import Watched
from gaccum_exp.core.noise_scale import Noise, NoiseScale, quotient_of_means

F64 = torch.float64
Window = list[tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def windows(sizes: Sequence[int], count: int, ignored: float = 0.0) -> list[Window]:
    """Draw windows of labelled points, a part of whose labels do not count."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        xs = [torch.randn(b, 5, generator=generator, dtype=F64) for b in sizes]
        ys = [(x.sum(1) > 0).long() + 0 for x in xs]
        for y in ys:
            drop = torch.rand(len(y), generator=generator) < ignored
            y[drop] = -100
            y[0] = 1
        found.append(list(zip(xs, ys, strict=True)))
    return found


def model_of(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), *layers, nn.Linear(4, 2)).to(F64)


def watched(model: nn.Module, given: Sequence[Window], loss: Loss) -> Watched:
    """Train on these windows, watched."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, None, optimizer, noise=True) as audit:
        for window in given:
            optimizer.zero_grad()
            for x, y in window:
                loss(model, x, y, len(window)).backward()
            optimizer.step()
    return audit


def own(model: nn.Module, given: Sequence[Window]) -> list[Noise]:
    """Measure the same windows by the package's own accumulation."""
    found = []
    for window in given:
        model.zero_grad()
        found.append(noise_scale(model, nn.CrossEntropyLoss(), window).window)
    return found


LOSSES: dict[str, Loss] = {
    "mean / N": lambda model, x, y, n: F.cross_entropy(model(x), y) / n,
    "mean, undivided": lambda model, x, y, n: F.cross_entropy(model(x), y),
    "sum / a constant": lambda model, x, y, n: F.cross_entropy(model(x), y, reduction="sum") / 37,
}


@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [2, 6, 3]], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_watched_loop_tells_the_noise_of_the_large_batch(
    loss: str, sizes: list[int], ignored: float
) -> None:
    """However the loop weighs its micro-batches: the scale is a matter of the gradients."""
    given, model = windows(sizes, 3, ignored), model_of()
    audit = watched(model, given, LOSSES[loss])
    expected = own(copy.deepcopy(model), given)
    found = [noise for noise in audit.noise if not isinstance(noise, str)]
    for one, other in zip(found, expected, strict=True):
        ratio = one.trace / other.trace  # of a sum that nobody counts the mean is by another constant
        assert math.isclose(one.squared_norm / other.squared_norm, ratio, rel_tol=1e-9)
        if not loss.startswith("sum"):
            assert math.isclose(ratio, 1, rel_tol=1e-9)
    assert audit.noise_scale is not None
    assert audit.noise_scale == pytest.approx(quotient_of_means(expected), rel=1e-9)
    assert "noise scale: " in str(audit)
    assert "3 windows" in str(audit)


def in_terms(model: nn.Module, x: Tensor, y: Tensor, n: int) -> Tensor:
    out = model(x)
    return (F.cross_entropy(out, y) + 0.1 * F.mse_loss(out[:, 0], x[:, 0])) / n


def in_terms_of_sums(model: nn.Module, x: Tensor, y: Tensor, n: int) -> Tensor:
    """One term is summed and divided by the window's samples, the other averaged and divided by N."""
    out = model(x)
    summed = F.cross_entropy(out, y, reduction="sum") / (n * len(x))
    return summed + 0.1 * F.mse_loss(out[:, 0], x[:, 0]) / n


@pytest.mark.parametrize("loss", [in_terms, in_terms_of_sums])
def test_terms_that_count_alike_have_the_noise_of_their_sum(loss: Loss) -> None:
    """The textbook's estimates, of micro gradients taken by hand."""
    (window,), model = windows([4, 4, 4, 4], 1), model_of()
    audit = watched(model, [window], loss)
    gradients = []
    for x, y in window:
        model.zero_grad()
        in_terms(model, x, y, 1).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    each = torch.stack(gradients)
    trace = 4 * float((each - each.mean(0)).square().sum()) / 3
    (noise,) = audit.noise
    assert isinstance(noise, Noise)
    assert noise.trace == pytest.approx(trace, rel=1e-9)
    assert noise.squared_norm == pytest.approx(float(each.mean(0).square().sum()) - trace / 16, rel=1e-9)


def test_with_adam_the_noise_is_told_in_its_metric_too() -> None:
    """As the package's own accumulation tells it, from the second window on."""
    given = windows([4, 4, 4, 4], 4)
    model = model_of()
    other = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, other)]
    with watch(model, None, optimizers[0], noise=True) as audit:
        for window in given:
            optimizers[0].zero_grad()
            for x, y in window:
                (F.cross_entropy(model(x), y) / len(window)).backward()
            optimizers[0].step()
    measured: list[NoiseScale] = []
    for window in given:
        optimizers[1].zero_grad()
        measured.append(
            noise_scale(other, nn.CrossEntropyLoss(), window, optimizer=optimizers[1], earlier=measured)
        )
        optimizers[1].step()
    expected = [of.adam_window for of in measured if of.adam_window is not None]
    assert len(expected) == 3
    for one, other in zip(audit.adam_noise, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert "noise scale, in Adam's metric: " in str(audit)


def counting_apart(model: nn.Module, x: Tensor, y: Tensor, n: int) -> Tensor:
    """One term counts labels, whose number differs, the other samples."""
    out = model(x)
    labels = y.masked_fill(x[:, 0] > 0, -100)
    return (F.cross_entropy(out, labels) + 0.1 * F.mse_loss(out[:, 0], x[:, 0])) / n


@pytest.mark.parametrize(
    ("layers", "sizes", "loss", "why"),
    [
        ([], [8], LOSSES["mean / N"], "one micro-batch"),
        ([nn.BatchNorm1d(4)], [4, 4], LOSSES["mean / N"], "biased (batch statistics)"),
        ([], [4, 4], counting_apart, "count its micro-batches differently"),
        (
            [],
            [4, 4],
            lambda model, x, y, n: F.cross_entropy(model(x) @ model(x).mT, torch.arange(len(x))) / n,
            "samples are mixed between the model's outputs and the loss",
        ),
    ],
    ids=["N = 1", "batch normalisation", "terms", "contrastive"],
)
def test_where_a_window_tells_no_noise_the_reason_is_said(
    layers: list[nn.Module], sizes: list[int], loss: Loss, why: str
) -> None:
    """And the loop is judged all the same."""
    audit = watched(model_of(*layers), windows(sizes, 1), loss)
    assert audit.noise_scale is None
    (said,) = [line for line in str(audit).splitlines() if line.startswith("noise scale: ")]
    assert "not measured" in said
    assert why in said


class Adversaries(nn.Module):
    """A generator, and what tells its points from real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(x if x.shape[1] == 3 else self.generator(x))


def test_optimizers_that_step_in_turn_have_no_noise_scale_in_common() -> None:
    """Each has one when it is watched alone, for its own loss; those that take one window have one."""

    def audited(turns: int, *watched: str) -> Watched:
        torch.manual_seed(0)
        model = Adversaries().to(F64)
        optimizers = {name: torch.optim.SGD(m.parameters(), 0.01) for name, m in model.named_children()}
        with watch(model, None, [optimizers[name] for name in watched], noise=True) as audit:
            for _ in range(3):
                for name in ("critic", "generator")[:turns]:
                    model.zero_grad()
                    for _ in range(3):
                        x = torch.randn(4, 3 if name == "critic" else 2, dtype=F64)
                        (F.softplus(model(x if turns == 2 else x[:, :2])).mean() / 3).backward()
                    for step in (name,) if turns == 2 else watched:
                        optimizers[step].step()
        return audit

    both = audited(2, "generator", "critic")
    assert both.noise_scale is None
    assert "noise scale: not measured: the optimizers step in turn" in str(both)
    for name in ("generator", "critic"):
        assert audited(2, name).noise_scale is not None
    assert audited(1, "generator", "critic").noise_scale is not None


def test_watching_for_noise_leaves_a_loop_as_it_was() -> None:
    """Unasked nothing is measured; asked, the verdict and the weights are the same."""
    given = windows([4, 4], 2)
    ends, verdicts = [], []
    for noise in (False, True):
        model = model_of(nn.Dropout(0.3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        with watch(model, None, optimizer, noise=noise) as audit:
            for window in given:
                optimizer.zero_grad()
                for x, y in window:
                    (F.cross_entropy(model(x), y) / 2).backward()
                optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        verdicts.append([one.as_dict() for one in audit.windows])
        assert (audit.noise_scale is not None) == noise
    assert torch.equal(*ends)
    assert verdicts[0] == verdicts[1]
