"""Errors that the user can mend, as against faults of the program, and how they are said: in a line."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

LONGEST = 600
"""Characters of a line; a longer one loses its middle."""
_IN_A_WORKER = re.compile(r"Caught \S+ in .*\.\nOriginal Traceback \(most recent call last\):\n")

_PASSWORDS = (
    # Of a server, whatever stands before it: a token takes the place of the user.
    re.compile(r"(?P<before>\bhttps?://)[^\s/?#]+(?=@)", re.IGNORECASE),
    # Of a database as SQLAlchemy reads it: a user's name ends at the first colon, the password at an @.
    re.compile(r"(?P<before>\b(?!https?:)[\w+.-]+://[^\s:/]*:)[^\s@]+(?=@)", re.IGNORECASE),
    # One that should have been quoted, to the last @. What begins with a port is none:
    # `http://host:5000/a@b`.
    re.compile(r"(?P<before>\b[\w+.-]+://[^\s/?#@:]*:)(?!\d+[/?#])(?:(?!://).)+(?=@)"),
    # Among the options, also of a driver that gets them in one.
    re.compile(
        r"(?P<before>[?&](?:pass|\w*(?:passw|passphrase|pwd|token|secret)\w*)=)[^\s&'\"]+", re.IGNORECASE
    ),
    re.compile(r"(?P<before>odbc_connect=\S*?(?:password|pwd)(?:=|%3D))[^\s&;%]+", re.IGNORECASE),
)


class BadInputError(ValueError):
    """The configuration or the input cannot be used; the message is one line for the user."""


class TrackingError(RuntimeError):
    """A record of a run could not be written, or not be read."""


class StoreAwayError(TrackingError):
    """The store does not answer, or not now; the same call may succeed later."""


class RecordRefusedError(TrackingError):
    """The store has answered that it will never take a record; what else came with it is stored."""


class RunGoneError(RecordRefusedError):
    """The store knows nothing of the run that a record is of."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the known word nearest to `word`, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""


def number_of_gib(text: str) -> str | None:
    """Return `500MiB is 0.488` for an amount with its unit, where a number of GiB is asked for."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGT])(i?)(B?)", text.strip(), re.IGNORECASE)
    if found is None or found[1].count(".") > 1 or found[1] == ".":
        return None
    power = "KMGT".index(found[2].upper()) + 1
    amount = float(found[1]) * (1024**power if found[3] or not found[4] else 1000**power)
    return f"{text} is {amount / 1024**3:.3g}"


class Arguments(argparse.ArgumentParser):
    """A parser of words that raises what is wrong with them, instead of printing a page and ending."""

    def error(self, message: str) -> NoReturn:
        """Raise `BadInputError`."""
        raise BadInputError(f"{message} ({self.prog} --help)")


def text_of(error: BaseException) -> str:
    """Return an error's message as text that can be written anywhere, whatever its class makes of it.

    Of an error in a data worker it is the worker's own, without the traceback that torch puts before it.
    """
    try:
        text = str(error)
    except Exception as failed:
        text = f"its message cannot be read ({type(failed).__name__})"
    text = text.encode("utf-8", "backslashreplace").decode()
    return _of_the_worker(text) if _IN_A_WORKER.match(text) else text


def _of_the_worker(text: str) -> str:
    """Return what stands behind the last traceback of a text, without the name of the error's class."""
    lines = text.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    said = next((n for n, line in enumerate(lines) if line.strip() and not line[0].isspace()), None)
    if said is None:
        return text
    return "\n".join([lines[said].partition(": ")[2], *lines[said + 1 :]])


def printable(text: str) -> str:
    """Return a text with escapes in place of what cannot be seen: `\\n` of a line's end."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_a_line(text: str) -> str:
    """Return a text as one line that can be printed, a very long one without its middle."""
    shown = printable(" ".join(text.split()))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 200]} … {shown[-200:]}"


def complain(text: object, program: str = "gaccum_exp") -> None:
    """Say on stderr, in a line and without passwords, what is wrong."""
    with suppress(OSError, ValueError):
        print(f"{program}: {hide_passwords(in_a_line(str(text)))}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    lines = text_of(error).splitlines()
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def hide_passwords(text: str) -> str:
    """Return a text without the passwords that addresses of servers and databases in it hold."""
    for pattern in _PASSWORDS:
        text = pattern.sub(r"\g<before>…", text)
    return text


@contextmanager
def with_extra(who: str, package: str, extra: str) -> Iterator[None]:
    """Say which extra brings a package that is imported inside.

    Raises:
        BadInputError: it is not installed, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == package:
            said = f"needs {package}: pip install 'gaccum_exp[{extra}]'"
        else:  # it is there, and what it needs is not
            why = first_line(error)
            said = f"{package} cannot be imported ({why}): pip install -U 'gaccum_exp[{extra}]'"
        raise BadInputError(f"{who}: {said}") from None
