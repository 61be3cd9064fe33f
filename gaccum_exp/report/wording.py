"""How numbers are written in tables, sentences and figures."""

import math
from collections.abc import Iterable

from gaccum_exp.report.rows import ComparisonRow

MISSING = "–"

_BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def byte_unit(largest_bytes: float) -> tuple[int, str]:
    """Return the unit (its size in bytes, its name) in which `largest_bytes` is at least 1."""
    return next((unit for unit in _BYTE_UNITS if largest_bytes >= unit[0]), _BYTE_UNITS[-1])


def time_unit(largest_s: float) -> tuple[float, str]:
    """Return the unit (its size in seconds, its name) in which `largest_s` is at least 1."""
    return next((unit for unit in _TIME_UNITS if largest_s >= unit[0]), _TIME_UNITS[-1])


def say_bytes(value: float | None) -> str:
    """`1.23 GiB`: three digits and a binary unit."""
    return MISSING if value is None else _in_unit(value, byte_unit(value))


def say_seconds(value: float | None) -> str:
    """`12.3 ms`: three digits and a unit."""
    return MISSING if value is None else _in_unit(value, time_unit(value))


def say_loss(value: float | None) -> str:
    """`0.1234`, or with an exponent where four decimals would not do."""
    if value is None:
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 1e3 or not math.isfinite(value):
        return f"{value:.4f}"
    return f"{value:.2e}"


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


def _in_unit(value: float, unit: tuple[float, str]) -> str:
    size, name = unit
    scaled = value / size
    digits = 0 if scaled >= 99.95 or (size == 1 and name == "B") else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {name}"
