"""A model and a data set that do to their process what models and data sets do."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import Dataset, get_worker_info

from experiments.durability.witness import Linear, points


class SilentError(Exception):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class OddError(BaseException):
    """Is no `Exception`."""


class UnpicklableError(Exception):
    """Cannot be sent to another process."""

    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")


def _raise(error: BaseException) -> None:
    raise error


def _hang() -> None:
    time.sleep(3600)


FAULTS: dict[str, Callable[[], object]] = {
    "sys.exit(0)": lambda: sys.exit(0),
    "sys.exit(3)": lambda: sys.exit(3),
    "os._exit(0)": lambda: os._exit(0),
    "os._exit(3)": lambda: os._exit(3),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGABRT": os.abort,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "unencodable": lambda: _raise(RuntimeError("\udcff is no text")),
    "silent": lambda: _raise(SilentError()),
    "odd": lambda: _raise(OddError("no Exception")),
    "unpicklable": lambda: _raise(UnpicklableError("stays here")),
    "recursion": lambda: _raise(RecursionError("too deep")),
    "memory": lambda: _raise(MemoryError("of the host")),
    "thread": lambda: threading.Thread(target=_hang).start(),
    "atexit": lambda: atexit.register(_hang),
    "closed": lambda: [os.close(number) for number in (1, 2)],
    "elsewhere": lambda: os.chdir("/"),
    "no environment": lambda: os.environ.clear(),
    "fork": lambda: os.fork() or (time.sleep(20), os._exit(0)),
}
"""What happens, by name."""
HARMLESS = frozenset({"thread", "atexit", "closed", "elsewhere", "no environment", "fork"})
"""Those after which the arm's training goes on: it must finish, like all others."""


class Unruly(Linear):
    """Something happens in it, where and as often as it is told to.

    Args:
        fault: what; see `FAULTS`.
        place: build, window or evaluation.
        armed: whether it does; an arm's number, 1 alone does.
        pause_s: as `Linear` has it.
    """

    def __init__(self, fault: str, place: str = "window", armed: int = 1, pause_s: float = 0.0) -> None:
        super().__init__(pause_s)
        self.fault, self.place, self.armed = fault, place, armed == 1
        self.passes = 0
        if place == "build":
            self.happen()

    def happen(self) -> None:
        """Let it happen, once."""
        if self.armed:
            self.armed = False
            FAULTS[self.fault]()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> (batch, 1)."""
        if not isinstance(x, FakeTensor):
            # The first training passes are of probes and audits.
            self.passes += self.training and torch.is_grad_enabled()
            if self.passes >= 20 and self.place == ("window" if self.training else "evaluation"):
                self.happen()
        return super().forward(x)


class UnrulyPoints(Dataset[tuple[Tensor, Tensor]]):
    """Points of which one is trouble to fetch.

    Args:
        fault: see `FAULTS`.
        armed: as `Unruly` has it.
        in_worker: only in a process that loads data.
        samples: how many.
    """

    def __init__(self, fault: str, armed: int = 1, in_worker: bool = True, samples: int = 512) -> None:
        self.points, self.fault, self.armed = points(samples), fault, armed == 1
        self.in_worker, self.fetched = in_worker, 0

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fetched += 1
        inside = (get_worker_info() is not None) == self.in_worker
        if self.armed and inside and self.fetched >= 40:
            self.armed = False
            FAULTS[self.fault]()
        return self.points[index]
