"""State that moves inside a window: what moves per micro-batch and enters the loss is found."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from gaccum_exp.audit.result import Audit
from tests.audit.support import or_zero, relative, taken

SOUND = ("equivalent", "identical")
D = torch.float64
N, SAMPLES, FEATURES, CLASSES = 3, 4, 5, 3
MOVES = "state moves in the window"


def soft(s: Tensor, t: Tensor) -> Tensor:
    return -((t / 0.1).softmax(-1) * (s / 0.2).log_softmax(-1)).sum(-1).mean()


class Loop:
    """A model, the data of one window, and what a stranger's loop keeps beside them."""

    criterion: Any = staticmethod(soft)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Linear(FEATURES, CLASSES).double()
        self.teacher: Any = copy.deepcopy(self.model).requires_grad_(False)
        with torch.no_grad():
            self.teacher.weight.mul_(2)
        self.data = [torch.randn(SAMPLES, FEATURES, dtype=D) for _ in range(N)]
        self.begin()

    def begin(self) -> None:
        """Set up what the loop needs."""

    def loss(self, x: Tensor) -> Tensor:
        """Return the loss of a micro-batch."""
        return self.criterion(self.model(x), self.teacher(x))

    def after(self, x: Tensor) -> None:
        """Do what the loop does after each micro-batch."""

    def before_step(self) -> None:
        """Do what the loop does before its optimizer step."""

    def large_batch(self) -> Tensor:
        """Return the loss of the whole window in the state that the loop is in."""
        return self.loss(torch.cat(self.data))

    def gap(self) -> float:
        """Return how far the first step's gradient is off that of the window in its first state."""
        at_once = type(self)()
        at_once.large_batch().backward()
        return relative(self.taken[0], or_zero(at_once.model))

    def judged(self, windows: int = 1, **how: Any) -> Audit:
        """Return the audit of the worst window."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.taken = taken(self.model, optimizer)
        with watch(self.model, self.criterion, optimizer, **how) as audit:
            for _ in range(windows):
                for x in self.data:
                    (self.loss(x) / N).backward()
                    with torch.no_grad():
                        self.after(x)
                with torch.no_grad():
                    self.before_step()
                optimizer.step()
                optimizer.zero_grad()
        return audit.worst


class Dino(nn.Module):
    def __init__(self, itself: bool = True) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(CLASSES, dtype=D))
        self.itself = itself

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        loss = soft(s, t - self.center)
        if self.itself:
            self.move(t)
        return loss

    def move(self, t: Tensor) -> None:
        self.center.lerp_(t.mean(0), 0.5)


class Centre(Loop):
    def begin(self) -> None:
        self.criterion = Dino()


class CentreRegistered(Loop):
    """Every pass puts another tensor in the place of the buffer."""

    def begin(self) -> None:
        class Rebound(Dino):
            def move(self, t: Tensor) -> None:
                self.center = 0.5 * self.center + 0.5 * t.mean(0)

        self.criterion = Rebound()


class CentreFromOutside(Loop):
    def begin(self) -> None:
        self.criterion = Dino(itself=False)

    def after(self, x: Tensor) -> None:
        self.criterion.move(self.teacher(x))


class TeacherByLerp(Loop):
    def after(self, x: Tensor) -> None:
        self.teacher.weight.lerp_(self.model.weight, 0.5)


class TeacherByData(Loop):
    """As official implementations write it: no version tells that the weights moved."""

    def after(self, x: Tensor) -> None:
        for own, other in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            own.data.mul_(0.5).add_(other.data, alpha=0.5)


class TeacherSharpened(TeacherByLerp):
    """Operations stand between the teacher and the loss."""

    criterion = staticmethod(lambda s, t: -(t * s.log_softmax(-1)).sum(-1).mean())

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            t = (self.teacher(x) / 0.1).softmax(-1)
            t /= t.sum(-1, keepdim=True)
        return self.criterion(self.model(x), t)


class TeacherInTheLoss(TeacherByLerp):
    """The loss function calls the teacher itself."""

    def begin(self) -> None:
        teacher = self.teacher

        def criterion(s: Tensor, x: Tensor) -> Tensor:
            return soft(s, teacher(x))

        self.criterion = criterion

    def loss(self, x: Tensor) -> Tensor:
        return self.criterion(self.model(x), x)


class TeacherHeldElsewhere(TeacherInTheLoss):
    """In a dictionary, where no one looks for modules."""

    def begin(self) -> None:
        held = {"teacher": self.teacher}

        def criterion(s: Tensor, x: Tensor) -> Tensor:
            return soft(s, held["teacher"](x))

        self.criterion = criterion


class TeacherInASystem(TeacherByLerp):
    """A module that is not watched holds student and teacher, and runs both."""

    def begin(self) -> None:
        class System(nn.Module):
            def __init__(self, loop: Loop) -> None:
                super().__init__()
                self.student, self.teacher, self.loss = loop.model, loop.teacher, loop.criterion

            def forward(self, x: Tensor) -> Tensor:
                loss: Tensor = self.loss(self.student(x), self.teacher(x))
                return loss

        self.system = System(self)

    def loss(self, x: Tensor) -> Tensor:
        loss: Tensor = self.system(x)
        return loss


class TeacherCountedBefore(TeacherHeldElsewhere):
    """The teacher has run outside of the loss that calls it, too."""

    def loss(self, x: Tensor) -> Tensor:
        self.teacher(x)
        return super().loss(x)


class TeacherAndScale(TeacherByLerp):
    """The loop's loss is off by a factor besides."""

    criterion = staticmethod(lambda s, t: N * soft(s, t))

    def large_batch(self) -> Tensor:
        return super().large_batch() / N


class AveragedWeights(Loop):
    """The model itself is the teacher, under an average of its weights."""

    def begin(self) -> None:
        self.average = {k: 2 * v.detach().clone() for k, v in self.model.named_parameters()}

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            t = torch.func.functional_call(self.model, self.average, (x,))
        return self.criterion(self.model(x), t)

    def after(self, x: Tensor) -> None:
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter, 0.5)


class OwnTensor(Loop):
    """The centre is a tensor of the loop's."""

    def begin(self) -> None:
        self.center = torch.zeros(1, CLASSES, dtype=D)

    def loss(self, x: Tensor) -> Tensor:
        return self.criterion(self.model(x) - self.center, self.teacher(x))

    def after(self, x: Tensor) -> None:
        self.center.lerp_(self.teacher(x).mean(0), 0.5)


class OwnTensorUnderTheTeacher(OwnTensor):
    """It is taken off the teacher's outputs, before the loss."""

    criterion = staticmethod(lambda s, t: -(t * s.log_softmax(-1)).sum(-1).mean())

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            t = ((self.teacher(x) - self.center) / 0.1).softmax(-1)
        return self.criterion(self.model(x), t)


class ReboundUnderTheTeacher(OwnTensorUnderTheTeacher):
    def after(self, x: Tensor) -> None:
        self.center = 0.5 * self.center + 0.5 * self.teacher(x).mean(0)


class OwnTensorRebound(OwnTensor):
    def loss(self, x: Tensor) -> Tensor:
        out = self.model(x)
        self.next = 0.5 * self.center + 0.5 * out.detach().mean(0)
        return self.criterion(out - self.center, self.teacher(x))

    def after(self, x: Tensor) -> None:
        self.center = self.next


class Queue(Loop):
    """MoCo: keys of earlier micro-batches are the negatives of later ones."""

    criterion = staticmethod(lambda logits: F.cross_entropy(logits, torch.zeros(len(logits)).long()))

    def begin(self) -> None:
        class Moco(nn.Module):
            def __init__(self, query: nn.Module, key: nn.Module) -> None:
                super().__init__()
                self.query, self.key = query, key
                self.register_buffer("queue", torch.randn(6, CLASSES, dtype=D))

            def forward(self, x: Tensor) -> Tensor:
                q, k = self.query(x), self.key(x).detach()
                logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().T], 1)
                self.queue.copy_(torch.cat([k[:2], self.queue])[:6])
                return logits

        self.model = Moco(self.model, self.teacher)

    def loss(self, x: Tensor) -> Tensor:
        return self.criterion(self.model(x))


class Critic(Loop):
    """Spectral normalisation in a module beside: every pass takes a step of its power iteration."""

    criterion = staticmethod(lambda scores, x: scores.square().mean())

    def begin(self) -> None:
        plain = nn.Linear(CLASSES, 4).double()
        self.critic = nn.utils.parametrizations.spectral_norm(plain, n_power_iterations=1)
        power: Any = self.critic.parametrizations["weight"][0]
        with torch.no_grad():  # fifteen iterations have been done, and have found the norm
            power._v.copy_(F.normalize(torch.randn(CLASSES, dtype=D), dim=0))

    def loss(self, x: Tensor) -> Tensor:
        return self.criterion(self.critic(self.model(x)), x)


class CriticStepped(Critic):
    """The other network of a pair is stepped after each micro-batch."""

    def begin(self) -> None:
        self.critic = nn.Sequential(nn.Linear(CLASSES, 4), nn.Tanh()).double()
        self.other = torch.optim.Adam(self.critic.parameters(), lr=0.1)

    def after(self, x: Tensor) -> None:
        self.other.step()
        self.other.zero_grad()


FAULTY: dict[type[Loop], tuple[str, ...]] = {
    Centre: ("Dino",),
    CentreRegistered: ("Rebound",),
    CentreFromOutside: ("Dino",),
    TeacherByLerp: ("Linear",),
    TeacherByData: ("Linear",),
    TeacherSharpened: ("Linear",),
    TeacherInTheLoss: ("Linear",),
    TeacherHeldElsewhere: ("Linear",),
    TeacherInASystem: ("Linear",),
    TeacherCountedBefore: ("Linear",),
    TeacherAndScale: ("Linear",),
    AveragedWeights: ("Linear",),
    OwnTensor: ("Tensor",),
    OwnTensorUnderTheTeacher: ("Tensor",),
    ReboundUnderTheTeacher: ("Tensor",),
    OwnTensorRebound: ("Tensor",),
    Queue: ("Moco",),
    Critic: (),
    CriticStepped: ("Linear", "Sequential"),
}
"""Loops whose state moves per micro-batch, and what is to blame; nothing: the audit leaves it open."""


@pytest.mark.parametrize("kind", FAULTY, ids=lambda kind: kind.__name__)
def test_a_state_that_moves_per_micro_batch_and_enters_the_loss_is_found(kind: type[Loop]) -> None:
    """Inside model, criterion or beside; what cannot be replayed is not called equivalent."""
    loop = kind()
    found = loop.judged()
    assert loop.gap() > 1e-3
    assert found.cause == MOVES, found.report()
    assert found.verdict == ("biased" if FAULTY[kind] else "inconclusive"), found.report()
    assert not FAULTY[kind] or found.culprit_type in FAULTY[kind], found.report()


class CentreOncePerStep(CentreFromOutside):
    def after(self, x: Tensor) -> None:
        pass

    def before_step(self) -> None:
        self.criterion.move(self.teacher(torch.cat(self.data)))


class TeacherOncePerStep(TeacherByLerp):
    def after(self, x: Tensor) -> None:
        pass

    def before_step(self) -> None:
        self.teacher.weight.lerp_(self.model.weight, 0.5)


class AverageForEvaluation(AveragedWeights):
    """Moved after each micro-batch, and never used."""

    def loss(self, x: Tensor) -> Tensor:
        return self.criterion(self.model(x), self.teacher(x))


class Counters(Loop):
    """A buffer and a number that count passes, in model, criterion, teacher and beside them."""

    def begin(self) -> None:
        class Counting(nn.Module):
            def __init__(self, inner: Any) -> None:
                super().__init__()
                self.inner, self.calls = inner, 0
                self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

            def forward(self, *args: Tensor) -> Tensor:
                self.calls += 1
                self.seen += 1
                return self.inner(*args)

        self.model, self.teacher = Counting(self.model), Counting(self.teacher)
        self.criterion, self.scale = Counting(soft), Counting(nn.Tanh())

    def loss(self, x: Tensor) -> Tensor:
        return self.criterion(self.scale(self.model(x)), self.teacher(x))


class Metrics(Loop):
    """A metric that adds up outputs, and a running mean of the loss."""

    def begin(self) -> None:
        class Metric(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("total", torch.zeros((), dtype=D))

            def forward(self, out: Tensor) -> Tensor:
                self.total += out.detach().abs().sum()
                return out.mean() * self.total

        self.metric, self.running = Metric(), torch.zeros((), dtype=D)

    def loss(self, x: Tensor) -> Tensor:
        out = self.model(x)
        self.metric(out)
        loss = self.criterion(out, self.teacher(x))
        self.running = 0.9 * self.running + 0.1 * loss.detach()
        return loss


class ReusedBuffers(Loop):
    """Data are loaded into the same tensors again and again, and normalised there."""

    def begin(self) -> None:
        self.x, self.noise = torch.empty(SAMPLES, FEATURES, dtype=D), torch.empty(SAMPLES, 1, dtype=D)
        torch.manual_seed(3)  # of the noise

    def large_batch(self) -> Tensor:
        x = torch.cat(self.data) / 2
        noise = torch.cat([self.noise.normal_().clone() for _ in self.data])
        return self.criterion(self.model(x) + noise, self.teacher(x))

    def loss(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.x.div_(2)
        self.noise.normal_()
        return self.criterion(self.model(self.x) + self.noise, self.teacher(self.x))


class TargetsBeforehand(TeacherSharpened):
    """The teacher runs over the whole window before its first micro-batch, and moves in between."""

    def begin(self) -> None:
        self.targets: list[Tensor] = []

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.targets = self.targets or [(self.teacher(each) / 0.1).softmax(-1) for each in self.data]
        t = next(t for t, each in zip(self.targets, self.data, strict=True) if each is x)
        return self.criterion(self.model(x), t)

    def before_step(self) -> None:
        self.targets = []

    def large_batch(self) -> Tensor:
        return torch.stack([self.loss(x) for x in self.data]).mean()


class EachTermBackward(TeacherOncePerStep):
    """What the teacher says is used after the first of a micro-batch's backward passes."""

    def loss(self, x: Tensor) -> Tensor:
        out, taught = self.model(x), self.teacher(x)
        (self.criterion(out, 0 * taught) / N).backward(retain_graph=True)
        return self.criterion(out, taught)

    def large_batch(self) -> Tensor:
        x = torch.cat(self.data)
        out, taught = self.model(x), self.teacher(x)
        return self.criterion(out, 0 * taught) + self.criterion(out, taught)


HARMLESS = (
    *(CentreOncePerStep, TeacherOncePerStep, AverageForEvaluation, Counters, Metrics, ReusedBuffers),
    *(TargetsBeforehand, EachTermBackward, Loop),
)


@pytest.mark.parametrize("kind", HARMLESS, ids=lambda kind: kind.__name__)
def test_what_moves_once_a_step_or_enters_no_loss_is_harmless(kind: type[Loop]) -> None:
    """Over two windows: the state of the first is not that of the second."""
    loop = kind()
    found = loop.judged(windows=2)
    assert loop.gap() < 1e-12
    assert found.verdict in SOUND, found.report()


@pytest.mark.parametrize("kind", [Centre, TeacherInTheLoss, Counters, Critic])
def test_the_loop_ends_with_the_state_that_it_has_unwatched(kind: type[Loop]) -> None:
    """Bit for bit, whatever was put back for the reruns, and in a second window too."""

    def state_of(loop: Loop) -> Iterator[Tensor]:
        for each in vars(loop).values():
            if isinstance(each, nn.Module):
                yield from (t.detach() for t in (*each.parameters(), *each.buffers()))

    @contextmanager
    def unwatched(*args: Any, **how: Any) -> Iterator[Any]:
        yield type("Nothing", (), {"worst": None})()

    watched = kind()
    watched.judged(windows=2)
    plain = kind()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "watch", unwatched)
        plain.judged(windows=2)
    pairs = list(zip(state_of(watched), state_of(plain), strict=True))
    assert pairs
    for one, other in pairs:
        assert torch.equal(one, other)


@pytest.mark.parametrize("per_micro_batch", [True, False])
def test_what_is_given_besides_and_moves_where_nothing_shows_its_use_is_not_called_equivalent(
    per_micro_batch: bool,
) -> None:
    """An object with a dictionary of tensors; moved once per step it is no matter."""

    class Average:
        def __init__(self, model: nn.Module) -> None:
            self.shadow = {k: v.detach().clone() for k, v in model.named_parameters()}

    loop = Loop()
    average = Average(loop.model)

    def move(*args: Any) -> None:
        for tensor in average.shadow.values():
            tensor.numpy()[:] *= 0.5

    setattr(loop, "after" if per_micro_batch else "before_step", move)
    found = loop.judged(also=[average])
    assert found.verdict == ("inconclusive" if per_micro_batch else "equivalent"), found.report()
    assert not per_micro_batch or "Average" in str(found.detail)
