"""Where the MLflow UI shows one sweep: the link, and the experiment tags that it rests on.

The link opens the experiment's chart view with nothing but the runs of one sweep in it. Its address
alone cannot do that: the chart view draws the first ten runs unless its state says otherwise. So, as
MLflow's own button for sharing a view does, the state is kept in an experiment tag, which the link
names. Three things about it were found by trying MLflow 3.5.0 and 3.17.2:

- the filter has to stand in the state as well, and must not stand in the link: from 3.17 on a link
  with a filter of its own ignores the state;
- 3.5 takes the state as it stands and fails on a missing key where 3.17 falls back on a default,
  so the state is written out in full, as plain JSON, which both read;
- an experiment of unknown kind makes 3.5 guess the kind and drop the chart view from the address,
  so the experiment says what kind it is.

Nothing here imports MLflow: these are texts, to be written with a client.
"""

import hashlib
import json
import shlex
import shutil
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

LOCAL_PORT = 5000


def experiment_tags(sweep_id: str) -> dict[str, str]:
    """Return the experiment tags to set, once or again, before `ui_link` for this sweep is opened."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{_share_key(sweep_id)}": json.dumps(_view_state(sweep_id)),
    }


def ui_link(base_url: str, experiment_id: str, sweep_id: str) -> str:
    """Return the address of the chart view of exactly the runs tagged with this `sweep_id`.

    Args:
        base_url: where the server answers, e.g. `http://127.0.0.1:5000`.
        experiment_id: the experiment that holds the runs and carries `experiment_tags(sweep_id)`.
        sweep_id: without a single quote.
    """
    # The workflow is what MLflow calls the side of its menu that lists runs; older ones ignore it.
    return (
        f"{base_url.rstrip('/')}/#/experiments/{quote(experiment_id, safe='')}/runs"
        f"?compareRunsMode=CHART&workflowType=machine_learning"
        f"&viewStateShareKey={_share_key(sweep_id)}"
    )


def ui_lines(tracking_uri: str, experiment_id: str, sweep_id: str) -> list[str]:
    """Return the two lines to print after a sweep: how to reach a server, and the link.

    A store that is a server already is named by its address, without user name and password; any
    other one by the shell command that serves it on this machine.
    """
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        parts = urlsplit(tracking_uri)
        address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
        return [address, ui_link(address, experiment_id, sweep_id)]
    # The short name only where it is this environment's: the user may not have activated it, and
    # another MLflow would want to migrate the database.
    found = shutil.which("mlflow")
    is_ours = found and Path(found).parent == Path(sys.executable).parent
    program = "mlflow" if is_ours else f"{shlex.quote(sys.executable)} -m mlflow"
    serve = f"ui --backend-store-uri {shlex.quote(tracking_uri)} --port {LOCAL_PORT}"
    link = ui_link(f"http://127.0.0.1:{LOCAL_PORT}", experiment_id, sweep_id)
    return [f"{program} {serve}", link]


def _share_key(sweep_id: str) -> str:
    # A hash, as MLflow's own keys are: safe in a tag's key and in an address whatever the id holds.
    return hashlib.sha256(sweep_id.encode()).hexdigest()[:32]


def _view_state(sweep_id: str) -> dict[str, object]:
    # Every key of MLflow's own state that either version reads unasked; the first five are ours to
    # choose, the rest say "as in a fresh view".
    training = {"uuid": "train", "name": "train", "display": True, "isReordered": True}
    return {
        "searchFilter": f"tags.sweep_id='{sweep_id}'",
        "runsHiddenMode": "SHOW_ALL",
        # The training curves come first and in full width; MLflow adds the other sections below.
        "compareRunSections": [training | {"columns": 1}],
        "isAccordionReordered": True,
        "compareRunCharts": [],
        "selectedColumns": [],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "groupsExpanded": {},
        "hideEmptyCharts": True,
        "useGroupedValuesInCharts": True,
        "autoRefreshEnabled": True,
    }
