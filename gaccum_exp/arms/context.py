"""The context of a job, and the launch of a command."""

import copy
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gaccum_exp.tracking.journal import Journal


@dataclass(frozen=True, slots=True)
class ArmContext:
    """One job: its configuration, and what Hydra knows of it. It can be pickled."""

    config: DictConfig
    """As composed, before it is validated."""
    folder: Path
    """Of its output; it exists."""
    overrides: tuple[str, ...]
    """Of the command line, those of this job: `accum.steps=4`."""
    choices: Mapping[str, str | None]
    """The file that each block came from, by block: `{"model": "cnn"}`."""
    swept_keys: tuple[str, ...]
    """What the sweep varies; empty for a single run."""
    multirun: bool
    owns_terminal: bool
    """Whether no other arm runs beside it, so that a progress bar can have the terminal."""

    @property
    def sweep_id(self) -> str:
        """The id that all arms of a command share."""
        return str(self.config.sweep_id)

    def with_values(self, values: Mapping[str, Any], **changes: Any) -> "ArmContext":
        """Return a copy with other values in its configuration, by dotted key, and other fields."""
        config = copy.deepcopy(self.config)
        for key, value in values.items():
            OmegaConf.update(config, key, value)
        return replace(self, config=config, **changes)


@dataclass(frozen=True, slots=True)
class Launch:
    """The single run or the sweep that a command has launched, and where it records."""

    folder: Path
    sweep_id: str
    tracking_uri: str
    experiment_name: str
    multirun: bool


@dataclass(slots=True)
class Command:
    """A command while it runs."""

    launch: Launch | None = None
    """Noted by the callback, once Hydra has composed the configuration."""
    journal: Journal | None = None
    """Of a sweep: its report is recorded there, as a run of its own."""


current_command: ContextVar[Command | None] = ContextVar("current_command", default=None)
"""Set while this process runs a command."""


def in_command_process() -> bool:
    """Whether a job runs in the command's own process, and so alone."""
    # Hydra's basic launcher runs one job after the other there. Launchers that run jobs side by side, or
    # on other hosts, start processes for them, in which no command runs.
    return current_command.get() is not None
