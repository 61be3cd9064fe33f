"""What an error of a store means: is it away, is a record refused, has the user to mend something.

MLflow turns most errors of connections and databases into one class, so their texts have to be read. In
doubt a store that is opened has to be mended, since the user looks on, and a store that is written to is
away, since a record that is kept for later is not lost.
"""

import re

AWAY = re.compile(
    r"timed? ?out|timeout|connection (?:refused|reset|aborted|broken)|incomplete ?read|badstatusline"
    r"|name ?resolution|could not translate host name|unreachable|no route to host|connect to proxy"
    r"|too many \d+ error responses|error code (?:429|5\d\d)"
    r"|database is locked|disk i/o error|disk is full|no space left|disk quota"
    r"|is starting up|is shutting down|too many (?:clients|connections)|connection slots"
    r"|can't connect|lost connection|closed the connection|terminating connection|eof occurred",
    re.IGNORECASE,
)
"""Says that whatever was asked for may be had later."""
CLASH = re.compile(
    r"unique ?constraint|uniqueviolation|duplicate (?:key|entry)|already exists|deadlock"
    r"|could not serialize",
    re.IGNORECASE,
)
"""Says that somebody else was quicker: what is asked for again at once is taken."""
TOO_MUCH = re.compile(
    r"error code (?:413|414)|dataerror|outofrange|truncation|too large to", re.IGNORECASE
)
REFUSING_CODES = {
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "NOT_IMPLEMENTED"),
    *("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "NOT_FOUND"),
}
"""Of MLflow's own answers, those that are about what it was given."""
GONE = re.compile(r"\brun\b.* not found|no run with", re.IGNORECASE)
"""Says that a run is not there, in an answer with the code RESOURCE_DOES_NOT_EXIST."""
DELETED = re.compile(r"(run|experiment) .*must be in the 'active' state", re.IGNORECASE)
"""Says that the user has deleted what a record is of; it can be restored."""
REFUSING_STATUSES = {400, 413, 414, 422}
"""Of an answer to an upload, which need not come from MLflow."""


def says_away(error: BaseException) -> bool:
    """Return whether an error in opening a store says that it may be there later."""
    return bool(AWAY.search(_texts(error)))


def says_clash(error: BaseException) -> bool:
    """Return whether a call has failed only because another process made the same entry meanwhile."""
    return bool(CLASH.search(str(error)))


def says_refused(error: BaseException) -> bool:
    """Return whether an error in writing says that this record will never be taken."""
    text = str(error)
    response = getattr(error, "response", None)  # of an upload
    if response is not None:
        return response.status_code in REFUSING_STATUSES
    if TOO_MUCH.search(text):
        return True
    code = getattr(error, "error_code", None)
    if (
        code is None
    ):  # none of MLflow's: a value of the wrong kind, as against whatever a connection raises
        return isinstance(error, (TypeError, ValueError)) and not isinstance(error, OSError)
    # What a proxy answers, or a database that is damaged, is not about the record.
    foreign = "failed with error code" in text or re.match(r"\((?:\w+\.)+\w+\)", text)
    return code in REFUSING_CODES and not foreign


def says_gone(error: BaseException) -> bool:
    """Return whether an error in writing says that the store has no such run."""
    code = getattr(error, "error_code", None)
    return code == "RESOURCE_DOES_NOT_EXIST" and bool(GONE.search(str(error)))


def what_is_deleted(error: BaseException) -> str | None:
    """Return "run" or "experiment" where an error says that the user has deleted it; else None."""
    found = DELETED.search(str(error))
    return None if found is None else found[1].lower()


def _texts(error: BaseException | None) -> str:
    """Return the messages of an error and of those that caused it."""
    texts: list[str] = []
    while error is not None and len(texts) < 10:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
