"""The context of a job, and the launch of a command."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.arms.outcome import Outcome
from gaccum_exp.arms.resume import Resumed
from gaccum_exp.config.schema import Settings
from gaccum_exp.errors import complain, printable
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.locks import FileLock
from gaccum_exp.train.stopping import Stop

if TYPE_CHECKING:
    from gaccum_exp.arms.report import Report

_NOT_COMPARED = frozenset({"tracking", "sweep", "sweep_id", "checkpoint", "resume", "figures"})
"""Blocks and keys that do not change what an arm is."""


class KnownArm(NamedTuple):
    """An arm that a sweep has which goes on."""

    folder: str
    """In the sweep's."""
    name: str
    status: str | None
    """How it ended for good; None: it is to go on."""
    objective: float | None = None
    reason: str | None = None
    verdict: str | None = None
    audit_asked: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """Which of a sweep's jobs one is."""

    number: int
    """From 1."""
    total: int | None
    """None: the sweeper decides as it goes."""
    left: int | None = None
    """How many are to follow; None: not known, or others run beside it."""
    taken_s: tuple[float, ...] = ()
    """What jobs before it took, in seconds."""

    def __str__(self) -> str:
        return f"{self.number} of {self.total}" if self.total else f"arm {self.number}"

    def following_s(self, own_s: float) -> float:
        """Estimate the seconds of those to follow: what it and those before took in the mean, each."""
        every = (*self.taken_s, own_s)
        return (self.left or 0) * sum(every) / len(every)


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
    home: Path = field(default_factory=Path.cwd)
    """The working directory of the command, which Hydra may have its jobs leave."""
    command_id: str = ""
    """Of the command that runs it: the sweep's own, or another one where the sweep goes on."""
    command: str = ""
    """That line, as it is typed into a shell."""
    sweep_folder: Path | None = None
    known: Mapping[str, KnownArm] = field(default_factory=dict)
    """The arms that a sweep has which goes on, by digest."""
    turn: Turn | None = None
    """None: it is of no sweep."""

    @property
    def sweep_id(self) -> str:
        """The id that all arms of a command share."""
        return str(self.config.sweep_id)

    @property
    def digest(self) -> str:
        """Its configuration in sixteen hexadecimal digits, without where it is recorded and how it goes
        on: arms of a sweep are the same where this is.
        """
        try:
            tree = OmegaConf.to_container(self.config, resolve=True)
        except OmegaConfBaseException:  # which will be its failure
            tree = OmegaConf.to_container(self.config)
        assert isinstance(tree, dict)
        kept = {key: value for key, value in tree.items() if key not in _NOT_COMPARED}
        text = json.dumps(_in_order(kept), default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def known_arm(self) -> KnownArm | None:
        """This arm as the sweep has it that goes on; None: it is new there."""
        return self.known.get(self.digest) if self.known else None

    @property
    def place(self) -> str | None:
        """Its folder, in the sweep's; None: it is of no sweep."""
        if self.sweep_folder is None or not self.folder.is_relative_to(self.sweep_folder):
            return None
        return str(self.folder.relative_to(self.sweep_folder))

    def at_home(self) -> "ArmContext":
        """Return the same in the folder that the sweep has for it already, if it does."""
        known = self.known_arm
        if known is None or self.sweep_folder is None:
            return self
        # What is there of an unfinished arm, its journal and its checkpoints, is found here.
        return replace(self, folder=self.sweep_folder / known.folder)

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
    """Return a run's name, what the sweep varies first: `N=4 · lr=0.1 · micro 64 · mean`.

    MLflow's lists cut a name after some twenty signs.
    """
    if control_of is not None:
        return f"{control_of} · control {settings.audit.control_seed}"
    first, largest = settings.accum.steps, settings.accum_steps
    n = largest if first == largest else f"{first} to {largest}"  # of a batch that grows
    parts = {"accum.steps": f"N={n}", "data.micro_batch_size": f"micro {settings.data.micro_batch_size}"}
    if settings.task == "plan":  # it is of every N
        batch = f"global batch {settings.data.global_batch_size}"
        parts = {"accum.steps": "plan", "data.global_batch_size": batch}
    parts["accum.reduction"] = settings.accum.reduction
    values = settings.flat() | dict(context.choices)
    keys = _shortened([key for key in context.swept_keys if key in values])
    for key in keys:
        if key == "data.global_batch_size":
            keys[key] = "batch"
        elif key.endswith("._target_"):  # a class, by its bare name
            keys[key], values[key] = key.removesuffix("._target_"), str(values[key]).rpartition(".")[2]
    differs = [text for key, text in parts.items() if key in keys]
    differs += [f"{short}={values[key]}" for key, short in keys.items() if key not in parts]
    shared = [text for key, text in parts.items() if key not in keys]
    return printable(" · ".join(differs + shared))


def _shortened(keys: Sequence[str]) -> dict[str, str]:
    """Return each key as short as still tells it from the others: `lr` of `optimizer.lr`."""

    def ends_alone(key: str, end: str) -> bool:
        return sum(f".{other}".endswith(f".{end}") for other in set(keys)) == 1

    def ends(key: str) -> list[str]:
        words = key.split(".")
        return [".".join(words[-count:]) for count in range(1, len(words) + 1)]

    return {key: next((end for end in ends(key) if ends_alone(key, end)), key) for key in keys}


def label_of(context: ArmContext, settings: Settings, also: str = "") -> str:
    """Return what a training is called while it runs, in a few words: `N=4 lr=0.1 · 3 of 12`."""
    first, largest = settings.accum.steps, settings.accum_steps
    words = [f"N={first}" if first == largest else f"N={first} to {largest}"]
    values = settings.flat() | dict(context.choices)
    for key in context.swept_keys:
        if key == "accum.reduction":
            words.append(str(values[key]))
        elif key in values and key != "accum.steps":
            words.append(f"{key.rpartition('.')[2]}={values[key]}")
    parts = [" ".join(words), also, "" if context.turn is None else str(context.turn)]
    return printable(" · ".join(part for part in parts if part))


def given_name(context: ArmContext) -> str:
    """Return what the command line says of an arm, where its configuration cannot say it."""
    lines = context.overrides
    swept = [line for line in lines if line.partition("=")[0].lstrip("+") in context.swept_keys]
    return printable(" · ".join(swept) or " · ".join(lines))


def contexts_of_seeds(context: ArmContext) -> list[ArmContext]:
    """Return the job of each seed, as Hydra would have made it; without several seeds, the given one.

    Each is where the sweep has it, if it goes on.
    """
    if not isinstance(context.config.sweep.seeds, ListConfig):
        return [context.at_home()]
    contexts = []
    for seed in context.config.sweep.seeds:
        overrides = []
        for line in context.overrides:
            key = line.partition("=")[0]
            if key != "sweep.seeds":
                overrides.append(f"{key}={seed}" if key.lstrip("+") == "seed" else line)
        folder, values = context.folder / f"seed={seed}", {"seed": seed, "sweep.seeds": None}
        one = context.with_values(values, folder=folder, overrides=tuple(overrides)).at_home()
        one.folder.mkdir(parents=True, exist_ok=True)
        contexts.append(one)
    return contexts


def _in_order(value: Any) -> Any:
    """Return nested containers as lists, whatever order the keys of mappings came in."""
    if isinstance(value, dict):
        pairs = ([str(key), _in_order(of_key)] for key, of_key in value.items())
        return sorted(pairs, key=lambda pair: pair[0])
    return [_in_order(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Launch:
    """The single run or the sweep that a command has launched, and where it records."""

    folder: Path
    sweep_id: str
    tracking_uri: str
    experiment_name: str
    multirun: bool
    called: bool = False
    """Whether Python code has called, which is handed the comparison instead of being printed to."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Python code that has asked for a sweep, and is handed what that shows."""

    overrides: tuple[str, ...] = ()
    """As it has written them."""
    named: tuple[str, ...] = ()
    """Its arguments by name, as they are written: `accum_steps=[1, 2]`, `model=…`."""
    handed_over: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Its objects that stand for a `_target_`, by digest: see `handed_over`."""

    def call(self, *more: str) -> str:
        """Return its call with these overrides besides: `sweep('model=mlp', accum_steps=[1, 2])`."""
        return f"sweep({', '.join([*map(repr, (*self.overrides, *more)), *self.named])})"


@dataclass(slots=True)
class Command:
    """A command while it runs."""

    stop: Stop
    """Asked to end it."""
    arguments: Sequence[str] = ()
    """What stands behind the program's name."""
    caller: Caller | None = None
    """None: somebody has typed it."""
    raw: bool = False
    """Whether the user wants to see where an error comes from (HYDRA_FULL_ERROR=1)."""
    command_id: str = ""
    extend: str | None = None
    """The key of a sweep that is to be extended until its best value lies inside."""
    further: Sequence[str] = ()
    """The arguments of the command that is to follow, where it is; the last one compares."""
    planned: int | None = None
    """How many arms a sweep's command line names; None: that is the sweeper's to decide."""
    launch: Launch | None = None
    """Noted by the callback, once Hydra has composed the configuration."""
    resumed: Resumed | None = None
    """The run that a single run goes on with."""
    settings: Settings | None = None
    """Of a single run."""
    lock: FileLock | None = None
    """Of the sweep that it goes on with."""
    journal: Journal | None = None
    """Of a sweep: its report is recorded there, as a run of its own."""
    outcomes: dict[Path, Outcome] = field(default_factory=dict)
    """How the arms of a sweep ended that this process has started, by folder."""
    taken_s: list[float] = field(default_factory=list)
    """What each job took that this process has run, of those that the sweep did not have yet."""

    interrupted: str | None = None
    """By what it was ended; None: it was not."""
    report: "Report | None" = None
    """Of a sweep, for its caller: what it shows."""
    complaints: list[str] = field(default_factory=list)
    """What its caller is to be told is wrong."""

    def complain(self, line: object) -> None:
        """Say what is wrong: at once, or to its caller when it has ended."""
        if self.caller is None:
            complain(line)
        else:
            self.complaints.append(str(line))

    def turn(self, number: int, total: int | None, over: int) -> Turn:
        """Return a job's place in the sweep; `over`: how many arms had ended before the command."""
        taken_s = tuple(self.taken_s)
        left = None if total is None else min(total - number, max(0, total - over - len(taken_s) - 1))
        return Turn(number, total, left, taken_s)


current_command: ContextVar[Command | None] = ContextVar("current_command", default=None)
"""Set while this process runs a command."""


def command_here() -> Command | None:
    """Return the command that this process runs; None where it runs a launcher's job.

    Hydra's basic launcher runs one job after the other in the command's process. Launchers that run jobs
    side by side, or on other hosts, start processes for them.
    """
    return current_command.get()
