"""Prepare the page's loss curves: thinned, with what they are drawn against, and a table of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gaccum_exp.report.compare.batch_curves import samples_after
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.distances import loss_curve
from gaccum_exp.report.compare.rounding_envelope import MARGIN, Envelope
from gaccum_exp.report.figures.curve_data import CurveRow, Points, loss_rows
from gaccum_exp.report.figures.panels import Panel, panels_of
from gaccum_exp.report.page.thinning import kept_places, rounded
from gaccum_exp.report.text.wording import MISSING, say_gap, say_loss
from gaccum_exp.tracking.records import RunRecord

Records = Mapping[str, RunRecord]
MOST_POINTS = 12_000
"""Of all loss curves of a page together, and again of all differences."""
_LEAST, _MOST = 60, 600
"""So many points has a curve at least, and at most."""


def curve_section(comparison: Comparison, records: Records) -> dict[str, Any] | None:
    """Return what the page shows of loss curves; None where no arm recorded one."""
    rows = loss_rows(comparison, records)
    panels = panels_of(comparison)
    drawable = [(row, of) for row, of in zip(rows.panels, panels, strict=True) if row.has_losses]
    count = sum(bool(curve.values.size) for panel, _ in drawable for curve in panel.losses)
    if not count:
        return None
    most = min(_MOST, max(_LEAST, MOST_POINTS // count))
    groups = list(rows.groups)

    def drawn(curves: Sequence[CurveRow], of: Panel) -> list[dict[str, Any]]:
        known = (curve for curve in curves if curve.values.size)
        return [_curve(curve, groups.index(curve.group), of, records, most) for curve in known]

    shown: list[dict[str, Any]] = [
        {
            "title": panel.title,
            "losses": drawn(panel.losses, of),
            "gaps": drawn(panel.largest_gaps, of),
            "envelopes": [_envelope(envelope, of, records, most) for envelope in panel.envelopes],
            "last_digit": _last_digit(panel.last_digit, of, records, most),
        }
        for panel, of in drawable
    ]
    values = np.concatenate([c.values for panel in rows.panels for c in panel.losses])
    values = values[np.isfinite(values)]
    every = [curve for panel in shown for curve in panel["losses"]]
    return {
        "title": rows.title,
        "groups": [
            {"label": label, "is_reference": is_reference}
            for label, is_reference in rows.groups.values()
        ],
        "panels": shown,
        "left_out": [panel.title for panel in rows.panels if not panel.has_losses],
        "tables": [_table(panel, records) for panel in panels],
        "log": bool(values.size and values.min() > 0 and values.max() > 30 * values.min()),
        "axes": {
            "samples": all("samples" in curve or "batch" in curve for curve in every),
            "seconds": all("step_s" in curve for curve in every),
        },
        "one_batch": all(len({row.global_batch_size for row in of.rows}) == 1 for of in panels),
        "alike": _alike(panels),
        "merged": rows.is_crowded,
        "controls": rows.controls,
        "margin": f"{MARGIN:.0f}",
        "has_gaps": any(panel["gaps"] for panel in shown),
        "last_digit": any(panel["gaps"] and panel["last_digit"] for panel in shown),
    }


def _alike(panels: Sequence[Panel]) -> str:
    """Say which arms are fed the same samples: ` of a panel`; empty: all of them."""
    seeds = any(len({dict(row.setting.values).get("seed") for row in of.rows}) > 1 for of in panels)
    same = ["panel"] * (len(panels) > 1) + ["seed"] * seeds
    return f" of the same {' and '.join(same)}" if same else ""


def _curve(curve: CurveRow, group: int, panel: Panel, records: Records, most: int) -> dict[str, Any]:
    columns = [curve.values, *(curve.range or ())]
    places = _kept(columns, most)
    alike = [row for row in panel.rows if curve.name in (row.run_id, f"median-{curve.group[0]}")]
    alike = [row for row in alike if row.accum_steps in curve.group]
    found = {
        "group": group,
        "name": _name(curve, alike),
        "is_reference": curve.is_reference,
        **_against(curve.global_steps[places], alike, records),
        "values": rounded(curve.values[places], 5),
    }
    if curve.range is not None:
        found |= {
            name: rounded(of[places], 5) for name, of in zip(("low", "high"), curve.range, strict=True)
        }
    return found


def _name(curve: CurveRow, alike: Sequence[ComparisonRow]) -> str:
    """Name a curve where it is pointed at: the arm, or how many it is the median of."""
    if curve.range is None:
        return alike[0].name
    ns = f"{curve.group[0]}" if len(curve.group) == 1 else f"{curve.group[0]} to {curve.group[-1]}"
    return f"N = {ns}, median of {len(alike)}"


def _envelope(envelope: Envelope, panel: Panel, records: Records, most: int) -> dict[str, Any]:
    columns = [np.array(envelope.values), np.array(envelope.limits)]
    places = _kept(columns, most)
    of = [row for row in panel.rows if row.run_id == envelope.reference_run_id] or panel.rows[:1]
    values, limits = (rounded(column[places], 3) for column in columns)
    at = _against(np.array(envelope.global_steps)[places], of, records)
    return {**at, "values": values, "limits": limits}


def _last_digit(
    points: Points | None, panel: Panel, records: Records, most: int
) -> dict[str, Any] | None:
    if points is None or not points[0].size:
        return None
    places = _kept([points[1]], most)
    of = [row for row in panel.rows if row.is_reference] or panel.rows[:1]
    return {**_against(points[0][places], of, records), "values": rounded(points[1][places], 3)}


def _kept(columns: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Return which points to keep: of columns that seldom change, the ends of where they do not."""
    changes = np.ones(columns[0].size, dtype=bool)
    changes[1:-1] = False
    for column in columns:
        differs = column[1:] != column[:-1]
        changes[1:] |= differs
        changes[:-1] |= differs
    places = np.flatnonzero(changes)
    kept: np.ndarray = places[kept_places([column[places] for column in columns], most)]
    return kept


def _against(steps: np.ndarray, alike: Sequence[ComparisonRow], records: Records) -> dict[str, Any]:
    """Return steps, samples (or what a step adds to them) and the seconds of a step, where known."""
    found: dict[str, Any] = {"steps": steps.tolist()}
    runs = [records[row.run_id] for row in alike]
    if not any("global_batches" in run.tags for run in runs):
        samples = [samples_after(run, steps) for run in runs if run.global_batch_size]
        if samples and all(np.array_equal(samples[0], other) for other in samples[1:]):
            batch = runs[0].global_batch_size or 0
            regular = np.array_equal(samples[0], steps * float(batch))
            found |= {"batch": batch} if regular else {"samples": samples[0].astype(int).tolist()}
    times = [row.step_s for row in alike if row.step_s is not None]
    if times:
        found["step_s"] = float(f"{float(np.median(times)):.4g}")
    return found


def _table(panel: Panel, records: Records) -> dict[str, Any]:
    head = ["arm", "steps", "first loss", "lowest loss", "at step", "last loss", "largest difference"]
    rows = []
    for row in panel.rows:
        steps, losses = loss_curve(records[row.run_id])
        if not steps.size:
            rows.append([row.name, "0", *[MISSING] * 5])
            continue
        finite = np.where(np.isfinite(losses), losses, np.inf)
        lowest = int(np.argmin(finite))
        gap = MISSING if row.is_reference else say_gap(row.max_loss_gap)
        first, least, last = (say_loss(float(losses[i])) for i in (0, lowest, -1))
        rows.append([row.name, f"{steps[-1]:,}", first, least, f"{steps[lowest]:,}", last, gap])
    return {"title": panel.title, "head": head, "rows": rows}
