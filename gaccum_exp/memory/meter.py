"""Measure the peak memory of one window while it trains.

Two sources, never mixed in a ratio. `tracker` follows every tensor's storage (`memory/storages.py`) and
tells what the bytes are for; it works on a CPU, where no allocator keeps count, and leaves the window's
result unchanged, but slows it down. `allocator` is an accelerator's own peak counter, which also sees
workspace inside operators, and what rounding and fragmentation cost.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gaccum_exp.core.losses.placement import Placed, on_device
from gaccum_exp.core.losses.protocol import Counts, LossFn, LossWrapper, count
from gaccum_exp.memory.storages import (
    GRADIENTS,
    INPUTS,
    OPTIMIZER_STATE,
    PARAMETERS,
    TEMPORARIES,
    StorageTracker,
)

FORWARD_BACKWARD = "forward/backward"
OPTIMIZER_STEP = "optimizer step"


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that one window, or one phase of it, held at once."""

    bytes: int
    phase: str
    """When: `forward/backward` or `optimizer step`."""
    parts: dict[str, int]
    """Bytes by category at that moment; empty where the source does not tell."""
    counters: dict[str, int] = field(default_factory=dict)
    """The allocator's own counters, by name, in bytes."""


class Meter:
    """Measure the peak of one window, phase by phase."""

    def __init__(
        self, modules: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._device = device
        self._optimizer = optimizer
        self.peaks: dict[str, Peak] = {}
        """Of each phase that has ended, by its name."""
        self.begun: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Measure no longer."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure a block as a phase of its own."""
        raise NotImplementedError

    def loss_fn(self, loss_fn: LossFn) -> LossFn:
        """Return what is to be called in place of the loss function."""
        return loss_fn

    def peak(self) -> Peak | None:
        """Return the window's peak, that of its highest phase; None where none has ended."""
        return highest(self.peaks)


class Unmetered(Meter):
    """Measure nothing, where a window is timed."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Enter a block without measuring it."""
        return nullcontext()


class TensorMeter(Meter):
    """Follow one window's tensors.

        meter = TensorMeter(model, optimizer, device)
        with meter:
            with meter.phase("forward/backward"):
                accumulate_gradients(model, meter.loss_fn(loss_fn), window)
            with meter.phase("optimizer step"):
                optimizer.step()
        meter.peak()

    Parameters, gradients and optimizer state count if they are on `device`, all else if it is made
    inside. Micro-batches are copied to the device one at a time, on a CPU as well, where they stand for
    the copies that an accelerator would hold; these are the inputs. Buffers are counted as parameters.

    Args:
        modules: the model, and the criterion where it is a module.
        optimizer: of their parameters.
        device: whose memory it is.
        budget_bytes: beyond which the window ends with a `BudgetExceededError`; None: no limit.
    """

    def __init__(
        self,
        modules: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        budget_bytes: int | None = None,
    ) -> None:
        super().__init__(modules, optimizer, device)
        self._parameters = list(modules.parameters())
        self._tracker = StorageTracker(device, budget_bytes)
        self._tracker.assign([*self._parameters, *modules.buffers()], PARAMETERS)
        self._tracker.assign((p.grad for p in self._parameters if p.grad is not None), GRADIENTS)
        self._tracker.assign(_state(optimizer), OPTIMIZER_STATE)

    def __enter__(self) -> Self:
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._assign_gradient)  # type: ignore[no-untyped-call]  # torch's
            for parameter in self._parameters
            if parameter.requires_grad
        ]
        self._tracker.__enter__()  # type: ignore[no-untyped-call]  # torch's own
        return self

    def __exit__(self, *error: Any) -> None:
        self._tracker.__exit__(*error)  # type: ignore[no-untyped-call]  # torch's own
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block as a phase of its own."""
        self.begun.add(name)
        tracker = self._tracker
        tracker.reset_peak()
        kept = tracker.held[OPTIMIZER_STATE]
        yield
        parts = dict(tracker.at_peak)
        # State that this step has made was among its temporaries when it was made.
        tracker.assign(_state(self._optimizer), OPTIMIZER_STATE)
        made = min(tracker.held[OPTIMIZER_STATE] - kept, parts[TEMPORARIES])
        parts[OPTIMIZER_STATE] += made
        parts[TEMPORARIES] -= made
        self.peaks[name] = Peak(tracker.peak, name, parts)

    @property
    def held_bytes(self) -> int:
        """What is held now."""
        return self._tracker.total

    def loss_fn(self, loss_fn: LossFn) -> LossFn:
        """Return the loss function with its micro-batch's own copy followed, pass by pass."""
        return _Followed(loss_fn, self._tracker)

    def _assign_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # a hook before this one may have taken it away
            self._tracker.assign([parameter.grad], GRADIENTS)


class _Followed(LossWrapper):
    """Places micro-batches as the loss function would, and counts the copies as inputs."""

    def __init__(self, loss_fn: LossFn, tracker: StorageTracker) -> None:
        super().__init__(on_device(loss_fn))
        self._from_host, self._tracker = loss_fn, tracker
        self._placement = loss_fn.placement if isinstance(loss_fn, Placed) else None

    def count(self, micro_batch: Any) -> Counts | None:
        self._tracker.paused = True  # the window itself is nobody's memory here, and is only looked at
        try:
            return count(self._from_host, micro_batch)
        finally:
            self._tracker.paused = False

    @contextmanager
    def around(self, micro_batch: Any) -> Iterator[Any]:
        # What an earlier backward pass has left behind are gradients, in whatever buffers they are kept.
        self._tracker.reassign(TEMPORARIES, GRADIENTS)
        placed = micro_batch if self._placement is None else self._placement.place(micro_batch)
        host = {id(leaf) for leaf in tree_leaves(micro_batch)}
        here = tree_map_only(Tensor, lambda t: t.clone() if id(t) in host else t, placed)
        self._tracker.assign((t for t in tree_leaves(here) if isinstance(t, Tensor)), INPUTS)
        self._tracker.in_forward = True
        try:
            yield here
        finally:
            self._tracker.in_forward = False


class AllocatorMeter(Meter):
    """Read the accelerator's own counters around one window."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block as a phase of its own."""
        self.begun.add(name)
        torch.accelerator.synchronize(self._device)
        torch.accelerator.reset_peak_memory_stats(self._device)
        yield
        torch.accelerator.synchronize(self._device)
        peak = torch.accelerator.max_memory_allocated(self._device)
        # `requested` is what tensors asked for, `allocated` that with every block rounded up, `reserved`
        # what was taken from the device: the rest is fragmentation, or kept for later.
        stats = torch.accelerator.memory_stats(self._device)
        names = ("requested", "allocated", "reserved")
        peaks = {name: stats.get(f"{name}_bytes.all.peak") for name in names}
        counters = {f"allocator_{name}": int(size) for name, size in peaks.items() if size}
        self.peaks[name] = Peak(peak, name, {}, counters)


def highest(peaks: Mapping[str, Peak]) -> Peak | None:
    """Return the peak of the phase that holds most."""
    return max(peaks.values(), key=lambda peak: peak.bytes, default=None)


def has_counters(device: torch.device) -> bool:
    """Whether the device counts its own peak."""
    if device.type == "cpu":
        return False
    try:
        torch.accelerator.max_memory_allocated(device)
    except RuntimeError:  # or NotImplementedError
        return False
    return True


def resident_set_bytes() -> int | None:
    """Return the memory of this process that is in RAM, code and libraries included; None: unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), None)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)]
