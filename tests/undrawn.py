"""The figures of sweeps left out where nobody looks: most of what comparing a small sweep takes.

Imported by the process of a sweep's arms before it begins. That one serves many tests, and what each of
them asks for comes with its environment.
"""

import os
from typing import Any
from unittest.mock import patch

from gaccum_exp.arms import serve

UNDRAWN = "TESTS_DRAW_NO_FIGURES"
DRAW = "gaccum_exp.report.figures.save_figures.draw"
_compare = serve._DONE["report"]


def no_figures(*_: object, **__: object) -> list[Any]:
    """Stand for `draw`."""
    return []


def _compare_undrawn(*given: Any) -> Any:
    if UNDRAWN not in os.environ:
        return _compare(*given)
    with patch(DRAW, no_figures):
        return _compare(*given)


serve._DONE["report"] = _compare_undrawn
