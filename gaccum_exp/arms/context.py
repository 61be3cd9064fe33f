"""The context of a job, and the launch of a command."""

import copy
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from gaccum_exp.arms.outcome import Outcome
from gaccum_exp.config.schema import Settings
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.train.stopping import Stop


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


def overrides_of(hydra: Any) -> list[str]:
    """Return a job's overrides as they were written, interpolations too."""
    written: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    return list(written)


def name_of(context: ArmContext, settings: Settings, control_of: str | None = None) -> str:
    """Return a run's name, what differs: `N=4 · micro 64 · mean`, and whatever else the sweep varies."""
    if control_of is not None:
        return f"{control_of} · control {settings.audit.control_seed}"
    parts = [f"N={settings.accum_steps}", f"micro {settings.data.micro_batch_size}"]
    if settings.task == "plan":  # it is of every N
        parts = ["plan", f"global batch {settings.data.global_batch_size}"]
    parts.append(settings.accum.reduction)
    named = ("accum.steps", "accum.reduction", "data.micro_batch_size")
    values = settings.flat() | dict(context.choices)
    swept = [key for key in context.swept_keys if key in values and key not in named]
    return " · ".join(parts + [f"{key}={values[key]}" for key in swept])


def given_name(context: ArmContext) -> str:
    """Return what the command line says of an arm, where its configuration cannot say it."""
    lines = context.overrides
    swept = [line for line in lines if line.partition("=")[0].lstrip("+") in context.swept_keys]
    return " · ".join(swept) or " · ".join(lines)


def contexts_of_seeds(context: ArmContext) -> list[ArmContext]:
    """Return the job of each seed, as Hydra would have made it; without several seeds, the given one."""
    if not isinstance(context.config.sweep.seeds, ListConfig):
        return [context]
    contexts = []
    for seed in context.config.sweep.seeds:
        overrides = []
        for line in context.overrides:
            key = line.partition("=")[0]
            if key != "sweep.seeds":
                overrides.append(f"{key}={seed}" if key.lstrip("+") == "seed" else line)
        folder = context.folder / f"seed={seed}"
        folder.mkdir(parents=True, exist_ok=True)
        values = {"seed": seed, "sweep.seeds": None}
        contexts.append(context.with_values(values, folder=folder, overrides=tuple(overrides)))
    return contexts


@dataclass(frozen=True, slots=True)
class Launch:
    """The single run or the sweep that a command has launched, and where it records."""

    folder: Path
    sweep_id: str
    tracking_uri: str
    experiment_name: str
    multirun: bool
    planned: int | None = None
    """How many arms a sweep is to have, where that is known beforehand."""


@dataclass(slots=True)
class Command:
    """A command while it runs."""

    stop: Stop
    """Asked to end it."""
    arguments: Sequence[str] = ()
    """What stands behind the program's name."""
    raw: bool = False
    """Whether the user wants to see where an error comes from (HYDRA_FULL_ERROR=1)."""
    launch: Launch | None = None
    """Noted by the callback, once Hydra has composed the configuration."""
    journal: Journal | None = None
    """Of a sweep: its report is recorded there, as a run of its own."""
    outcomes: dict[Path, Outcome] = field(default_factory=dict)
    """How the arms of a sweep ended that this process has started, by folder."""


current_command: ContextVar[Command | None] = ContextVar("current_command", default=None)
"""Set while this process runs a command."""


def command_here() -> Command | None:
    """Return the command that this process runs; None where it runs a launcher's job.

    Hydra's basic launcher runs one job after the other in the command's process. Launchers that run jobs
    side by side, or on other hosts, start processes for them.
    """
    return current_command.get()
