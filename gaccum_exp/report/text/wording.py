"""Write numbers and lists as tables, sentences and figures have them."""

import math
from collections.abc import Iterable, Sequence
from functools import partial

MISSING = "–"
NOT_AUDITED = "not audited"
MOST_NUMBERS = 30
"""So many numbers are still listed in a sentence."""

_BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def _unit(units: Sequence[tuple[float, str]], largest: float) -> tuple[float, str]:
    return next((unit for unit in units if largest >= unit[0]), units[-1])


byte_unit = partial(_unit, _BYTE_UNITS)
"""Return the unit (its size in bytes, its name) in which the largest value is at least 1."""
time_unit = partial(_unit, _TIME_UNITS)
"""Return the unit (its size in seconds, its name) in which the largest value is at least 1."""


def say_loss(value: float) -> str:
    """`0.1234`, or with an exponent where four decimals would not do."""
    if value == 0 or 1e-3 <= abs(value) < 1e3 or not math.isfinite(value):
        return f"{value:.4f}"
    return f"{value:.1e}"


def say_scaled(value: float, unit_size: float) -> str:
    """`6.84`: three digits of a quantity whose unit stands in the header."""
    scaled = value / unit_size
    return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}"


def say_gap(value: float | None) -> str:
    """`3.1e-06`: two digits of a difference; an exact zero is `0`."""
    if value is None:
        return MISSING
    return "0" if value == 0 else f"{value:.1e}" if not 0.1 <= value < 10 else f"{value:.2f}"


def say_ratio(value: float) -> str:
    """`0.31`: two decimals, or two digits where they would say nothing."""
    return f"{value:.2f}" if value >= 0.095 or not math.isfinite(value) else f"{value:.2g}"


def say_rounded(value: float) -> str:
    """`1,230`: three digits, and all zeros of a large number."""
    return f"{float(f'{value:.3g}'):,.12g}"


def say_sizes(sizes: Sequence[int]) -> str:
    """`64`, or `36-37` where micro-batches are not equal; the largest comes first."""
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[-1]}-{sizes[0]}"


def say_list(items: Iterable[object]) -> str:
    """`2, 4 and 8`."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def say_numbers(numbers: Sequence[int]) -> str:
    """`2, 4 and 8`; of more than thirty, which ascend, the ends and how many they are."""
    if len(numbers) <= MOST_NUMBERS:
        return say_list(numbers)
    return f"{', '.join(map(str, numbers[:3]))}, … and {numbers[-1]} ({len(numbers)} values)"


def say_controls(counts: Iterable[int]) -> str:
    """`3 controls`, or `2 to 3 controls` where envelopes are of different numbers."""
    numbers = set(counts)
    least, most = min(numbers), max(numbers)
    return f"{least if least == most else f'{least} to {most}'} control{'s' if most > 1 else ''}"
