"""Runs of a sweep -> one row per arm, measured against the arm's reference.

    gap(k)   = |train loss of the arm − train loss of its reference| after optimizer step k
    distance = ‖w − w_ref‖₂ / ‖w_ref‖₂ over all parameters at the end of training, in float64

Ratios are taken only between like and like: peaks from the same memory source, step times on the
same device with the same number of threads. What was not measured stays None, and is blank in the
CSV file. The verdict on an arm's gradient is its own audit's, read from the run. On its loss curve
there is one where the sweep has controls: `envelope`.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gaccum_exp.report.compare.envelope import Envelope, Standing, envelope_of, stand
from gaccum_exp.report.compare.gaps import largest_loss_gap
from gaccum_exp.report.compare.pairing import (
    Group,
    Source,
    global_batch_of,
    group_runs,
    micro_batches_of,
    steps_of,
)
from gaccum_exp.report.compare.row import ComparisonRow
from gaccum_exp.report.compare.swept_keys import Swept, sort_key, swept_keys, swept_values
from gaccum_exp.report.text.findings import control_notes, verdict_notes
from gaccum_exp.report.text.notes import other_notes, reference_notes
from gaccum_exp.tracking.metrics import PREDICTED_PEAK_BYTES
from gaccum_exp.tracking.records import RunRecord

Parameters = Mapping[str, torch.Tensor]
WeightsOf = Callable[[str], Parameters | None]

CSV_COLUMNS = (
    # A contract: scripts rely on these names and on their order. New ones go below.
    *("run_id", "role", "steps", "micro_batch_size", "global_batch_size", "reduction"),
    *("train_loss", "eval_loss", "eval_accuracy", "max_loss_gap", "weight_distance"),
    *("peak_bytes", "peak_ratio", "step_s", "step_ratio"),
    *("name", "status", "failure", "differs", "reference_run_id", "reference_source"),
    *("common_steps", "peak_phase", "memory_source", "device", "threads"),
    *("verdict", "cause", "culprit", "e64", "e", "floor", "control", "envelope"),
    *("eval_perplexity", "tokens_per_s", "skipped_windows", "predicted_peak_bytes"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a sweep says: its arms' rows, the references borrowed from the store, and notes."""

    rows: tuple[ComparisonRow, ...]
    """A row per arm: group by group, the reference first, then by N."""
    stored: tuple[ComparisonRow, ...] = ()
    """Rows of the references that are no arm of the sweep; their `setting` is the group's."""
    stored_runs: tuple[RunRecord, ...] = ()
    """The runs behind `stored`, for drawing."""
    reference_notes: tuple[str, ...] = ()
    """What a reader of any table or figure must know: references that are not the sweep's own."""
    verdict_notes: tuple[str, ...] = ()
    """What makes an arm's gradient another than the large batch's, and curves that left the envelope."""
    envelopes: tuple[Envelope, ...] = ()
    """What rounding alone makes of the loss curves, one for each reference that has controls."""
    other_notes: tuple[str, ...] = ()
    """Uneven splits, numbers that were not compared, arms that did not finish."""

    @property
    def shown(self) -> tuple[ComparisonRow, ...]:
        """What figures show: the borrowed references and the arms."""
        return self.stored + self.rows

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
        weights: gives a run's final parameters by name, on the CPU, or None where none are kept.
            Called for finished arms that have a reference, and for the references.

    Returns:
        A row per arm in an order that does not depend on that of `runs`.
    """
    keys = swept_keys(runs)
    groups = group_runs(runs, stored)
    with_batch = _batch_was_swept(groups)
    settings = {id(group): _setting(group, keys, with_batch) for group in groups}
    groups.sort(key=lambda group: _group_order(group, settings[id(group)]))
    rows: list[ComparisonRow] = []
    stored_rows: list[ComparisonRow] = []
    stored_runs: dict[str, RunRecord] = {}
    envelopes: dict[str, Envelope] = {}
    for group in groups:
        setting = settings[id(group)]
        envelope = envelope_of(group.reference, group.usable_controls) if group.reference else None
        if envelope is not None:
            envelopes[envelope.reference_run_id] = envelope
        measured = [_row(arm, group, setting, envelope) for arm in group.arms]
        measured = _with_distances(measured, group, weights)
        rows += sorted(measured, key=lambda row: row.role not in ("reference", "stand-in"))
        if group.source is Source.STORED and group.reference is not None:
            stored_rows.append(_row(group.reference, group, setting, None))
            stored_runs[group.reference.run_id] = group.reference
    labelled = [(group, settings[id(group)]) for group in groups]
    return Comparison(
        rows=tuple(rows),
        stored=tuple(stored_rows),
        stored_runs=tuple(stored_runs.values()),
        reference_notes=reference_notes(labelled),
        verdict_notes=verdict_notes(labelled) + control_notes(labelled, rows),
        envelopes=tuple(envelopes.values()),
        other_notes=other_notes(labelled),
    )


def weight_distance(ours: Parameters, theirs: Parameters) -> float | None:
    """Return ‖w − w_ref‖₂ / ‖w_ref‖₂ over all parameters, accumulated in float64.

    None when names or shapes differ: the two are not the same model. From a reference of zero
    norm the distance is 0 or infinite.
    """
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        return None
    difference = _norm(ours[name].double() - theirs[name].double() for name in theirs)
    norm = _norm(tensor.double() for tensor in theirs.values())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def write_csv(comparison: Comparison, path: Path) -> Path:
    """Write a row per arm under `CSV_COLUMNS`, floats in full precision, unknown values blank."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for row in comparison.rows:
            writer.writerow([getattr(row, column) for column in CSV_COLUMNS])
    return path


def _batch_was_swept(groups: Sequence[Group]) -> bool:
    """Whether the global batch was varied on its own."""
    batches = {global_batch_of(group.arms[0]) for group in groups} - {None}  # an arm refused has none
    return len(batches) > 1 and not any(group.n_multiplies for group in groups)


def _setting(group: Group, keys: Mapping[str, str], with_batch: bool) -> Swept:
    """What sets the group apart; its global batch too, where that was swept on its own."""
    swept = swept_values(group.arms[0], keys)
    if with_batch:
        swept += (("global batch", str(global_batch_of(group.arms[0]))),)
    return Swept(group.arms[0].params.get("accum.reduction"), swept)


def _group_order(group: Group, setting: Swept) -> tuple[object, ...]:
    # The id of the first arm settles ties, so that the order of the input never shows.
    first = group.arms[0]
    return (sort_key(setting), global_batch_of(first) or 0, first.run_id)


def _predicted_peak(run: RunRecord) -> int | None:
    """Return it where it was for the N that the run ended with."""
    predicted = _last(run, PREDICTED_PEAK_BYTES)
    if predicted is None or "accum.steps_used" in run.tags:
        return None
    return int(predicted)


def _row(run: RunRecord, group: Group, setting: Swept, envelope: Envelope | None) -> ComparisonRow:
    reference = group.reference
    if envelope is None or reference is None or run.run_id == reference.run_id:
        envelope, standing = None, Standing()
    else:
        standing = stand(run, reference, envelope)
    micro = micro_batches_of(run)
    gap, common = largest_loss_gap(run, reference) if reference else (None, 0)
    peak_bytes, step_s = _measured(run, "memory/peak_bytes"), _measured(run, "time/step_s")
    return ComparisonRow(
        run_id=run.run_id,
        role=_role(run, group),
        steps=steps_of(run),
        micro_batch_size=micro[0] if micro else None,
        global_batch_size=global_batch_of(run),
        reduction=run.params.get("accum.reduction"),
        train_loss=_last(run, "train/loss"),
        eval_loss=_last(run, "eval/loss"),
        eval_accuracy=_last(run, "eval/accuracy"),
        max_loss_gap=gap,
        weight_distance=0.0 if reference is not None and run is reference else None,
        peak_bytes=None if peak_bytes is None else int(peak_bytes),
        peak_ratio=_ratio(run, reference, "memory/peak_bytes", like=("memory.source",)),
        step_s=step_s,
        step_ratio=_ratio(run, reference, "time/step_s", like=("device", "threads")),
        name=run.name,
        status=run.status,
        failure=run.tags.get("failure"),
        setting=setting,
        reference_run_id=reference.run_id if reference else None,
        reference_source=group.source.value,
        common_steps=common,
        micro_batch_sizes=micro,
        peak_phase=run.tags.get("memory.peak_phase"),
        memory_source=run.tags.get("memory.source"),
        device=run.tags.get("device"),
        threads=run.tags.get("threads"),
        verdict=run.tags.get("verdict") or None,
        cause=run.tags.get("cause") or None,
        culprit=run.tags.get("culprit") or None,
        e64=_last(run, "audit/e64"),
        e=_last(run, "audit/e"),
        floor=_last(run, "audit/floor"),
        control=standing.word,
        left_at=standing.left_at,
        envelope=envelope.largest if envelope else None,
        controls=envelope.controls if envelope else 0,
        eval_perplexity=_last(run, "eval/perplexity"),
        tokens_per_s=_last(run, "throughput/tokens_per_s"),
        skipped_windows=_last(run, "train/skipped_windows"),
        predicted_peak_bytes=_predicted_peak(run),
    )


def _role(run: RunRecord, group: Group) -> str:
    """`reference` for the run the group is compared with, and for no other, whatever its N."""
    if group.reference is None or run.run_id != group.reference.run_id:
        return "candidate"
    names = {Source.STAND_IN: "stand-in", Source.STORED: "stored reference"}
    return names.get(group.source, "reference")


def _with_distances(
    rows: Sequence[ComparisonRow], group: Group, weights: WeightsOf
) -> list[ComparisonRow]:
    """Fill in the weight distance of arms that trained to the end, one arm in memory at a time."""
    compared = {row.run_id for row in rows if row.status == "FINISHED" and row.role == "candidate"}
    theirs = weights(group.reference.run_id) if group.reference and compared else None
    if theirs is None:
        return list(rows)
    filled = []
    for row in rows:
        ours = weights(row.run_id) if row.run_id in compared else None
        filled.append(row if ours is None else row.at_distance(weight_distance(ours, theirs)))
    return filled


def _ratio(
    run: RunRecord, reference: RunRecord | None, metric: str, like: tuple[str, ...]
) -> float | None:
    if reference is None:
        return None
    alike = all(run.tags.get(tag) and run.tags[tag] == reference.tags.get(tag) for tag in like)
    if not alike and run is not reference:
        return None
    ours, theirs = _measured(run, metric), _measured(reference, metric)
    return ours / theirs if ours is not None and theirs else None


def _measured(run: RunRecord, metric: str) -> float | None:
    """Return a cost; one that is not finite was not measured."""
    value = run.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def _last(run: RunRecord, metric: str) -> float | None:
    if metric in run.metrics:
        return run.metrics[metric]
    curve = run.curves.get(metric)
    return curve.values[-1] if curve and curve.values else None


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))
