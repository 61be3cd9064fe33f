"""The peak of one window, measured while it trains.

Two sources, never mixed in a ratio. `tracker` follows every tensor's storage (torch's MemTracker) and
says what the bytes are; it works on a CPU, where no allocator keeps count, and leaves the window's
result unchanged, but slows it down many times. `allocator` is an accelerator's own peak counter, which
also sees workspace inside operators.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_leaves, tree_map_only

from gaccum_exp.core.denominator import Denominator
from gaccum_exp.core.loss import LossFn, count

FORWARD_BACKWARD = "forward/backward"
OPTIMIZER_STEP = "optimizer step"
CATEGORIES = ("parameters", "gradients", "optimizer_state", "activations", "temporaries")


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that one window held at once."""

    bytes: int
    phase: str
    """When: `forward/backward` or `optimizer step`."""
    parts: dict[str, int]
    """Bytes by category at that moment; empty where the source does not tell."""


class _PhaseWatch:
    """Remembers in which phase of the step the peak rose last, and which phases were begun."""

    def __init__(self, read_peak: Callable[[], int]) -> None:
        self._read_peak = read_peak
        self._highest = 0
        self.highest_in = FORWARD_BACKWARD
        self.begun: set[str] = set()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.begun.add(phase)
        yield
        peak = self._read_peak()
        if peak > self._highest:
            self._highest, self.highest_in = peak, phase


class _NoHook:
    """Stands in for the hook that a parameter without gradient cannot have."""

    def remove(self) -> None:
        """Nothing to remove."""


class _Tracker(MemTracker):  # type: ignore[no-untyped-call]  # torch's metaclass
    """torch's tracker, for models that it refuses: with frozen parameters, or called several times.

    It hooks every parameter's gradient, and takes a second forward pass of a module before its backward
    pass for an error; here a module's statistics begin anew with every pass.
    """

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        for parameter in module.parameters():
            if not parameter.requires_grad:
                self._param_to_grad_hook_handles[parameter] = (_NoHook(), _NoHook())
        return super()._track_module_params_and_buffers(module, install_grad_hooks)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if not self._mod_tracker.is_bw:
            self.memory_tracking.pop(module, None)  # type: ignore[no-untyped-call]  # torch's own
        super()._pre_fw_hook(module, inputs)

    def _update_and_maybe_create_winfos(self, t: Any, *args: Any, **kwargs: Any) -> set[Any]:
        # A gradient that a hook before the tracker's own has taken away, as float32 buffers do.
        return set() if t is None else super()._update_and_maybe_create_winfos(t, *args, **kwargs)


class TrackedWindow:
    """Follows one window's tensors.

        tracked = TrackedWindow(model, optimizer, device)
        with tracked:
            with tracked.phase("forward/backward"):
                accumulate_gradients(model, tracked.loss_fn(loss_fn), window)
            with tracked.phase("optimizer step"):
                optimizer.step()
        tracked.peak()

    Parameters, gradients and optimizer state count if they are on `device`, wherever they were made;
    everything else counts if it is made inside. Micro-batches are copied to the device one at a time, on
    a CPU as well, where they stand for the copies that an accelerator would hold; they are counted as
    activations. Buffers are counted as parameters.
    """

    def __init__(
        self, modules: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._device = device
        self._optimizer = optimizer
        self._tracker = _Tracker()
        self._tracker.track_external(modules, optimizer)
        self.phase = _PhaseWatch(lambda: self._snapshot().get("Total", 0))

    def __enter__(self) -> "TrackedWindow":
        self._tracker.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._tracker.__exit__(*args)

    def loss_fn(self, loss_fn: LossFn) -> LossFn:
        """Return the loss function with its micro-batch's own copy tracked, pass by pass."""
        return _CopyingLoss(loss_fn)

    def peak(self) -> Peak:
        """Return the peak since entering.

        Under `accum.buffer_dtype=float32` the buffers are temporaries: the tracker knows as gradients
        what `.grad` holds, and there is nothing in it while they fill.
        """
        snapshot = self._snapshot()
        kind = {key: snapshot.get(key, 0) for key in ("Parameter", "Buffer", "Gradient", "Activation")}
        # What the optimizer allocates in its step is filed under its state; only what it keeps is state.
        in_optimizer = snapshot.get("Optstate", 0)
        state = min(in_optimizer, _state_bytes(self._optimizer, self._device))
        parts = {
            "parameters": kind["Parameter"] + kind["Buffer"],
            "gradients": kind["Gradient"],
            "optimizer_state": state,
            "activations": kind["Activation"],
        }
        parts["temporaries"] = snapshot.get("Total", 0) - sum(parts.values())
        return Peak(snapshot.get("Total", 0), self.phase.highest_in, parts)

    def _snapshot(self) -> dict[str, int]:
        snapshots = self._tracker.get_tracker_snapshot("peak")
        on_device = next((s for d, s in snapshots.items() if d.type == self._device.type), {})
        return {getattr(key, "value", key): size for key, size in on_device.items()}


class _CopyingLoss:
    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn

    def count(self, micro_batch: Any) -> Denominator | None:
        return count(self._loss_fn, micro_batch)

    def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, Denominator]:
        return self._loss_fn(model, tree_map_only(Tensor, torch.clone, micro_batch))


class AllocatedWindow:
    """Reads the accelerator's own counters around one window; used as TrackedWindow is."""

    def __init__(
        self, modules: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._device = device
        self.phase = _PhaseWatch(self._read)

    def __enter__(self) -> "AllocatedWindow":
        torch.accelerator.synchronize(self._device)
        torch.accelerator.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *args: Any) -> None:
        torch.accelerator.synchronize(self._device)

    def loss_fn(self, loss_fn: LossFn) -> LossFn:
        """Return it as it is: the counters see everything."""
        return loss_fn

    def peak(self) -> Peak:
        """Return the peak since entering."""
        return Peak(self._read(), self.phase.highest_in, {})

    def _read(self) -> int:
        return torch.accelerator.max_memory_allocated(self._device)


Meter = TrackedWindow | AllocatedWindow


def has_counters(device: torch.device) -> bool:
    """Whether the device counts its own peak."""
    if device.type == "cpu":
        return False
    try:
        torch.accelerator.max_memory_allocated(device)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _state_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    tensors = (t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor))
    return sum(t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type)
