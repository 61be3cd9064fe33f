"""Prepare what the figures of memory and time show, as plain bars and curves against N."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gaccum_exp.core.step_times import FEWEST_WINDOWS
from gaccum_exp.memory.plan import CATEGORIES
from gaccum_exp.report.arm_limit import MOST_SETTINGS, by_n
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.figures.panels import Panel, panels_of, subject, thinned
from gaccum_exp.report.text.wording import byte_unit, say_list, say_numbers, say_scaled, time_unit
from gaccum_exp.tracking.metrics import RESIDENT_SET_BYTES, memory_part
from gaccum_exp.tracking.records import RunRecord

# What is measured beside the tracked tensors, named as what it is.
_OTHER_SIZES = {
    RESIDENT_SET_BYTES: "Resident set of the process, libraries and data included",
    memory_part("allocator_requested"): "Peak of what tensors asked the allocator for",
    memory_part("allocator_allocated"): "the same in whole blocks, with workspace",
    memory_part("allocator_reserved"): "taken from the device, fragments and what is kept included",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One N of a panel, in the figure's unit."""

    n: int
    role: str
    """Of the reference among its arms; empty: none is one."""
    missing: str = ""
    """What is said in place of a bar where nothing was recorded."""
    name: str = ""
    """The run's id, of one run."""
    each: tuple[float, ...] = ()
    """Of the runs that are drawn; the bar is their median."""
    ratio: float | None = None
    """To the reference's; None: not stated."""
    is_reference: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of a peak by category; empty where that was not recorded."""
    phase: str | None = None
    """When the peak was."""
    low: float | None = None
    """Of one run, the quartiles over its timed windows; None where too few were timed."""
    high: float | None = None
    is_alike: bool = False
    """Whether no difference to the reference's is measurable."""


@dataclass(frozen=True, slots=True)
class BarRows:
    """What one figure shows."""

    title: str
    axis: str
    highest: float
    panels: Sequence[tuple[str, list[Bar]]]
    """Titles with bars by N."""
    notes: tuple[str, ...]
    categories: tuple[str, ...] = ()
    phases: frozenset[str | None] = frozenset()
    are_repeated: bool = False
    """Whether several runs' times are dots beside a bar."""

    @property
    def have_spread(self) -> bool:
        """Whether any bar has the quartiles of its run's windows."""
        return any(bar.low is not None for _, bars in self.panels for bar in bars)


@dataclass(frozen=True, slots=True)
class CostCurve:
    """One setting's costs by N."""

    label: str
    measured_bytes: Mapping[int, float]
    predicted_bytes: Mapping[int, float]
    step_s: Mapping[int, float]
    every_n: tuple[int, ...] = ()
    """Ascending, those included of which nothing is known."""
    step_low_s: Mapping[int, float] = field(default_factory=dict)
    """Quartiles over timed windows, of repeated runs the outermost; where they are known."""
    step_high_s: Mapping[int, float] = field(default_factory=dict)


def memory_rows(comparison: Comparison, runs: Mapping[str, RunRecord]) -> BarRows:
    """Prepare the peaks by N and category; of repetitions the largest."""
    panels, left_out = thinned(panels_of(comparison))
    measured = [row for row in comparison.shown if row.peak_bytes is not None]
    highest_bytes = max((row.peak_bytes or 0 for row in measured), default=0)
    unit_bytes, unit = byte_unit(highest_bytes)
    sources = sorted({row.memory_source for row in comparison.shown if row.memory_source})
    source = f" ({say_list(sources)})" if sources else ""
    repeated = any(len(rows) > 1 for panel in panels for rows in panel.by_n.values())
    parts = {
        row.run_id: {
            name: size / unit_bytes
            for name in CATEGORIES
            if (size := runs[row.run_id].metrics.get(memory_part(name))) is not None
        }
        for row in measured
    }

    def bar(n: int, role: str, known: Sequence[ComparisonRow]) -> Bar:
        row = max(known, key=lambda row: (row.peak_bytes or 0, row.run_id))
        total = (row.peak_bytes or 0) / unit_bytes
        found = row.peak_ratio, row.is_reference, parts[row.run_id], row.peak_phase
        return Bar(n, role, "", row.run_id, (total,), *found)

    notes = (
        ["× is the ratio of totals to the reference's."] if any(r.peak_ratio for r in measured) else []
    )
    if any(row.memory_source == "allocator" for row in comparison.shown):
        notes.append("Totals are the allocator's, the categories the tracker's: they may differ.")
    shown = [runs[row.run_id].metrics for row in comparison.shown]
    for key, words in _OTHER_SIZES.items():
        sizes = [metrics[key] for metrics in shown if key in metrics]
        if sizes:
            size_bytes, unit_of_size = byte_unit(max(sizes))
            least, most = say_scaled(min(sizes), size_bytes), say_scaled(max(sizes), size_bytes)
            notes.append(f"{words}: {least if least == most else f'{least} to {most}'} {unit_of_size}.")
    return BarRows(
        title=f"Peak memory{source}: {subject(comparison, runs)}"
        + ("; the largest of repeated runs" if repeated else ""),
        axis=f"peak memory in {unit}",
        highest=highest_bytes / unit_bytes,
        panels=_bars(panels, "peak_bytes", bar),
        notes=(*left_out, *notes, *comparison.reference_notes),
        categories=tuple(name for name in CATEGORIES if any(name in of for of in parts.values())),
        phases=frozenset(row.peak_phase for row in measured),
    )


def step_time_rows(comparison: Comparison, runs: Mapping[str, RunRecord]) -> BarRows:
    """Prepare the time of an optimizer step by N; of repetitions the median and each."""
    panels, left_out = thinned(panels_of(comparison))
    times = [row.step_s for row in comparison.shown if row.step_s is not None]
    unit_s, unit = time_unit(max(times, default=1.0))
    machines = sorted({f"{row.device}, threads: {row.threads}" for row in comparison.shown})

    def bar(n: int, role: str, known: Sequence[ComparisonRow]) -> Bar:
        ratios = [row.step_ratio for row in known if row.step_ratio is not None]
        low, high = (known[0].step_low_s, known[0].step_high_s) if len(known) == 1 else (None, None)
        return Bar(
            n,
            role,
            each=tuple((row.step_s or 0.0) / unit_s for row in known),
            low=None if low is None else low / unit_s,
            high=None if high is None else high / unit_s,
            ratio=statistics.median(ratios) if ratios else None,
            is_alike=all(row.step_differs is False for row in known),
            is_reference=any(row.is_reference for row in known),
        )

    bars = _bars(panels, "step_s", bar)

    return BarRows(
        title=f"Time of an optimizer step: {subject(comparison, runs)}; "
        f"on {say_list(machines) if len(machines) <= 2 else 'several machines'}",
        axis=f"step time in {unit}",
        highest=max(times, default=0.0) / unit_s,
        panels=bars,
        notes=(
            *left_out,
            *_ratio_notes([bar for _, of in bars for bar in of if bar.each]),
            *_apart(comparison),
            *comparison.reference_notes,
        ),
        are_repeated=any(len(rows) > 1 for panel in panels for rows in panel.by_n.values()),
    )


def _ratio_notes(bars: Sequence[Bar]) -> list[str]:
    """Say what stands above bars of times, and why nothing does."""
    notes = []
    if any(bar.ratio is not None and not bar.is_alike for bar in bars):
        notes.append("× is the ratio to the reference.")
    if any(bar.is_alike for bar in bars):
        notes.append("≈: no measurable difference to the reference, since the middle halves overlap.")
    if any(bar.ratio is None for bar in bars):
        fewest = f"fewer than {FEWEST_WINDOWS} windows were timed, or of the reference"
        notes.append(f"Without a ratio: {fewest}, or the machines differ.")
    return notes


def _apart(comparison: Comparison) -> tuple[str, ...]:
    rows = [row for row in comparison.rows if row.other_command and row.step_s is not None]
    if not rows:
        return ()
    ns = say_numbers(sorted({row.accum_steps or 0 for row in rows}))
    return (f"N = {ns}: run by another command than the reference, perhaps under another load.",)


def frontier_rows(comparison: Comparison) -> list[CostCurve]:
    """Prepare each setting's memory, measured and predicted, and step time, by N."""
    panels = [panel for panel in panels_of(comparison) if len(panel.by_n) > 1][:MOST_SETTINGS]
    return [
        CostCurve(
            panel.title,
            # Of repeated runs: the largest peaks, and the median of times.
            _by_n(panel.rows, "peak_bytes", max),
            _by_n(panel.rows, "predicted_peak_bytes", max),
            _by_n(panel.rows, "step_s", statistics.median),
            tuple(panel.by_n),
            _by_n(panel.rows, "step_low_s", min),
            _by_n(panel.rows, "step_high_s", max),
        )
        for panel in panels
    ]


def _bars(
    panels: Sequence[Panel], name: str, bar: Callable[[int, str, Sequence[ComparisonRow]], Bar]
) -> list[tuple[str, list[Bar]]]:
    # `bar` makes one of an N, its role, and the rows that have the value.
    found: list[tuple[str, list[Bar]]] = []
    for panel in panels:
        bars = []
        for n, rows in panel.by_n.items():
            role = next((row.role for row in rows if row.is_reference), "")
            missing = next((row.status for row in rows if not row.finished), "not recorded")
            known = [row for row in rows if getattr(row, name) is not None]
            bars.append(bar(n, role, known) if known else Bar(n, role, missing))
        found.append((panel.title, bars))
    return found


def _by_n(
    rows: Sequence[ComparisonRow], name: str, sum_up: Callable[[list[float]], float]
) -> dict[int, float]:
    known = by_n(row for row in rows if getattr(row, name) is not None)
    return {n: sum_up([getattr(row, name) for row in some]) for n, some in known.items()}
