"""Figures are drawn in the style that they are saved in."""

from collections.abc import Iterator

import pytest

from gaccum_exp.report.figures.style import styled


@pytest.fixture(autouse=True)
def _drawn_for_paper() -> Iterator[None]:
    """Draw at a paper's text width, unless a test asks for another."""
    with styled():
        yield
