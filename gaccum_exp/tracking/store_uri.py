"""Where runs are recorded, as a user says it: the address of a store, and the name of an experiment."""

import re
from urllib.parse import parse_qsl, urlsplit

from gaccum_exp.errors import BadInputError

SECRETS = re.compile(r"pass(?:word|wd|phrase)?|pwd|token|secret", re.IGNORECASE)
"""Names of what is secret in a URI's query."""


def has_password(uri: str) -> bool:
    """Return whether a URI holds a password, before its host or in its query."""
    before_host, at, _ = uri.partition("://")[2].partition("/")[0].rpartition("@")
    query = uri.partition("?")[2]
    return bool(at and ":" in before_host) or any(
        SECRETS.search(key) and value for key, value in parse_qsl(query)
    )


def refuse_password(uri: str) -> None:
    """Raise `BadInputError` where a URI holds a password; the message does not repeat it."""
    if not has_password(uri):
        return
    scheme = urlsplit(uri).scheme
    raise BadInputError(f"tracking.uri: a password in {scheme}://…")
