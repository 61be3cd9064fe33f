"""Is there memory for it? Asked before a pass is run, since running out would take the run down."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MARGIN = 0.8
"""What of the free memory an audit may take."""


class TooLargeError(RuntimeError):
    """An audit needs more memory than there is."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    told = "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
    return isinstance(error, (TooLargeError, torch.OutOfMemoryError, MemoryError)) or told


class Saved:
    """Bytes that autograd keeps for backward passes, beside the parameters; storages counted once."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def counted(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Count what the block's forward pass keeps."""
        seen = {p.untyped_storage().data_ptr() for p in parameters}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def needed_bytes(parameters: list[Tensor], saved: int, *, float64: bool, beside: int) -> int:
    """Return what one pass over all samples takes at its peak.

    Args:
        parameters: of the modules.
        saved: bytes that the forward passes of all micro-batches keep, together.
        float64: whether the pass runs in float64.
        beside: gradients that will be held beside the pass, in the same precision.
    """
    own = sum(p.nbytes for p in parameters)
    growth = 8 * sum(p.numel() for p in parameters) / own if float64 and own else 1.0
    return int(growth * ((2 + beside) * own + saved))  # copies of the weights, and their gradient


def free_bytes(device: torch.device) -> int | None:
    """Return the device's free memory, or None where that cannot be asked."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    return min((n for n in (_of_machine(), _of_group()) if n is not None), default=None)


def require(needed: int, device: torch.device, what: str) -> None:
    """Refuse a pass that does not fit.

    Raises:
        TooLargeError: with both numbers.
    """
    free = free_bytes(device)
    if free is not None and needed > MARGIN * free:
        gib = needed / 2**30, free / 2**30
        raise TooLargeError(f"{what} needs about {gib[0]:.2g} GiB on {device}, {gib[1]:.2g} are free")


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _of_group() -> int | None:
    """What is left of a container's limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return int(limit) - int(used) if limit.isdigit() else None
