"""The beginning of a run or a sweep, as a Hydra callback: only Hydra knows when it begins, and where.

The end is no callback: Hydra skips that when an arm raises, and turns errors in it into warnings. It
comes after Hydra in the command line, which reads what the arms have left: their `arm.json`, and their
runs in the store.
"""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.arms.context import Launch, current_command
from gaccum_exp.arms.outcome import BAD_INPUT
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.shipper import announce, helper_address, start_helper, wait_for_store

log = logging.getLogger(__name__)


class SweepStart(Callback):
    """Notes where a run or a sweep writes, and prepares what its arms share."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a single run, and start the process that will record it."""
        _note_launch(config, Path(config.hydra.run.dir), multirun=False)
        start_helper()
        _have_left_runs_delivered(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a sweep, tell its jobs what it varies, and refuse it where nothing can be recorded."""
        _note_launch(config, Path(config.hydra.sweep.dir), multirun=True)
        overrides = _parsed([*config.hydra.overrides.task, *_configured_overrides(config)])
        swept = [o.get_key_element() for o in overrides if o.is_sweep_override()]
        # An override of Hydra's own block reaches every job, whatever process or host a launcher runs it
        # on, and is not among the overrides that name and record an arm.
        listed = ",".join(f"'{key.lstrip('+')}'" for key in swept)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.overrides.hydra.append(f"+hydra.callbacks.sweep.swept_keys=[{listed}]")
            config.hydra.overrides.hydra.append(f"+hydra.callbacks.sweep.helper='{helper_address()}'")
        if config.sweep.vectorize == "seed":
            _one_job_for_all_seeds(config)
        if _first_arm_composes(config, kwargs["config_name"]):
            _prepare_store(config, Path(config.hydra.sweep.dir))
            _have_left_runs_delivered(config)


def _note_launch(config: DictConfig, folder: Path, *, multirun: bool) -> None:
    command = current_command.get()
    if command is not None:
        command.launch = Launch(
            folder=folder.absolute(),
            sweep_id=str(config.sweep_id),
            tracking_uri=str(config.tracking.uri),
            experiment_name=str(config.tracking.experiment_name),
            multirun=multirun,
        )


def _configured_overrides(config: DictConfig) -> list[str]:
    """Return what the configuration has the sweeper vary or set, as on the command line."""
    return [f"{k}={v}" for k, v in dict(config.hydra.sweeper.get("params") or {}).items()]


def _one_job_for_all_seeds(config: DictConfig) -> None:
    """Make one job of all seeds that the sweeper would vary: an arm with a list of them."""
    hydra = config.hydra
    # Hydra gives its own sweeper the overrides after this callback. Others ask for one value at a time,
    # and wait for its result.
    if not str(hydra.sweeper._target_).endswith("BasicSweeper"):
        log.warning("sweep.vectorize=seed: only Hydra's basic sweeper varies seeds that can be stacked")
        return
    configured = _configured_overrides(config)
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
    """Whether Hydra can compose it; if not, it will soon say why, without torch and MLflow."""
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


def _prepare_store(config: DictConfig, folder: Path) -> None:
    """Open the store before the arms do, which side by side would all make a new one."""
    to = config.tracking
    journal = Journal.create(folder, str(to.uri), str(to.experiment_name))
    command = current_command.get()
    if command is not None:
        command.journal = journal
    announce(journal.path)
    known = wait_for_store(journal.path)
    if known.state == "refused":
        print(f"gaccum_exp: {known.reason}", file=sys.stderr)
        # The one exception that Hydra does not turn into a warning here.
        raise SystemExit(BAD_INPUT) from None


def _have_left_runs_delivered(config: DictConfig) -> None:
    """Have the helper deliver, and end, what commands have left that were killed or had no store."""
    for folder in (Path(config.hydra.run.dir), Path(config.hydra.sweep.dir)):
        # Only where commands have folders of their own side by side: no search through a home.
        if str(config.sweep_id) in folder.name and folder.parent.is_dir():
            announce(folder.parent.absolute())
