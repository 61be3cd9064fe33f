"""Prepare what the page draws of one window: its micro-batches, and the gradient's error by layer.

What is read is `window.json` as a run keeps it; its keys are told by the audit that writes it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.text.verdict_notes import rank
from gaccum_exp.report.text.wording import MISSING, say_gap

Window = Mapping[str, Any]
WindowOf = Callable[[str], Window | None]
"""Gives what a run, by its id, keeps of one window; None where it keeps nothing."""
MOST_WINDOWS, MOST_LAYERS, MOST_MICRO_BATCHES = 12, 40, 64


def window_section(comparison: Comparison, window_of: WindowOf) -> list[dict[str, Any]]:
    """Return the windows of a few arms, the worst verdict first."""
    worst_first = sorted(comparison.rows, key=lambda row: (rank(row.verdict), -(row.accum_steps or 0)))
    found: list[dict[str, Any]] = []
    for row in worst_first:
        window = window_of(row.run_id) if (row.accum_steps or 1) > 1 else None
        if window and window.get("micro_batches"):
            found.append(_window(row, window))
        if len(found) == MOST_WINDOWS:
            break
    return found


def _window(row: ComparisonRow, window: Window) -> dict[str, Any]:
    micro_batches, term = _of_one_term(window["micro_batches"])
    layers = window.get("layers") or []
    worst = sorted(layers, key=lambda layer: _over(layer["error"], layer["floor"]), reverse=True)
    shown = [layer for layer in layers if layer in worst[:MOST_LAYERS]]  # in the model's order
    columns = _columns(max((len(_by_micro_batch(layer)) for layer in shown), default=0))
    unit = str(window.get("unit") or "samples")
    return {
        "name": row.name,
        "verdict": row.verdict or "",
        "weighed": f"one of the {unit} of {term}" if term else f"one {unit.removesuffix('s')}",
        "micro": [_micro_batch(of) for of in micro_batches],
        "columns": ["window", *(_range(places, micro_batches) for places in columns)],
        "layers": [{"name": layer["name"], "cells": list(_cells(layer, columns))} for layer in shown],
        "no_shares": window.get("no_shares") or "",
        "left_out": len(layers) - len(shown),
        "tables": [_micro_table(micro_batches, unit), *([_layer_table(shown)] if shown else [])],
    }


def _of_one_term(micro_batches: Sequence[Window]) -> tuple[Sequence[Window], str]:
    """Return micro-batches as one term of a loss of several weighs them: the one that errs the most."""
    names = [term["name"] for term in micro_batches[0].get("terms") or []]
    of_term = {
        name: [{**of, **next(t for t in of["terms"] if t["name"] == name)} for of in micro_batches]
        for name in names
    }
    if not of_term:
        return micro_batches, ""

    def furthest(name: str) -> float:
        return max((abs(weight - 1) for of in of_term[name] if (weight := _weight(of))), default=0.0)

    name = max(names, key=furthest)
    return of_term[name], name


def _micro_batch(of: Window) -> dict[str, Any]:
    return {
        "index": of["index"],
        "first": of["first"],
        "end": of["first"] + of["samples"],
        "weight": _short(_weight(of)),
    }


def _weight(of: Window) -> float | None:
    """Return what one counted unit weighs, relative to one pass; None: nothing counts."""
    weight, one_pass = of.get("weight"), of.get("one_pass_weight")
    return None if weight is None or not one_pass else weight / one_pass


def _cells(layer: Window, columns: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Yield the error of the layer, and by micro-batch, with how many digits it is above its floor.

    What a micro-batch adds is measured in float64, and has that floor.
    """
    floor64 = layer.get("floor64")
    by_micro_batch = _by_micro_batch(layer)
    yield _cell(layer["error"], layer["floor"])
    for places in columns:
        known = [by_micro_batch[i] for i in places if i < len(by_micro_batch)]
        largest = max((e for e in known if e is not None), default=None)
        yield _cell(largest, layer["floor"] if floor64 is None else floor64)


def _cell(error: float | None, floor: float | None) -> dict[str, Any]:
    over = _over(error, floor)
    digits = math.log10(over) if 0 < over < math.inf else over and 9.0
    return {"error": _short(error), "digits": None if error is None else round(digits, 2)}


def _over(error: float | None, floor: float | None) -> float:
    """Return how many times its floor an error is; infinite where there is no floor."""
    if error is None or (not floor and error > 0):
        return math.inf
    return error / floor if floor else 0.0


def _by_micro_batch(layer: Window) -> Sequence[float | None]:
    return layer.get("by_micro_batch") or []


def _columns(count: int) -> list[list[int]]:
    """Return which micro-batches share a column, where there are more than can be told apart."""
    if not count:
        return []
    return [of.tolist() for of in np.array_split(np.arange(count), min(count, MOST_MICRO_BATCHES))]


def _range(places: Sequence[int], micro_batches: Sequence[Window]) -> str:
    first, last = (micro_batches[place]["index"] + 1 for place in (places[0], places[-1]))
    return str(first) if first == last else f"{first}-{last}"


def _micro_table(micro_batches: Sequence[Window], unit: str) -> dict[str, Any]:
    def said(value: float | None, digits: int = 4) -> str:
        return MISSING if value is None else f"{value:.{digits}g}"

    return {
        "title": "Micro-batches of the window",
        "head": ["micro-batch", "first sample", "samples", f"{unit} counted", "weight", "in one pass"],
        "rows": [
            [
                *(str(of["index"] + 1), str(of["first"]), str(of["samples"])),
                *(said(of.get("counted"), 12), said(of.get("weight")), said(of.get("one_pass_weight"))),
            ]
            for of in micro_batches
        ],
    }


def _layer_table(layers: Sequence[Window]) -> dict[str, Any]:
    return {
        "title": "Error of the gradient by layer",
        "head": [
            "layer",
            "error",
            "rounding floor",
            "in float64",
            "floor there",
            "largest of a micro-batch",
        ],
        "rows": [[layer["name"], *map(say_gap, _errors(layer))] for layer in layers],
    }


def _errors(layer: Window) -> Iterator[float | None]:
    yield from (layer.get(key) for key in ("error", "floor", "error64", "floor64"))
    yield max((e for e in _by_micro_batch(layer) if e is not None), default=None)


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
