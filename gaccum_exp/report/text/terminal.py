"""What is printed on a terminal: the console, and how all tables look."""

import sys
from typing import Any, TextIO

from rich import box
from rich.console import Console

LOOK: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False}
LOOK |= {"header_style": "bold", "caption_justify": "left"}


def console(to: TextIO | None = None) -> Console:
    """Return a console as wide as the terminal; 100 columns where there is none.

    Args:
        to: where it writes, as plain text even in a notebook; None: stdout.
    """
    if to is not None:
        return Console(file=to, width=100, force_jupyter=False, color_system=None)
    there = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=None if there else 100)
