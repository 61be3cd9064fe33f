"""The tracer at the edges: two at once, passes inside backward passes, errors, and what stays held."""

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import watch
from gaccum_exp.audit.watch.tape import OutputRef, TapedCall
from tests.audit.loops import faulty_loop
from tests.audit.support import CE, FEATURES, HIDDEN, Fn, net, window

PARTS = window(4, 3, 2)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def passes(model: nn.Module) -> None:
    """Accumulate the mean gradient of all samples."""
    for x, y in PARTS:
        (CE(model(x), y) * len(y) / 9).backward()


def test_two_watches_of_one_loop_say_the_same() -> None:
    """The passes that one runs again are none of the loop's to the other."""
    loop, model = faulty_loop("not divided"), net()
    optimizer = sgd(model)
    with watch(model, CE, optimizer) as outer, watch(model, CE, optimizer) as inner:
        loop(model, optimizer, PARTS)
    assert str(inner) == str(outer)


class _Implicit(torch.autograd.Function):
    """tanh(xW), whose backward pass takes a gradient itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.tanh(x @ weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            out = torch.tanh(x @ weight)
        return torch.autograd.grad(out, (x, weight), grad)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Any:
        return _Implicit.apply(x, self.weight)


def test_a_gradient_taken_inside_a_backward_pass_is_a_part_of_it() -> None:
    """Every micro-batch still has a backward pass of its own: nothing is said against the memory."""
    model = net(_Layer())
    with watch(model, CE, optimizer := sgd(model)) as audit:
        passes(model)
        optimizer.step()
    assert audit.sound, str(audit)


@pytest.mark.parametrize(
    "write",
    [lambda x: x.div_(2).add_(1), lambda x: x.requires_grad_() * 2],
    ids=["normalized in place", "made to require a gradient"],
)
def test_a_model_may_write_to_its_inputs(write: Any) -> None:
    """A pass that is run again meets the inputs as the loop gave them."""
    model = nn.Sequential(Fn(write), nn.Linear(FEATURES, 3))
    with watch(model, CE, optimizer := sgd(model)) as audit:
        for x, y in PARTS:
            (CE(model(x.clone()), y) * len(y) / 9).backward()
        optimizer.step()
    assert audit.sound, str(audit)


def test_a_loss_that_is_saved_is_warned_of_by_nobody() -> None:
    """torch warns of hooks that are not saved with a tensor."""
    model = net()
    with warnings.catch_warnings(), watch(model, CE, sgd(model)):
        warnings.simplefilter("error")
        torch.save({"loss": CE(model(PARTS[0][0]), PARTS[0][1])}, io.BytesIO())


def test_losses_that_a_loop_keeps_keep_nothing_else() -> None:
    """Once the block has ended they have no hook, and the watch holds no tensor of the loop's."""
    model, losses = net(), list[Tensor]()
    block = watch(model, CE, optimizer := sgd(model))
    with block:
        for x, y in PARTS:
            losses.append(CE(model(x), y))
            (losses[-1] / 3).backward()
        optimizer.step()
    assert not any(loss._backward_hooks for loss in losses)
    assert block._tracer is None


def test_an_error_ends_the_block_without_judging() -> None:
    """A window whose optimizers have not all stepped stays unjudged: an interrupt is not held up."""
    model = net()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    with pytest.raises(KeyboardInterrupt), watch(model, CE, [first, second]) as audit:  # noqa: PT012
        passes(model)
        first.step()
        raise KeyboardInterrupt
    assert audit.windows == []


def test_the_worst_audits_methods_are_the_watchs() -> None:
    """As its other attributes are."""
    model = net()
    with watch(model, CE, optimizer := sgd(model)) as audit:
        passes(model)
        optimizer.step()
    assert audit.report() == audit.worst.report()


def test_a_chain_of_calls_is_followed_once_and_not_along_every_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An LSTM cell takes both its states from one call: of n calls there are 2^n paths to the first."""
    calls: list[TapedCall] = []
    for n in range(16):
        states = {k: OutputRef(calls[-1], k) for k in range(2)} if calls else {}
        calls.append(TapedCall("model", CE, states, order=n))
    asked: list[TapedCall] = []
    refs = TapedCall.refs
    monkeypatch.setattr(TapedCall, "refs", lambda call: (asked.append(call), refs(call))[1])
    assert calls[-1].sources() == set(calls[:-1])
    assert len(asked) == len(calls)
