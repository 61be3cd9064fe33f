"""Where in the user's own source something was called: `train.py:41`."""

import functools
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from gaccum_exp.audit.watch.scalars import calling_frame

OURS = str(Path(__file__).resolve().parents[2])
INSTALLED = ("site-packages", "dist-packages")
"""Folders of what somebody has installed, and did not write."""
MOST = 2
"""Lines that are named of one call, at most."""


class Place(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        """Return it as from the working directory, or without its folder where that is elsewhere."""
        path = os.path.relpath(self.file)
        return f"{os.path.basename(path) if path.startswith(os.pardir) else path}:{self.line}"


def place_of(frame: FrameType | None) -> Place | None:
    """Return the innermost line of the user's own from a frame on outwards; None: there is none."""
    while frame is not None:
        if _users_own(frame.f_code.co_filename):
            return Place(os.path.abspath(frame.f_code.co_filename), frame.f_lineno)
        frame = frame.f_back
    return None


def place_of_call() -> Place | None:
    """Return the user's line that the call which runs now comes from."""
    return place_of(calling_frame())


@functools.lru_cache(maxsize=4096)
def _users_own(file: str) -> bool:
    if not os.path.isfile(file):  # a cell, or what was generated
        return False
    path = os.path.realpath(file)
    library = os.path.realpath(sysconfig.get_path("stdlib"))
    return not (path.startswith((library + os.sep, OURS + os.sep)) or {*Path(path).parts} & {*INSTALLED})


@dataclass(slots=True)
class Places:
    """The lines from which a window's calls came, by what is called."""

    lines: dict[str, dict[Place, None]] = field(default_factory=dict)

    def note(self, what: str, place: Place | None = None) -> None:
        """Note the line that a call comes from, now or from a `place`."""
        place = place or place_of_call()
        if place is not None:
            self.lines.setdefault(what, {})[place] = None

    def line(self, *what: str) -> str:
        """Return `train.py:41` for the first of these calls of which a line is known, else nothing.

        Where passes and step come from one line, the loop is a framework's, and the line tells nothing.
        """
        if self.lines.get("backward") == self.lines.get("step"):
            return ""
        return said(next((self.lines[each] for each in what if each in self.lines), {}))

    def at(self, *what: str) -> str:
        """Return the same in brackets, to stand behind the words for it: ` (train.py:41)`."""
        line = self.line(*what)
        return f" ({line})" if line else ""


def said(places: Iterable[Place]) -> str:
    """Return some lines in words."""
    named = list(map(str, places))
    return " and ".join(named) if len(named) <= MOST else f"{named[0]} and elsewhere"
