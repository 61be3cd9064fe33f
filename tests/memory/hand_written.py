"""Accumulation as a careful person writes it down: it keeps nothing beyond a micro-batch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.memory.storages import GRADIENTS, INPUTS, OPTIMIZER_STATE, PARAMETERS, StorageTracker

CPU = torch.device("cpu")


def hand_written_peak(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    samples: int,
) -> int:
    """Return the tracked peak of one window of a hand-written loop, in bytes."""
    tracker = StorageTracker(CPU)
    tracker.assign([*model.parameters(), *model.buffers()], PARAMETERS)
    state = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
    tracker.assign(state, OPTIMIZER_STATE)
    tracker.assign((p.grad for p in model.parameters() if p.grad is not None), GRADIENTS)
    with tracker:
        optimizer.zero_grad()
        tracker.reset_peak()
        for inputs, targets in micro_batches:
            one_pass(model, inputs.clone(), targets.clone(), samples, tracker)
        optimizer.step()
    return tracker.peak


def one_pass(
    model: nn.Module, inputs: Tensor, targets: Tensor, samples: int, tracker: StorageTracker
) -> None:
    """Forward and backward of one micro-batch, nothing of which is left at the end."""
    tracker.assign([inputs, targets], INPUTS)
    (F.cross_entropy(model(inputs), targets, reduction="sum") / samples).backward()
