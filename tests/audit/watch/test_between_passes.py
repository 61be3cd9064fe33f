"""What a loop does between its passes: schedules, clipping, and the GradScaler."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from gaccum_exp import watch
from gaccum_exp.audit.watch.watch import Watched
from tests.audit.support import CE, large_batch, net, or_zero, relative, taken, whole, wide, window

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

SOUND = ("equivalent", "identical")
D = torch.float64
After = Callable[[nn.Module, torch.optim.Optimizer], object]
Schedule = Callable[[torch.optim.Optimizer], Callable[[], object]]


def changed_by(after: After, parts: Any) -> Any:
    """Return the large batch's gradient in float64, after what is done to it before the step."""
    model: Any = net(dtype=D)
    x, y = whole(parts)
    CE(model(x.double()), y).backward()
    after(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return or_zero(model)


def audited(after: After, between: Schedule | None = None, *, dtype: torch.dtype = D) -> Watched:
    """Watch a sound loop that does something before its step, and between its passes."""
    model, parts = net(dtype=dtype), window(4, 4, 4, 4, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    each = between(optimizer) if between else lambda: None
    found = taken(model, optimizer)
    with watch(model, CE, optimizer) as audit:
        for x, y in parts:
            (CE(model(x), y) / len(parts)).backward()
            each()
        after(model, optimizer)
        optimizer.step()
    assert relative(found[0], changed_by(after, parts)) < (1e-12 if dtype == D else 1e-4)
    return audit


def nothing(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Do nothing."""


class Own:
    """A schedule of one's own, of others or alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, *others: Any) -> None:
        self.optimizer, self.others = optimizer, others

    def step(self) -> None:
        for other in self.others:
            other.step()
        if not self.others:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9


class Warming(lr_scheduler.LRScheduler):
    """A schedule that steps another in its own step."""

    def __init__(self, optimizer: torch.optim.Optimizer, after: Any) -> None:
        self.after: Any = None
        super().__init__(optimizer)
        self.after = after

    def get_lr(self) -> Any:
        return [rate / 2 for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.after is not None:
            self.after.step()


def pair(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 2)]


SCHEDULES: dict[str, Schedule] = {
    "chained": lambda o: lr_scheduler.ChainedScheduler(pair(o)).step,
    "sequential": lambda o: lr_scheduler.SequentialLR(o, pair(o), [2]).step,
    "on a plateau": lambda o: partial(lr_scheduler.ReduceLROnPlateau(o).step, 1.0),
    "its own, of two": lambda o: Own(o, *pair(o)).step,
    "its own, of torch's class": lambda o: Warming(o, lr_scheduler.StepLR(o, 2)).step,
    "its own, alone": lambda o: Own(o).step,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_of_a_schedule_is_one_however_it_is_made(name: str) -> None:
    """Stepped after each of four passes: three times inside the window, and the gradient is sound."""
    found = audited(nothing, SCHEDULES[name])
    assert found.verdict in SOUND, str(found)
    assert [c.name for c in found.checks] == ["schedule"]
    assert "stepped 3 times inside" in found.checks[0].finding


def test_a_schedule_that_is_stepped_twice_per_pass_is_counted_twice() -> None:
    """Calls one after the other are two."""

    def twice(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        schedule = lr_scheduler.ChainedScheduler(pair(optimizer))
        return lambda: [schedule.step(), schedule.step()]

    assert "stepped 6 times" in audited(nothing, twice).checks[0].finding


def test_a_method_called_step_that_runs_the_window_is_no_schedule() -> None:
    """A trainer's `step` calls its optimizer's and its schedule's, once."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 1)

    class Trainer:
        def step(self) -> None:
            for x, y in window(4, 4):
                (CE(model(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    with watch(model, CE, optimizer) as audit:
        Trainer().step()
        Trainer().step()
    assert audit.sound, str(audit)


def total_norm(model: nn.Module) -> torch.Tensor:
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


def as_torchtitan(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    nn.utils.clip_grads_with_norm_(model.parameters(), 0.01, norm)


def each_parameter_alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_(parameter, 0.01)


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    factor = min(1.0, 0.01 / (float(total_norm(model)) + 1e-6))
    for parameter in model.parameters():
        parameter.grad.mul_(factor)  # type: ignore[union-attr]  # backward has set it


def all_at_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    gradients = [p.grad.data for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, torch.clamp(0.5e-2 / norm, max=1.0))


def parameter_by_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        parameter.grad = gradient * torch.clamp(0.02 / gradient.pow(2).sum().sqrt(), max=1.0)


def elementwise(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad.clamp_(-1.7e-3, 1.7e-3)  # type: ignore[union-attr]  # backward has set it


def normalized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    norm = total_norm(model)
    for parameter in model.parameters():
        parameter.grad.div_(norm)  # type: ignore[union-attr]  # backward has set it


KNOWN: list[After] = [as_torchtitan, each_parameter_alone]
BY_HAND: list[After] = [by_hand, all_at_once, parameter_by_parameter, elementwise, normalized]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [*KNOWN, *BY_HAND])
def test_clipping_is_known_in_all_its_forms(clip: After, dtype: torch.dtype) -> None:
    """By torch's functions, in groups, or written out, which is then said."""
    found = audited(clip, dtype=dtype)
    assert found.verdict in SOUND, str(found)
    assert ("taken for clipping" in (found.detail or "")) == (clip in BY_HAND)


@pytest.mark.parametrize("looks", [False, True])
def test_a_factor_after_the_last_pass_is_not_taken_for_clipping(looks: bool) -> None:
    """Whether or not the loop has looked at the norm: 0.137 leaves one that nobody has chosen."""

    def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if looks:
            total_norm(model)
        for parameter in model.parameters():
            parameter.grad.mul_(0.137)  # type: ignore[union-attr]  # backward has set it

    assert audited(scaled).verdict not in SOUND


def test_gradients_zeroed_before_the_step_are_not_taken_for_clipping() -> None:
    """Zero is no norm that somebody clips to."""

    def zeroed(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        total_norm(model)
        optimizer.zero_grad(set_to_none=False)

    assert audited(zeroed).verdict not in SOUND


def test_clipping_inside_the_window_is_still_a_fault() -> None:
    """After every pass, torchtitan's way."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, CE, optimizer) as audit:
        for x, y in window(4, 4, 4):
            (CE(model(x), y) / 3).backward()
            as_torchtitan(model, optimizer)
        optimizer.step()
    assert audit.verdict == "biased", str(audit)


def scaled_loop(update: Callable[[Any, int], object], *others: Any) -> tuple[Watched, float]:
    """Watch a loop under a GradScaler that does something after each pass; measure its gradient."""
    model, parts = net(), window(4, 4, 4, 4)
    inputs, labels = map(wide, whole(parts))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0), *others]
    expected, found = large_batch(model, lambda m: CE(m(inputs), labels)), taken(model, optimizer)
    with watch(model, CE, optimizer) as audit:
        for i, (x, y) in enumerate(parts):
            scalers[i % len(scalers)].scale(CE(model(x), y) / len(parts)).backward()
            update(scalers[0], i)
        scalers[0].step(optimizer)
        scalers[0].update()
    return audit, relative(found[0], expected)


def doubled(scaler: Any, i: int) -> None:
    if i < 3:
        scaler.update(2 * scaler.get_scale())


def halved_once(scaler: Any, i: int) -> None:
    if i == 1:
        scaler.update(512.0)


def before_the_step(scaler: Any, i: int) -> None:
    if i == 3:
        scaler.update(4096.0)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (doubled, "1024, 2048, 4096, 8192"),
        (halved_once, "1024, 512"),
        (before_the_step, "1024, 4096"),
    ],
)
def test_a_loss_scale_that_moves_inside_the_window_is_the_cause(update: Any, said: str) -> None:
    """Not unequal denominators: all micro-batches hold four samples."""
    found, gap = scaled_loop(update)
    assert gap > 1e-3
    assert (found.verdict, found.cause) == ("biased", "loss scale"), str(found)
    assert f"changed inside the window ({said}): update the GradScaler once" in found.remedy


def test_two_scalers_of_two_scales_are_told_to_be_one() -> None:
    """And of one scale they are sound."""
    found, gap = scaled_loop(lambda s, i: None, torch.amp.GradScaler("cpu", init_scale=256.0))
    assert gap > 1e-3
    assert (found.verdict, found.cause) == ("biased", "loss scale"), str(found)
    assert "scale by one GradScaler" in found.remedy
    same = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found, gap = scaled_loop(lambda s, i: None, same)
    assert gap < 1e-5
    assert found.verdict in SOUND


def test_a_scaler_that_steps_another_optimizer_does_not_end_the_window() -> None:
    """One scaler for two models: the step of the other's optimizer was taken for a skipped one."""
    model, other = net(), net(seed=1)
    optimizer, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with watch(model, CE, optimizer) as audit:
        for x, y in window(4, 4, 4):
            scaler.scale(CE(model(x), y) / 3).backward()
            scaler.scale(nn.functional.mse_loss(other(x), torch.zeros(4, 3))).backward()
        scaler.step(second)
        scaler.step(optimizer)
        scaler.update()
    assert (audit.verdict, audit.accum_steps) == ("equivalent", 3), str(audit)
