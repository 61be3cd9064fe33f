"""The window that the audit of a run has judged, read from the run's files."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from gaccum_exp.audit.audited_window import WINDOW_FILE, AuditedWindow, read_window

Fetch = Callable[[str, str, str], str | None]
"""Brings a run's file, by id and name, into a folder and returns its path; None: there is none."""


def window_of(fetch: Fetch, run_id: str) -> AuditedWindow | None:
    """Return what a run's audit knew of its window; None: it was not audited, or by an older version."""
    with tempfile.TemporaryDirectory() as folder:
        path = fetch(run_id, WINDOW_FILE, folder)
        return None if path is None else read_window(Path(path))
