"""Attributes are kept, or it is said that a training has no checkpoints; nothing is dropped unsaid."""

import collections
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.train.checkpoint.attributes import copied
from gaccum_exp.train.checkpoint.parts import moving, parts_of
from gaccum_exp.train.checkpoint.snapshot import _on_device
from tests.strangers import Net
from tests.support import STRANGER
from tests.train.checkpoint.resumes import Training, gone_on, stopped_at

HERE = "tests.train.checkpoint.test_unkept"
OF = (*STRANGER, "audit.at_start=false", "data.global_batch_size=8", "accum.steps=2", "train.steps=5")
EVERY = (*OF, "checkpoint.every_steps=1", "checkpoint.every_minutes=null", "checkpoint.keep=9")


class Hoarder(Net):
    """Its output follows from what earlier passes have left in attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(2, dtype=torch.float64)
        self.several = [zeros.clone(), zeros.clone()]
        self.by_name = {"ema": zeros.clone(), "act": torch.tanh}
        self.recent = collections.deque([zeros.clone()], maxlen=3)
        self.pair: tuple[Any, ...] = (0.0, zeros.clone())
        self.number, self.array = np.float64(0), [np.zeros(2)]
        self.counts, self.ordered = collections.Counter(n=0), collections.OrderedDict(n=0)
        self.made = collections.defaultdict(list)
        self.nested: list[Any] = [[0.0], {"in": ({1: 0.0},)}]
        self.long, self.shapes = [0.0] * 1001, {(torch.Size([2]), torch.float64): 0.0}
        self.seen: set[int] = set()
        self.of_parameter = {p: torch.zeros_like(p) for p in self.parameters()}
        self.generators = [torch.Generator().manual_seed(1), np.random.default_rng(2)]
        self.parts = [self.layers, next(self.parameters())]
        self.hidden: Tensor | None = None  # with a graph

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        if self.training:
            mean = x.mean(0)
            self.several[0] = 0.9 * self.several[0] + mean
            self.several[1] += mean
            self.by_name["ema"] = 0.9 * self.by_name["ema"] + mean
            self.recent.append(mean)
            self.pair = (self.pair[0] + 1, self.pair[1] + mean)
            self.number, self.array[0] = self.number + 1, self.array[0] + 1
            self.counts["n"] += 1
            self.ordered["n"] += 1
            self.made["n"].append(1.0)
            self.nested[0][0] += 1
            self.nested[1]["in"][0][1] += 1
            self.long[7] += 1
            self.shapes[x.shape[1:], x.dtype] += 1
            self.seen.add(len(self.seen))
            for parameter, of in self.of_parameter.items():
                of += 0.1 * parameter.detach()
        moved = (
            self.several[0] + self.several[1] + self.by_name["ema"] + sum(self.recent) + self.pair[1]
        ).sum()
        moved = moved + self.pair[0] + float(self.number) + self.array[0].sum() + self.counts["n"]
        moved = moved + self.ordered["n"] + sum(self.made["n"]) + self.nested[0][0] + len(self.seen)
        moved = moved + self.nested[1]["in"][0][1] + self.long[7] + sum(self.shapes.values())
        moved = moved + sum(of.sum() for of in self.of_parameter.values())
        moved = moved + torch.rand((), generator=self.generators[0]) + self.generators[1].random()
        moved = moved + (0.0 if self.hidden is None else self.hidden.detach().sum())
        out = super().forward(x)
        self.hidden = 0.1 * out
        return out * (1 + 0.01 * moved)


class Aliased(Net):
    """What is one object when it is built becomes several, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        zeros, nothing = torch.zeros(2, dtype=torch.float64), list[float]()
        self.older = self.newer = zeros
        self.recent = [zeros] * 3
        self.notes = self.others = nothing
        self.shadow: list[Tensor] = [self.layers[0].weight]
        self.one, self.other = zeros.clone(), zeros.clone()
        self.register_buffer("mean", zeros.clone())
        self.view = self.mean

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        if self.training:
            mean = x.mean(0)
            self.older, self.newer = self.newer, mean
            self.recent = [*self.recent[1:], mean.clone()]
            self.notes = [*self.notes, 1.0]
            self.others.append(2.0)
            self.shadow[0] = 0.5 * self.shadow[0].detach() + 1
            self.one = self.other
            self.one += mean
            self.mean += mean
        moved = self.older - self.newer + self.recent[0] - self.recent[2] + self.one - 2 * self.other
        moved = moved + self.mean + 2 * self.view
        out = super().forward(x) * (1 + 0.01 * moved.sum() + 0.01 * self.shadow[0].sum())
        return out * (1 + 0.01 * (sum(self.notes) - sum(self.others)))


class Lookahead(torch.optim.SGD):
    """Goes half the way back to slow weights, which are a list, every second step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow += 0.5 * (p - slow)
                p.copy_(slow)
        return done


def test_what_was_on_the_host_is_brought_to_the_device_that_goes_on() -> None:
    """Tensors in containers too, which may have no place yet; the states of generators stay."""
    training = Training(*OF, "accum.reduction=mean", f"model._target_={HERE}.Hoarder")
    now = moving(parts_of(training.state))
    window = {"accumulator": {"loss_sum": torch.ones(())}, "at_start": copied(now)}
    tree = {"optimizer": {}, "moving": now, "window": window}
    moved = _on_device(tree, torch.device("meta"))
    for kept in (moved["moving"], moved["window"]["at_start"]):
        own = kept["attributes"]["model"]
        assert own["recent"][0].is_meta
        assert own["by_name"]["ema"].is_meta
        assert not own["generators"][0].of.is_meta
        assert not kept["random"][0].is_meta
    assert moved["window"]["accumulator"]["loss_sum"].is_meta


def test_containers_of_tensors_and_values_come_back(tmp_path: Path) -> None:
    """In a model and in an optimizer, whatever holds them: the training ends bit for bit as it would."""
    of = (*OF, f"model._target_={HERE}.Hoarder", "optimizer=custom", "optimizer.lr=0.1",
          f"optimizer._target_={HERE}.Lookahead")  # fmt: skip
    whole = Training(*of).train()
    stopped = stopped_at(tmp_path, (3, 1), *of)
    again, _ = gone_on(tmp_path, *of)
    assert torch.equal(again.weights, whole.weights)
    assert {**stopped.curves, **again.curves} == whole.curves
    model: Any = again.state.model
    assert set(model.of_parameter) == set(model.parameters())
    assert model.parts[0] is model.layers
    assert model.made["new"] == []


def test_what_was_one_object_and_is_several_comes_back_as_several(tmp_path: Path) -> None:
    """Each with its own value, and none of them in a parameter; what is one object stays one."""
    of = (*OF, f"model._target_={HERE}.Aliased", "accum.steps=4", "accum.reduction=mean")
    whole = Training(*of).train()
    stopped_at(tmp_path, (3, 1), *of)
    again, _ = gone_on(tmp_path, *of)
    assert torch.equal(again.weights, whole.weights)
    model: Any = again.state.model
    assert model.one is model.other
    assert model.view is model.mean


class Box:
    """An object of the user's own."""

    def __init__(self, value: Any = 0) -> None:
        self.value, self.lock, self.act = value, threading.Lock(), lambda x: x


class Moving(Net):
    """From its seventh pass on it moves something that is no tensor, number or container of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.passes = kind, 0
        self.kept = {
            "object": Box(),
            "entry": [Box(Box(0.0))],
            "tensor": Box(torch.zeros(2)),
            "module": [nn.BatchNorm1d(2, dtype=torch.float64)],
            "factory": collections.defaultdict(lambda: 0),
            "anew": Box(),
        }[kind]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        self.passes += self.training
        if self.training and self.passes > 6:
            of: Any = self.kept
            if self.kind == "object":
                of.value += 1
            elif self.kind == "entry":
                of[0].value.value += 0.5
            elif self.kind == "tensor":
                of.value.data.add_(1)
            elif self.kind == "module":
                of[0](x)
            elif self.kind == "factory":
                of["n"] += 1
            else:
                self.kept = Box()
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "type_"),
    [("object", "Box"), ("entry", "Box"), ("tensor", "Box"), ("module", "BatchNorm1d"),
     ("factory", "defaultdict"), ("anew", "Box")],
)  # fmt: skip
def test_what_cannot_be_kept_and_moves_is_said_and_ends_the_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, type_: str
) -> None:
    """Once, with its name; those that were taken before it moved are removed."""
    of = (*EVERY, f"model._target_={HERE}.Moving", f"+model.kind={kind}")
    before = Training(*of, "train.steps=3", folder=tmp_path).train()
    assert before.state.done
    assert [path.name for path in tmp_path.iterdir()]
    training = Training(*of, folder=tmp_path).train()
    assert training.state.done
    (said,) = [m for m in caplog.messages if "checkpoints" in m]
    assert said.startswith(
        f"no checkpoints: an interrupted training would begin again, since model.kept ({type_}) moves"
    )
    assert list(tmp_path.glob("*")) == []


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self) -> int:
        return 0


class Configured(Net):
    """Holds what cannot be kept and stays as it is, as most models do."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.act, self.of = Box({"width": 6}), torch.tanh, lambda x: x
        self.listed = [self.layers, self.config, self.act, nn.Tanh()]
        self.lock, self.type, self.parent = threading.Lock(), Box, [self]
        self.itself: list[Any] = []
        self.itself.append(self.itself)
        self.made = collections.defaultdict(Unhashable())


def test_what_cannot_be_kept_and_stays_is_no_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A configuration, functions, locks, lists of modules; a schedule that wraps a step."""
    of = (*EVERY, f"model._target_={HERE}.Configured", "optimizer=adamw", "scheduler=cosine")
    Training(*of, folder=tmp_path).train()
    assert not [m for m in caplog.messages if "no checkpoints" in m]
    assert len(list(tmp_path.iterdir())) == 4
