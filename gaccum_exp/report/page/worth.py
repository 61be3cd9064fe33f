"""Prepare what the page shows of the batch: noise scales, and the loss of every global batch."""

import math
from collections.abc import Sequence
from typing import Any

from gaccum_exp.report.arm_limit import MOST_SETTINGS
from gaccum_exp.report.compare.batches import BatchComparison
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.figures.batch_data import batch_panels, notes_of
from gaccum_exp.report.page.rich_tables import as_table
from gaccum_exp.report.text.batch_table import render_batches, say_batches, say_interval
from gaccum_exp.report.text.noise_notes import NoiseTold, noise_of

_MOST_INTERVALS = 16


def noise_section(comparison: Comparison) -> dict[str, Any] | None:
    """Return the noise scale's interval of each arm that tells one, beside its batch."""
    told = [of for row in comparison.rows if row.finished and (of := noise_of(row)) is not None]
    told = [of for of in told if of.low]
    if not told:
        return None
    narrowest = sorted(told, key=lambda of: of.width)[:_MOST_INTERVALS]
    shown = [of for of in told if of in narrowest]
    several = len({of.row.reduction for of in told}) > 1

    def name(row: ComparisonRow) -> str:
        setting = row.setting.label if several else row.setting.text
        return f"N = {row.accum_steps}" + (f", {setting}" if setting else "")

    return {
        "intervals": [_interval(of, name(of.row)) for of in shown],
        "left_out": len(told) - len(shown),
        "in_adam_metric": any(of.in_adam_metric for of in shown),
        "table": {
            "title": "Noise scale of each arm, in samples",
            "head": ["arm", "global batch", "noise scale (interval)", "windows measured"],
            "rows": [
                [
                    name(of.row),
                    str(of.row.global_batch_size),
                    say_interval(of),
                    str(of.windows),
                ]
                for of in told
            ],
        },
    }


def batch_sections(comparisons: Sequence[BatchComparison]) -> list[dict[str, Any]]:
    """Return a figure, a table and a sentence for each setting that has several global batches."""
    named = len(comparisons) > 1
    return [_batches(of, named) for of in comparisons[:MOST_SETTINGS]]


def _batches(of: BatchComparison, named: bool) -> dict[str, Any]:
    panels = batch_panels(of, named=named)
    noise, limit = panels.noise, panels.limit
    return {
        "title": panels.label,
        "said": say_batches(of),
        "table": as_table(render_batches(of, named=named)),
        "notes": notes_of([of], 0)[1:],
        "loss": panels.loss,
        "limit": limit if limit is not None and math.isfinite(limit) else None,
        "noise": noise and {"low": noise.low, "high": _bounded(noise.high)},
        "noise_label": noise.label if noise else "",
        "losses": [
            {
                "batch": loss.batch,
                "loss": loss.mean,
                "low": loss.mean - loss.spread,
                "high": loss.mean + loss.spread,
                "is_settled": loss.is_settled,
            }
            for loss in panels.losses
        ],
    }


def _interval(of: NoiseTold, name: str) -> dict[str, Any]:
    return {
        "label": name,
        "low": of.low,
        "high": _bounded(of.high),
        "scale": of.scale if of.scale is not None and math.isfinite(of.high) else None,
        "batch": of.row.global_batch_size,
    }


def _bounded(end: float) -> float | None:
    return end if math.isfinite(end) else None
