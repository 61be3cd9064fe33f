"""Loops as people write them, kind by kind: what `watch` says of each is what a newcomer needs to hear.

Sound loops step on the large batch's gradient, the others do not: each is measured against the loss
of the whole window, taken by hand in float64, beside what is said of it. A window is of micro-batches
of four samples unless it says otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from tests.audit.loops import Stepped, stepped
from tests.audit.support import whole

D = torch.float64
SOUND = ("equivalent", "identical")
SCALE, UNEQUAL = "loss scale", "unequal denominators"
STALE, COUPLED = "stale or missing gradients", "loss not additive over samples"
Parts = Sequence[tuple[Tensor, ...]]
ce = F.cross_entropy
LOOPS: dict[str, tuple[Callable[[], Stepped], str, str | None]] = {}
"""By name: what runs and watches it, the verdict (`sound` for either of two), and the cause."""


def loop(verdict: str, cause: str | None = None) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a loop."""

    def register(run_it: Callable[[], Any]) -> Callable[[], Any]:
        LOOPS[run_it.__name__] = run_it, verdict, cause
        return run_it

    return register


def net(outputs: int = 3) -> nn.Sequential:
    """Return a small network of 5 inputs."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def few() -> nn.Module:
    """Return a model of two parameters."""
    torch.manual_seed(1)
    return nn.Linear(1, 1).double()


def few_hidden() -> nn.Module:
    """Return a small network with one output."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 1)).double()


def data(sizes: Sequence[int] = (4, 4, 4, 4), inputs: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of these sizes, with labels of three classes."""
    torch.manual_seed(2)
    return [(torch.randn(n, inputs, dtype=D), torch.randint(3, (n,))) for n in sizes]


def kept(parts: Parts, most: int = 4) -> list[tuple[Tensor, ...]]:
    """Return the micro-batches with a mask: 1, 2, 3, 4 samples count."""
    return [(*part, (torch.arange(len(part[0])) <= i % most).to(D)) for i, part in enumerate(parts)]


def without_labels() -> list[tuple[Tensor, Tensor]]:
    """Return four micro-batches, the labels of the third ignored."""
    parts = data()
    parts[2][1][:] = -100
    return parts


def run(model: nn.Module, given: Any, fn: Any, parts: Parts, divisor: float) -> Stepped:
    """Watch a loop that divides `fn(model, *micro_batch)`, and measure it against that of the window."""

    def passes(m: nn.Module, o: Any) -> None:
        for part in parts:
            (fn(m, *part) / divisor).backward()

    return stepped(model, given, passes, lambda m: fn(m, *whole(parts)))


# One loss of the model's outputs, in the loop or in a function that is watched.


def half_of_squares(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((m(x)[:, 0] - y) ** 2).mean()


def cross_entropy(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return ce(m(x), y)


@loop("sound")
def half_of_the_squares_in_a_function() -> Stepped:
    return run(net(1), half_of_squares, half_of_squares, data((4, 4)), 2)


@loop("sound")
def half_of_the_squares_in_the_loop() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * F.mse_loss(m(x)[:, 0], y.double())

    return run(net(1), None, fn, data((4, 4)), 2)


@loop("sound")
def given_constant_in_a_function() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return 0.3 * ce(m(x), y)

    return run(net(), fn, fn, data(), 4)


@loop("sound")
def log_probabilities_by_hand() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return -m(x).log_softmax(-1).gather(1, y[:, None]).mean()

    return run(net(), None, fn, data(), 4)


def alignments(lengths: Sequence[int], divisor: float) -> Stepped:
    """CTC over 9 steps, with the targets of a micro-batch's samples one after the other."""
    torch.manual_seed(4)
    counts = [torch.tensor(lengths[k : k + 3]) for k in range(0, len(lengths), 3)]
    given = [
        (
            torch.randn(3, 9, 5, dtype=D),
            torch.randint(1, 3, (int(each.sum()),)),
            torch.full((3,), 9),
            each,
        )
        for each in counts
    ]

    def fn(m: Any, x: Tensor, y: Tensor, steps: Tensor, each: Tensor) -> Tensor:
        return F.ctc_loss(m(x).log_softmax(-1).transpose(0, 1), y, steps, each)

    return run(net(), None, fn, given, divisor)


@loop("sound")
def aligned_targets_of_equal_length() -> Stepped:
    return alignments([2] * 9, 3)


@loop("sound")
def aligned_targets_of_other_lengths() -> Stepped:
    return alignments([1, 3, 2, 2, 2, 4, 1, 1, 3], 3)


@loop("biased", SCALE)
def aligned_targets_undivided() -> Stepped:
    return alignments([2] * 9, 1)


@loop("sound")
def elementwise_and_weighed() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return (ce(m(x), y, reduction="none") * w).mean()

    return run(net(), None, fn, [(*part, torch.rand(4, dtype=D)) for part in data()], 4)


@loop("sound")
def elementwise_criterion_and_its_mean() -> Stepped:
    c = nn.CrossEntropyLoss(reduction="none")
    return run(net(), c, lambda m, x, y: c(m(x), y).mean(), data(), 4)


@loop("sound")
def divergence_by_batchmean() -> Stepped:
    def divergence(s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(s.log_softmax(-1), t, reduction="batchmean")

    parts = [(x, torch.rand(4, 3, dtype=D).softmax(-1)) for x, _ in data()]
    return run(net(), divergence, lambda m, x, t: divergence(m(x), t), parts, 4)


@loop("sound")
def one_micro_batch() -> Stepped:
    return run(net(), None, cross_entropy, data((4,)), 1)


@loop("sound")
def sum_then_one_backward() -> Stepped:
    def passes(m: nn.Module, o: Any) -> None:
        total: Any = 0
        for x, y in data():
            total = total + ce(m(x), y) / 4
        total.backward()

    return stepped(net(), None, passes, lambda m: cross_entropy(m, *whole(data())))


@loop("sound")
def unrolled_two() -> Stepped:
    def passes(m: nn.Module, o: Any) -> None:
        a, b = data((4, 4))
        (ce(m(a[0]), a[1]) / 2).backward()
        (ce(m(b[0]), b[1]) / 2).backward()

    return stepped(net(), None, passes, lambda m: cross_entropy(m, *whole(data((4, 4)))))


@loop("biased", SCALE)
def unrolled_two_undivided() -> Stepped:
    def passes(m: nn.Module, o: Any) -> None:
        a, b = data((4, 4))
        ce(m(a[0]), a[1]).backward()
        ce(m(b[0]), b[1]).backward()

    return stepped(net(), None, passes, lambda m: cross_entropy(m, *whole(data((4, 4)))))


@loop("biased", SCALE)
def partial_divided_by_full() -> Stepped:
    return run(net(), None, cross_entropy, data((4, 4, 4)), 4)


# Division by N inside the function that is watched.


def divided_inside(
    fn: Any, n: int, outside: float, loss: Any, model: nn.Module | None = None
) -> Stepped:
    """Watch `fn`, which divides `loss` by n itself, in a loop that divides it once more."""
    parts = data([4] * n)

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in parts:
            (fn(m, x, y) / outside).backward()

    return stepped(model or net(), fn, passes, lambda m: loss(m, *whole(parts)))


def with_squares(m: Any, x: Tensor, y: Tensor) -> Tensor:
    z = m(x)
    return ce(z, y) + 0.1 * (z**2).mean()


@loop("biased", SCALE)
def divided_inside_and_outside() -> Stepped:
    return divided_inside(lambda m, x, y: ce(m(x), y) / 3, 3, 3, cross_entropy)


@loop("biased", SCALE)
def two_terms_divided_twice() -> Stepped:
    return divided_inside(lambda m, x, y: with_squares(m, x, y) / 4, 4, 4, with_squares)


@loop("sound")
def divided_inside_each_of_two_terms() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        z = m(x)
        return ce(z, y) / 4 + 0.1 * (z**2).mean() / 4

    return divided_inside(fn, 4, 1, with_squares)


@loop("biased", SCALE)
def two_terms_undivided() -> Stepped:
    return run(net(), with_squares, with_squares, data(), 1)


# Two terms, and penalties.


@loop("sound")
def squares_of_the_outputs_beside() -> Stepped:
    return run(net(), None, with_squares, data(), 4)


@loop("sound")
def squares_of_the_outputs_beside_a_criterion_given() -> Stepped:
    c = nn.CrossEntropyLoss()

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        z = m(x)
        return c(z, y) + 0.1 * (z**2).mean()

    return run(net(), c, fn, data(), 4)


@loop("biased", SCALE)
def one_of_two_terms_undivided() -> Stepped:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            z = m(x)
            (ce(z, y) / 4 + 0.1 * (z**2).mean()).backward()

    return stepped(net(), None, passes, lambda m: with_squares(m, *whole(data())))


@loop("sound")
def penalty_of_the_weights() -> Stepped:
    c = nn.CrossEntropyLoss()

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return c(m(x), y) + 0.01 * sum(p.pow(2).sum() for p in m.parameters())

    return run(net(), c, fn, data(), 4)


@loop("sound")
def penalty_before_the_loss() -> Stepped:
    c = nn.CrossEntropyLoss()

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = 0.01 * m[0].weight.pow(2).sum()
        return loss + c(m(x), y)

    return run(net(), c, fn, data(), 4)


@loop("sound")
def penalty_once_in_its_own_backward() -> Stepped:
    c = nn.CrossEntropyLoss()

    def penalty(m: Any) -> Tensor:
        found: Tensor = 0.01 * m[0].weight.abs().sum()
        return found

    def passes(m: Any, o: Any) -> None:
        for x, y in data():
            (c(m(x), y) / 4).backward()
        penalty(m).backward()

    return stepped(net(), c, passes, lambda m: cross_entropy(m, *whole(data())) + penalty(m))


@loop("sound")
def both_ways_of_a_pair() -> Stepped:
    def fn(a: Tensor, y: Tensor) -> Tensor:
        return (ce(a, y) + ce(a * 2, y)) / 2

    return run(net(), fn, lambda m, x, y: fn(m(x), y), data((4, 4)), 2)


class Weighing(nn.Module):
    """Weights of two terms that are learnt (1705.07115)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.s = net(), nn.Parameter(torch.tensor([0.3, 0.2], dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def weighed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    z = m(x)
    a, b = ce(z, y), (z**2).mean()
    total: Tensor = torch.exp(-m.s[0]) * a + m.s[0] + torch.exp(-m.s[1]) * b + m.s[1]
    return total


@loop("sound")
def uncertainty_weights() -> Stepped:
    return run(Weighing(), None, weighed, data(), 4)


@loop("sound")
def uncertainty_weights_in_a_function() -> Stepped:
    return run(Weighing(), weighed, weighed, data(), 4)


@loop("sound")
def losses_in_a_dictionary_of_the_models() -> Stepped:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = net()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            z = self.n(x)
            return {"a": ce(z, y), "b": (z**2).mean()}

    return run(Own(), None, lambda m, x, y: sum(m(x, y).values()), data(), 4)


def variational(m: Any, x: Tensor) -> Tensor:
    z = m(x)
    mu, lv = z[:, :2], z[:, 2:3]
    kl = -0.5 * (1 + lv - mu[:, :1] ** 2 - lv.exp()).sum() / len(x)
    return F.mse_loss(mu, x[:, :2], reduction="sum") / len(x) + kl


@loop("sound")
def variational_bound() -> Stepped:
    return run(net(), variational, variational, [(x,) for x, _ in data()], 4)


@loop("biased", UNEQUAL)
def variational_bound_of_unequal_micro_batches() -> Stepped:
    return run(net(), variational, variational, [(x,) for x, _ in data((4, 4, 4, 2))], 4)


# Denominators of masks.


def masked(m: Any, x: Tensor, y: Tensor, k: Tensor) -> Tensor:
    return -(m(x).log_softmax(-1).gather(1, y[:, None])[:, 0] * k).sum() / k.sum()


@loop("biased", UNEQUAL)
def masked_means() -> Stepped:
    return run(net(), None, masked, kept(data()), 4)


@loop("sound")
def masked_sums_over_the_windows_count() -> Stepped:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y, k in kept(data()):
            (masked(m, x, y, k) * k.sum() / 10).backward()

    return stepped(net(), None, passes, lambda m: masked(m, *whole(kept(data()))))


@loop("biased", UNEQUAL)
def one_of_two_terms_masked() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor, k: Tensor) -> Tensor:
        z = m(x)
        return ce(z, y) + ((z**2).sum(1) * k).sum() / k.sum()

    return run(net(), fn, fn, kept(data()), 4)


@loop("biased", UNEQUAL)
def nothing_but_nan_of_an_empty_micro_batch() -> Stepped:
    return run(net(), None, cross_entropy, without_labels(), 4)


def clamped(z: Tensor, y: Tensor) -> Tensor:
    return ce(z, y, reduction="sum") / max(1, int((y >= 0).sum()))


@loop("biased", UNEQUAL)
def empty_micro_batch_counted_among_n() -> Stepped:
    return run(net(), clamped, lambda m, x, y: clamped(m(x), y), without_labels(), 4)


@loop("sound")
def empty_micro_batch_not_counted_among_n() -> Stepped:
    return run(net(), clamped, lambda m, x, y: clamped(m(x), y), without_labels(), 3)


@loop("sound")
def token_means_weighed_in_float32() -> Stepped:
    parts = data((4, 4, 4))
    parts[0][1][:2] = -100

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in parts:
            (ce(m(x.float()), y) * (y >= 0).sum() / 10).backward()

    return stepped(net().float(), None, passes, lambda m: cross_entropy(m, *whole(parts)))


# Losses that are no sums over samples.


@loop("biased", COUPLED)
def root_of_the_mean_of_squares() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.sqrt(F.mse_loss(m(x)[:, 0], y.double()))

    return run(net(1), None, fn, data(), 4)


@loop("biased", COUPLED)
def dice_beside() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        z = m(x)
        p, t = z.softmax(-1)[:, 1], (y == 1).double()
        return ce(z, y) + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)

    return run(net(), fn, fn, data(), 4)


@loop("sound")
def contrastive_among_cached_features() -> Stepped:
    """Exact, and left open: the loss has more rows than a micro-batch has samples."""
    parts = data()
    labels = torch.cat([y for _, y in parts])

    def among(z: Tensor) -> Tensor:
        z = F.normalize(z, dim=-1)
        return ce(z @ z.T / 0.1 - 1e9 * torch.eye(16, dtype=D), labels)

    def passes(m: nn.Module, o: Any) -> None:
        with torch.no_grad():
            cached = [m(x) for x, _ in parts]
        for k, (x, _) in enumerate(parts):
            among(torch.cat([*cached[:k], m(x), *cached[k + 1 :]])).backward()

    return stepped(net(), None, passes, lambda m: among(m(whole(parts)[0])))


# Few parameters.


@loop("sound")
def few_parameters() -> Stepped:
    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(m(x)[:, 0], y.double())

    return run(few(), None, fn, data((3, 3, 3, 3), inputs=1), 4)


@loop("biased", UNEQUAL)
def few_parameters_masked() -> Stepped:
    def fn(p: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return ((p[:, 0] - y) ** 2 * k).sum() / k.sum()

    return run(few(), fn, lambda m, x, y, k: fn(m(x), y.double(), k), kept(data(inputs=1)), 4)


@loop("biased", COUPLED)
def few_parameters_coupled() -> Stepped:
    def fn(p: Tensor, y: Tensor) -> Tensor:
        return (p * y[:, None]).mean() / (p.std() + 1)

    return run(few(), fn, lambda m, x, y: fn(m(x), y.double()), data(inputs=1), 4)


# Several calls of the model.


def real_and_fake(m: Any, x: Tensor, fake: Tensor) -> Tensor:
    real, made = m(x), m(fake)
    bce = F.binary_cross_entropy_with_logits
    return bce(real, torch.ones_like(real)) + bce(made, torch.zeros_like(made))


def own_backwards(divisor: float) -> Stepped:
    b, parts = nn.BCEWithLogitsLoss(), [(x, 2 * x + 1) for x, _ in data()]
    one, zero = torch.ones(4, 1, dtype=D), torch.zeros(4, 1, dtype=D)

    def passes(m: nn.Module, o: Any) -> None:
        for x, fake in parts:
            (b(m(x), one) / divisor).backward()
            (b(m(fake), zero) / divisor).backward()

    return stepped(net(1), b, passes, lambda m: real_and_fake(m, *whole(parts)))


@loop("sound")
def real_and_fake_each_with_its_backward() -> Stepped:
    return own_backwards(4)


@loop("biased", SCALE)
def real_and_fake_each_with_its_backward_undivided() -> Stepped:
    return own_backwards(1)


@loop("sound")
def unlabelled_missing_in_a_micro_batch() -> Stepped:
    parts = data()
    unlabelled = whole([(x + 1, y) for i, (x, y) in enumerate(parts) if i != 1])

    def passes(m: nn.Module, o: Any) -> None:
        for i, (x, y) in enumerate(parts):
            loss = ce(m(x), y) / 4
            if i != 1:
                loss = loss + 0.5 * ce(m(x + 1), y, reduction="sum") / 12
            loss.backward()

    def large(m: Any) -> Tensor:
        return cross_entropy(m, *whole(parts)) + 0.5 * cross_entropy(m, *unlabelled)

    return stepped(net(), None, passes, large)


@loop("sound")
def critic_after_its_generator() -> Stepped:
    torch.manual_seed(3)
    maker, b = nn.Linear(4, 5).double(), nn.BCEWithLogitsLoss()
    of_maker = torch.optim.SGD(maker.parameters(), 0.0)
    noise = [torch.randn(4, 4, dtype=D) for _ in range(6)]
    one, zero = torch.ones(4, 1, dtype=D), torch.zeros(4, 1, dtype=D)
    parts = [(x, maker(z).detach()) for (x, _), z in zip(data((4, 4, 4)), noise[3:], strict=True)]

    def passes(m: nn.Module, o: Any) -> None:
        for z in noise[:3]:
            (b(m(maker(z)), one) / 3).backward()
        of_maker.step()
        o.zero_grad()
        for (x, _), z in zip(parts, noise[3:], strict=True):
            fake = maker(z).detach()
            ((b(m(x), one) + b(m(fake), zero)) / 2 / 3).backward()

    return stepped(net(1), b, passes, lambda m: real_and_fake(m, *whole(parts)) / 2)


@loop("sound")
def weights_of_as_many_classes_as_samples() -> Stepped:
    weight, y = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=D), torch.tensor([0, 1, 2, 3])
    parts = [(x, y.roll(i)) for i, (x, _) in enumerate(data())]
    return run(net(4), None, lambda m, x, y: ce(m(x), y, weight=weight), parts, 4)


def weighted_pixels(labels: Sequence[Tensor]) -> Stepped:
    """Label pixels, with weights of as many classes as a micro-batch has samples; torch takes more."""
    torch.manual_seed(2)
    model, weight = nn.Conv2d(2, 4, 3, padding=1).double(), torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=D)
    parts = [(torch.randn(4, 2, 3, 3, dtype=D), y) for y in labels]
    return run(model, None, lambda m, x, y: ce(m(x), y, weight=weight), parts, 4)


@loop("sound")
def pixels_of_equally_weighted_classes() -> Stepped:
    y = torch.randint(0, 4, (4, 3, 3), generator=torch.Generator().manual_seed(3))
    return weighted_pixels([y.roll(i) for i in range(4)])


@loop("biased", UNEQUAL)
def pixels_of_unequally_weighted_classes() -> Stepped:
    generator = torch.Generator().manual_seed(3)
    return weighted_pixels([torch.randint(0, 4, (4, 3, 3), generator=generator) for _ in range(4)])


@loop("sound")
def chosen_and_rejected_beside_a_reference() -> Stepped:
    reference = net(1).requires_grad_(False)

    def preferred(m: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
        both = torch.cat([chosen, rejected])
        with torch.no_grad():
            a, b = reference(both).chunk(2)
        c, d = m(both).chunk(2)
        return -F.logsigmoid((c - a) - (d - b)).mean()

    parts = [(x, x.flip(1) + 1) for x, _ in data()]
    return run(few_hidden(), None, preferred, parts, 4)


@loop("biased", SCALE)
def hooks_that_clip() -> Stepped:
    model = net()
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.02, 0.02))  # type: ignore[no-untyped-call]
    return run(model, None, cross_entropy, data(), 4)


class Reversed(torch.autograd.Function):
    """Leaves features as they are, and turns their gradient round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return -ctx.by * gradient, None


class Squared(torch.autograd.Function):
    """A loss with a gradient of its own, in the newer way to write it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.square().mean()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * 2 * x / x.numel()


def reversing(divisor: int) -> Stepped:
    """Train a head against features, between whose calls their gradient is turned round."""
    model = nn.ModuleDict({"features": nn.Linear(5, 4), "classes": nn.Linear(4, 3)}).double()

    def loss(m: Any, x: Tensor, y: Tensor) -> Tensor:
        features = m["features"](x)
        other = ce(m["classes"](Reversed.apply(features, 0.5)), 2 - y)
        return ce(m["classes"](features), y) + other

    return run(model, None, loss, data(), divisor)


@loop("sound")
def gradients_turned_round() -> Stepped:
    return reversing(4)


@loop("biased", SCALE)
def gradients_turned_round_and_not_divided() -> Stepped:
    return reversing(1)


@loop("biased", SCALE)
def a_loss_with_a_gradient_of_its_own() -> Stepped:
    return run(net(), None, lambda m, x, y: Squared.apply(m(x)), data(), 1)


# A gradient that goes into the loss.


def slope(m: Any, x: Tensor, asked: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the outputs at inputs of the loop's own, and the gradient of what is asked of them."""
    x = (0.5 * x).requires_grad_()
    out = m(x)
    return out, torch.autograd.grad(asked(out), x, create_graph=True)[0]


def penalized(divisor: float, of_penalty: float) -> Stepped:
    """Train a critic that is to be 1-Lipschitz; the penalty is divided by a number of its own."""

    def loss(m: Any, x: Tensor, divisors: tuple[float, float]) -> Tensor:
        _, by_input = slope(m, x, torch.sum)
        penalty = ((by_input.norm(dim=1) - 1) ** 2).mean()
        return m(x).mean() / divisors[0] + 10 * penalty / divisors[1]

    def passes(m: nn.Module, o: Any) -> None:
        for x, _ in data():
            loss(m, x, (divisor, of_penalty)).backward()

    return stepped(net(1), None, passes, lambda m: loss(m, whole(data())[0], (1, 1)))


@loop("sound")
def a_gradient_penalty_in_the_loops_own_lines() -> Stepped:
    return penalized(4, 4)


@loop("biased", SCALE)
def a_gradient_penalty_that_is_not_divided() -> Stepped:
    return penalized(4, 1)


def forces(parts: Parts, asked: Callable[[Tensor], Tensor]) -> Stepped:
    """Train an energy by itself and by its gradient."""

    def loss(m: Any, x: Tensor, y: Tensor) -> Tensor:
        energy, force = slope(m, x, asked)
        return F.mse_loss(energy.squeeze(1), y.double()) + F.mse_loss(-force, x)

    return run(net(1), None, loss, parts, len(parts))


@loop("sound")
def an_energy_and_its_forces() -> Stepped:
    return forces(data(), torch.sum)


@loop("biased", UNEQUAL)
def an_energy_and_its_forces_of_other_numbers() -> Stepped:
    return forces(data((4, 4, 2)), torch.sum)


@loop("biased", "loss not additive over samples")
def forces_of_the_mean_energy() -> Stepped:
    return forces(data(), torch.mean)


# What reaches the step.


def changed(after: Callable[[Any], None]) -> Stepped:
    """Watch a sound loop whose gradients are changed after its last pass."""

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (ce(m(x), y) / 4).backward()
        after(m)

    return stepped(net(), None, passes, lambda m: cross_entropy(m, *whole(data())))


@loop("biased", STALE)
def zeroed_before_the_step() -> Stepped:
    return changed(lambda m: [p.grad.zero_() for p in m.parameters()])  # type: ignore[func-returns-value]


@loop("biased", STALE)
def replaced_before_the_step() -> Stepped:
    def replaced(m: Any) -> None:
        torch.manual_seed(9)
        for p in m.parameters():
            p.grad = torch.randn_like(p) * p.grad.norm()

    return changed(replaced)


def by_autograd(adds: bool) -> Stepped:
    """Watch a loop of `torch.autograd.grad`."""

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            found = torch.autograd.grad(ce(m(x), y) / 4, list(m.parameters()))
            for p, g in zip(m.parameters(), found, strict=True):
                p.grad = p.grad + g if adds and p.grad is not None else g

    return stepped(net(), None, passes, lambda m: cross_entropy(m, *whole(data())))


@loop("sound")
def autograd_grad_added_up() -> Stepped:
    return by_autograd(True)


@loop("biased", STALE)
def autograd_grad_of_the_last_alone() -> Stepped:
    return by_autograd(False)


@loop("sound")
def scaled_unscaled_and_clipped() -> Stepped:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data((4, 4, 4)):
            scaler.scale(ce(m(x.float()), y) / 3).backward()
        scaler.unscale_(o)
        nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        scaler.step(o)
        scaler.update()

    large = whole(data((4, 4, 4)))
    return stepped(net().float(), None, passes, lambda m: cross_entropy(m, *large), most=0.1)


def each(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return what changes every parameter."""
    return lambda m: [change(p) for p in m.parameters()][:0] or None


def clipped_then(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda m: [nn.utils.clip_grad_norm_(m.parameters(), 0.01), change(m)][:0] or None


def noisy(p: Any) -> None:
    p.grad.add_(torch.randn_like(p), alpha=0.01)


def centralised(p: Any) -> None:
    if p.ndim > 1:
        p.grad -= p.grad.mean(1, keepdim=True)


def projected(p: Any) -> None:
    p.grad -= (p.grad * p.detach()).sum() / p.detach().square().sum() * p.detach()


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        (each(noisy), "stochastic", "noise was added"),
        (clipped_then(each(noisy)), "stochastic", "noise was added"),
        (each(lambda p: p.grad.add_(p.detach(), alpha=0.1)), "equivalent", "0.1 × the weights"),
        (each(centralised), "equivalent", "centralised"),
        (each(projected), "equivalent", "projected"),
        (each(lambda p: p.grad.sign_()), "equivalent", "signs alone"),
        (each(lambda p: p.grad.mul_(p.detach().norm())), "equivalent", "a number of its own"),
        (each(lambda p: p.grad.mul_(p.grad.abs() > p.grad.abs().median())), "equivalent", "set to zero"),
        (each(lambda p: p.grad.mul_(0.25) if p.ndim > 1 else None), "inconclusive", "not known here"),
        (each(lambda p: p.grad.copy_(p.grad.sign() * p.grad.abs().sqrt())), "inconclusive", "not known"),
        (clipped_then(each(lambda p: p.grad.sub_(p.grad**2))), "inconclusive", "not known here"),
    ],
)
def test_what_is_done_to_the_whole_gradient_is_named_and_sized(
    change: Callable[[Any], None], verdict: str, said: str
) -> None:
    """The large batch's would be changed alike; a division by N of a part is no such choice."""
    torch.manual_seed(3)
    for divisor in (4, 1):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, None, optimizer) as audit:
            for x, y in data():
                (ce(model(x), y) / divisor).backward()
            change(model)
            optimizer.step()
        if divisor == 4:
            assert audit.verdict == verdict, str(audit)
            assert said in (audit.detail or ""), str(audit)
            assert "the loop changed the gradient by" in (audit.detail or "")
        elif verdict != "inconclusive":
            assert (audit.verdict, audit.cause) == ("biased", SCALE), str(audit)


@pytest.mark.parametrize("where", ["before", "after", "each"])
@pytest.mark.parametrize("divisor", [3, 1])
def test_penalties_of_several_weights_with_a_backward_pass_of_their_own(
    where: str, divisor: int
) -> None:
    """They are a part of a micro-batch, or of the window, and no micro-batch."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def penalize() -> None:
        (
            0.01 * sum(p.norm() for p in model.parameters()) / (divisor if where == "each" else 1)
        ).backward()

    with watch(model, None, optimizer) as audit:
        if where == "before":
            penalize()
        for x, y in data((4, 4, 4)):
            (ce(model(x), y) / divisor).backward()
            if where == "each":
                penalize()
        if where == "after":
            penalize()
        optimizer.step()
    assert audit.accum_steps == 3, str(audit)
    expected = ("equivalent", None) if divisor == 3 else ("biased", SCALE)
    assert (audit.verdict, audit.cause) == expected, str(audit)


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_is_judged_with_its_cause(name: str) -> None:
    """By verdict and cause, and the measured gradient is the large batch's where none is named."""
    run_it, verdict, cause = LOOPS[name]
    audit, gap, rounding = run_it()
    assert (gap <= rounding) == (verdict != "biased"), gap
    assert gap <= rounding or not gap < 1e-3, gap
    assert audit.verdict in (SOUND if verdict == "sound" else (verdict,)), str(audit)
    assert audit.cause == cause, str(audit)


def test_gradients_that_are_sparse_are_followed() -> None:
    """Those of an embedding: the loop runs on, and is judged."""
    torch.manual_seed(0)
    model = nn.EmbeddingBag(9, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, None, optimizer) as audit:
        for ids in torch.randint(9, (12, 2)).split(4):
            ce(model(ids), ids[:, 0] % 3).backward()
        optimizer.step()
    assert (audit.verdict, audit.cause) == ("biased", SCALE), str(audit)


@pytest.mark.parametrize(("by", "verdict"), [(3, "stochastic"), (1, "biased")])
def test_a_drawn_weight_of_two_terms_is_no_fault(by: int, verdict: str) -> None:
    """Mixup's, of which the large batch would draw one; but not divided by N the loop is faulty."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    np.random.seed(0)
    with watch(model, None, optimizer) as audit:
        for x, y in data((4, 4, 4)):
            share = np.random.beta(1, 1)
            out = model(share * x + (1 - share) * x.flip(0))
            ((share * ce(out, y) + (1 - share) * ce(out, y.flip(0))) / by).backward()
        optimizer.step()
    assert audit.verdict == verdict, str(audit)
    assert audit.cause == ("randomness" if by == 3 else SCALE)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_weight_that_moves_in_the_window_is_a_fault_whatever_the_passes_draw(dropout: bool) -> None:
    """Dropout's draws are the model's own: no weight of the loss is drawn, and each has its value."""
    model = nn.Sequential(net(), nn.Dropout(0.5 if dropout else 0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts, share = data((4, 4, 4)), 0.0
    with watch(model, None, optimizer) as audit:
        for x, y in parts:
            share += 0.2
            out = model(x)
            (((1 - share) * ce(out, y) + share * out.square().mean()) / 3).backward()
        optimizer.step()
    assert (audit.verdict, audit.cause) == ("biased", "state moves in the window"), str(audit)
