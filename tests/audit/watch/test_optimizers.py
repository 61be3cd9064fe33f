"""Loops of several optimizers, of optimizers that step elsewhere, and of two gradients per step."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import watch
from tests.audit.support import CE, FEATURES, Fn, net, window

SOUND = ("equivalent", "identical")
D = torch.float64


def passes(model: nn.Module, parts: Any, divisor: float | None = None) -> None:
    for x, y in parts:
        (CE(model(x), y) / (divisor or len(parts))).backward()


def two(model: Any) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(model[0].parameters(), lr=0.5),
        torch.optim.Adam(model[2].parameters(), lr=0.5),
    ]


def one_per_parameter(model: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([p], lr=0.5) for p in model.parameters()]


@pytest.mark.parametrize("given", [list, tuple, lambda found: dict(enumerate(found))])
@pytest.mark.parametrize("made", [two, one_per_parameter])
def test_optimizers_that_step_one_after_the_other_take_one_window(made: Any, given: Any) -> None:
    """At the weights of the passes, though the first has moved its own by then; clipped one by one."""
    model = net(dtype=D)
    optimizers = made(model)
    with watch(model, CE, given(optimizers)) as audit:
        for _ in range(2):
            passes(model, window(4, 4, 3, 4, dtype=D)[:2])
            for optimizer in optimizers:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert [(w.verdict in SOUND, w.accum_steps) for w in audit.windows] == [(True, 2)] * 2, str(audit)


@pytest.mark.parametrize("made", [two, one_per_parameter])
def test_a_fault_is_found_under_several_optimizers(made: Any) -> None:
    """Not divided by N."""
    model = net(dtype=D)
    optimizers = made(model)
    with watch(model, CE, optimizers) as audit:
        passes(model, window(4, 4, 4, dtype=D), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    assert (audit.verdict, audit.cause) == ("biased", "loss scale"), str(audit)
    assert audit.scale == pytest.approx(3)


def test_the_loop_of_several_optimizers_ends_as_without_watch() -> None:
    """Bit for bit, though weights are exchanged while a window is judged."""
    ends = []
    for watched in (False, True):
        model = net()
        optimizers = two(model)
        with watch(model, CE, optimizers if watched else two(net())):
            for _ in range(2):
                passes(model, window(4, 4))
                for optimizer in optimizers:
                    optimizer.step()
                model.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("factor", [1, 3])
def test_optimizers_with_passes_between_their_steps_have_windows_of_their_own(factor: int) -> None:
    """Two halves of a model, trained in turns: each is judged on its own passes and parameters."""
    model = nn.ModuleDict({"a": net(dtype=D), "b": net(dtype=D, seed=1)})
    optimizers = {k: torch.optim.SGD(m.parameters(), lr=0.1) for k, m in model.items()}
    with watch(model, CE, optimizers) as audit:
        for _ in range(2):
            for name, optimizer in optimizers.items():
                optimizer.zero_grad()
                passes(model[name], window(4, 4, 4, dtype=D), 3 if name == "a" else 3 / factor)
                optimizer.step()
    expected = [(3, 1.0), (3, float(factor))] * 2
    assert [(w.accum_steps, w.scale) for w in audit.windows] == [
        (n, pytest.approx(scale)) for n, scale in expected
    ]
    assert audit.sound == (factor == 1), str(audit)


def test_optimizers_that_step_at_different_rates_are_left_open() -> None:
    """The second's gradient is of passes before the first one's step: that is said, and no verdict."""
    model = net(dtype=D)
    fast, slow = two(model)
    with watch(model, CE, [fast, slow]) as audit:
        for x, y in window(4, 4, dtype=D):
            CE(model(x), y).backward()
            fast.step()
            fast.zero_grad()
        slow.step()
    assert audit.verdict == "inconclusive", str(audit)
    assert "watch its optimizer alone; else call zero_grad before" in (audit.detail or "")


def test_what_a_generator_leaves_in_its_critic_is_asked_about() -> None:
    """Its passes go through the critic, which is cleared after its own step alone.

    So are those of an encoder that is stepped after its decoder, on purpose: no loop says which.
    """
    generator, critic = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()
    of_generator, of_critic = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, critic))
    with watch() as audit:
        for _ in range(2):
            for _ in range(2):
                fake = generator(torch.randn(4, 2, dtype=D)).detach()
                (critic(fake).square().mean() / 2).backward()
            of_critic.step()
            of_critic.zero_grad()
            for _ in range(2):
                (-critic(generator(torch.randn(4, 2, dtype=D))).square().mean() / 2).backward()
            of_generator.step()
            of_generator.zero_grad()
    told = [w.verdict in SOUND for w in audit.windows]
    assert told == [True, True, False, True], str(audit)
    assert audit.windows[2].verdict == "inconclusive"
    assert "else call zero_grad before its first backward pass" in (audit.windows[2].detail or "")


@pytest.mark.parametrize("zeroed", [True, False])
def test_fakes_that_a_generator_made_before_its_critics_step_are_followed_past_it(zeroed: bool) -> None:
    """Both are judged; a critic that is never zeroed steps again on what it has stepped on, and more."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()
    of_generator, of_critic = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, critic))
    with watch() as audit:
        for _ in range(2):
            fakes = [generator(torch.randn(4, 2, dtype=D)) for _ in range(3)]
            for fake in fakes:
                real = critic(torch.randn(4, 4, dtype=D))
                ((critic(fake.detach()) - real).sigmoid().mean() / 3).backward()
            of_critic.step()
            generator.zero_grad()
            for fake in fakes:
                (-critic(fake).sigmoid().mean() / 3).backward()
            of_generator.step()
            if zeroed:
                critic.zero_grad()
    causes = [w.cause if w.verdict == "biased" else w.verdict in SOUND for w in audit.windows]
    assert causes == [True, True, True if zeroed else "stale or missing gradients", True], str(audit)


def test_an_optimizer_that_steps_inside_the_backward_pass_does_not_accumulate() -> None:
    """The tutorial's way to save memory: every micro-batch is a window of its own."""
    model = net(dtype=D)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def stepped(parameter: Any) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(stepped)
    with watch(model, CE, optimizers.values()) as audit:
        passes(model, window(4, 4, 4, dtype=D))
    assert [(w.verdict, w.accum_steps) for w in audit.windows] == [("biased", 1)] * 3, str(audit)
    assert "inside the backward pass, so that nothing accumulates" in (audit.remedy or "")


@pytest.mark.parametrize("wrong", [None, [], "adam", [None]])
def test_what_is_no_optimizer_is_refused_by_name(wrong: Any) -> None:
    """Before anything runs."""
    with pytest.raises(TypeError, match="watch needs a torch optimizer"):
        watch(net(), CE, wrong)


def test_a_step_that_raises_lets_its_window_go() -> None:
    """The next ones are judged as if it had not been there."""
    model = net(dtype=D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, CE, optimizer) as audit:
        passes(model, window(4, 4, dtype=D))
        optimizer.param_groups[0]["lr"] = "none"
        with pytest.raises(TypeError):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        for seed in (2, 3):
            optimizer.zero_grad()
            passes(model, window(4, 4, 4, dtype=D, seed=seed))
            optimizer.step()
    assert [(w.verdict in SOUND, w.accum_steps) for w in audit.windows[-2:]] == [(True, 3)] * 2, str(
        audit
    )
    assert audit.left_over == 0


def test_a_model_that_raises_leaves_the_tracer_ready() -> None:
    """One micro-batch fails and is left out, as a loop that guards against a bad sample does."""
    failing = [True]

    def fails_once(x: Tensor) -> Tensor:
        if failing.pop() if failing else False:
            raise ValueError("a bad sample")
        return x

    model = net(Fn(fails_once), dtype=D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, *parts = window(4, 4, 4, dtype=D)
    with watch(model, CE, optimizer) as audit:
        with pytest.raises(ValueError, match="bad sample"):
            model(first[0])
        passes(model, parts)
        optimizer.step()
    assert (audit.verdict in SOUND, audit.accum_steps) == (True, 2), str(audit)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (2010.01412): the gradient at the weights where the loss is worst."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)
        self.old: list[Tensor] = []

    @property
    def all(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.all if p.grad is not None]).norm()
        self.old = [p.detach().clone() for p in self.all]
        for p in self.all:
            p.add_(p.grad, alpha=float(0.05 / norm))  # type: ignore[arg-type]  # backward has set it
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, old in zip(self.all, self.old, strict=True):
            p.data = old
        self.base.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nothing is returned
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def in_two_steps(model: nn.Module, sam: SAM, parts: Any, second: Any, divisor: float) -> None:
    passes(model, parts)
    sam.first_step()
    passes(model, second, divisor)
    sam.second_step()


def by_closure(model: nn.Module, sam: SAM, parts: Any, second: Any, divisor: float) -> None:
    passes(model, parts)
    sam.step(lambda: passes(model, second, divisor))


@pytest.mark.parametrize("of", [lambda sam: sam, lambda sam: sam.base])
@pytest.mark.parametrize("loop", [in_two_steps, by_closure])
def test_of_sams_two_gradients_the_second_is_judged_at_its_own_weights(loop: Any, of: Any) -> None:
    """Sound and not divided by N; that there was another gradient is said."""
    parts = window(4, 4, 4, dtype=D)
    for divisor, verdict in ((3.0, SOUND), (1.0, ("biased",))):
        model = net(dtype=D)
        sam = SAM(model.parameters())
        with watch(model, CE, of(sam)) as audit:
            loop(model, sam, parts, parts, divisor)
            loop(model, sam, parts, parts, divisor)
        assert [w.accum_steps for w in audit.windows] == [3, 3]
        assert audit.verdict in verdict, str(audit)
        if divisor == 3:
            assert "two gradients at two weights" in (audit.detail or "")
        else:
            assert audit.scale == pytest.approx(3)


def test_gradients_of_other_samples_that_were_zeroed_as_the_weights_moved_are_no_sam() -> None:
    """A loop that zeroes inside the window, of a model that renormalizes its weights: left open."""
    model, parts = net(dtype=D), window(4, 4, 4, dtype=D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, CE, optimizer) as audit:
        for x, y in parts:
            optimizer.zero_grad()
            CE(model(x), y).backward()
            with torch.no_grad():
                next(model.parameters()).mul_(0.99)
        with torch.no_grad():
            next(model.parameters()).div_(0.99)
        optimizer.step()
    assert audit.verdict not in SOUND, str(audit)


def test_gradients_at_other_weights_that_were_not_zeroed_are_told() -> None:
    """Weights moved by hand after the second of three passes."""
    model = net(dtype=D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, CE, optimizer) as audit:
        for i, (x, y) in enumerate(window(4, 4, 4, dtype=D)):
            if i == 2:
                with torch.no_grad():
                    next(model.parameters()).mul_(3)
            (CE(model(x), y) / 3).backward()
        optimizer.step()
    assert (audit.verdict, audit.cause) == ("biased", "stale or missing gradients"), str(audit)
    assert "changed after backward pass 2 of 3" in (audit.detail or "")


def test_parts_of_a_model_that_a_loop_calls_one_by_one_are_followed() -> None:
    """An encoder, something between, a head; the model itself is never called."""
    model = nn.ModuleDict({"encoder": nn.Linear(FEATURES, 4), "head": nn.Linear(4, 3)}).double()
    for divisor, verdict in ((3.0, SOUND), (1.0, ("biased",))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, None, optimizer) as audit:
            for x, y in window(4, 4, 4, dtype=D):
                out = model["head"](torch.tanh(model["encoder"](x)))
                (nn.functional.cross_entropy(out, y) / divisor).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert audit.verdict in verdict, str(audit)
