"""The page's figures as Vega-Lite specifications, without data: the page's script puts these in.

Colours and dashes come with the data (`"scale": None`), because they follow the reader's light or dark
scheme. An `@name` is a title that the script fills in.
"""

from collections.abc import Mapping
from typing import Any

from gaccum_exp.report.page.vega import compiled

Spec = dict[str, Any]
_N = "N, micro-batches per window"


def vega_specs() -> dict[str, Any]:
    """Return every figure's Vega specification by name."""
    specs = {
        "loss linear": _losses("linear"),
        "loss log": _losses("log"),
        "gap": _gaps(),
        "memory": _memory(),
        "tradeoff": _tradeoff(),
        "errors": _errors(),
        "window": _window(),
        "noise": _noise(),
        "batches": _batches(),
    }
    return {name: compiled(_whole(spec)) for name, spec in specs.items()}


def _whole(spec: Spec) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": None,
        "config": {"aria": False},  # a figure has one label, and a table behind it
        **spec,
    }


def _field(name: str, kind: str, title: str | None = None, **more: Any) -> dict[str, Any]:
    """Return how a field is drawn; `kind` is Q, O or N."""
    types = {"Q": "quantitative", "O": "ordinal", "N": "nominal"}
    return {"field": name, "type": types[kind], "title": title, **more}


_OWN_COLOR: Mapping[str, Any] = {"field": "color", "type": "nominal", "scale": None}
_AT: Mapping[str, Any] = _field(
    "x",
    "Q",
    "@axis",
    scale={"nice": False, "zero": False},
    axis={"grid": False, "tickCount": 6},
)


def _line(data: str, y: Mapping[str, Any]) -> Spec:
    own = {
        of: {"field": of, "type": "nominal", "scale": None}
        for of in ("strokeDash", "strokeWidth", "opacity")
    }
    return {
        "data": {"name": data},
        "mark": {"type": "line", "invalid": "break-paths-filter-domains", "strokeCap": "butt"},
        "encoding": {"x": _AT, "y": y, "detail": _field("curve", "N"), "color": _OWN_COLOR, **own},
    }  # fmt: skip


def _dots(y: Mapping[str, Any]) -> Spec:
    """Draw what no line passes through: a value without a neighbour."""
    return {
        "data": {"name": "dots"},
        "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
        "encoding": {"x": _AT, "y": y, "color": _OWN_COLOR},
    }


def _band(data: str, y: Mapping[str, Any], opacity: float) -> Spec:
    return {
        "data": {"name": data},
        "mark": {"type": "area", "opacity": opacity, "line": False},
        "encoding": {
            "x": _AT, "y": {**y, "field": "low"}, "y2": {"field": "high"},
            "detail": _field("curve", "N"), "color": _OWN_COLOR,
        },
    }  # fmt: skip


def _losses(scale: str) -> Spec:
    y = _field(
        "y", "Q", "train loss", scale={"type": scale, "zero": False, "nice": scale == "linear"},
        axis={"tickCount": 6, **({"format": "~g"} if scale == "log" else {})},
    )  # fmt: skip
    return {"height": 260, "layer": [_band("ranges", y, 0.18), _line("lines", y), _dots(y)]}


def _gaps() -> Spec:
    y = _field(
        "y", "Q", "largest difference so far", scale={"type": "log", "nice": True},
        axis={"format": "~e", "tickCount": 6},
    )  # fmt: skip
    layers = [
        _band("envelopes", y, 0.22),
        _line("limits", y),
        _band("ranges", y, 0.18),
        _line("lines", y),
        _dots(y),
    ]
    return {"height": 210, "layer": layers}


def _memory() -> Spec:
    n = _field("n", "O", _N, axis={"labelAngle": 0})
    size = _field("size", "Q", "@axis", scale={"zero": True, "nice": True}, axis={"tickCount": 6})
    return {
        "height": 280,
        "layer": [
            {
                "data": {"name": "parts"},
                "mark": {"type": "bar", "width": {"band": 0.62}, "strokeWidth": 0.7},
                "encoding": {
                    "x": n, "y": {**size, "stack": "zero"}, "order": _field("order", "Q"),
                    "color": _OWN_COLOR,
                    "opacity": {"field": "opacity", "type": "quantitative", "scale": None},
                },
            },
            {
                "data": {"name": "planned"},
                "mark": {"type": "tick", "thickness": 2.5, "width": {"band": 0.8}},
                "encoding": {"x": n, "y": size, "color": _OWN_COLOR},
            },
            {
                "data": {"name": "budget"},
                "mark": {"type": "rule", "strokeDash": [6, 4], "strokeWidth": 1.6},
                "encoding": {"y": size, "color": _OWN_COLOR},
            },
            # The label again in the colour of the paper, thick, so that the budget's line spares it.
            *(
                {
                    "data": {"name": "totals"},
                    "mark": {"type": "text", "dy": -9, "fontSize": 12, **halo},
                    "encoding": {
                        "x": n, "y": size, "text": _field("label", "N"),
                        color: {"field": color, "type": "nominal", "scale": None},
                    },
                }
                for color, halo in (("stroke", {"strokeWidth": 5}), ("color", {}))
            ),
        ],
    }  # fmt: skip


def _tradeoff() -> Spec:
    scale = {"zero": False, "nice": True, "padding": 18}
    x = _field("x", "Q", "@axis", scale=scale, axis={"tickCount": 6})
    y = _field("y", "Q", "@other", scale=scale, axis={"tickCount": 6})
    both = {"x": x, "y": y, "color": _OWN_COLOR}
    return {
        "height": 280,
        "data": {"name": "points"},
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.5},
                "encoding": {**both, "detail": _field("panel", "N"), "order": _field("n", "Q")},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1.4},
                "encoding": {**both, "x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}, "encoding": both},
            {
                "mark": {"type": "text", "dy": {"expr": "datum.panel % 2 ? 15 : -13"}, "fontSize": 12},
                "encoding": {**both, "text": _field("label", "N")},
            },
        ],
    }  # fmt: skip


def _errors() -> Spec:
    x = _field("micro", "O", "micro-batch", sort=None, axis={"labelAngle": 0, "labelOverlap": True})
    y = _field("layer", "N", None, sort=None, axis={"labelLimit": 170})
    return {
        "height": {"step": 22},
        "data": {"name": "cells"},
        "layer": [
            {
                "mark": {"type": "rect", "strokeWidth": 1},
                "encoding": {
                    "x": x, "y": y, "color": _OWN_COLOR,
                    "stroke": {"field": "stroke", "type": "nominal", "scale": None},
                },
            },
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {
                    "x": x, "y": y, "text": _field("label", "N"),
                    "color": {"field": "ink", "type": "nominal", "scale": None},
                },
            },
        ],
    }  # fmt: skip


def _window() -> Spec:
    x = _field("first", "Q", "sample of the window", scale={"nice": False}, axis={"grid": False})
    y = _field("weight", "Q", "weight, one pass = 1", scale={"zero": True}, axis={"tickCount": 4})
    return {
        "height": 150,
        "layer": [
            {
                "data": {"name": "micro"},
                "mark": {"type": "rect", "strokeWidth": 1.5},
                "encoding": {
                    "x": x, "x2": {"field": "end"}, "y": y, "y2": {"field": "zero"}, "color": _OWN_COLOR,
                    "stroke": {"field": "stroke", "type": "nominal", "scale": None},
                },
            },
            {
                "data": {"name": "labels"},
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {
                    "x": {**x, "field": "middle"}, "y": {**y, "field": "at"},
                    "text": _field("label", "N"), "color": _OWN_COLOR,
                },
            },
            {
                "data": {"name": "one"},
                "mark": {"type": "rule", "strokeDash": [5, 3], "strokeWidth": 1.5},
                "encoding": {"y": y, "color": _OWN_COLOR},
            },
        ],
    }  # fmt: skip


def _noise() -> Spec:
    x = _field(
        "low", "Q", "samples", scale={"type": "log", "nice": False, "padding": 20}, axis={"tickCount": 6}
    )
    y = _field("label", "N", None, sort=None, axis={"labelLimit": 200})
    return {
        "height": {"step": 30},
        "data": {"name": "intervals"},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 8, "opacity": 0.35},
                "encoding": {"x": x, "x2": {"field": "high"}, "y": y, "color": _OWN_COLOR},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {"x": {**x, "field": "scale"}, "y": y, "color": _OWN_COLOR},
            },
            {
                "mark": {"type": "tick", "thickness": 3, "height": {"band": 0.75}},
                "encoding": {
                    "x": {**x, "field": "batch"}, "y": y,
                    "color": {"field": "ink", "type": "nominal", "scale": None},
                },
            },
        ],
    }  # fmt: skip


def _batches() -> Spec:
    x = _field(
        "batch", "Q", "global batch in samples",
        scale={"type": "log", "base": 2, "nice": False, "padding": 20},
        axis={"format": "d", "grid": False},
    )  # fmt: skip
    y = _field("loss", "Q", "@axis", scale={"zero": False, "nice": True}, axis={"tickCount": 6})
    both = {"x": x, "y": y, "color": _OWN_COLOR}
    return {
        "height": 260,
        "layer": [
            {
                "data": {"name": "noise"},
                "mark": {"type": "rect", "opacity": 0.2},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "color": _OWN_COLOR},
            },
            {
                "data": {"name": "limit"},
                "mark": {"type": "rule", "strokeDash": [6, 4], "strokeWidth": 1.4},
                "encoding": {"y": y, "color": _OWN_COLOR},
            },
            {"data": {"name": "losses"}, "mark": {"type": "line", "strokeWidth": 1.2}, "encoding": both},
            {
                "data": {"name": "losses"},
                "mark": {"type": "rule", "strokeWidth": 1.6},
                "encoding": {**both, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
            },
            {
                "data": {"name": "losses"},
                "mark": {"type": "point", "size": 75, "opacity": 1, "strokeWidth": 2},
                "encoding": {**both, "fill": {"field": "fill", "type": "nominal", "scale": None}},
            },
        ],
    }  # fmt: skip
