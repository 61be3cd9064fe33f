"""Prepare what the page draws of one window: its micro-batches, and the gradient's error by layer."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gaccum_exp.audit.audited_window import AuditedWindow, LayerError, MicroBatchShare, TermShare
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.text.verdict_notes import rank
from gaccum_exp.report.text.wording import MISSING, say_gap

WindowOf = Callable[[str], AuditedWindow | None]
"""Gives the window that a run, by its id, was audited on; None where it keeps none."""
MOST_WINDOWS, MOST_LAYERS, MOST_MICRO_BATCHES = 6, 40, 64
_MOST_ASKED = 24
"""Of arms, which a store takes a while to answer for, and those of older versions have none."""


def window_section(comparison: Comparison, window_of: WindowOf) -> list[dict[str, Any]]:
    """Return the windows of a few arms, the worst verdict first."""
    several = (row for row in comparison.rows if (row.accum_steps or 1) > 1)
    worst_first = sorted(several, key=lambda row: (rank(row.verdict), -(row.accum_steps or 0)))
    found: list[dict[str, Any]] = []
    for row in worst_first[:_MOST_ASKED]:
        window = window_of(row.run_id)
        if window is not None and window.micro_batches:
            found.append(_window(row, window))
        if len(found) == MOST_WINDOWS:
            break
    return found


def _window(row: ComparisonRow, window: AuditedWindow) -> dict[str, Any]:
    term, shares = _shares(window.micro_batches)
    over = [_over(layer.error, layer.floor) for layer in window.layers]
    worst = sorted(range(len(over)), key=lambda i: -over[i])[:MOST_LAYERS]
    shown = [window.layers[i] for i in sorted(worst)]  # in the model's order
    columns = _columns(max((len(layer.by_micro_batch or ()) for layer in shown), default=0))
    unit = window.unit.removesuffix("s")
    return {
        "name": row.name,
        "verdict": row.verdict or "",
        "weighed": f"one {unit} of the term {term}" if term else f"one {unit}",
        "micro": [
            {
                "index": of.index,
                "first": of.first,
                "end": of.first + of.samples,
                "weight": _short(_weight(share)),
            }
            for of, share in zip(window.micro_batches, shares, strict=True)
        ],
        "columns": ["window", *(_range(places, window.micro_batches) for places in columns)],
        "layers": [_layer(layer, columns) for layer in shown],
        "no_shares": window.no_shares or "",
        "left_out": len(window.layers) - len(shown),
        "tables": [
            _micro_table(window.micro_batches, shares, window.unit, term),
            *([_layer_table(shown)] if shown else []),
        ],
    }


def _shares(
    micro_batches: Sequence[MicroBatchShare],
) -> tuple[str, Sequence[MicroBatchShare | TermShare]]:
    """Return what micro-batches are weighed by: of several terms, by the one that errs the most."""
    of_term: dict[str, list[TermShare]] = {}
    for of in micro_batches:
        for term in of.terms:
            of_term.setdefault(term.name, []).append(term)
    whole = {name: shares for name, shares in of_term.items() if len(shares) == len(micro_batches)}
    if not whole:
        return "", micro_batches

    def furthest(name: str) -> float:
        known = (weight for share in whole[name] if (weight := _weight(share)) is not None)
        return max((abs(weight - 1) for weight in known), default=0.0)

    name = max(whole, key=furthest)
    return name, whole[name]


def _weight(of: MicroBatchShare | TermShare) -> float | None:
    """Return what one counted unit weighs, relative to one pass; None: nothing counts."""
    return None if of.weight is None or not of.one_pass_weight else of.weight / of.one_pass_weight


def _layer(layer: LayerError, columns: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the error of a layer, then by micro-batch, and which of these are above their floor.

    What a micro-batch adds is measured in float64, and has that floor.
    """
    by_micro_batch = layer.by_micro_batch or ()
    errors, floors = [layer.error], [layer.floor]
    for places in columns:
        known = (by_micro_batch[i] for i in places if i < len(by_micro_batch))
        errors.append(max((e for e in known if e is not None), default=None))
        floors.append(layer.floor if layer.floor64 is None else layer.floor64)
    above = "".join(
        "1" if error is not None and _over(error, floor) > 1 else "0"
        for error, floor in zip(errors, floors, strict=True)
    )
    return {"name": layer.name, "errors": [_short(error, 2) for error in errors], "above": above}


def _over(error: float | None, floor: float | None) -> float:
    """Return how many times its floor an error is; infinite where there is no floor."""
    if error is None or (not floor and error > 0):
        return math.inf
    return error / floor if floor else 0.0


def _columns(count: int) -> list[list[int]]:
    """Return which micro-batches share a column, where there are more than can be told apart."""
    if not count:
        return []
    return [of.tolist() for of in np.array_split(np.arange(count), min(count, MOST_MICRO_BATCHES))]


def _range(places: Sequence[int], micro_batches: Sequence[MicroBatchShare]) -> str:
    first, last = (micro_batches[place].index + 1 for place in (places[0], places[-1]))
    return str(first) if first == last else f"{first}-{last}"


def _micro_table(
    micro_batches: Sequence[MicroBatchShare],
    shares: Sequence[MicroBatchShare | TermShare],
    unit: str,
    term: str,
) -> dict[str, Any]:
    def said(value: float | None, digits: int = 4) -> str:
        return MISSING if value is None else f"{value:.{digits}g}"

    return {
        "title": f"Micro-batches of the window{f', term {term}' if term else ''}",
        "head": ["micro-batch", "first sample", "samples", f"{unit} counted", "weight", "in one pass"],
        "rows": [
            [
                *(str(of.index + 1), str(of.first), str(of.samples)),
                *(said(share.counted, 12), said(share.weight), said(share.one_pass_weight)),
            ]
            for of, share in zip(micro_batches, shares, strict=True)
        ],
    }


def _layer_table(layers: Sequence[LayerError]) -> dict[str, Any]:
    def errors(of: LayerError) -> Iterator[float | None]:
        yield from (of.error, of.floor, of.error64, of.floor64)
        yield max((e for e in of.by_micro_batch or () if e is not None), default=None)

    return {
        "title": "Error of the gradient by layer",
        "head": [
            *("layer", "error", "rounding floor", "in float64", "floor there"),
            "largest of a micro-batch",
        ],
        "rows": [[layer.name, *map(say_gap, errors(layer))] for layer in layers],
    }


def _short(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
