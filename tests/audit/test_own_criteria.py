"""Criteria of one's own: what is asked of them beside the passes is nobody's randomness."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.core.losses.model_loss import ModelLoss
from tests.audit.support import CLASSES, HIDDEN, net, window
from tests.program import Program
from tests.support import STRANGER

SOUND = ("equivalent", "identical")


class Focal(nn.Module):
    """Single cross entropies, weighed by how wrong they are."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def single(self, logits: Tensor, labels: Tensor) -> Tensor:
        ce = F.cross_entropy(logits, labels, reduction="none")
        return (1 - (-ce).exp()) ** 2 * ce

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        single = self.single(logits, labels)
        return single.sum() if self.reduction == "sum" else single.mean()


class Smoothed(Focal):
    """Label smoothing by hand."""

    def single(self, logits: Tensor, labels: Tensor) -> Tensor:
        smooth = 0.9 * F.one_hot(labels, CLASSES) + 0.1 / CLASSES
        return -(smooth * logits.log_softmax(1)).sum(1)


class Tempered(Focal):
    """A parameter of its own, which is trained as well."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def single(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits / self.temperature, labels, reduction="none")


class Foreground(Focal):
    """Over at least one sample of the last class, and says so itself."""

    def denominator(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (labels == CLASSES - 1).sum().clamp(min=1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = self.single(logits, labels).sum()
        return total if self.reduction == "sum" else total / self.denominator(logits, labels)


class Dropping(Focal):
    """Really random: it drops single losses."""

    def single(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.dropout(super().single(logits, labels), 0.3)


OWN = (Focal, Smoothed, Tempered, Foreground)


@pytest.mark.parametrize("kind", OWN)
def test_a_window_of_an_own_criterion_is_not_called_stochastic(kind: type[Focal]) -> None:
    """Though its denominator is found out with random outputs, in the very pass that is recorded."""
    found = audit_window(net(), kind(), window(4, 3, 4))
    assert found.verdict in SOUND, found


@pytest.mark.parametrize("kind", OWN)
def test_a_loop_of_an_own_criterion_is_not_called_stochastic(kind: type[Focal]) -> None:
    """Watched from outside, with equal micro-batches."""
    model, criterion = net(), kind()
    parts = [(x, torch.tensor([0, 2, 1, 2])) for x, _ in window(4, 4, 4)]
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    with watch(model, criterion, optimizer) as audit:
        for inputs, labels in parts:
            (criterion(model(inputs), labels) / len(parts)).backward()
        optimizer.step()
    assert audit.verdict in SOUND, audit.report()


def test_a_criterion_that_draws_is_stochastic() -> None:
    """Its own draws are seen, and nothing beside them."""
    found = audit_window(net(), Dropping(), window(4, 3, 4))
    assert (found.verdict, found.cause) == ("stochastic", "randomness")


class OwnLoss(nn.Module):
    """A model with a loss of its own, all weights of its last layer zero at first."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        nn.init.zeros_(self.last.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.dropout(torch.tanh(self.first(x))))
        return {"loss": F.cross_entropy(logits, labels)}


@pytest.mark.parametrize(("dropout", "verdicts"), [(0.0, SOUND), (0.5, ("stochastic",))])
def test_what_a_models_own_loss_counts_is_found_unseen(
    dropout: float, verdicts: tuple[str, ...]
) -> None:
    """Its probe moves weights at random where they tell nothing, and that is no draw of the model's."""
    parts = [{"x": x, "labels": labels} for x, labels in window(4, 3)]
    found = audit_window(OwnLoss(dropout), ModelLoss(), parts)
    assert found.verdict in verdicts, found


def test_the_program_ends_well_with_an_own_criterion(program: Program) -> None:
    """`task=audit` says equivalent or identical, and ends with status 0."""
    own = ("criterion=custom", "criterion._target_=tests.audit.test_own_criteria.Focal")
    ended = program("task=audit", *STRANGER, *own, "accum.steps=3", "data.global_batch_size=7")
    assert ended.status == 0, ended.plain
    audits = [json.loads(path.read_text()) for path in program.folder.rglob("audit.json")]
    assert audits
    assert all(audit["verdict"] in SOUND for audit in audits)
