"""The memory of our own window: no more than a hand-written loop's, and nothing outlives its pass."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from experiments.memory_frontier.witness import allocated_peak, one_dnn
from gaccum_exp.core.accumulate import accumulate_gradients
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.memory.meter import FORWARD_BACKWARD, OPTIMIZER_STEP, TensorMeter
from gaccum_exp.memory.storages import ACTIVATIONS, INPUTS
from gaccum_exp.models.cnn import CNN
from gaccum_exp.train.hooks import Hooks
from gaccum_exp.train.memory_meters import MeterPhases
from gaccum_exp.train.step import take_step
from tests.memory.hand_written import CPU, hand_written_peak
from tests.shortened import shortened
from tests.support import build, settings, step_at

SIZE = 16
"""Samples of a micro-batch."""


def micro_batches(count: int, size: int = SIZE) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count * size, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (count * size,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))


def model_and_optimizer(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = CNN(input_shape=(3, 32, 32), num_classes=10)
    made: torch.optim.Optimizer
    if name == "sgd":
        made = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    else:
        made = torch.optim.AdamW(model.parameters(), fused=name == "fused adamw")
    return model, made


def our_peak(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: Sequence[Any],
    reduction: str = "global_mean",
    loss: CriterionLoss | None = None,
) -> tuple[int, dict[str, int]]:
    """Return the tracked peak of a window in bytes, and its parts."""
    loss = loss or CriterionLoss(nn.CrossEntropyLoss(), reduction)
    tracked = TensorMeter(model, optimizer, CPU)
    optimizer.zero_grad()
    with tracked:
        with tracked.phase(FORWARD_BACKWARD):
            accumulate_gradients(model, tracked.loss_fn(loss), window, reduction=reduction)  # type: ignore[arg-type]
        with tracked.phase(OPTIMIZER_STEP):
            optimizer.step()
    peak = tracked.peak()
    assert peak is not None
    return peak.bytes, peak.parts


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused adamw"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_peak_is_that_of_a_loop_which_keeps_nothing(count: int, optimizer: str) -> None:
    """Within 2 %: the loss that is reported has to lie somewhere."""
    window = micro_batches(count)
    model, made = model_and_optimizer(optimizer)
    our_peak(model, made, window)  # makes the optimizer's state
    by_hand = hand_written_peak(model, made, window, count * SIZE)
    assert our_peak(model, made, window)[0] <= 1.02 * by_hand


@pytest.mark.parametrize("count", shortened([1, 4], [4]))
@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_a_second_witness_saw_the_same_peak(name: str, count: int) -> None:
    """Every allocation of an operator, as torch's profiler records it: within 2 % without oneDNN."""
    torch.manual_seed(0)
    model = CNN(input_shape=(3, 32, 32), num_classes=10) if name == "cnn" else get_model(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loss = CriterionLoss(nn.CrossEntropyLoss())
    window = micro_batches(count)
    with one_dnn(False):
        our_peak(model, optimizer, window, loss=loss)
        tracked = our_peak(model, optimizer, window, loss=loss)[0]
        optimizer.zero_grad()
        before = TensorMeter(model, optimizer, CPU)
        followed = before.loss_fn(loss)  # copies its micro-batches, and is followed by nobody

        def step() -> None:
            accumulate_gradients(model, followed, window)
            optimizer.step()

        assert before.held_bytes + allocated_peak(step) == pytest.approx(tracked, rel=0.02)


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
def test_the_peak_does_not_grow_with_n(reduction: str) -> None:
    """Of micro-batches of one size: 64 of them hold what 2 hold, to a few bytes."""
    model, made = model_and_optimizer("sgd")
    our_peak(model, made, micro_batches(2))
    two, many = (our_peak(model, made, micro_batches(n), reduction)[0] for n in (2, 64))
    assert abs(many - two) <= 64


class Leaking(CriterionLoss):
    """Keeps something of every micro-batch."""

    def __init__(self, what: str) -> None:
        super().__init__(nn.CrossEntropyLoss())
        self.what, self.kept = what, list[Any]()

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        outputs = model(micro_batch[0])
        loss = nn.functional.cross_entropy(outputs, micro_batch[1], reduction="sum")
        self.kept.append({"graph": loss, "batch": micro_batch[0], "output": outputs.detach()}[self.what])
        return loss


@pytest.mark.parametrize("what", ["graph", "batch", "output"])
def test_the_measure_of_growth_sees_what_outlives_its_micro_batch(what: str) -> None:
    """A graph, a batch or an output that is kept: the check above would fail."""
    model, made = model_and_optimizer("sgd")
    our_peak(model, made, micro_batches(2))
    two, many = (our_peak(model, made, micro_batches(n), loss=Leaking(what))[0] for n in (2, 64))
    assert many - two > 64


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
@pytest.mark.parametrize("counted_late", [False, True])
def test_nothing_of_a_micro_batch_is_there_when_the_next_begins(
    reduction: str, counted_late: bool
) -> None:
    """Neither its graph, its copy on the device nor its outputs."""
    model, made = model_and_optimizer("sgd")
    tracked = TensorMeter(model, made, CPU)
    held: list[dict[str, int]] = []
    criterion = CriterionLoss(nn.CrossEntropyLoss(), reduction)

    def loss_fn(model: nn.Module, micro_batch: Any) -> Any:
        held.append(dict(tracked._tracker.held))
        return criterion(model, micro_batch)

    if not counted_late:
        loss_fn.count = criterion.count  # type: ignore[attr-defined]
    window = micro_batches(4)
    with tracked, tracked.phase(FORWARD_BACKWARD):
        accumulate_gradients(model, tracked.loss_fn(loss_fn), window, reduction=reduction)  # type: ignore[arg-type]
    one_batch = held[0][INPUTS]
    assert one_batch == SIZE * (3 * 32 * 32 * 4 + 8)
    for before in held:
        assert before[INPUTS] == one_batch
        assert before[ACTIVATIONS] <= 64


def test_a_training_step_holds_no_more_than_the_window_alone() -> None:
    """The step with everything around it: seeding, norm, clipping, schedule, metrics."""
    call = (
        *("model=cnn", "data=fake", "data.image_size=32", "data.size=64", "data.global_batch_size=64"),
        *("accum.steps=4", "runtime.device=cpu", "accum.max_grad_norm=1.0", "scheduler=cosine"),
    )
    experiment = build(settings(*call))
    window = next(experiment.windows_from(0))
    step_at(experiment, window, 0)
    by_hand = hand_written_peak(experiment.model, experiment.optimizer, window, 64)
    tracked = TensorMeter(experiment.modules, experiment.optimizer, CPU)
    watched = replace(experiment, loss_fn=tracked.loss_fn(experiment.loss_fn))
    with tracked:
        watched.global_step = 1
        take_step(watched, window, Hooks([MeterPhases(tracked)]))
    peak = tracked.peak()
    assert peak is not None
    assert peak.bytes <= 1.02 * by_hand
