"""The seams of a training, each tried with a throw-away hook."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.train.build import build
from gaccum_exp.train.hooks import MICRO_BATCH, OPTIMIZER_STEP, PASSES, WINDOW, Hook, Hooks
from gaccum_exp.train.loop import train
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step
from tests.support import STRANGER, settings

COMMON = (*STRANGER, "data.global_batch_size=8", "accum.steps=4", "train.steps=4", "optimizer=adamw",
          "audit.at_start=false")  # fmt: skip
DROPOUT = "+model.dropout=0.3"


def weights(state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.modules.parameters()])


def trained(*overrides: str) -> TrainState:
    state = build(settings(*COMMON, *overrides))
    train(state, Hooks())
    return state


def test_a_hook_sees_every_micro_gradient() -> None:
    """What each micro-batch adds to `.grad` is its own gradient over the window's count, in float64."""
    state = build(settings(*COMMON, "runtime.precision=fp64"))
    expected: list[Tensor] = []
    seen: list[Tensor] = []

    def gradient() -> Tensor:
        return torch.cat([p.grad.flatten() for p in state.parameters if p.grad is not None])

    class MicroGradients(Hook):
        phases = frozenset({MICRO_BATCH})

        def before(self, state: TrainState, window: Any) -> None:
            for x, y in window:
                loss = nn.functional.cross_entropy(state.model(x.double()), y, reduction="sum")
                own = torch.autograd.grad(loss / 8, state.parameters)
                expected.append(torch.cat([g.flatten() for g in own]))

        def after_micro_batch(self, state: TrainState, accumulator: AccumulatorState) -> None:
            if accumulator.passes_done == 1:
                self.so_far = torch.zeros(())
            seen.append(gradient() - self.so_far)
            self.so_far = gradient()

    train(state, Hooks([MicroGradients()]))
    assert len(seen) == 4 * 4
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-10, atol=1e-14)


class InterruptedHereError(Exception):
    """The process is to end, and to go on later."""


class StopInside(Hook):
    """Saves all that a window holds after some of its micro-batches, and stops there."""

    phases = frozenset({MICRO_BATCH})

    def __init__(self, global_step: int, passes: int) -> None:
        self._at = global_step, passes

    def after_micro_batch(self, state: TrainState, accumulator: AccumulatorState) -> None:
        if self._at == (state.global_step, accumulator.passes_done):
            names = {p: name for name, p in state.modules.named_parameters()}
            self.window = accumulator.state_dict(names)
            raise InterruptedHereError


def resumed(stopped: TrainState, hook: StopInside, *overrides: str) -> TrainState:
    """Build the training anew, with the state of the one that was stopped, and train to the end."""
    state = build(settings(*COMMON, *overrides))
    state.modules.load_state_dict(stopped.modules.state_dict())
    state.optimizer.load_state_dict(stopped.optimizer.state_dict())
    state.global_step = stopped.global_step
    parameters = dict(state.modules.named_parameters())
    state.begun = AccumulatorState.from_state_dict(hook.window, parameters)
    train(state, Hooks())
    return state


@pytest.mark.parametrize(
    "overrides",
    [
        (DROPOUT,),
        (DROPOUT, "accum.reduction=mean"),
        ("accum.reduction=sum",),
        ("criterion=custom", "criterion._target_=tests.train.test_hooks.counted_late"),
        ("runtime.precision=bf16", "runtime.weight_dtype=same", "accum.buffer_dtype=float32"),
    ],
    ids=lambda overrides: overrides[-1],
)
@pytest.mark.parametrize("passes", [1, 3])
def test_a_window_goes_on_from_its_saved_state(overrides: tuple[str, ...], passes: int) -> None:
    """Stopped after some micro-batches of the third window: the same weights, bit for bit."""
    stopped, hook = build(settings(*COMMON, *overrides)), StopInside(2, passes)
    with pytest.raises(InterruptedHereError):
        train(stopped, Hooks([hook]))
    assert stopped.global_step == 2
    assert torch.equal(weights(resumed(stopped, hook, *overrides)), weights(trained(*overrides)))


def counted_late() -> Any:
    """Make a loss function whose denominator is known only after the forward pass."""

    def loss_fn(model: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
        x, y = micro_batch
        counted = y % 3 != 0
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        return (losses * counted).sum(), counted.sum()

    return loss_fn


def test_a_window_is_repeated_finer() -> None:
    """A hook that refuses one window at N = 4 has it at N = 8, where all that follow stay."""
    splits: list[tuple[int, int]] = []

    class FinerOnce(Hook):
        phases = frozenset({MICRO_BATCH})

        @contextmanager
        def around(self, phase: str, state: TrainState, window: Any) -> Iterator[None]:
            yield
            if state.global_step == 1 and len(window) == 4:
                raise InterruptedHereError

        def redo(self, state: TrainState, window: Any, error: Exception) -> bool:
            state.split_factor *= 2
            return isinstance(error, InterruptedHereError)

        def after(self, state: TrainState, window: Any, values: Any) -> None:
            splits.append((state.global_step, len(window)))

    state = build(settings(*COMMON, DROPOUT))
    train(state, Hooks([FinerOnce()]))
    assert splits == [(1, 4), (2, 8), (3, 8), (4, 8)]
    by_hand = build(settings(*COMMON, DROPOUT))
    for by_hand.global_step in range(4):
        by_hand.split_factor = 1 if by_hand.global_step == 0 else 2
        take_step(by_hand, next(by_hand.windows_from(by_hand.global_step)))
    assert torch.equal(weights(state), weights(by_hand))


class Diary(Hook):
    """Notes at which points it is called."""

    phases = frozenset({WINDOW, PASSES, MICRO_BATCH, OPTIMIZER_STEP})

    def __init__(self, name: str, notes: list[str]) -> None:
        self._name, self._notes = name, notes

    def begin(self, state: Any) -> None:
        self._notes.append(f"{self._name} begin")

    def before(self, state: Any, window: Any) -> None:
        self._notes.append(f"{self._name} before")

    @contextmanager
    def around(self, phase: str, state: Any, window: Any) -> Iterator[None]:
        self._notes.append(f"{self._name} ( {phase}")
        yield
        self._notes.append(f"{self._name} ) {phase}")

    def after_micro_batch(self, state: Any, accumulator: AccumulatorState) -> None:
        self._notes.append(f"{self._name} sees {accumulator.passes_done}")

    def after(self, state: Any, window: Any, values: Any) -> None:
        self._notes.append(f"{self._name} after {state.global_step}")

    def end(self, state: Any) -> None:
        self._notes.append(f"{self._name} end")


def test_the_first_hook_is_the_outermost() -> None:
    """It begins first at every point, and is done last."""
    notes: list[str] = []
    state = build(settings(*COMMON, "train.steps=1", "accum.steps=1"))
    train(state, Hooks([Diary("a", notes), Diary("b", notes)]))
    assert notes == [
        "a begin", "b begin", "a before", "b before", "a ( window", "b ( window",
        "a ( forward/backward", "b ( forward/backward", "a ( micro-batch", "b ( micro-batch",
        "b ) micro-batch", "a ) micro-batch", "b sees 1", "a sees 1",
        "b ) forward/backward", "a ) forward/backward", "a ( optimizer step", "b ( optimizer step",
        "b ) optimizer step", "a ) optimizer step", "b ) window", "a ) window",
        "b after 1", "a after 1", "b end", "a end",
    ]  # fmt: skip


def test_hooks_inside_a_window_see_the_first_evaluation_of_a_closure_only() -> None:
    """L-BFGS runs the window's gradients several times in one step."""
    notes: list[str] = []
    lbfgs = ("optimizer=custom", "optimizer._target_=torch.optim.LBFGS", "+optimizer.max_iter=4")
    common = tuple(o for o in COMMON if o != "optimizer=adamw")
    state = build(settings(*common, *lbfgs, "train.steps=1", "accum.steps=2"))
    train(state, Hooks([Diary("a", notes)]))
    assert [note for note in notes if "sees" in note] == ["a sees 1", "a sees 2"]


def test_an_error_that_no_hook_redoes_ends_the_training() -> None:
    """With the steps taken so far."""

    class Failing(Hook):
        phases = frozenset({MICRO_BATCH})

        def before(self, state: TrainState, window: Any) -> None:
            self.window = window

        def after_micro_batch(self, state: TrainState, accumulator: AccumulatorState) -> None:
            if state.global_step == 2:
                raise InterruptedHereError

    state = build(settings(*COMMON))
    with pytest.raises(InterruptedHereError):
        train(state, Hooks([Failing()]))
    assert state.global_step == 2
