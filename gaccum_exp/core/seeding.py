"""Seeds: random streams that do not depend on how a window is split.

Every draw of a run is keyed by its purpose and its position (the epoch's order, the step's dropout, the
augmentation of the j-th sample of window k), never by how many draws came before it. So arms with
different N, reduction or number of workers see the same samples, the same initial weights and the same
augmentation.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Derive a 63-bit seed for one purpose at one position from a run's seed."""
    # A hash and not a sum, so that (seed 0, step 1) and (seed 1, step 0) share nothing.
    key = f"{seed}/{purpose}/" + "/".join(map(str, position))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def seed_host(seed: int) -> None:
    """Seed the generators of the host: torch's for the CPU, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_model(seed: int, device: torch.device) -> None:
    """Seed torch's generators that a forward pass draws from: the CPU's and the device's."""
    # Cheaper than `torch.manual_seed`, which visits every backend; this runs in every window.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state of torch, Python and NumPy at the end."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def random_states() -> list[Any]:
    """Return the state of every generator that a model may draw from."""
    devices = [torch.get_device_module(a).get_rng_state_all() for a in _accelerators()]
    return [torch.get_rng_state(), random.getstate(), np.random.get_state(), devices]


def set_random_states(states: list[Any]) -> None:
    """Set every generator back."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    for accelerator, saved in zip(_accelerators(), states[3], strict=True):
        torch.get_device_module(accelerator).set_rng_state_all(saved)


def drawn_since(seed: int) -> bool:
    """Whether anything was drawn from the host's generators since `seed_host(seed)`."""
    now = random_states()
    seed_host(seed)
    seeded = random_states()
    set_random_states(now)
    return not same_states(now, seeded)


def same_states(one: list[Any], other: list[Any]) -> bool:
    """Whether every generator stands where it stood."""
    torch_alike = all(map(torch.equal, *(tree_leaves([s[0], s[3]]) for s in (one, other))))
    return torch_alike and same_host_state(one, other)


def same_host_state(one: list[Any], other: list[Any]) -> bool:
    """Whether Python's and NumPy's generators stand where they stood."""
    numpy_alike = all(np.array_equal(a, b) for a, b in zip(one[2], other[2], strict=True))
    return bool(one[1] == other[1] and numpy_alike)


def _accelerators() -> list[torch.device]:
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [here] if here is not None and here.type == "cuda" else []
