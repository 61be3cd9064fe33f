"""The streams that a command speaks to, so that nothing it says can change how it ends.

A sign that the output's encoding lacks is written in another way; what cannot be written, to a disk that
is full or a reader that has left, is dropped.
"""

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gaccum_exp.errors import complain

_PLAIN = str.maketrans(
    {
        "×": "x", "·": "-", "–": "-", "…": "...", "µ": "u", "Σ": "Sum", "†": "+", "‡": "#", "✓": "y",
        "✗": "n", "√": "sqrt", "≤": "<=", "≥": ">=", "‖": "||", "─": "-", "━": "-", "│": "|", "→": "->",
        "≈": "~=", "∝": "~", "±": "+-",
    }
)  # fmt: skip
"""Signs that tables and sentences hold, as an encoding without them has them."""


def _written_plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    plain = error.object[error.start : error.end].translate(_PLAIN)
    return plain.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("gaccum_exp.plain", _written_plainly)


class _Outlet(io.FileIO):
    """A stream that takes everything, and remembers why it could not pass something on."""

    lost: OSError | None = None

    def write(self, data) -> int:  # type: ignore[no-untyped-def]  # any buffer, as the base
        size = memoryview(data).nbytes
        try:
            while (written := super().write(data)) is None:  # a pipe that is full and does not block
                select.select([], [self], [])
            return written
        except OSError as error:
            self.lost = self.lost or error
            return size


@contextmanager
def forgiving(*, says: bool = True) -> Iterator[None]:
    """Let both streams take everything meanwhile; `says` on stderr, at the end, that stdout did not."""
    _keep_numbers()
    before, outlets = (sys.stdout, sys.stderr), dict[str, _Outlet]()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # somebody else's, who reads what is said
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
        outlets[name] = _Outlet(number, "wb", closefd=False)
        lines = number == 2 or outlets[name].isatty()
        buffer = io.BufferedWriter(outlets[name])
        text = io.TextIOWrapper(buffer, encoding, "gaccum_exp.plain", line_buffering=lines)
        setattr(sys, name, text)
    try:
        yield
    finally:
        for name, outlet in outlets.items():
            getattr(sys, name).flush()
            # Of a reader that has left, as behind `| head`, nothing is said.
            lost = outlet.lost if says and name == "stdout" else None
            if lost is not None and lost.errno != errno.EPIPE:
                complain(
                    f"stdout cannot be written ({lost.strerror}): some of what was said is lost, but "
                    "nothing of what is recorded"
                )
        sys.stdout, sys.stderr = before


def _keep_numbers() -> None:
    """Open what is closed of the streams 0 to 2, whose number, and words, the next file would get."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the smallest number that is free
                os.set_inheritable(number, True)
