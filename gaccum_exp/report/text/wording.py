"""How numbers are written in tables, sentences and figures."""

import math
from collections.abc import Iterable, Sequence

from gaccum_exp.report.compare.row import ComparisonRow

MISSING = "–"
MOST_NUMBERS = 30

_BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def byte_unit(largest_bytes: float) -> tuple[int, str]:
    """Return the unit (its size in bytes, its name) in which `largest_bytes` is at least 1."""
    return next((unit for unit in _BYTE_UNITS if largest_bytes >= unit[0]), _BYTE_UNITS[-1])


def time_unit(largest_s: float) -> tuple[float, str]:
    """Return the unit (its size in seconds, its name) in which `largest_s` is at least 1."""
    return next((unit for unit in _TIME_UNITS if largest_s >= unit[0]), _TIME_UNITS[-1])


def say_loss(value: float | None) -> str:
    """`0.1234`, or with an exponent where four decimals would not do."""
    if value is None:
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 1e3 or not math.isfinite(value):
        return f"{value:.4f}"
    return f"{value:.1e}"


def say_scaled(value: float | None, unit_size: float) -> str:
    """`6.84`: three digits of a quantity whose unit stands in the header."""
    return MISSING if value is None else _three_digits(value / unit_size)


def say_gap(value: float | None) -> str:
    """`3.1e-06`: two digits of a difference; an exact zero is `0`."""
    if value is None:
        return MISSING
    return "0" if value == 0 else f"{value:.1e}" if not 0.1 <= value < 10 else f"{value:.2f}"


def say_ratio(value: float | None) -> str:
    """`0.31`: two decimals, or two digits where they would say nothing."""
    if value is None:
        return MISSING
    return f"{value:.2f}" if value >= 0.095 or not math.isfinite(value) else f"{value:.2g}"


def say_micro_batches(row: ComparisonRow) -> str:
    """`64`, or `36-37` where the micro-batches are not equal."""
    sizes = row.micro_batch_sizes
    if not sizes:
        return MISSING
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


def say_controls(counts: int | Iterable[ComparisonRow]) -> str:
    """`3 controls`, or `2 to 3 controls` where the rows' envelopes are of different numbers."""
    numbers = {counts} if isinstance(counts, int) else {row.controls for row in counts}
    least, most = min(numbers), max(numbers)
    return f"{least if least == most else f'{least} to {most}'} control{'s' if most > 1 else ''}"


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"
