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
from gaccum_exp.core.noise_scale import Noise, quotient_of_means

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


@pytest.mark.parametrize(
    ("layers", "sizes", "loss", "why"),
    [
        ([], [8], LOSSES["mean / N"], "one micro-batch"),
        ([nn.BatchNorm1d(4)], [4, 4], LOSSES["mean / N"], "biased (batch statistics)"),
        ([], [4, 4], in_terms, "several terms"),
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
