"""Errors that the user can mend, as against faults of the program."""

import difflib
import re
from collections.abc import Iterable

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


def text_of(error: BaseException) -> str:
    """Return an error's message as text that can be written anywhere, whatever its class makes of it."""
    try:
        text = str(error)
    except Exception as failed:
        text = f"its message cannot be read ({type(failed).__name__})"
    return text.encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    lines = text_of(error).splitlines()
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def hide_passwords(text: str) -> str:
    """Return a text without the passwords that addresses of servers and databases in it hold."""
    for pattern in _PASSWORDS:
        text = pattern.sub(r"\g<before>…", text)
    return text
