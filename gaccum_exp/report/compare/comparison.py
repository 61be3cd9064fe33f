"""Compare the runs of a sweep: one row per arm, measured against the arm's reference.

Ratios are taken only between like and like: peaks from the same memory source, step times on the
same device with the same number of threads. The verdict on an arm's gradient is its own audit's, read
from the run. On its loss curve there is one where the sweep has controls: `rounding_envelope`.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaccum_exp.report.compare.columns import COLUMNS, ComparisonRow, Measured
from gaccum_exp.report.compare.distances import Parameters, largest_loss_gap, weight_distance
from gaccum_exp.report.compare.pairing import Group, Source, group_runs
from gaccum_exp.report.compare.rounding_envelope import Envelope, Standing, envelope_of, stand
from gaccum_exp.report.text.notes import other_notes, reference_notes
from gaccum_exp.report.text.verdict_notes import control_notes, verdict_notes
from gaccum_exp.report.whole_files import whole
from gaccum_exp.tracking.records import RunRecord

WeightsOf = Callable[[str], Parameters | None]

CSV_COLUMNS = tuple(name for name, column in COLUMNS.items() if column.in_csv)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a sweep shows: its arms' rows, the references borrowed from the store, and notes."""

    rows: tuple[ComparisonRow, ...]
    """A row per arm: group by group, the reference first, then by N."""
    stored: tuple[ComparisonRow, ...] = ()
    """Rows of the references that are no arm of the sweep; their `setting` is the group's."""
    stored_runs: tuple[RunRecord, ...] = ()
    """The runs behind `stored`, for drawing."""
    reference_notes: tuple[str, ...] = ()
    """References that are not the sweep's own: what a reader of any table or figure must know."""
    verdict_notes: tuple[str, ...] = ()
    """What makes a gradient another than the large batch's, and curves that left the envelope."""
    envelopes: tuple[Envelope, ...] = ()
    """What rounding alone makes of the loss curves, one for each reference that has controls."""
    other_notes: tuple[str, ...] = ()
    """Uneven splits, numbers that were not compared, arms that did not finish."""

    @property
    def shown(self) -> tuple[ComparisonRow, ...]:
        """What figures show: the borrowed references and the arms."""
        return self.stored + self.rows

    @property
    def is_of_audits(self) -> bool:
        """Whether nothing was to be trained: its arms are audits, but for those that did not begin."""
        begun = [row for row in self.rows if row.accum_steps is not None]
        return bool(begun) and all(row.is_audit for row in begun)

    @property
    def notes(self) -> tuple[str, ...]:
        """All notes, a sentence each."""
        return self.verdict_notes + self.reference_notes + self.other_notes


def compare(
    runs: Sequence[RunRecord],
    stored: Iterable[RunRecord] = (),
    weights: WeightsOf = lambda run_id: None,
) -> Comparison:
    """Pair every arm with its reference and measure it.

    Args:
        runs: the arms of a sweep and their controls, finished or not, in any order.
        stored: other runs of the store, among which a missing reference is looked for.
        weights: gives a run's final parameters by name, on the CPU, or None where none are kept; asked
            for references and the finished arms that have one.
    """
    groups = group_runs(runs, stored)
    rows: list[ComparisonRow] = []
    stored_rows: list[ComparisonRow] = []
    stored_runs: dict[str, RunRecord] = {}
    envelopes: dict[str, Envelope] = {}
    for group in groups:
        envelope = envelope_of(group.reference, group.usable_controls) if group.reference else None
        if envelope is not None:
            envelopes[envelope.reference_run_id] = envelope
        measured = [ComparisonRow.of(arm) for arm in _measure(group, envelope, weights)]
        rows += sorted(measured, key=lambda row: row.role not in ("reference", "stand-in"))
        if group.source is Source.STORED and group.reference is not None:
            itself = largest_loss_gap(group.reference, group.reference)
            stored_rows.append(ComparisonRow.of(Measured(group.reference, group, *itself, 0.0)))
            stored_runs[group.reference.run_id] = group.reference
    return Comparison(
        rows=tuple(rows),
        stored=tuple(stored_rows),
        stored_runs=tuple(stored_runs.values()),
        reference_notes=reference_notes(groups),
        verdict_notes=verdict_notes(groups) + control_notes(groups, rows),
        envelopes=tuple(envelopes.values()),
        other_notes=other_notes(groups),
    )


def write_csv(comparison: Comparison, path: Path) -> Path:
    """Write a row per arm, floats in full precision, unknown values blank."""
    with whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        head, rows = csv_table(comparison)
        writer.writerows([head, *rows])
    return path


def csv_table(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Return the columns of `comparison.csv`, with one for each term of a loss, and a row per arm."""
    terms = sorted({term for row in comparison.rows for term, _ in row.term_losses})
    rows = [
        [*(getattr(row, name) for name in CSV_COLUMNS), *map(dict(row.term_losses).get, terms)]
        for row in comparison.rows
    ]
    return [*CSV_COLUMNS, *terms], rows


def _measure(group: Group, envelope: Envelope | None, weights: WeightsOf) -> Iterator[Measured]:
    # The weights of one arm at a time are in memory.
    reference = group.reference
    if reference is None:
        yield from (Measured(arm, group) for arm in group.arms)
        return
    others = [arm for arm in group.arms if arm.run_id != reference.run_id]
    theirs = weights(reference.run_id) if any(arm.finished for arm in others) else None
    for arm in group.arms:
        gap = largest_loss_gap(arm, reference)
        if arm.run_id == reference.run_id:
            yield Measured(arm, group, *gap, 0.0)
            continue
        standing = stand(arm, reference, envelope) if envelope else Standing()
        ours = weights(arm.run_id) if arm.finished and theirs is not None else None
        distance = None if ours is None or theirs is None else weight_distance(ours, theirs)
        yield Measured(arm, group, *gap, distance, envelope, standing)
