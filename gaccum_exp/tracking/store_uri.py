"""Where runs are recorded, as the user says it: the address of a store, and the name of an experiment.

Both may come from MLflow's own environment variables. A password has no place in an address, which is
recorded with every run and shown: the programs that connect have variables and files for it.
"""

import os
import re
from urllib.parse import urlsplit

from gaccum_exp.errors import BadInputError, hide_passwords

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
IN_MEMORY = re.compile(r"sqlite(\+\w+)?:/*(:memory:|file::memory:|file:.*mode=memory|\?|$)")
DEFAULT_URI, DEFAULT_EXPERIMENT = "sqlite:///mlflow.db", "gaccum_exp"


def tracking_uri(given: object = None, source: str = "tracking.uri") -> str:
    """Return the address of the store: as given, else from the environment, else a file.

    Args:
        given: None where the configuration says nothing.
        source: what to name where a password is refused.

    Raises:
        BadInputError: there is a password in it, which the message does not repeat; or it is of a
            database in memory.
    """
    if not given and (given := os.environ.get(URI)):
        source = URI
    uri = str(given or DEFAULT_URI)
    refuse_password(uri, source)
    if IN_MEMORY.match(uri):
        raise BadInputError(
            f"{source}={uri}: a database in memory ends with its process; give a file ({DEFAULT_URI})"
        )
    return uri


def absolute(uri: str, folder: str) -> str:
    """Return an address with the file of a SQLite store from the root on, not from a folder."""
    kind, separator, path = uri.partition(":///")
    relative = kind.startswith("sqlite") and path and not path.startswith(("/", ":memory:", "file:"))
    return f"{kind}{separator}{os.path.normpath(os.path.join(folder, path))}" if relative else uri


def is_file(uri: str) -> bool:
    """Whether a store is a file, or files, of this machine."""
    return uri.startswith(("sqlite", "file:")) or "://" not in uri


def experiment_name(given: object = None) -> str:
    """Return the name of the experiment: as given, else from the environment, else the program's."""
    return str(given or os.environ.get(EXPERIMENT) or DEFAULT_EXPERIMENT)


def refuse_password(uri: str, source: str = "tracking.uri") -> None:
    """Raise `BadInputError` where an address holds a password or a token; say where that belongs."""
    if hide_passwords(uri) == uri:
        return
    scheme = urlsplit(uri).scheme.partition("+")[0]
    served = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    instead = {
        "http": served,
        "https": served,
        "postgresql": "set PGPASSWORD, or write it to ~/.pgpass",
        "mysql": "write it to ~/.my.cnf, and ?read_default_file=~/.my.cnf behind the address",
    }
    advice = instead.get(scheme, "give it to the driver in another way")
    raise BadInputError(
        f"{source}: an address with a password or a token would be recorded with every run; {advice}"
    )
