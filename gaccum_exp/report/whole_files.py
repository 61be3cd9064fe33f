"""Files that are there whole, or not at all, also where their writing is broken off."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to be written, with the same suffix, which takes its place at the end.

    Where the writing is broken off, what was there before is there still; beside it only kill -9 leaves
    anything.
    """
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
