"""Packages that are not there for a while, as where an extra is not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def unimportable(package: str) -> Iterator[None]:
    """Have `import package` fail as if it had never been installed, whatever has imported it before."""
    hidden = {name: None for name in sys.modules if name.partition(".")[0] == package}
    with patch.dict(sys.modules, {**hidden, package: None}):
        yield
