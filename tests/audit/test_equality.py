"""Where accumulation is the large batch, it is so to rounding: gradients, and weights after updates."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.criterion import CriterionLoss
from tests.audit.support import gradients, relative, window

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

F64 = torch.float64
CLASSES = 4


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def labels(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape)


def some_ignored(*shape: int) -> Tensor:
    target = labels(*shape)
    target.view(-1)[1::3] = -100
    return target


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape).double() * 2 - 1


def zeros_and_ones(*shape: int) -> Tensor:
    return torch.randint(2, shape).double()


def multi_labels(batch: int) -> Tensor:
    return torch.tensor([[0, 2, -1, 0], [1, -1, 0, 0]]).repeat(batch, 1)[:batch]


def class_weights() -> Tensor:
    return torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=F64)


# By name: the criterion; what is made of the model's (batch, 4) output; the targets of a batch.
Case = tuple[Callable[[], nn.Module], Callable[[Tensor], Any], Callable[[int], Sequence[Tensor]]]
CRITERIA: dict[str, Case] = {
    "L1": (nn.L1Loss, lambda x: x, lambda n: [draw(n, 4)]),
    "MSE": (nn.MSELoss, lambda x: x.reshape(-1, 2, 2), lambda n: [draw(n, 2, 2)]),
    "SmoothL1": (nn.SmoothL1Loss, lambda x: x[:, 0], lambda n: [draw(n)]),
    "Huber": (nn.HuberLoss, lambda x: x, lambda n: [draw(n, 4)]),
    "BCE": (nn.BCELoss, torch.sigmoid, lambda n: [zeros_and_ones(n, 4)]),
    "BCE weighted": (
        lambda: nn.BCELoss(weight=class_weights()),
        torch.sigmoid,
        lambda n: [zeros_and_ones(n, 4)],
    ),
    "BCEWithLogits": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=class_weights()),
        lambda x: x,
        lambda n: [zeros_and_ones(n, 4)],
    ),
    "SoftMargin": (nn.SoftMarginLoss, lambda x: x, lambda n: [signs(n, 4)]),
    "KLDiv": (nn.KLDivLoss, lambda x: x.log_softmax(1), lambda n: [draw(n, 4).softmax(1)]),
    "KLDiv batchmean": (
        lambda: nn.KLDivLoss(reduction="batchmean"),
        lambda x: x.log_softmax(1),
        lambda n: [draw(n, 4).softmax(1)],
    ),
    "PoissonNLL": (nn.PoissonNLLLoss, lambda x: x, lambda n: [torch.rand(n, 4, dtype=F64) * 5]),
    "GaussianNLL": (
        nn.GaussianNLLLoss,
        lambda x: (x[:, :2], x[:, 2:].exp()),
        lambda n: [draw(n, 2)],
    ),
    "HingeEmbedding": (nn.HingeEmbeddingLoss, lambda x: x.abs(), lambda n: [signs(n, 4)]),
    "MarginRanking": (nn.MarginRankingLoss, lambda x: (x[:, 0], x[:, 1]), lambda n: [signs(n)]),
    "CosineEmbedding": (nn.CosineEmbeddingLoss, lambda x: (x[:, :2], x[:, 2:]), lambda n: [signs(n)]),
    "MultiMargin": (
        lambda: nn.MultiMarginLoss(weight=class_weights()),
        lambda x: x,
        lambda n: [labels(n)],
    ),
    "MultiLabelMargin": (nn.MultiLabelMarginLoss, lambda x: x, lambda n: [multi_labels(n)]),
    "MultiLabelSoftMargin": (nn.MultiLabelSoftMarginLoss, lambda x: x, lambda n: [zeros_and_ones(n, 4)]),
    "Triplet": (
        nn.TripletMarginLoss,
        lambda x: (x[:, :2], x[:, 1:3] + 1, x[:, 2:] - 1),
        lambda n: [],
    ),
    "Triplet distance": (
        nn.TripletMarginWithDistanceLoss,
        lambda x: (x[:, :2], x[:, 1:3] + 1, x[:, 2:] - 1),
        lambda n: [],
    ),
    "NLL": (
        lambda: nn.NLLLoss(weight=class_weights()),
        lambda x: x.log_softmax(1),
        lambda n: [some_ignored(n)],
    ),
    "CE": (nn.CrossEntropyLoss, lambda x: x, lambda n: [some_ignored(n)]),
    "CE tokens": (
        lambda: nn.CrossEntropyLoss(weight=class_weights(), label_smoothing=0.1),
        lambda x: torch.stack([x, -x, 2 * x], 2),
        lambda n: [some_ignored(n, 3)],
    ),
    "CE soft": (
        lambda: nn.CrossEntropyLoss(weight=class_weights()),
        lambda x: x,
        lambda n: [draw(n, 4).softmax(1)],
    ),
}
if hasattr(nn, "LinearCrossEntropyLoss"):
    CRITERIA["LinearCE"] = (
        lambda: nn.LinearCrossEntropyLoss(4, CLASSES).double(),
        lambda x: x,
        lambda n: [some_ignored(n)],
    )


class Model(nn.Module):
    """Inputs (batch, 4, 6), outputs (batch, 4), made into what a criterion takes."""

    def __init__(self, norm: str, shaped: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3)
        norms = {"layer": nn.LayerNorm([8, 4]), "group": nn.GroupNorm(2, 8), "none": nn.Identity()}
        self.norm = norms[norm]
        self.out = nn.Linear(32, 4)
        self.shaped = shaped

    def forward(self, x: Tensor) -> Any:
        return self.shaped(self.out(torch.tanh(self.norm(self.conv(x))).flatten(1)))


def sizes_of_a_window() -> st.SearchStrategy[list[int]]:
    """One to five micro-batches of any sizes, with something that cross entropy counts in the first."""
    return st.lists(st.integers(1, 6), min_size=1, max_size=5)


def direct_mean(criterion: nn.Module, outputs: Any, targets: Sequence[Tensor]) -> Tensor:
    """The criterion's own mean; Gaussian NLL alone takes its target between two outputs."""
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if isinstance(criterion, nn.GaussianNLLLoss):
        return criterion(outputs[0], targets[0], outputs[1])
    return criterion(*outputs, *targets)


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
@pytest.mark.parametrize("name", CRITERIA)
@settings(max_examples=8)
@given(sizes=sizes_of_a_window(), seed=st.integers(0, 2**16))
def test_global_mean_is_the_large_batchs_gradient(
    name: str, norm: str, sizes: list[int], seed: int
) -> None:
    """To 1e-12, for every criterion whose mean is a ratio, however the window is split."""
    torch.manual_seed(seed)
    make, shaped, make_targets = CRITERIA[name]
    model, criterion, n = Model(norm, shaped).double(), make(), sum(sizes)
    inputs, targets = draw(n, 4, 6), make_targets(n)
    modules = nn.ModuleList([model, criterion])
    direct_mean(criterion, model(inputs), targets).backward()
    expected = gradients(modules)
    modules.zero_grad()
    rows = [t.split(sizes) for t in (inputs, *targets)]
    loss = accumulate_gradients(model, criterion, list(zip(*rows, strict=True)))
    found = gradients(modules)
    if loss.denominator == 0:  # every label ignored: torch's own mean is NaN
        assert found == {}
        return
    assert relative(found, expected) <= 1e-12


def test_every_criterion_with_a_ratio_is_among_them() -> None:
    """A loss that torch adds is noticed; CTC has no ratio, the adaptive softmax no `reduction`."""
    tried = {type(make()) for make, _, _ in CRITERIA.values()}
    losses = {
        loss
        for loss in vars(nn).values()
        if isinstance(loss, type) and loss.__name__.endswith("Loss") and issubclass(loss, nn.Module)
    }
    assert losses - tried == {nn.CTCLoss, nn.AdaptiveLogSoftmaxWithLoss}


UPDATES = 8
LOOSER: dict[str, float] = {"Adafactor": 1e-11, "LBFGS": 1e-9}
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
}


def rows_of_a_matrix(sparse: bool) -> nn.Module:
    """A model of matrices only, as Muon wants, whose first has sparse gradients, as SparseAdam wants."""
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 6, sparse=sparse)
    return nn.Sequential(embedding, nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))


def weights_after(name: str, micro_batches: Callable[[int], list[Any]]) -> Tensor:
    kind, model = OPTIMIZERS[name], rows_of_a_matrix(sparse=name == "SparseAdam").double()
    if name == "SparseAdam":  # it takes no dense gradient
        for parameter in list(model.parameters())[1:]:
            parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": 0.01}
    if "weight_decay" in inspect.signature(kind).parameters:
        options["weight_decay"] = 0.1
    optimizer = kind(trained, **options)  # type: ignore[arg-type]  # each takes what it takes
    loss_fn = CriterionLoss(nn.CrossEntropyLoss())

    def loss_at(step: int) -> float:
        optimizer.zero_grad()
        loss = accumulate_gradients(model, loss_fn, micro_batches(step))
        return float(loss.loss_sum) / float(loss.denominator)

    for step in range(UPDATES):
        optimizer.step(functools.partial(loss_at, step))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def ids_and_labels(step: int, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(7, (sum(sizes),), generator=generator)
    target = torch.randint(3, (sum(sizes),), generator=generator)
    return list(zip(ids.split(list(sizes)), target.split(list(sizes)), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_after_eight_updates_are_the_large_batchs(name: str) -> None:
    """To 1e-12 of their norm, with weight decay, on windows of 4, 3, 3 and 1 samples.

    Measured on six splits, relative to the norm of the weights: Adafactor 3e-17, LBFGS 2e-10. Adafactor
    divides by running means of squares that no bound keeps from zero, so a digit is left to it. LBFGS
    divides by differences y of two gradients g, until its tolerance stops it at |g| = 1e-7: rounding of
    1e-16 grows by up to |g| / |y| = 1e7, to 1e-9.
    """
    one_pass = weights_after(name, lambda step: ids_and_labels(step, [11]))
    accumulated = weights_after(name, lambda step: ids_and_labels(step, [4, 3, 3, 1]))
    assert float((accumulated - one_pass).norm() / one_pass.norm()) <= LOOSER.get(name, 1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_comparison_of_weights_can_fail(name: str) -> None:
    """One label that is another moves the weights of every optimizer further than its bound."""

    def other(step: int) -> list[tuple[Tensor, Tensor]]:
        (ids, target), *rest = ids_and_labels(step, [4, 3, 3, 1])
        target = copy.deepcopy(target)
        target[0] = (target[0] + 1) % 3
        return [(ids, target), *rest]

    one_pass = weights_after(name, lambda step: ids_and_labels(step, [11]))
    gap = float((weights_after(name, other) - one_pass).norm() / one_pass.norm())
    assert gap > 1e3 * LOOSER.get(name, 1e-12)


def test_mean_of_means_fails_the_same_comparison() -> None:
    """The comparison of gradients can fail too: unequal micro-batches under `mean`."""
    torch.manual_seed(0)
    model, micro_batches = nn.Linear(5, 3), window(4, 4, 1)
    found = []
    for reduction in ("global_mean", "mean"):
        model.zero_grad()
        accumulate_gradients(model, nn.CrossEntropyLoss(), micro_batches, reduction=reduction)  # type: ignore[arg-type]  # both are
        found.append(gradients(model))
    assert relative(found[1], found[0]) > 1e-2
