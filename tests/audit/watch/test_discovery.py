"""`watch()` without arguments finds what a loop trains, and judges its first window."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import watch


def net(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


def micro_batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(8, 6, generator=generator) for _ in range(count)]
    return [(x, x.sum(1).gt(0).long()) for x in made]


def window(
    model: Callable[..., Tensor],
    optimizer: Any,
    loss: Callable[..., Tensor] = nn.functional.cross_entropy,
) -> None:
    for x, y in micro_batches():
        (loss(model(x), y) / 4).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("inside", [True, False])
def test_the_first_window_is_judged(inside: bool) -> None:
    """Whether model and optimizer are made in the block or before it."""
    made = None if inside else net()
    held = None if made is None else torch.optim.AdamW(made.parameters())
    with watch() as audit:
        model = made or net()
        window(model, held or torch.optim.AdamW(model.parameters()))
    assert [(a.verdict, a.accum_steps) for a in audit.windows] == [("equivalent", 4)]
    assert audit.sound


def test_a_loop_ends_bit_for_bit_as_without() -> None:
    """Weights and random numbers after two windows with dropout, and an evaluation before."""

    def trained(around: Any) -> list[Tensor]:
        with around:
            model = net(nn.Dropout(0.3))
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            with torch.no_grad():
                model(micro_batches(1)[0][0])
            for _ in range(2):
                window(model, optimizer)
        return [*model.parameters(), torch.randn(3)]

    torch.manual_seed(0)
    without = trained(nullcontext())
    torch.manual_seed(0)
    assert all(map(torch.equal, without, trained(watch())))


def test_an_evaluation_before_the_training_is_no_part_of_a_window() -> None:
    """Nor is one under inference mode, nor a call while there is no optimizer."""
    with watch() as audit:
        model = net(nn.BatchNorm1d(8))
        model(micro_batches(1)[0][0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model.eval()(micro_batches(1)[0][0])
        window(model.train(), optimizer)
    assert audit.cause == "batch statistics"
    assert audit.culprit == "1"
    assert len(audit.windows) == 1


def test_modules_under_one_optimizer_are_found_together() -> None:
    """An encoder and a decoder that no module holds; a fault in either is named by its class."""
    with watch() as audit:
        encoder, decoder = net(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
        both = [*encoder.parameters(), *decoder.parameters()]
        window(lambda x: decoder(encoder(x)), torch.optim.SGD(both, lr=0.1))
    assert audit.cause == "batch statistics"
    assert audit.culprit is not None
    assert audit.culprit.startswith("Sequential")


def test_optimizers_that_step_in_turn_are_judged_each() -> None:
    """As a GAN's: the second one's faulty windows are told from the first one's."""
    with watch() as audit:
        one, other = net(), net()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, other)]
        for _ in range(2):
            window(one, optimizers[0])
            for x, y in micro_batches():
                nn.functional.cross_entropy(other(x), y).backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
    assert [a.verdict for a in audit.windows] == ["equivalent", "biased"] * 2


def test_an_optimizer_that_comes_later_is_found() -> None:
    """As where one model is trained after another."""
    with watch() as audit:
        for _ in range(2):
            model = net()
            window(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [a.verdict for a in audit.windows] == ["equivalent"] * 2


def test_an_average_and_a_teacher_are_not_taken_for_the_model() -> None:
    """The average holds the model, too; the teacher is called first."""

    class Average(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.shadow = model, copy.deepcopy(model)

    with watch() as audit:
        model, teacher = net(), net()
        average = Average(model)
        with torch.no_grad():
            teacher[0].weight.mul_(1.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def distilled(x: Tensor) -> Tensor:
            with torch.no_grad():
                target = teacher(x)
            out: Tensor = model(x) - target
            return out

        window(distilled, optimizer, lambda out, y: out.square().mean())
        average.shadow.load_state_dict(model.state_dict())
    assert audit.sound, str(audit)
    assert len(audit.windows) == 1


@pytest.mark.parametrize("mode", [True, False])
def test_a_frozen_body_in_training_mode_is_a_part_of_it(mode: bool) -> None:
    """Its batch statistics mix samples though the optimizer holds the head alone."""
    with watch() as audit:
        model = net(nn.BatchNorm1d(8)).train(mode)
        optimizer = torch.optim.SGD(model[-1].parameters(), lr=0.1)
        window(model, optimizer)
    assert audit.verdict == ("biased" if mode else "equivalent")


def test_a_loss_module_of_ones_own_is_found_by_what_it_is_called_on() -> None:
    """Its state moves in every micro-batch, as DINO's centre does."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(3))

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            loss = (out - self.centre - y[:, None]).square().mean()
            self.centre.lerp_(out.detach().mean(0), 0.5)
            return loss

    with watch() as audit:
        model, loss = net(), Centred()
        window(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
        centre = loss.centre.clone()
    assert audit.cause == "state moves in the window", str(audit)
    assert torch.equal(loss.centre, centre)


def test_a_closure_takes_its_passes_inside_the_step() -> None:
    """Where the optimizer is there before any module is called, as of L-BFGS."""
    with watch() as audit:
        model = net()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

        def closure() -> float:
            optimizer.zero_grad()
            total = 0.0
            for x, y in micro_batches():
                loss = nn.functional.cross_entropy(model(x), y) / 4
                loss.backward()
                total += loss.item()
            return total

        optimizer.step(closure)
    assert [(a.verdict, a.accum_steps) for a in audit.windows] == [("equivalent", 4)]


def test_half_of_what_is_needed_is_refused() -> None:
    """Model and optimizer go together; a criterion may come alone."""
    with pytest.raises(TypeError, match="watch needs"):
        watch(net())
    with pytest.raises(TypeError, match="or neither"):
        watch(optimizer=torch.optim.SGD(net().parameters(), lr=0.1))
    with watch(criterion=nn.functional.cross_entropy) as audit:
        model = net()
        window(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert audit.sound


def test_nothing_found_says_why() -> None:
    """No step, or parameters that belong to no module."""
    with watch() as audit:
        pass
    assert "no optimizer step was seen" in (audit.detail or "")
    with watch() as audit:
        w = torch.ones(6, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.1)
        window(lambda x: nn.Identity()(x @ w), optimizer, lambda out, y: out.square().mean())
    assert "belongs to no module" in str(audit.detail)


def among_themselves(features: torch.Tensor) -> torch.Tensor:
    """Contrast every sample with the others of its micro-batch."""
    logits = features @ features.T
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)).roll(1))


def test_the_function_of_a_loss_that_mixes_samples_is_found_and_followed() -> None:
    """Line by line one window is left open; the next ones are judged by the function, in its place."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    left_open = None
    with watch() as audit:
        for _ in range(3):
            left_open = left_open or (audit.windows[0] if audit.windows else None)
            for x, _ in micro_batches(2):
                (among_themselves(model(x)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [w.verdict for w in audit.windows] == ["biased", "biased"], str(audit)
    assert left_open is not None
    assert (left_open.verdict, "among_themselves" in str(left_open.detail)) == ("inconclusive", True)
    assert audit.cause == "loss not additive over samples"


@pytest.mark.parametrize("made_before", [True, False])
def test_a_penalty_before_the_first_call_of_a_module_is_no_stale_gradient(made_before: bool) -> None:
    """Nothing was traced yet: the first window is left open, the second, seen whole, takes its place."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch() as audit:
        if not made_before:
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model[0].weight.square().sum().backward()
            window(model, optimizer)
            optimizer.zero_grad()
        assert audit.windows[0].verdict == "equivalent", str(audit)
    assert len(audit.windows) == 1


class Own:
    """An optimizer that is none of torch's: it has what a loop uses of one."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize(("divisor", "verdict"), [(2, "equivalent"), (1, "biased")])
def test_an_optimizer_of_no_class_of_torchs_is_followed(found: bool, divisor: int, verdict: str) -> None:
    """It is known by its `step`, `zero_grad` and `param_groups`."""
    model = nn.Linear(3, 2).double()
    optimizer = Own(model.parameters())
    with watch() if found else watch(model, None, optimizer) as audit:  # type: ignore[arg-type]
        for _ in range(2):
            optimizer.zero_grad()
            for x in torch.randn(2, 4, 3, dtype=torch.float64):
                (model(x).square().mean() / divisor).backward()
            optimizer.step()
    assert [w.verdict for w in audit.windows] == [verdict] * 2, str(audit)
