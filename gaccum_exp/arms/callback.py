"""What begins and what ends a sweep, around Hydra.

The beginning is a Hydra callback, since only Hydra knows that a sweep begins and where. The end is not:
Hydra skips its callback when an arm raises and turns errors in it into warnings. It comes after Hydra in
our own command line, and reads what the arms have left: their `arm.json` and their runs in the store.
"""

import importlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.shipper import connect, start

log = logging.getLogger(__name__)
OUTCOME = "arm.json"
"""How an arm ended, in the arm's folder."""
SWEPT_KEYS = "GACCUM_EXP_SWEPT_KEYS"
"""Environment variable: the keys that a sweep varies, comma-separated, for the names of its runs."""

VERDICT_STATUS = {"biased": 3, "inconclusive": 5, "stochastic": 4}
"""Exit statuses of the verdicts that are not 0, the one first that outranks the others."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What Hydra has begun in this process."""

    folder: Path
    sweep_id: str
    tracking_uri: str
    experiment_name: str
    multirun: bool


begun: list[Begun] = []
"""The run or sweep of this process, once Hydra has begun it; read by the command line at the end."""


class SweepBegin(Callback):
    """Notes where the run or sweep writes, and prepares what its arms share."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a single run, and wake up what will record it."""
        _note(config, Path(config.hydra.run.dir), multirun=False)
        start()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a sweep, say to its arms what it varies, and refuse it where nothing can be recorded."""
        _note(config, Path(config.hydra.sweep.dir), multirun=True)
        os.environ[SWEPT_KEYS] = ",".join(_swept_keys(config))
        if config.sweep.vectorize == "seed":
            _one_job_for_all_seeds(config)
        if _first_arm_composes(config, kwargs["config_name"]):
            _prepare_store(config)


def outcomes(sweep: Begun) -> list[dict[str, Any]]:
    """Return how the arms of this sweep ended, as they have left it in their folders."""
    found = []
    for path in sorted(sweep.folder.rglob(OUTCOME)):
        outcome = json.loads(path.read_text())
        if outcome["sweep_id"] == sweep.sweep_id:
            found.append(outcome | {"folder": str(path.parent)})
    return found


def exit_status(sweep: Begun) -> int:
    """Return 1 if a run failed (2 if it is a single one and its input was at fault), else the verdicts'.

    Of several arms' verdicts that were asked for, the first of 3, 5, 4 that any has earned; else 0.
    """
    ended = outcomes(sweep)
    failed = [o for o in ended if o["status"] != "FINISHED"]
    if failed:
        return 2 if not sweep.multirun and failed[0]["bad_input"] else 1
    earned = {o["verdict"] for o in ended if o["audit_asked"]}
    return next((status for verdict, status in VERDICT_STATUS.items() if verdict in earned), 0)


def _note(config: DictConfig, folder: Path, *, multirun: bool) -> None:
    tracking = config.tracking
    begun.append(
        Begun(
            folder=folder.absolute(),
            sweep_id=str(config.sweep_id),
            tracking_uri=str(tracking.uri),
            experiment_name=str(tracking.experiment_name),
            multirun=multirun,
        )
    )


def _swept_keys(config: DictConfig) -> Iterator[str]:
    sweepers = dict(config.hydra.sweeper.get("params") or {})
    for override in _parsed([*config.hydra.overrides.task, *(f"{k}={v}" for k, v in sweepers.items())]):
        if override.is_sweep_override():
            yield override.get_key_element().lstrip("+")


def _one_job_for_all_seeds(config: DictConfig) -> None:
    """Take the seeds out of what the sweeper varies: a job is then an arm with a list of them.

    Hydra gives the sweeper its overrides after this callback. Other sweepers than its own ask for one
    value at a time, and wait for what comes of it.
    """
    hydra = config.hydra
    if not str(hydra.sweeper._target_).endswith("BasicSweeper"):
        log.warning("sweep.vectorize=seed: only Hydra's basic sweeper varies seeds that can be stacked")
        return
    configured = [f"{key}={value}" for key, value in dict(hydra.sweeper.get("params") or {}).items()]
    overrides = _parsed([*configured, *hydra.overrides.task])
    of_seed = [o for o in overrides if o.get_key_element().lstrip("+") == "seed"]
    if not of_seed or not of_seed[-1].is_discrete_sweep():
        return
    seeds = list(of_seed[-1].sweep_string_iterator())
    if len(set(seeds)) < max(2, len(seeds)):
        return
    own = [f"{of_seed[-1].get_key_element()}={seeds[0]}", f"sweep.seeds=[{','.join(seeds)}]"]
    lines: list[str] = []
    for override in overrides:
        if override is of_seed[-1]:
            lines += own
        elif override not in of_seed:
            lines.append(str(override.input_line))
    with read_write(hydra), open_dict(hydra):
        hydra.overrides.task = lines
        if configured:
            hydra.sweeper.params = {}


def _first_arm_composes(config: DictConfig, config_name: str | None) -> bool:
    """Where it does not, Hydra is about to say why, and that need not wait for torch and MLflow."""
    overrides = []
    for override in _parsed(config.hydra.overrides.task):
        if not override.is_sweep_override():
            overrides.append(str(override.input_line))
        elif override.is_choice_sweep():
            first = next(iter(override.sweep_string_iterator()))
            overrides.append(f"{override.get_key_element()}={first}")
    try:
        compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException):
        return False
    return True


def _parsed(lines: Iterable[object]) -> list[Override]:
    return OverridesParser.create().parse_overrides([str(line) for line in lines])


def _prepare_store(config: DictConfig) -> None:
    """Create the store before the arms do: side by side they would all migrate a new database.

    An exit is the one exception that Hydra does not turn into a warning here.
    """
    store = connect(config.tracking.uri, config.tracking.experiment_name)
    importlib.import_module("torch")  # what the arms need, meanwhile
    try:
        store.ready()
    except BadInputError as error:
        print(f"gaccum_exp: {error}", file=sys.stderr)
        raise SystemExit(2) from None
