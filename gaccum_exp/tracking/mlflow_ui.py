"""Where the MLflow UI shows one sweep: the link, and the experiment tags that it rests on.

The link opens the experiment's chart view with nothing but the runs of one sweep in it. Its address
alone cannot do that: the chart view draws the first ten runs unless its state says otherwise. So, as
MLflow's own button for sharing a view does, the state is kept in an experiment tag, which the link
names. Three things about it were found by trying MLflow 3.5.0 and 3.17.2:

- the filter has to stand in the state as well, and must not stand in the link: from 3.17 on a link
  with a filter of its own ignores the state;
- 3.5 takes the state as it stands and fails on a missing key where 3.17 falls back on a default,
  so the state is written out in full;
- an experiment of unknown kind makes 3.5 guess the kind and drop the chart view from the address,
  so the experiment says what kind it is.

Nothing here imports MLflow: these are texts, to be written with a client.
"""

import base64
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import zlib
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.tracking.store_uri import absolute

LOCAL_PORT = 5000
LARGE_ULP = 1000.0
"""So far the axis of loss gaps reaches at least: where rounding alone is at work, they lie below."""
RUN_COLOR = "mlflow.runColor"
"""The tag of a run that says in which colour the UI draws it."""
VERDICT = "verdict"
"""The tag that the list of runs is grouped by."""
_COSTS = (metrics.PEAK_RATIO, metrics.STEP_RATIO, metrics.STEP_TIME_MS)
_PARTS = ("activations", "gradients", "optimizer_state", "parameters", "temporaries", "inputs")
_SECTIONS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("Loss", 2, (metrics.TRAIN_LOSS, metrics.LOSS_GAP_ULP)),
    ("Memory and time", 3, _COSTS),
    ("Memory by category", 3, (metrics.PEAK_BYTES, *map(metrics.memory_part, _PARTS))),
    ("Evaluation", 2, (metrics.EVAL_LOSS, metrics.EVAL_ACCURACY, metrics.EVAL_PERPLEXITY)),
    ("Noise scale", 2, (metrics.NOISE_SCALE, metrics.in_adam_metric(metrics.NOISE_SCALE))),
)
"""What is shown at once: the name of a section, its charts side by side, their metrics."""
_ADDED = (metrics.LOSS_GAP, metrics.LOSS_GAP_ULP, *_COSTS)
"""Metrics that a comparison adds to the runs that it has read."""
_OTHERS = "Other metrics"
_COLUMNS = (metrics.LOSS_GAP_ULP, *_COSTS[:2], metrics.TRAIN_LOSS, metrics.EVAL_LOSS)
"""Of the table, beside the verdict."""
_POSITIVE = (metrics.TRAIN_LOSS, metrics.EVAL_LOSS, metrics.GRADIENT_NORM, "noise/")
"""Metrics, or beginnings of their names, whose curves are read on a logarithmic axis."""


def experiment_tags(
    sweep_id: str, runs: Sequence[RunRecord] = (), largest_ulp: float = 0.0
) -> dict[str, str]:
    """Return the experiment tags to set, once or again, before `ui_link` for this sweep is opened.

    Args:
        sweep_id: without a single quote.
        runs: of the sweep, which say what there is to be shown; none: MLflow's own arrangement.
        largest_ulp: how far their loss curves are apart at most, in `LOSS_GAP_ULP`'s unit.
    """
    # Packed as MLflow packs it, which keeps no more than 5,000 characters of it (3.17: 20,000).
    text = json.dumps(_view_state(sweep_id, runs, largest_ulp), separators=(",", ":")).encode()
    packed = base64.b64encode(zlib.compress(text, 9)).decode()
    return {
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{_share_key(sweep_id)}": f"deflate;{packed}",
    }


def ui_link(base_url: str, experiment_id: str, sweep_id: str, arranged: bool = True) -> str:
    """Return the address of the chart view of exactly the runs tagged with this `sweep_id`.

    Args:
        base_url: where the server answers, e.g. `http://127.0.0.1:5000`.
        experiment_id: the experiment that holds the runs and carries `experiment_tags(sweep_id)`.
        sweep_id: without a single quote.
        arranged: False where the experiment has no such tags, which a link must not name then.
    """
    state = f"viewStateShareKey={_share_key(sweep_id)}"
    if not arranged:
        state = f"searchFilter={quote(_filter_of(sweep_id), safe='')}"
    # The workflow is what MLflow calls the side of its menu that lists runs; older ones ignore it.
    return (
        f"{base_url.rstrip('/')}/#/experiments/{quote(experiment_id, safe='')}/runs"
        f"?compareRunsMode=CHART&workflowType=machine_learning"
        f"&{state}"
    )


def ui_lines(tracking_uri: str, experiment_id: str, sweep_id: str, arranged: bool = True) -> list[str]:
    """Return the two lines to print after a sweep: how to reach a server, and the link.

    A store that is a server already is named by its address, without user name and password; any
    other one by the shell command that serves it on this machine.
    """
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        parts = urlsplit(tracking_uri)
        address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
        return [address, ui_link(address, experiment_id, sweep_id, arranged)]
    # The short name only where it is this environment's: the user may not have activated it, and
    # another MLflow would want to migrate the database.
    found = shutil.which("mlflow")
    is_ours = found and Path(found).parent == Path(sys.executable).parent
    program = "mlflow" if is_ours else f"{shlex.quote(sys.executable)} -m mlflow"
    store = shlex.quote(absolute(tracking_uri, os.getcwd()))  # from whatever folder it is given
    serve = f"server --backend-store-uri {store} --host 127.0.0.1 --port {LOCAL_PORT} --workers 1"
    link = ui_link(f"http://127.0.0.1:{LOCAL_PORT}", experiment_id, sweep_id, arranged)
    return [f"{program} {serve}", link]


def _filter_of(sweep_id: str) -> str:
    return f"tags.sweep_id='{sweep_id}'"


def _share_key(sweep_id: str) -> str:
    # A hash, as MLflow's own keys are: safe in a tag's key and in an address whatever the id holds.
    return hashlib.sha256(sweep_id.encode()).hexdigest()[:32]


def _view_state(sweep_id: str, runs: Sequence[RunRecord], largest_ulp: float) -> dict[str, object]:
    # Every key of MLflow's own state that either version reads unasked; those from `columnWidths` on
    # say "as in a fresh view".
    sections, charts = _arrangement(runs)
    for chart in charts:
        if chart["metricKey"] == metrics.LOSS_GAP_ULP:  # a fixed axis, on which rounding lies low
            top = max(LARGE_ULP, 2 * largest_ulp)
            chart["range"] = {"yMin": -1, "yMax": round(math.log10(top), 3)}
    judged = any(run.tags.get(VERDICT) for run in runs)
    verdict = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": VERDICT}]}
    return {
        "searchFilter": _filter_of(sweep_id),
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "compareRunCharts": charts,
        # The list beside the charts has no columns, so that there the verdicts are its headings.
        "groupBy": verdict if judged else None,
        "useGroupedValuesInCharts": False,
        "selectedColumns": [f"tags.`{VERDICT}`", *(f"metrics.`{metric}`" for metric in _COLUMNS)],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "groupsExpanded": {},
        "hideEmptyCharts": True,
        "autoRefreshEnabled": True,
    }


def _arrangement(runs: Sequence[RunRecord]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the sections of the view and their charts: one for each metric of the runs.

    A metric without a chart of its own would get one from MLflow: a line, also through a single point.
    """
    left = {metric for run in runs for metric in run.metrics}
    curves = [item for run in runs for item in run.curves.items()]
    several = {key for key, curve in curves if len(curve.values) > 1}
    left |= {metric for metric in _ADDED if left}
    sections, charts = list[dict[str, Any]](), list[dict[str, Any]]()

    def add(name: str, columns: int, keys: Iterable[str], display: bool = True) -> None:
        shown = [key for key in keys if key in left]
        left.difference_update(shown)
        if shown:
            section = {"uuid": name, "name": name, "display": display, "isReordered": True}
            sections.append(section | {"columns": columns, "cardHeight": 300})
            charts.extend(_chart(key, name, _is_curve(key, several)) for key in shown)

    for name, columns, keys in _SECTIONS:
        terms = sorted(key for key in left if key.startswith(metrics.of_term(keys[0], "")))
        add(name, columns, (*keys, *terms))
    add(_OTHERS, 3, sorted(left), display=False)
    return sections, charts


def _is_curve(metric: str, several: Set[str]) -> bool:
    """Whether a metric has several points, told by those of which that is known."""
    if metric.startswith((metrics.TRAIN_LOSS, "optim/")):
        metric = metrics.TRAIN_LOSS
    return (metrics.EVAL_LOSS if metric.startswith("eval/") else metric) in several


def _chart(metric: str, section: str, is_curve: bool) -> dict[str, Any]:
    """Return a chart of one metric: a curve for each run, else a bar."""
    chart: dict[str, Any] = {
        "type": "BAR",
        "uuid": metric,
        "metricKey": metric,
        "metricSectionId": section,
    }
    chart |= {"isGenerated": False, "deleted": False}
    if not is_curve:
        return chart
    is_positive = metric.startswith(_POSITIVE) and metric != metrics.LOSS_GAP  # which may be 0
    scale = "log" if is_positive else "linear"
    return chart | {
        "type": "LINE", "selectedMetricKeys": [metric], "scaleType": scale, "xAxisKey": "step",
        "xAxisScaleType": "linear", "lineSmoothness": 0, "selectedXAxisMetricKey": "", "range": {},
        "displayPoints": False,
    }  # fmt: skip
