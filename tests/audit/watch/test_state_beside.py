"""What a loop computes beside its model: what mixes samples or moves there is found, by its cause.

A queue, a baseline, a teacher in train mode, weights that are counted, advantages that are normalised:
each as public loops have it, with the sound loop beside it.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gaccum_exp import watch
from gaccum_exp.audit import result
from gaccum_exp.audit.result import Audit
from tests.audit.support import or_zero, relative, taken

SOUND = ("equivalent", "identical")
D = torch.float64
N, SAMPLES, FEATURES, CLASSES = 3, 4, 6, 3
Data = list[tuple[Tensor, ...]]
KINDS: dict[str, tuple[type["Loop"], str | None]] = {}
"""Every kind of loop, and the cause that makes it biased; None: it is sound."""


def kind(cause: str | None = None) -> Callable[[type["Loop"]], type["Loop"]]:
    def noted(of: type["Loop"]) -> type["Loop"]:
        KINDS[of.__name__] = of, cause
        return of

    return noted


class Loop:
    """A model, one window's data (x, y, values), and what a stranger's loop keeps beside them."""

    criterion: Any = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model: Any = nn.Linear(FEATURES, CLASSES).double()
        self.data: Data = [
            (
                torch.randn(SAMPLES, FEATURES, dtype=D),
                torch.randint(CLASSES, (SAMPLES,)),
                1 + torch.rand(SAMPLES, dtype=D),
            )
            for _ in range(N)
        ]
        self.begin()

    def begin(self) -> None:
        """Set up what the loop keeps."""

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        """Return the loss of a micro-batch."""
        raise NotImplementedError

    def before(self) -> None:
        """Do what the loop does before its passes."""

    def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
        """Do what the loop does after each micro-batch."""

    def before_step(self) -> None:
        """Do what the loop does before its step."""

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        x, y, r = (torch.cat(each) for each in zip(*self.data, strict=True))
        return x, y, r

    def large_batch(self) -> Tensor:
        """Return the loss of the whole window, in the state that the loop is in."""
        return self.loss(*self.whole())

    def gap(self) -> float:
        """Return how far the loop's gradient is off that of a large batch."""
        at_once = type(self)()
        at_once.before()
        at_once.large_batch().backward()
        return relative(self.taken[0], or_zero(at_once.model))

    def judged(self) -> Audit:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.taken = taken(self.model, optimizer)
        with watch(self.model, self.criterion, optimizer) as audit:
            self.before()
            for batch in self.data:
                (self.loss(*batch) / N).backward()
                self.after(*batch)
            self.before_step()
            optimizer.step()
        return audit.worst


# Queues: the keys of earlier micro-batches are negatives of later ones.


def contrast(q: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ queue.T], 1)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


class Queue(Loop):
    def begin(self) -> None:
        self.queue = torch.randn(6, CLASSES, dtype=D)

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return contrast(self.model(x), x[:, :CLASSES], self.queue.clone().detach())


@kind(result.MOVING_STATE)
class QueueInPlace(Queue):
    def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
        self.queue[:2] = x[:2, :CLASSES]


@kind(result.MOVING_STATE)
class QueueThroughAView(QueueInPlace):
    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return contrast(self.model(x), x[:, :CLASSES], self.queue)

    def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
        self.queue[:2].copy_(x[:2, :CLASSES])


@kind(result.MOVING_STATE)
class QueueByCopy(Queue):
    def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
        self.queue.copy_(torch.cat([x[:, :CLASSES], self.queue])[:6])


@kind(result.MOVING_STATE)
class QueueRebound(Queue):
    def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
        self.queue = torch.cat([x[:, :CLASSES], self.queue])[:6]


@kind(result.MOVING_STATE)
class QueueForTheCriterion(QueueInPlace):
    criterion = staticmethod(contrast)

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return self.criterion(self.model(x), x[:, :CLASSES], self.queue)


@kind(result.MOVING_STATE)
class QueueEnclosed(Queue):
    """By the criterion, which nothing is given but outputs and keys."""

    def begin(self) -> None:
        super().begin()
        held = self.held = {"queue": self.queue}
        self.criterion = lambda q, keys: contrast(q, keys, held["queue"])

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return self.criterion(self.model(x), x[:, :CLASSES])

    def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
        self.held["queue"] = torch.cat([x[:, :CLASSES], self.held["queue"]])[:6]


@kind()
class QueueOncePerStep(Queue):
    def before_step(self) -> None:
        self.queue[:6] = torch.cat([x[:2, :CLASSES] for x, _, _ in self.data])


@kind()
class BufferFilledInParts(Loop):
    """A buffer larger than a micro-batch, that each one is written to."""

    def begin(self) -> None:
        self.buffer = torch.zeros(SAMPLES + 3, FEATURES, dtype=D)

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        if len(x) > SAMPLES:
            return F.cross_entropy(self.model(2 * x), y)
        self.buffer[:SAMPLES] = x
        return F.cross_entropy(self.model(2 * self.buffer[:SAMPLES]), y)


# Baselines of a policy gradient.


class Baseline(Loop):
    def begin(self) -> None:
        self.baseline: Any = torch.zeros((), dtype=D)

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        chosen = self.model(x).log_softmax(-1).gather(1, y[:, None])[:, 0]
        return -(chosen * (r - self.baseline)).mean()


@kind(result.MOVING_STATE)
class BaselineInPlace(Baseline):
    def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
        self.baseline.mul_(0.9).add_(0.1 * r.mean())


@kind(result.MOVING_STATE)
class BaselineRebound(Baseline):
    def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
        self.baseline = 0.9 * self.baseline + 0.1 * r.mean()


@kind(result.NOT_ADDITIVE)
class BaselineOfTheMicroBatch(Baseline):
    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        self.baseline = r.mean()
        return super().loss(x, y, r)


@kind()
class BaselineOfTheWindow(Baseline):
    def before(self) -> None:
        self.baseline = self.whole()[2].mean()


def test_a_baseline_that_is_a_plain_number_is_left_open() -> None:
    """Where a number comes from is not seen; that it changes is, and that one pass has one."""

    class BaselineOfPython(Baseline):
        def begin(self) -> None:
            self.baseline = 0.0

        def after(self, x: Tensor, y: Tensor, r: Tensor) -> None:
            self.baseline = 0.9 * self.baseline + 0.1 * r.mean().item()

    loop = BaselineOfPython()
    found = loop.judged()
    assert loop.gap() > 1e-3
    assert found.verdict == "inconclusive"
    assert "a number changes from micro-batch to micro-batch (0, 0.1" in str(found.detail)


# Teachers.


class Taught(Loop):
    def begin(self) -> None:
        layers = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)
        self.teacher: Any = nn.Sequential(*layers).double().requires_grad_(False)

    def taught(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher(x).softmax(-1)

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return F.kl_div(self.model(x).log_softmax(-1), self.taught(x), reduction="batchmean")


@kind(result.BATCH_STATISTICS)
class TeacherInTrainMode(Taught):
    pass


@kind(result.BATCH_STATISTICS)
class TeacherWithAGraph(Taught):
    def begin(self) -> None:
        super().begin()
        self.teacher.requires_grad_(True)

    def taught(self, x: Tensor) -> Tensor:
        return self.teacher(x).detach().softmax(-1)


@kind(result.BATCH_STATISTICS)
class TeacherInTheModel(Taught):
    def begin(self) -> None:
        super().begin()

        class Distiller(nn.Module):
            def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
                super().__init__()
                self.student, self.teacher = student, teacher

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    taught = self.teacher(x)
                return self.student(x), taught

        self.model = Distiller(self.model, self.teacher)

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        own, taught = self.model(x)
        return F.kl_div(own.log_softmax(-1), taught.softmax(-1), reduction="batchmean")

    def judged(self) -> Audit:
        self.model.requires_grad_(True)
        self.model.teacher.requires_grad_(False)
        return super().judged()


@kind(result.BATCH_STATISTICS)
class TeacherThatDrawsAndMixes(Taught):
    def begin(self) -> None:
        super().begin()
        self.teacher.append(nn.Dropout(0.5))


@kind()
class TeacherInEvalMode(Taught):
    def begin(self) -> None:
        super().begin()
        self.teacher.eval()


@kind()
class TeacherOverTheWindow(Taught):
    """In train mode, and run once over all samples before the passes."""

    def before(self) -> None:
        x = self.whole()[0]
        self.targets = {id(x): super(TeacherOverTheWindow, self).taught(x) for x in [x]}
        parts = next(iter(self.targets.values())).split(SAMPLES)
        self.targets |= {id(x): t for (x, _, _), t in zip(self.data, parts, strict=True)}

    def taught(self, x: Tensor) -> Tensor:
        return self.targets[id(x)] if id(x) in self.targets else next(iter(self.targets.values()))


def test_a_teacher_that_draws_is_stochastic() -> None:
    """With its draws held the loop is the large batch's; a module without weights augments data."""

    class Draws(Taught):
        def begin(self) -> None:
            self.teacher = nn.Sequential(nn.Linear(FEATURES, CLASSES).double(), nn.Dropout(0.5))

    found = Draws().judged()
    assert (found.verdict, found.cause, found.culprit_type) == (
        "stochastic",
        result.RANDOMNESS,
        "Dropout",
    )
    assert "Sequential.1" in str(found.remedy)

    class Augments(Taught):
        def begin(self) -> None:
            self.augment = nn.Dropout(0.5)

        def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
            return F.cross_entropy(self.model(self.augment(x)), y)

    assert Augments().judged().verdict in SOUND


# Weights that are counted, and arithmetic on data.


class Arithmetic(Loop):
    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        """Return what the loop makes of the samples' values."""
        return r

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return (F.cross_entropy(self.model(x), y, reduction="none") * self.values(x, y, r)).mean()


@kind(result.NOT_ADDITIVE)
class PositiveWeight(Arithmetic):
    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        target = F.one_hot(y, CLASSES).double()
        positive = target.sum(0).clamp(min=1)
        weight = (len(y) - positive + 1) / positive
        return F.binary_cross_entropy_with_logits(self.model(x), target, pos_weight=weight)


@kind(result.NOT_ADDITIVE)
class ClassWeights(Arithmetic):
    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return (1 / torch.bincount(y, minlength=CLASSES).clamp(min=1))[y]


@kind()
class ConstantWeights(Arithmetic):
    def begin(self) -> None:
        self.weights = torch.tensor([1.0, 2.0, 3.0], dtype=D)

    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return self.weights[y]


@kind(result.NOT_ADDITIVE)
class Normalised(Arithmetic):
    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return (r - r.mean()) / (r.std() + 1e-8)


@kind(result.NOT_ADDITIVE)
class NormalisedInPlace(Arithmetic):
    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        r = r.clone()
        r -= r.mean()
        r /= r.std()
        return r


class OfOnePool(Arithmetic):
    """Each micro-batch has its part of one tensor, as of a buffer of roll-outs."""

    def begin(self) -> None:
        super().begin()
        self.pool = torch.cat([r for _, _, r in self.data])
        self.place = 0

    def part(self, size: int) -> Tensor:
        start, self.place = self.place, (self.place + size) % len(self.pool)
        return self.pool[start : start + size]


@kind(result.NOT_ADDITIVE)
class PartsNormalised(OfOnePool):
    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        part = self.part(len(r))
        return (part - part.mean()) / (part.std() + 1e-8)


@kind()
class PartsOfWhatIsNormalised(OfOnePool):
    def begin(self) -> None:
        super().begin()
        self.pool = (self.pool - self.pool.mean()) / self.pool.std()

    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return self.part(len(r))


@kind(result.NOT_ADDITIVE)
class BetweenExtremes(Arithmetic):
    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return (r - r.min()) / (r.max() - r.min())


@kind(result.NOT_ADDITIVE)
class NormalisedOutputs(Arithmetic):
    """Of the model's own, detached, as an advantage is made of a critic's values."""

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        out = self.model(x)
        a = r - out[:, 0].detach()
        return (F.cross_entropy(out, y, reduction="none") * (a - a.mean()) / a.std()).mean()


@kind(result.NOT_ADDITIVE)
class StandardisedInputs(Arithmetic):
    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return F.cross_entropy(self.model((x - x.mean(0)) / x.std(0)), y)


@kind(result.UNEQUAL_DENOMINATORS)
class SelfNormalised(Arithmetic):
    """What normalises the weights is a denominator."""

    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return r / r.mean()


@kind()
class NormalisedOverTheWindow(Arithmetic):
    def before(self) -> None:
        r = self.whole()[2]
        self.mean, self.std = r.mean(), r.std()

    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return (r - self.mean) / self.std


@kind()
class EqualWeightsNormalised(Arithmetic):
    """The sum of the weights is the same in every micro-batch."""

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        weights = torch.ones_like(r)
        return (F.cross_entropy(self.model(x), y, reduction="none") * (weights / weights.sum())).sum()


@kind()
class UnequalMicroBatches(EqualWeightsNormalised):
    """The weights of each add up to one, and it is weighed by its samples."""

    def begin(self) -> None:
        self.data[0] = tuple(each[:2] for each in self.data[0])

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        share = N * len(x) / len(self.whole()[0]) if len(x) <= SAMPLES else 1.0
        return super().loss(x, y, r) * share


@kind()
class NormalisedInGroups(Arithmetic):
    """Of two samples each, which no micro-batch divides."""

    def values(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        groups = r.view(-1, 2)
        return (groups / groups.sum(1, keepdim=True)).flatten()


@kind()
class SampleBySample(Arithmetic):
    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        smooth = 0.9 * F.one_hot(y, CLASSES).double() + 0.1 / CLASSES
        return -(
            smooth * self.model(F.normalize(x.float().double() / 255, dim=1)).log_softmax(-1)
        ).mean()


@kind()
class SlicesOfOneBatch(Loop):
    """Micro-batches are cut from what was normalised as a whole."""

    def before(self) -> None:
        x, y, _ = self.whole()
        self.x, self.y = (x - x.mean(0)) / x.std(0), y

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        k = next((i for i, each in enumerate(self.data) if each[0] is x), None)
        part = slice(None) if k is None else slice(k * SAMPLES, (k + 1) * SAMPLES)
        return F.cross_entropy(self.model(self.x[part] * 0.5), self.y[part])


class Augmented(Loop):
    """The large batch takes in the same samples, as they were augmented."""

    def begin(self) -> None:
        self.seen: list[Tensor] = []

    def augmented(self, x: Tensor) -> Tensor:
        """Return the samples, changed at random."""
        return x

    def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return F.cross_entropy(self.model(self.augmented(x)), y)

    def large_batch(self) -> Tensor:
        inputs = torch.cat([self.augmented(x) for x, _, _ in self.data])
        return F.cross_entropy(self.model(inputs), self.whole()[1])


@kind()
class Noise(Augmented):
    def augmented(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


@kind()
class Mixup(Augmented):
    def augmented(self, x: Tensor) -> Tensor:
        part = np.random.beta(1, 1)
        return part * x + (1 - part) * x[torch.randperm(len(x))]


@kind()
class MixupOfPartnersGiven(Augmented):
    """Each micro-batch comes with the places of its samples' partners."""

    def begin(self) -> None:
        self.partners = [torch.randperm(SAMPLES) for _ in range(N)]

    def augmented(self, x: Tensor) -> Tensor:
        k = next(i for i, each in enumerate(self.data) if each[0] is x)
        return 0.3 * x + 0.7 * x[self.partners[k]]


@kind(result.NOT_ADDITIVE)
class NormalisedAfterMixup(Mixup):
    """What was mixed at random is data; what is made of that is not."""

    def augmented(self, x: Tensor) -> Tensor:
        x = super().augmented(x)
        return (x - x.mean(0)) / x.std(0)

    def large_batch(self) -> Tensor:
        x = torch.cat([super(NormalisedAfterMixup, self).augmented(x) for x, _, _ in self.data])
        return F.cross_entropy(self.model((x - x.mean(0)) / x.std(0)), self.whole()[1])


@kind()
class MixupOfMirroredBatches(Augmented):
    def augmented(self, x: Tensor) -> Tensor:
        part = np.random.beta(1, 1)
        return part * x + (1 - part) * x.flip(0)


@kind()
class ScaledAtRandom(Augmented):
    def augmented(self, x: Tensor) -> Tensor:
        return x.flip(1) * random.uniform(0.5, 1.5) if random.random() < 0.5 else x


@pytest.mark.parametrize("name", KINDS)
def test_what_is_made_of_samples_beside_the_model_is_judged_with_its_cause(name: str) -> None:
    """Against the large batch that makes it of all samples, in float64; sound loops are not accused."""
    of, cause = KINDS[name]
    loop = of()
    found = loop.judged()
    assert (loop.gap() < 1e-12) == (cause is None)
    if cause is None:
        assert found.verdict in SOUND, found.report()
    else:
        assert (found.verdict, found.cause) == ("biased", cause), found.report()


def test_the_line_that_mixes_samples_and_the_teachers_module_are_named() -> None:
    """A reader is told where to look."""
    found = Normalised().judged()
    assert "`return (r - r.mean()) / (r.std() + 1e-8)`" in str(found.remedy)
    found = TeacherInTrainMode().judged()
    assert (found.culprit, found.culprit_type) == ("Sequential.1", "BatchNorm1d")
    assert "call eval() on it" in str(found.remedy)


def test_what_a_data_loader_puts_together_is_data() -> None:
    """Even where it normalises each batch: the loop's own work begins behind it."""
    model = nn.Linear(FEATURES, CLASSES).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def collated(samples: Any) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(each) for each in zip(*samples, strict=True))
        return x - x.mean(0), y

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, FEATURES, dtype=D), torch.randint(CLASSES, (12,)))
    with watch(model, None, optimizer) as audit:
        for x, y in DataLoader(data, SAMPLES, collate_fn=collated):
            (F.cross_entropy(model(x), y) / N).backward()
        optimizer.step()
    assert audit.worst.verdict in SOUND, audit.worst.report()


def test_a_weight_that_changes_from_micro_batch_to_micro_batch_is_said_with_its_numbers() -> None:
    """Micro-batches count alike, so it is no denominator."""

    class Annealed(Loop):
        beta = 0.0

        def loss(self, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
            self.beta += 0.5
            out = self.model(x)
            return F.cross_entropy(out, y) + self.beta * out.square().mean()

    found = Annealed().judged()
    assert (found.verdict, found.cause) == ("biased", result.MOVING_STATE)
    said = "a weight of the loss changes from micro-batch to micro-batch (0.5, 1, 1.5 in "
    assert said in str(found.remedy)
