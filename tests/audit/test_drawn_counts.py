"""Random numbers that decide what a loss counts, or that belong to sequences of several lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.audit.result import LOSS_SCALE, UNEQUAL_DENOMINATORS
from gaccum_exp.core.reductions import GLOBAL_MEAN, reduction_named

MEAN = reduction_named("mean")
STILL = "what then differs is chance"
Mask = Callable[[Tensor], Tensor]


def of_length(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]) < torch.randint(1, ids.shape[1] + 1, (len(ids), 1))


def time_first(ids: Tensor) -> Tensor:
    return (torch.rand(ids.numel()) < 0.5).view(ids.shape[1], len(ids)).T


def cropped(ids: Tensor) -> Tensor:
    return (torch.arange(ids.shape[1]) < torch.randint(1, ids.shape[1] + 1, ())).expand(ids.shape)


def chosen(ids: Tensor) -> Tensor:
    """Choose some tokens of the micro-batch, whosever they are."""
    some = torch.randperm(ids.numel())[: 3 + int(torch.randint(0, 9, ()))]
    return torch.zeros(ids.numel(), dtype=torch.bool).index_fill(0, some, True).view(ids.shape)


def among_the_large(ids: Tensor) -> Tensor:
    large = ids > 2
    return large.masked_scatter(large, torch.rand(int(large.sum())) < 0.5)


REPLAYABLE: dict[str, Mask] = {
    "hides few": lambda ids: torch.rand(ids.shape) < 0.3,
    "hides most": lambda ids: torch.rand(ids.shape) < 0.7,
    "flat": lambda ids: (torch.rand(ids.numel()) < 0.5).view(ids.shape),
    "integers": lambda ids: torch.randint(0, 3, ids.shape) == 0,
    "lengths": of_length,
}
NOT_REPLAYABLE: dict[str, Mask] = {
    "time first": time_first,
    "cropped": cropped,
    "chosen": chosen,
    "among the large": among_the_large,
}


class Masked(nn.Module):
    """Predicts the tokens that a mask hides."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.embedded, self.out = nn.Embedding(8, 6), nn.Linear(6, 7)
        self._mask = mask

    def at(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.out(self.embedded(ids.masked_fill(mask, 7)))
        return logits.flatten(0, 1), torch.where(mask, ids, -100).flatten()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.at(ids, self._mask(ids))


def masked(mask: Mask) -> tuple[Masked, list[Tensor]]:
    torch.manual_seed(0)
    return Masked(mask).double(), [torch.randint(0, 7, (4, 6)) for _ in range(4)]


def summed(model: Masked, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits, labels = model(ids)
    return F.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()


def distance_by_hand(model: Masked, window: list[Tensor], masks: list[Tensor]) -> float:
    """Return how far the mean of means is from the large batch's mean under the same masks."""

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    whole = gradient(F.cross_entropy(*model.at(torch.cat(window), torch.cat(masks))))
    each = [gradient(F.cross_entropy(*model.at(*pair))) for pair in zip(window, masks, strict=True)]
    return float((torch.stack(each).mean(0) - whole).norm() / whole.norm())


@pytest.mark.parametrize("name", REPLAYABLE)
def test_masks_that_follow_their_samples_show_the_bias_of_a_mean_of_means(name: str) -> None:
    """The error is that of a loop by hand with the masks of the first passes."""
    drawn: list[Tensor] = []

    def kept(ids: Tensor) -> Tensor:
        drawn.append(REPLAYABLE[name](ids))
        return drawn[-1]

    model, window = masked(kept)
    found = audit_window(model, summed, window, reduction=MEAN)
    by_hand = distance_by_hand(model, window, drawn[: len(window)])
    assert (found.verdict, found.cause) == ("biased", UNEQUAL_DENOMINATORS)
    assert found.e64 == pytest.approx(by_hand, rel=1e-9)
    assert STILL in (found.remedy or "")


@pytest.mark.parametrize("name", NOT_REPLAYABLE)
def test_masks_that_no_one_pass_can_have_show_that_they_count_unequally(name: str) -> None:
    """What each micro-batch counts under its own mask needs no one pass."""
    model, window = masked(NOT_REPLAYABLE[name])
    found = audit_window(model, summed, window, reduction=MEAN)
    assert (found.verdict, found.cause) == ("biased", UNEQUAL_DENOMINATORS)
    assert STILL in (found.remedy or "")


@pytest.mark.parametrize("name", [*REPLAYABLE, *NOT_REPLAYABLE])
def test_sums_divided_once_are_never_accused(name: str) -> None:
    """Whatever mask: stochastic where it follows its samples, else that or left open."""
    model, window = masked((REPLAYABLE | NOT_REPLAYABLE)[name])
    found = audit_window(model, summed, window, reduction=GLOBAL_MEAN)
    assert found.verdict in ("stochastic", *(["inconclusive"] if name in NOT_REPLAYABLE else []))


def test_a_loop_whose_loss_draws_its_mask_is_biased_and_still_stochastic() -> None:
    """Outside of all modules, and under watch."""
    model = Masked(lambda ids: torch.zeros(ids.shape, dtype=torch.bool)).double()
    torch.manual_seed(1)
    window = [torch.randint(0, 7, (4, 6)) for _ in range(4)]

    def step(ids: Tensor) -> Tensor:
        labels = torch.where(torch.rand(ids.shape) < 0.5, ids, -100)
        return F.cross_entropy(model(ids)[0], labels.flatten())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, step, optimizer) as found:
        for ids in window:
            (step(ids) / len(window)).backward()
        optimizer.step()
    assert (found.verdict, found.cause) == ("biased", UNEQUAL_DENOMINATORS)
    assert f"{STILL}, no fault (numbers are drawn outside of the modules)" in (found.remedy or "")


def test_integers_that_number_other_samples_leave_the_question_open() -> None:
    """A loss against samples drawn from the micro-batch has no replay in its large batch."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    window = [torch.randn(4, 4, dtype=torch.float64) for _ in range(3)]

    def against_others(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        out = model(x)
        return (out * out[torch.randint(0, len(x), (len(x),))]).tanh().sum(), len(x)

    assert audit_window(model, against_others, window).verdict == "inconclusive"


class Tagger(nn.Module):
    """Tags tokens, with dropout of its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded, self.out = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        tagged: Tensor = self.out(F.dropout(self.embedded(ids), 0.3))
        return tagged


@pytest.mark.parametrize("reduction", [GLOBAL_MEAN, MEAN])
def test_numbers_of_shorter_sequences_are_padded_as_these_are(reduction: Any) -> None:
    """Micro-batches of lengths 6, 4 and 8: the draws are held, and only their mean of means is off."""
    torch.manual_seed(0)
    window = []
    for samples, longest in ((2, 6), (3, 4), (2, 8)):
        ids, labels = torch.randint(1, 9, (samples, longest)), torch.randint(0, 5, (samples, longest))
        labels[0, 3:] = -100
        window.append({"input_ids": ids, "labels": labels})

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, labels = model(batch["input_ids"]).flatten(0, 1), batch["labels"]
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        return loss, (labels != -100).sum()

    found = audit_window(Tagger().double(), loss_fn, window, reduction=reduction)
    assert found.e64 is not None
    if reduction is MEAN:
        assert (found.verdict, found.cause) == ("biased", UNEQUAL_DENOMINATORS)
    else:
        assert found.verdict == "stochastic"
        assert found.e64 < 1e-12


class OverLogCount(nn.Module):
    """Divides by log(1 + positives): infinite where there is none."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets, reduction="sum")
        return loss if self.reduction == "sum" else loss / (targets > 0).double().sum().log1p()


def test_a_gradient_that_float64_makes_infinite_gives_no_verdict() -> None:
    """No bias is read off a distance that is not a number."""
    torch.manual_seed(0)
    window = [
        (torch.randn(3, 4, dtype=torch.float64), torch.tensor(t))
        for t in ([0, 0, 0], [1, 0, 2], [1, 2, 2])
    ]
    found = audit_window(nn.Linear(4, 3).double(), OverLogCount(), window, reduction=MEAN)
    assert found.verdict == "inconclusive"
    assert "finite" in (found.detail or "")


@pytest.mark.parametrize(
    ("inside", "outside", "said"),
    [(1.0, 1.0, "not divided by N"), (1 / 3, 1 / 3, "divided by N twice"), (1.0, 1 / 3, None)],
)
def test_unequal_denominators_do_not_hide_a_wrong_division(
    inside: float, outside: float, said: str | None
) -> None:
    """Of a loop with both faults both are said."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = []
    for counting in (4, 2, 1):
        labels = torch.randint(0, 3, (4,))
        labels[counting:] = -100
        window.append((torch.randn(4, 6, dtype=torch.float64), labels))

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) * inside

    with watch(model, step, optimizer) as found:
        for batch in window:
            (step(batch) * outside).backward()
        optimizer.step()
    causes = [finding.cause for finding in found.worst.findings]
    assert found.verdict == "biased"
    assert sorted(causes) == [*([LOSS_SCALE] if said else []), UNEQUAL_DENOMINATORS]
    assert said is None or said in (found.worst.remedies or "")
