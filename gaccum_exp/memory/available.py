"""Free memory, and what a pass needs of it: asked before the pass, since running out ends the run."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gaccum_exp.errors import text_of

log = logging.getLogger(__name__)
LARGE = 0.25
"""The part of the free memory above which an audit says beforehand what it needs."""
MARGIN = 0.8
"""The part of the free memory that an audit may take."""
HEADROOM = 0.9  # operators need workspace besides
"""The share of the free memory that a window may hold where no budget is given."""


class TooLargeError(RuntimeError):
    """An audit needs more memory than there is."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    message = text_of(error)
    worded = "can't allocate memory" in message or "out of memory" in message.lower()
    return isinstance(error, (TooLargeError, torch.OutOfMemoryError, MemoryError)) or worded


class SavedForBackward:
    """Bytes that autograd saves for backward passes, without the parameters; storages counted once."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def counted(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Count what the block's forward pass saves."""
        seen = {p.untyped_storage().data_ptr() for p in parameters}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def needed_bytes(parameters: list[Tensor], saved: int, *, float64: bool, held: int) -> int:
    """Return the peak of one pass over all samples, in float64 or the parameters' own precision.

    saved: bytes that all its forward passes save together; held: gradients that are kept meanwhile.
    """
    own = sum(p.nbytes for p in parameters)
    growth = 8 * sum(p.numel() for p in parameters) / own if float64 and own else 1.0
    return int(growth * ((2 + held) * own + saved))  # copies of the weights, and their gradient


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of the device, on a CPU within the container's limit; None: unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with suppress(OSError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        found += [int(limit) - int(used)] if limit.isdigit() else []
    return min(found, default=None)


def announce(needed: int, device: torch.device, what: str) -> None:
    """Say what is about to be needed, if that is much; warn where it is a large part of what is free."""
    free, gib = free_bytes(device), needed / 2**30
    large = free is not None and needed > LARGE * free
    level = logging.WARNING if large else logging.INFO if gib >= 1 else logging.DEBUG
    said = "" if free is None else f", {free / 2**30:.2g} GiB are free"
    log.log(level, "%s needs about %.2g GiB on %s%s", what, gib, device, said)


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Raise `TooLargeError`, with what is needed and what is free, where a pass does not fit."""
    free = free_bytes(device)
    if free is not None and needed > MARGIN * free:
        gib = needed / 2**30, free / 2**30
        raise TooLargeError(f"{what} needs about {gib[0]:.2g} GiB on {device}, {gib[1]:.2g} are free")
