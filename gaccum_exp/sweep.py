"""What begins and what ends a sweep, around Hydra.

The beginning is a Hydra callback, since only Hydra knows that a sweep begins and where. The end is not:
Hydra skips its callback when an arm raises and turns errors in it into warnings. It comes after Hydra in
our own command line, and reads what the arms have left: their `arm.json` and their runs in the store.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


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
        """Note a single run."""
        _note(config, Path(config.hydra.run.dir), multirun=False)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a sweep, and say to its arms what it varies."""
        from gaccum_exp.arm import SWEPT_KEYS

        _note(config, Path(config.hydra.sweep.dir), multirun=True)
        os.environ[SWEPT_KEYS] = ",".join(_swept_keys(config))
        _prepare_store(config)


def outcomes(sweep: Begun) -> list[dict[str, Any]]:
    """Return how the arms of this sweep ended, as they have left it in their folders."""
    found = []
    for path in sorted(sweep.folder.rglob("arm.json")):
        outcome = json.loads(path.read_text())
        if outcome["sweep_id"] == sweep.sweep_id:
            found.append(outcome)
    return found


def exit_status(sweep: Begun) -> int:
    """Return 0, or 1 if a run failed, or 2 if a single run's input was at fault."""
    failed = [o for o in outcomes(sweep) if o["status"] != "FINISHED"]
    if not failed:
        return 0
    return 2 if not sweep.multirun and failed[0]["bad_input"] else 1


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
    lines = [*config.hydra.overrides.task, *(f"{k}={v}" for k, v in _sweeper_params(config).items())]
    for override in OverridesParser.create().parse_overrides([str(line) for line in lines]):
        if override.is_sweep_override():
            yield override.get_key_element().lstrip("+")


def _sweeper_params(config: DictConfig) -> dict[str, Any]:
    return dict(config.hydra.sweeper.get("params") or {})


def _prepare_store(config: DictConfig) -> None:
    """Create the store before the arms do: side by side they would all migrate a new database."""
    from gaccum_exp.errors import BadInputError
    from gaccum_exp.tracking import Store

    try:
        Store(config.tracking.uri, config.tracking.experiment_name)
    except BadInputError as error:
        log.debug("each arm will say so: %s", error)
