"""An audit leaves nothing behind: not in the model, its gradients, its optimizer, or any generator."""

import collections
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from gaccum_exp.audit.audit_window import audit_window
from tests.audit.support import CE, HIDDEN, Fn, net, window


def generators() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()]


def same(one: Any, other: Any) -> bool:
    """Compare bit for bit, through the containers that are used here."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


class Stateful(nn.Module):
    """Counts and collects in every way that attributes allow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.shapes: list[Any] = []
        self.by_size: dict[int, int] = {}
        self.nested: dict[str, list[Tensor]] = {"sums": [torch.zeros(HIDDEN)]}
        self.kinds: set[str] = set()
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.shapes.append(tuple(x.shape))
        self.by_size[len(x)] = self.by_size.get(len(x), 0) + 1
        self.nested["sums"][0].add_(1)
        self.kinds.add(str(x.dtype))
        self.cache = x.detach()
        self.late = 1
        return x

    def state(self) -> Any:
        held = (self.calls, self.shapes, self.by_size, self.nested, self.kinds, self.cache)
        return copy.deepcopy((*held, hasattr(self, "late"), self.seen))


def raises_in_float64(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise RuntimeError("not in this precision")
    return x


def raises_on_large(x: Tensor) -> Tensor:
    if len(x) > 4:
        raise RuntimeError("too many")
    return x


ENDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "judged": lambda x: x,
    "raises in float64": raises_in_float64,
    "raises on the large batch": raises_on_large,
    "raises at once": lambda x: x.reshape(-1, 7, 7),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_model_and_every_generator_are_as_they_were(ending: str) -> None:
    """Weights, gradients, buffers, flags, attributes, hooks and random state, however it ends."""
    stateful = Stateful()
    model = net(nn.BatchNorm1d(HIDDEN), stateful, nn.Dropout(), Fn(ENDINGS[ending]))
    model[0].bias.requires_grad_(False)
    model[3].eval()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    CE(model[-1](torch.randn(2, HIDDEN)), torch.tensor([0, 1])).backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()

    def everything() -> Any:
        return [
            {k: v.clone() for k, v in model.state_dict().items()},
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            copy.deepcopy(optimizer.state_dict()),
            stateful.state(),
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            generators(),
            torch.get_default_dtype(),
        ]

    objects = [(id(p), id(p.grad)) for p in model.parameters()]
    buffers = [id(b) for b in model.buffers()]
    before = everything()
    found = audit_window(model, CE, window(4, 4, 3))
    assert same(everything(), before)
    assert [(id(p), id(p.grad)) for p in model.parameters()] == objects
    assert [id(b) for b in model.buffers()] == buffers
    assert found.verdict == ("biased" if ending == "judged" else "inconclusive")


class Meter:
    """An average as training code keeps it."""

    def __init__(self) -> None:
        self.total, self.shadow = 0.0, torch.zeros(HIDDEN)

    def update(self, x: Tensor) -> None:
        self.total += 1
        self.shadow += x.detach().float().mean(0)


class Held(nn.Module):
    def __init__(self, state: Any, use: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.state, self.use = state, use

    def forward(self, x: Tensor) -> Tensor:
        self.use(self.state, x)
        return x


def seen_by(state: Any) -> Any:
    """Return what can be compared of a state."""
    if isinstance(state, Meter):
        return copy.deepcopy(vars(state))
    if isinstance(state, torch.Generator):
        return state.get_state().clone()
    if isinstance(state, random.Random):
        return state.getstate()
    if isinstance(state, np.random.Generator):
        return copy.deepcopy(state.bit_generator.state)
    return copy.deepcopy(state)


HOLDINGS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "deque": (lambda: collections.deque([0], maxlen=3), lambda s, x: s.append(len(x))),
    "Counter": (collections.Counter, lambda s, x: s.update("a")),
    "OrderedDict": (collections.OrderedDict, lambda s, x: s.setdefault(len(s), 1)),
    "defaultdict": (lambda: collections.defaultdict(list), lambda s, x: s[0].append(1)),
    "array": (lambda: np.zeros(2), lambda s, x: s.__iadd__(1)),
    "object": (Meter, lambda s, x: s.update(x)),
    "torch generator": (torch.Generator, lambda s, x: torch.rand(1, generator=s)),
    "numpy generator": (lambda: np.random.default_rng(0), lambda s, x: s.random()),
    "random.Random": (lambda: random.Random(0), lambda s, x: s.random()),
}


@pytest.mark.parametrize("name", list(HOLDINGS))
def test_what_a_module_holds_is_as_it_was(name: str) -> None:
    """Queues, counters, arrays, meters and generators that a module keeps as plain attributes."""
    make, use = HOLDINGS[name]
    held = Held(make(), use)
    before = seen_by(held.state)
    audit_window(net(held), CE, window(4, 4, 3))
    assert same(seen_by(held.state), before)


def test_a_module_that_only_the_loss_function_knows_is_as_it_was() -> None:
    """A projection head in the loss function's closure: its gradients and its running statistics."""
    model, head = net(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    before = copy.deepcopy(head.state_dict())

    def loss_fn(model: nn.Module, micro_batch: Any) -> Any:
        inputs, labels = micro_batch
        return F.cross_entropy(head(model(inputs)), labels, reduction="sum"), len(labels)

    audit_window(model, loss_fn, window(4, 4, 3))
    assert all(p.grad is None for p in head.parameters())
    assert same(dict(head.state_dict()), dict(before))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
}


def trained(optimizer: str, precision: str, watched: bool) -> list[Any]:
    """Train two windows, and return all that is left."""
    random.seed(0)
    np.random.seed(0)
    model = net(nn.BatchNorm1d(HIDDEN), nn.Dropout(), Stateful(), Fn(lambda x: x * random.random()))
    stepping = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16", init_scale=64.0)
    losses = []

    def train() -> None:
        for step in range(2):
            stepping.zero_grad()
            for inputs, labels in window(4, 4, 3, seed=step):
                with torch.autocast("cpu", getattr(torch, precision), enabled=precision != "float32"):
                    loss = CE(model(inputs), labels) / 3
                scaler.scale(loss).backward()
                losses.append(loss.item())
            scaler.unscale_(stepping)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(stepping)
            scaler.update()

    if watched:
        with watch(model, CE, stepping) as audit:
            train()
        assert audit.verdict in ("biased", "inconclusive")
        assert len(audit.windows) == 2
    else:
        train()
    gradients = [p.grad for p in model.parameters()]
    states = [model.state_dict(), stepping.state_dict(), scaler.state_dict(), model[3].state()]
    return [*map(dict, states[:3]), states[3], gradients, losses, generators()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_watched_loop_ends_bit_for_bit_as_without(optimizer: str, precision: str) -> None:
    """Weights, statistics, optimizer, scaler, counters, gradients, losses and generators."""
    assert same(trained(optimizer, precision, True), trained(optimizer, precision, False))


def test_a_loop_inside_one_autocast_ends_as_without() -> None:
    """There casts of the weights outlive the step, and `watch` must not be what drops them."""

    def weights(watched: bool) -> list[Tensor]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def train() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                for _ in range(3):
                    for inputs, labels in window(4, 4):
                        (CE(model(inputs), labels) / 2).backward()
                    optimizer.step()
                    optimizer.zero_grad()

        if watched:
            with watch(model, CE, optimizer):
                train()
        else:
            train()
        return [p.detach() for p in model.parameters()]

    assert same(weights(True), weights(False))
