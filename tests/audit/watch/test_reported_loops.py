"""Loops after public reports, each in three shapes and beside its twin without the fault, or with one.

Every loop is measured against the loss of the whole window, taken by hand in float64.
"""

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.audit.loops import Stepped, stepped
from tests.audit.support import whole

D = torch.float64
SOUND = ("equivalent", "identical")
SCALE, UNEQUAL, STALE = "loss scale", "unequal denominators", "stale or missing gradients"
ce = F.cross_entropy
Loss = Callable[..., Tensor]


def check(found: Stepped, cause: str | None) -> None:
    """Fail where verdict or cause is not that of the measured gradient."""
    audit, gap, rounding = found
    if cause is None:
        assert gap <= rounding
        assert audit.verdict in SOUND, str(audit)
    else:
        assert gap > 1e-3
        assert audit.verdict == "biased", str(audit)
    assert audit.cause == cause, str(audit)


def linear(inputs: int = 5, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).double()


def tanh(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())][:-1]).double()


def pooled(channels: int, outputs: int) -> nn.Sequential:
    """Return a model of images."""
    torch.manual_seed(0)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh(), pool, nn.Linear(4, outputs)).double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


def labels(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def drawn(n: int, each: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Return n micro-batches."""
    torch.manual_seed(1)
    return [each() for _ in range(n)]


# The loss function that is watched divides by N itself: huggingface/trl#3021, roboflow/rf-detr#1503.


def classes(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    return ce(model(batch[0]), batch[1])


def sequence(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    return F.smooth_l1_loss(model(batch[0]), batch[1]) * 3


def penalized(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    out = model(batch[0])
    return F.binary_cross_entropy_with_logits(out[:, 0], batch[1]) + 0.1 * out.square().mean()


INSIDE: list[tuple[int, Loss, Callable[[], nn.Module], Any]] = [
    (4, classes, linear, lambda: (randn(4, 5), labels(4))),
    (3, sequence, lambda: tanh(4, 6, 2), lambda: (randn(2, 7, 4), randn(2, 7, 2))),
    (2, penalized, lambda: pooled(2, 1), lambda: (randn(5, 2, 4, 4), torch.rand(5, dtype=D))),
]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("n", "loss", "model", "each"), INSIDE)
def test_a_function_that_divides_by_n_is_right_once(
    n: int, loss: Loss, model: Any, each: Any, twice: bool
) -> None:
    """Equivalent, and 1 / N of the large batch's gradient where the loop divides again."""
    parts = drawn(n, each)

    def compute_loss(model: Any, batch: Any) -> Tensor:
        return loss(model, batch) / n

    def passes(m: Any, o: Any) -> None:
        for batch in parts:
            (compute_loss(m, batch) / (n if twice else 1)).backward()

    found = stepped(model(), compute_loss, passes, lambda m: loss(m, whole(parts)))
    check(found, SCALE if twice else None)
    assert not twice or found.gap == pytest.approx(1 - 1 / n)


# Micro-batches that count nothing, sums over the window's count: karpathy/nanochat#618.


def ignoring(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return ce(m(x).flatten(0, -2), y.flatten(), reduction="sum")


def observed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return ((m(x) - y.nan_to_num()) ** 2 * ~y.isnan()).sum()


def labelled(n: int, empty: tuple[int, ...], *shape: int) -> list[tuple[Tensor, ...]]:
    parts = drawn(n, lambda: (randn(*shape, 5), labels(*shape)))
    for i, (_, y) in enumerate(parts):
        y.view(-1)[(0 if i in empty else 1 + i) :] = -100
    return parts


def measured() -> list[tuple[Tensor, ...]]:
    parts = drawn(3, lambda: (randn(4, 5), randn(4, 2)))
    for i, (_, y) in enumerate(parts):
        y[2 * i :] = torch.nan
    return parts


EMPTY: list[tuple[Loss, Callable[[], nn.Module], Any, Callable[[Tensor], Tensor]]] = [
    (ignoring, linear, lambda: labelled(4, (2,), 4), lambda y: y != -100),
    (observed, lambda: tanh(5, 6, 2), measured, lambda y: ~y.isnan()),
    (ignoring, lambda: tanh(5, 6, 3), lambda: labelled(5, (0, 3), 2, 6), lambda y: y != -100),
]


@pytest.mark.parametrize("of_means", [False, True])
@pytest.mark.parametrize(("loss", "model", "window", "counts"), EMPTY)
def test_micro_batches_that_count_nothing_take_no_share(
    loss: Loss, model: Any, window: Any, counts: Any, of_means: bool
) -> None:
    """Sums over the window's count are equivalent; means over one's own, one at least, are not."""
    parts = window()
    of = [int(counts(y).sum()) for _, y in parts]
    assert 0 in of

    def passes(m: Any, o: Any) -> None:
        for (x, y), n in zip(parts, of, strict=True):
            (loss(m, x, y) / (max(1, n) * len(parts) if of_means else sum(of))).backward()

    found = stepped(model(), None, passes, lambda m: loss(m, *whole(parts)) / sum(of))
    check(found, UNEQUAL if of_means else None)


# Another optimizer's passes leave gradients in the critic: FoundationVision/OmniTokenizer#15.


def entropy(real: Tensor, fake: Tensor) -> Tensor:
    bce = F.binary_cross_entropy_with_logits
    return (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def distance(real: Tensor, fake: Tensor) -> Tensor:
    return fake.mean() - real.mean() + 1e-3 * real.square().mean()


CRITICS: list[tuple[int, Loss, Callable[[], nn.Module], tuple[int, ...], int]] = [
    (4, entropy, lambda: linear(5, 1), (5,), 4),
    (2, hinge, lambda: tanh(6, 8, 1), (6,), 3),
    (3, distance, lambda: pooled(1, 1), (1, 4, 4), 5),
]


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize(("n", "loss", "critic", "shape", "size"), CRITICS)
def test_what_a_generators_passes_leave_in_its_critic_is_found(
    n: int, loss: Loss, critic: Any, shape: tuple[int, ...], size: int, zeroed: bool
) -> None:
    """Unless it is zeroed before the critic's own passes."""
    torch.manual_seed(2)
    width = torch.Size(shape).numel()
    maker = nn.Sequential(nn.Linear(4, width), nn.Unflatten(1, shape)).double()
    of_maker = torch.optim.SGD(maker.parameters(), lr=0.0)  # so that the fakes are known beforehand
    noise = drawn(n, lambda: (randn(size, 4),))
    parts = [(randn(size, *shape), maker(z).detach()) for (z,) in noise]

    def passes(m: Any, o: Any) -> None:
        for (z,) in noise:
            (F.softplus(-m(maker(z))).mean() / n).backward()
        of_maker.step()
        if zeroed:
            o.zero_grad()
        for (real, _), (z,) in zip(parts, noise, strict=True):
            fake = maker(z).detach()
            (loss(m(real), m(fake)) / n).backward()

    def large(m: Any) -> Tensor:
        real, fake = whole(parts)
        return loss(m(real), m(fake))

    check(stepped(critic(), None, passes, large), None if zeroed else STALE)


# A buffer of gradients that keeps one micro-batch's only: AMD-AGI/Primus#1046.

BUFFERED: list[tuple[int, int, Loss, Callable[[], nn.Module], Any]] = [
    (4, 0, ce, linear, lambda: (randn(4, 5), labels(4))),
    (3, 2, F.mse_loss, lambda: tanh(4, 6, 2), lambda: (randn(2, 7, 4), randn(2, 7, 2))),
    (5, 1, ce, lambda: pooled(2, 3), lambda: (randn(3, 2, 4, 4), labels(3))),
]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("n", "kept", "loss", "model", "each"), BUFFERED)
def test_a_buffer_that_keeps_one_micro_batch_is_found(
    n: int, kept: int, loss: Loss, model: Any, each: Any, adds: bool
) -> None:
    """The first, the last or one between; one that adds them up is sound."""
    parts = drawn(n, each)

    def passes(m: Any, o: Any) -> None:
        buffer: dict[Any, Tensor] = {}
        for i, (x, y) in enumerate(parts):
            (loss(m(x), y) / n).backward()
            for p in m.parameters():
                if adds or i == kept:
                    buffer[p] = p.grad.clone() if p not in buffer else buffer[p] + p.grad
                p.grad = None
        for p in m.parameters():
            p.grad = buffer[p]

    def large(m: Any) -> Tensor:
        x, y = whole(parts)
        return loss(m(x), y)

    check(stepped(model(), loss, passes, large), None if adds else STALE)


# Reentrant checkpointing of inputs that need no gradient: huggingface/transformers#26221, peft#1142.


class Adapted(nn.Module):
    """A frozen layer with an adapter of low rank beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + x @ self.down.T @ self.up.T)


class Checkpointed(nn.Module):
    """Runs its first block under a checkpoint; `reentrant` is of the loop that runs."""

    def __init__(self, first: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        self.first, self.rest, self.reentrant = first, rest, False

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
            hidden = checkpoint(self.first, x, use_reentrant=self.reentrant)
        out: Tensor = self.rest(hidden)
        return out


def adapters() -> nn.Module:
    return Checkpointed(Adapted(5, 8), Adapted(8, 3))


def images() -> nn.Module:
    return Checkpointed(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten()), nn.Linear(16, 3))


def deep() -> nn.Module:
    frozen = nn.Linear(4, 6).requires_grad_(False)
    return Checkpointed(nn.Sequential(frozen, Adapted(6, 6), Adapted(6, 6)), nn.Linear(6, 2))


CHECKPOINTS: list[tuple[int, Loss, Callable[[], nn.Module], Any, str]] = [
    (4, ce, adapters, lambda: (randn(4, 5), labels(4)), "first.down"),
    (2, ce, images, lambda: (randn(3, 2, 4, 4), labels(3)), "first.0.weight"),
    (3, F.mse_loss, deep, lambda: (randn(4, 3, 4), randn(4, 3, 2)), "first.1.down"),
]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("n", "loss", "made", "each", "named"), CHECKPOINTS)
def test_parameters_that_a_checkpoint_leaves_without_gradient_are_named(
    n: int, loss: Loss, made: Any, each: Any, named: str, reentrant: bool
) -> None:
    """Measured against the same model without it."""
    torch.manual_seed(0)
    model, parts = made().double(), drawn(n, each)

    def passes(m: Any, o: Any) -> None:
        m.reentrant = reentrant
        for x, y in parts:
            (loss(m(x), y) / n).backward()

    def large(m: Any) -> Tensor:
        x, y = whole(parts)
        return loss(m(x), y)

    found = stepped(model, loss, passes, large)
    check(found, STALE if reentrant else None)
    assert not reentrant or named in str(found.audit), str(found.audit)


# Several calls of the model a micro-batch, one backward: FixMatch and its kind.


def fixmatch(m: Any, x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return ce(m(x), y) + 0.5 * ce(m(u), v)


def consistent(m: Any, x: Tensor, y: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
    return F.mse_loss(m(x), y) + 2 * F.mse_loss(m(strong), m(weak).detach())


def siamese(m: Any, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cosine_embedding_loss(m(a), m(b), y, margin=0.2)


CALLS: list[tuple[int, Loss, Callable[[], nn.Module], Any]] = [
    (4, fixmatch, linear, lambda: (randn(4, 5), labels(4), randn(8, 5), labels(8))),
    (
        3,
        consistent,
        lambda: tanh(5, 6, 2),
        lambda: (randn(2, 5), randn(2, 2), randn(5, 5), randn(5, 5)),
    ),
    (
        2,
        siamese,
        lambda: pooled(1, 3),
        lambda: (randn(3, 1, 4, 4), randn(3, 1, 4, 4), 2.0 * torch.randint(2, (3,)) - 1),
    ),
]


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize(("n", "loss", "model", "each"), CALLS)
def test_several_calls_that_share_a_backward_are_one_micro_batch(
    n: int, loss: Loss, model: Any, each: Any, divided: bool
) -> None:
    """With other samples in each call, or other numbers of them."""
    parts = drawn(n, each)

    def passes(m: Any, o: Any) -> None:
        for part in parts:
            (loss(m, *part) / (n if divided else 1)).backward()

    found = stepped(model(), None, passes, lambda m: loss(m, *whole(parts)))
    check(found, None if divided else SCALE)
    assert found.audit.accum_steps == n


# Two terms, each over its own count: datamol-io/graphium#413.


class Heads(nn.Module):
    """(batch, 5) -> one output for each term."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 6)
        self.heads = nn.ModuleList(nn.Linear(6, width) for width in widths)
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return [head(hidden) for head in self.heads]


class Term(NamedTuple):
    """The sum of a term over what counts, and the mask of that."""

    single: Loss
    target: Callable[[], Tensor]
    width: int
    weight: float = 1.0


SQUARES = Term(lambda p, t: (p[:, 0] - t).square(), lambda: randn(4), 1)
FAR = Term(lambda p, t: (p[:, 0] - t).abs(), lambda: randn(4), 1, 0.3)
CLASSES = Term(lambda p, t: ce(p, t, reduction="none"), lambda: labels(4), 3, 2.0)
BITS = Term(
    lambda p, t: F.binary_cross_entropy_with_logits(p, t, reduction="none").sum(1),
    lambda: torch.rand(4, 2, dtype=D),
    2,
)
TWO: list[tuple[tuple[Term, Term], list[tuple[int, int]]]] = [
    ((SQUARES, SQUARES), [(4, 1), (1, 4), (3, 2), (2, 3)]),
    ((CLASSES, FAR), [(1, 4), (3, 2), (4, 1)]),
    ((BITS, CLASSES), [(2, 4), (4, 1)]),
]


@pytest.mark.parametrize("own_counts", [True, False])
@pytest.mark.parametrize(("terms", "counts"), TWO)
def test_two_terms_over_their_windows_counts_are_the_large_batchs(
    terms: tuple[Term, Term], counts: list[tuple[int, int]], own_counts: bool
) -> None:
    """And two means of means are not."""
    torch.manual_seed(1)
    targets = [tuple(term.target() for term in terms) for _ in counts]
    inputs = [randn(4, 5) for _ in counts]
    of = [sum(c) for c in zip(*counts, strict=True)]

    def sums(out: list[Tensor], part: tuple[Tensor, ...], count: tuple[int, int]) -> list[Tensor]:
        return [
            (term.single(p, t) * (torch.arange(4) < c)).sum() * term.weight
            for term, p, t, c in zip(terms, out, part, count, strict=True)
        ]

    def passes(m: Any, o: Any) -> None:
        for x, part, count in zip(inputs, targets, counts, strict=True):
            first, second = sums(m(x), part, count)
            a, b = of if own_counts else [c * len(counts) for c in count]
            (first / a + second / b).backward()

    def large(m: Any) -> Tensor:
        out = [each.split(4) for each in m(torch.cat(inputs))]
        found = [sums([each[i] for each in out], targets[i], counts[i]) for i in range(len(counts))]
        first, second = (torch.stack(each).sum() for each in zip(*found, strict=True))
        return first / of[0] + second / of[1]

    model = Heads(*(term.width for term in terms))
    check(stepped(model, None, passes, large), None if own_counts else UNEQUAL)
