"""`watch` around loops that torch.compile has compiled: the compiler sees nothing of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import watch
from tests.audit.support import CE, net, window

pytestmark = [  # torch's compiler about itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo"),
]

SOUND = ("equivalent", "identical")
dynamo: Any = pytest.importorskip("torch._dynamo")
testing: Any = pytest.importorskip("torch._dynamo.testing")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


class Ran(NamedTuple):
    """What a loop has left."""

    frames: int
    breaks: int
    weights: Tensor
    audit: Any


def ran(kind: str, watched: bool, warm: bool = False, divisor: float = 2.0) -> Ran:
    """Run two windows of a loop of which one part is compiled, and a pass more."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    counter = testing.CompileCounter()
    model: Any = net()
    criterion: Any = nn.CrossEntropyLoss()
    fullgraph = kind not in ("train step", "optimizer")

    def compiled(part: Any) -> Any:
        return torch.compile(part, backend=counter, fullgraph=fullgraph)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called, loss, step = model, criterion, optimizer.step

    def whole_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    def train_step(x: Tensor, y: Tensor) -> None:
        (loss(called(x), y) / divisor).backward()

    given: Any = (model, criterion)
    each = train_step
    if kind == "model":
        called = compiled(model)
        given = called, criterion
    elif kind == "model, given uncompiled":
        called = compiled(model)
    elif kind == "model in place":
        model.compile(backend=counter, fullgraph=True)
    elif kind == "a part":
        model[2].compile(backend=counter, fullgraph=True)
    elif kind == "criterion":
        loss = compiled(criterion)
        given = model, loss
    elif kind == "loss function":
        function = compiled(whole_loss)
        given = model, function

        def each(x: Tensor, y: Tensor) -> None:
            (function(model, x, y) / divisor).backward()

    elif kind == "train step":
        each = compiled(train_step)
    elif kind == "optimizer":
        step = compiled(optimizer.step)
    parts = window(4, 4)
    if warm:
        for x, y in parts:
            each(x, y)
        optimizer.zero_grad()
    context: AbstractContextManager[Any] = watch(*given, optimizer) if watched else nullcontext()
    with context as audit:
        for _ in range(2):
            for x, y in parts:
                each(x, y)
            step()
            optimizer.zero_grad()
    each(*parts[0])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return Ran(counter.frame_count, sum(dynamo.utils.counters["graph_break"].values()), weights, audit)


SEEN = (
    *("model", "model, given uncompiled", "model in place", "a part"),
    *("criterion", "loss function", "optimizer"),
)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", SEEN)
def test_the_compiler_sees_nothing_of_watch(kind: str, warm: bool) -> None:
    """As many graphs as without it, no break more, the same weights; and the loop is judged."""
    alone, found = ran(kind, False, warm), ran(kind, True, warm)
    assert found.frames == alone.frames > 0
    assert found.breaks <= alone.breaks
    assert torch.equal(found.weights, alone.weights)
    assert [w.verdict in SOUND for w in found.audit.windows] == [True, True], str(found.audit)


@pytest.mark.parametrize("kind", ["model", "loss function"])
def test_a_fault_of_a_compiled_loop_is_found(kind: str) -> None:
    """Not divided by N."""
    audit = ran(kind, True, divisor=1.0).audit
    assert (audit.verdict, audit.cause) == ("biased", "loss scale"), str(audit)


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_train_step_is_left_open_and_says_what_to_give(warm: bool) -> None:
    """Nothing is seen inside it; it is compiled as without watch all the same."""
    alone, found = ran("train step", False, warm), ran("train step", True, warm)
    assert (found.frames, torch.equal(found.weights, alone.weights)) == (alone.frames, True)
    assert found.audit.verdict == "inconclusive"
    assert "nothing is seen (train_step): give watch the compiled function" in found.audit.detail


def test_a_mode_of_the_loops_own_keeps_its_place() -> None:
    """A mode of torch functions around the compiled call: it is there inside and afterwards."""
    seen: list[str] = []

    class Mine(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    model: Any = torch.compile(net(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, CE, optimizer) as audit:
        for x, y in window(4, 4):
            out = model(x)
            with Mine():
                model(x)
                assert len(torch.overrides._get_current_function_mode_stack()) == 2  # type: ignore[no-untyped-call]
            (CE(out, y) / 2).backward()
        optimizer.step()
    assert audit.verdict in SOUND, str(audit)
    assert seen
