"""Records that a comparison adds to its runs: loss gaps and costs relative to the reference.

Only at a sweep's end is it known how far an arm's loss is from its reference's, and what its memory and
time are in units of the reference's. An arm has ended by then, so this is a record of its own in its
journal, behind the end, and delivered like all others. It may come again with every report: a point
bears the time of the loss that it was made from, and is the same point in the store.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gaccum_exp.errors import BadInputError, TrackingError
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.gap_curve import Gap, gap_curve
from gaccum_exp.report.compare.pairing import group_runs
from gaccum_exp.report.figures.looks import GREY, color
from gaccum_exp.tracking import metrics, shipper
from gaccum_exp.tracking.journal import add_to_ended, is_of_this_host, last_owner
from gaccum_exp.tracking.mlflow_ui import RUN_COLOR
from gaccum_exp.tracking.records import RunRecord

if TYPE_CHECKING:
    from gaccum_exp.arms.report import Runs

log = logging.getLogger(__name__)
MOST_COLORS = 8
"""So many can be told apart."""
MOST_STEPS, LEAST_STEPS = 4_000, 50
"""Of all arms, and of one: a store takes some ten thousand values a second."""


class Addition(NamedTuple):
    """What is added to one run."""

    run: RunRecord
    points: list[tuple[int, int, dict[str, float]]]
    """(global step, time_ms, {metric: value})."""
    tags: dict[str, str]


def add_comparison(
    runs: "Runs", arms: Sequence[RunRecord], stored: Sequence[RunRecord], comparison: Comparison
) -> float:
    """Record what a comparison says of its arms: in their journals, or in the store where these are not.

    Args:
        runs: where the arms were read.
        arms: of one sweep, and their controls.
        stored: what else they were compared with.
        comparison: of them.

    Returns:
        The largest gap between two loss curves in ulp, 0 where there is none.
    """
    found = list(additions(arms, stored, comparison))
    try:
        for addition in found:
            _add(runs, addition)
    except (OSError, BadInputError, TrackingError) as error:
        log.warning("what was compared is not recorded with the arms: %s", error)
    ulps = (values.get(metrics.LOSS_GAP_ULP, 0.0) for of in found for _, _, values in of.points)
    return max(ulps, default=0.0)


def additions(
    arms: Sequence[RunRecord], stored: Sequence[RunRecord], comparison: Comparison
) -> Iterator[Addition]:
    """Yield what is added to each run that has a loss."""
    rows = {row.run_id: row for row in comparison.rows}
    colors = {run_id: color(*place) for run_id, place in _places(comparison.rows).items()}
    most = max(LEAST_STEPS, MOST_STEPS // max(1, len(arms)))
    seen = set[str]()
    for group in group_runs(arms, stored):
        for run in (*group.arms, *group.usable_controls):
            curve = run.curves.get(metrics.TRAIN_LOSS)
            if curve is None or not curve.times_ms or run.run_id in seen:
                continue
            seen.add(run.run_id)
            times = dict(zip(curve.global_steps, curve.times_ms, strict=True))
            points = [(curve.global_steps[-1], curve.times_ms[-1], _costs(rows.get(run.run_id)))]
            if group.reference is not None and group.reference.run_id != run.run_id:
                gaps = gap_curve(run, group.reference, most)
                points = [(of.global_step, times[of.global_step], _of_gap(of)) for of in gaps] + points
            tags = {RUN_COLOR: colors.get(run.run_id, GREY)}
            yield Addition(run, [point for point in points if point[2]], tags)


def _places(rows: Sequence[ComparisonRow]) -> dict[str, tuple[int, int]]:
    """Return by its run's id which of how many colours an arm has: of too many arms one for each N."""
    if len(rows) <= MOST_COLORS:
        return {row.run_id: (place, len(rows)) for place, row in enumerate(rows)}
    counts = sorted({row.accum_steps or 0 for row in rows})
    return {row.run_id: (counts.index(row.accum_steps or 0), len(counts)) for row in rows}


def _of_gap(gap: Gap) -> dict[str, float]:
    ulp = {} if gap.largest_ulp is None else {metrics.LOSS_GAP_ULP: gap.largest_ulp}
    return {metrics.LOSS_GAP: gap.gap, **ulp}


def _costs(row: ComparisonRow | None) -> dict[str, float]:
    """Return an arm's costs in units of its reference's, and its step's time as a chart can show it."""
    if row is None:
        return {}
    # A bar would state a ratio that the table marks as no measurable difference.
    stated = row.is_reference or row.step_differs
    costs = {
        metrics.PEAK_RATIO: row.peak_ratio,
        metrics.STEP_RATIO: row.step_ratio if stated else None,
        metrics.STEP_TIME_MS: None if row.step_s is None else 1e3 * row.step_s,
    }
    return {metric: float(value) for metric, value in costs.items() if value is not None}


def _add(runs: "Runs", addition: Addition) -> None:
    run, points, tags = addition
    path = next(filter(None, (of.path_of(run.run_id) for of in runs.journals)), None)
    if path is not None and is_of_this_host(last_owner(path)):
        if add_to_ended(path, [list(point) for point in points], tags):
            shipper.announce(path)
    elif run.experiment_id and run.status != "RUNNING":
        values: list[Any] = [
            (metric, value, time_ms, at) for at, time_ms, of in points for metric, value in of.items()
        ]
        runs.store.log_points(run.run_id, values)
        runs.store.log_tags(run.run_id, {key: tags[key] for key in tags.keys() - run.tags.keys()})
