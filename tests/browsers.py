"""What tests need that open a page: Debian's browser, and what drives it."""

import importlib.util
from collections.abc import Callable

import pytest

from experiments.mlflow_browser import CHROMIUM

_NEEDED = {"playwright": "playwright", "axe_playwright_python": "axe-playwright-python"}
MISSING = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
MISSING += [] if CHROMIUM else ["chromium"]
IN_BROWSER = (
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
)
"""Marks of a test that takes the fixture `browser`."""


def in_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test so."""
    for mark in IN_BROWSER:
        test = mark(test)
    return test
