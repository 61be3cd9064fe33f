"""Long checks, of which the suite runs a part and `make test-whole` the rest."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def shortened(cases: Iterable[Any], suite: Collection[Any]) -> list[Any]:
    """Return a parametrised test's cases, those that are not the suite's marked with `whole`.

    Args:
        cases: all of them; a tuple is a test's several arguments.
        suite: those that the suite runs, or, of tuples, their first arguments.

    Raises:
        ValueError: one of the suite's is not there, or nothing is left for the whole check.
    """
    cases = list(cases)
    names = [case[0] if isinstance(case, tuple) else case for case in cases]
    missing = [name for name in suite if name not in names]
    if missing or all(name in suite for name in names):
        raise ValueError(f"{missing or 'nothing to leave out'}: of {names}")
    return [
        case
        if name in suite
        else pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.whole)
        for name, case in zip(names, cases, strict=True)
    ]
