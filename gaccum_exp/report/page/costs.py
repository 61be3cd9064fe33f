"""Prepare what the page shows of memory and time: bars by N, one against the other, a table."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from gaccum_exp.memory.plan import CATEGORIES
from gaccum_exp.report.arm_limit import spread
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.figures.cost_data import Bar, frontier_rows, memory_rows
from gaccum_exp.report.figures.panels import Panel, panels_of, thinned
from gaccum_exp.report.text.wording import (
    MISSING,
    byte_unit,
    say_ratio,
    say_scaled,
    time_unit,
)
from gaccum_exp.tracking.records import RunRecord

_MOST_NAMED = 10
"""So many N of a curve are named beside it."""
_LABEL = 0.08
"""So much of the highest bar is its label above it as high as."""


def memory_section(comparison: Comparison, records: Mapping[str, RunRecord]) -> dict[str, Any] | None:
    """Return the peaks by N and category, planned ones beside them, and a budget to begin with."""
    panels, _ = thinned(panels_of(comparison))
    rows_shown = [row for panel in panels for row in panel.rows]
    peaks = [peak for row in rows_shown for peak in (row.peak_bytes, row.predicted_peak_bytes)]
    known = [peak for peak in peaks if peak is not None]
    if not known:
        return None
    rows = memory_rows(comparison, records)
    size, unit = byte_unit(max(known))
    own_size = byte_unit(max((row.peak_bytes or 0 for row in comparison.shown), default=0))[0]
    shown: list[dict[str, Any]] = [
        {"title": title, "bars": [_bar(bar, panel, own_size / size, size) for bar in bars]}
        for (title, bars), panel in zip(rows.panels, panels, strict=True)
        if any(_has_peak(row) for row in panel.rows)
    ]
    return {
        "title": rows.title,
        "unit": unit,
        "unit_bytes": size,
        "categories": [name.replace("_", " ") for name in rows.categories],
        "panels": shown,
        "left_out": [panel.title for panel in panels if not any(map(_has_peak, panel.rows))],
        "tables": [_table(panel, records, size, unit) for panel in panels],
        "notes": rows.notes,
        "budget": _budget(records, known, size),
        "highest": float(f"{1.15 * max(known) / size:.3g}"),
        "is_planned": any(bar["planned"] is not None for panel in shown for bar in panel["bars"]),
    }


def tradeoff_section(comparison: Comparison) -> dict[str, Any] | None:
    """Return peak memory and step time of each N, by setting; None unless two N have both.

    Where N multiplies the global batch they are of steps over other samples, and are not held together.
    """
    if any(len({row.global_batch_size for row in of.rows}) > 1 for of in panels_of(comparison)):
        return None
    curves = [
        (curve.label, sorted(curve.measured_bytes.keys() & curve.step_s.keys()), curve)
        for curve in frontier_rows(comparison)
    ]
    curves = [(label, both, curve) for label, both, curve in curves if len(both) > 1]
    if not curves:
        return None
    size, unit = byte_unit(max(curve.measured_bytes[n] for _, both, curve in curves for n in both))
    unit_s, time = time_unit(max(curve.step_s[n] for _, both, curve in curves for n in both))
    points = [
        {
            "panel": index,
            "n": n,
            "is_named": n in spread(both, _MOST_NAMED),
            "x": _short(curve.step_s[n] / unit_s),
            "low": _short(curve.step_low_s.get(n, curve.step_s[n]) / unit_s),
            "high": _short(curve.step_high_s.get(n, curve.step_s[n]) / unit_s),
            "y": _short(curve.measured_bytes[n] / size),
        }
        for index, (_, both, curve) in enumerate(curves)
        for n in both
    ]
    return {
        "unit": unit,
        "time": time,
        "labels": [label for label, *_ in curves],
        "points": points,
        "has_spread": any(curve.step_low_s for *_, curve in curves),
    }


def _has_peak(row: ComparisonRow) -> bool:
    return row.peak_bytes is not None or row.predicted_peak_bytes is not None


def _bar(bar: Bar, panel: Panel, scale: float, size: float) -> dict[str, Any]:
    planned = [
        row.predicted_peak_bytes for row in panel.by_n[bar.n] if row.predicted_peak_bytes is not None
    ]
    total = bar.each[0] * scale if bar.each else None
    parts = {name.replace("_", " "): _short(value * scale) for name, value in bar.parts.items() if value}
    return {
        "n": bar.n,
        "total": None if total is None else _short(total),
        "parts": parts or ({} if total is None else {"total": _short(total)}),
        "ratio": "" if bar.ratio is None or bar.is_reference else f"{say_ratio(bar.ratio)} ×",
        "missing": bar.missing,
        "planned": _short(max(planned) / size) if planned else None,
    }


def _budget(records: Mapping[str, RunRecord], known: Sequence[float], size: float) -> dict[str, Any]:
    """Return the budget to begin with: the configured one, or one where its line crosses no label."""
    given = {run.params.get("runtime.memory_budget_gib") for run in records.values()} - {None, "None"}
    with_one = [float(text) * 2**30 / size for text in given if text]
    peaks = sorted({*known})
    low, high = max(pairwise(peaks), key=lambda ends: ends[1] - ends[0], default=(peaks[0], peaks[0]))
    between = (low + high) / 2 if high - low > 2 * _LABEL * peaks[-1] else (1 + _LABEL) * peaks[-1]
    return {"value": float(f"{max(with_one, default=between / size):.3g}"), "given": bool(with_one)}


def _table(panel: Panel, records: Mapping[str, RunRecord], size: float, unit: str) -> dict[str, Any]:
    times = [row.step_s for row in panel.rows if row.step_s is not None]
    unit_s, time = time_unit(max(times, default=1.0))
    names = [
        name
        for name in CATEGORIES
        if any(f"memory/{name}_bytes" in records[row.run_id].metrics for row in panel.rows)
    ]
    head = ["N", f"peak, {unit}", "× reference", f"planned, {unit}", "peak in"]
    head += [name.replace("_", " ") for name in names] + [f"step, {time}", "quartiles", "× reference"]
    return {
        "title": panel.title,
        "head": head,
        "rows": [_cells(n, rows, records, names, size, unit_s) for n, rows in panel.by_n.items()],
    }


def _cells(
    n: int, rows: Sequence[ComparisonRow], records: Mapping[str, RunRecord],
    names: Sequence[str], size: float, unit_s: float,
) -> list[str]:  # fmt: skip
    # Of repeated runs the largest peak, as the bars show it, and the median of times.
    largest = max(rows, key=lambda row: (row.peak_bytes or 0, row.run_id))
    planned = max((row.predicted_peak_bytes or 0 for row in rows), default=0)
    metrics = records[largest.run_id].metrics

    def said(value: float | None, unit: float) -> str:
        return MISSING if value is None else say_scaled(value, unit)

    def ratio(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return say_ratio(statistics.median(known)) if known else MISSING

    times = [row.step_s for row in rows if row.step_s is not None]
    lows = [row.step_low_s for row in rows if row.step_low_s is not None]
    highs = [row.step_high_s for row in rows if row.step_high_s is not None]
    return [
        str(n),
        said(largest.peak_bytes, size),
        ratio([largest.peak_ratio]),
        said(planned or None, size),
        largest.peak_phase or MISSING,
        *(said(metrics.get(f"memory/{name}_bytes"), size) for name in names),
        said(statistics.median(times) if times else None, unit_s),
        f"{said(min(lows), unit_s)} to {said(max(highs), unit_s)}" if lows and highs else MISSING,
        "≈"
        if all(row.step_differs is False for row in rows)
        else ratio([row.step_ratio for row in rows]),
    ]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
