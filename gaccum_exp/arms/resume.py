"""Which run a command goes on with: the newest unfinished one of its configuration, or the one it names.

A run is unfinished that was KILLED, or whose process died; one that has FINISHED is not, nor one that
FAILED: what it met is there to be met again. A reference whose controls are not all trained is
unfinished too. All that is asked stands at the beginning and at the end of the runs' journals, and it is
asked before the command has a folder of its own, or torch.
"""

import copy
import fnmatch
import importlib.metadata
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.config.schema import Settings, validate
from gaccum_exp.errors import BadInputError, first_line, nearest
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import (
    PATTERN,
    Record,
    beginning,
    end_of,
    is_of_this_host,
    last_owner,
)
from gaccum_exp.tracking.locks import FileLock

AUTO, NEVER = "auto", "never"
LOOKED_THROUGH = 200
"""So many folders, the newest ones, are looked through for an unfinished run."""
PATIENCE_S = 0.5
"""So long a process that was killed, or one that delivers what it has left, may hold the run's lock."""
CONTROLS_LOCK = "controls.lock"
SAID = 5
"""So many keys are named that differ."""
ANOTHER_ROUTE = ("resume", "sweep_id", "data.workers", "checkpoint.", "tracking.", "sweep.", "figures.")
"""Keys, or beginnings of keys, that change neither what is trained nor what is measured of it. The
number of threads is none of them: 1 and 2 give other bits."""
SPLIT = (
    "accum.steps", "data.micro_batch_size", "accum.on_oom", "runtime.memory_budget_gib",
    "audit.at_start", "audit.every_steps", "audit.controls",
)  # fmt: skip
"""Those in which a run that is named may differ from the command: how its windows are split (N and the
micro-batch first), and what is asked beside its training."""


@dataclass(frozen=True, slots=True)
class Left:
    """A run as earlier commands have left it."""

    path: Path
    """Of its journal, absolute."""
    store: Record
    begin: Record
    status: str | None
    """None: it has no end."""

    @property
    def params(self) -> Mapping[str, str]:
        """Every value of its configuration by dotted key."""
        params: Mapping[str, str] = self.begin["params"]
        return params

    @property
    def sweep_id(self) -> str:
        """The id of the command that has begun it."""
        return str(self.begin["tags"].get("sweep_id", ""))

    @property
    def is_unfinished(self) -> bool:
        """Whether it was interrupted."""
        return self.status in (None, "KILLED")

    @property
    def chose_accum_steps(self) -> bool:
        """Whether its N was chosen by what fits."""
        return "accum.auto" in self.begin["tags"]

    @property
    def told(self) -> str:
        """Its folder and its name."""
        return f"{os.path.relpath(self.path.parent)} ({self.begin['name']})"


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run that this process goes on with: no other one can while it holds the lock."""

    left: Left
    lock: FileLock

    def settings(self, settings: Settings) -> Settings:
        """Return settings with the N of the run where they leave it to be chosen."""
        if settings.chooses_accum_steps:
            return settings.with_accum_steps(int(self.left.params["accum.steps"]))
        return settings


def of_command(config: DictConfig) -> Resumed | None:
    """Return the run that a single run's command goes on with; None: it begins one.

    Args:
        config: as composed, with Hydra's own block.

    Raises:
        BadInputError: it names a run that it cannot go on with.
    """
    asked = str(config.resume)
    if config.task != "train" and asked not in (AUTO, NEVER):
        raise BadInputError(
            f"resume={asked}: goes on with a training, and task={config.task} is none; leave it out"
        )
    if asked == NEVER or config.task != "train":
        return None
    wanted: Wanted | None = None
    if asked != AUTO:
        try:
            return _named(config, asked, _validated(config))
        except (HydraException, OmegaConfBaseException) as error:
            raise BadInputError(f"resume={asked}: {first_line(error)}") from error
    controls = bool(config.audit.controls)
    for folder in _folders(config)[:LOOKED_THROUGH]:
        if not any(_may_go_on(path, controls) for path in _journals(folder)):
            continue
        try:
            wanted = wanted or Wanted(_validated(config), config)
        except Exception:  # whoever runs it says what is wrong with it
            return None
        resumed = _taken(folder, wanted)
        if resumed is not None:
            return resumed
    return None


def in_folder(folder: Path, settings: Settings) -> Resumed | None:
    """Take what a sweep has left of an arm in its folder, whatever has become of it; None: nothing.

    No sweep has an arm twice.
    """
    return _taken(folder, Wanted(settings), settings.sweep_id)


def _taken(folder: Path, wanted: "Wanted", sweep_id: str | None = None) -> Resumed | None:
    left = _unfinished(folder, wanted, sweep_id)
    if left is None:
        return None
    if left.status is None and not is_of_this_host(last := last_owner(left.path)):
        host = last.get("host")
        where = os.path.relpath(folder)
        print(f"gaccum_exp: {left.told} is of {host}, which may still train it: another run is begun "
              f"(resume={where} goes on with it)", file=sys.stderr)  # fmt: skip
        return None
    lock = _lock_of(left)
    if lock is None or (left.status == "FINISHED" and controls_in_training(folder)):
        if lock is not None:
            lock.release()
        return None
    now = _unfinished(folder, wanted, sweep_id)  # since another process may have gone on with it
    if now is None or now.path != left.path:
        lock.release()
        return None
    return Resumed(now, lock)


def control_in(folder: Path, sweep_id: str, number: int) -> Left | None:
    """Return the control of a number that a command has begun in a folder; None where there is none."""
    of_number = (run for run in runs_in(folder) if run.params.get("audit.control_seed") == str(number))
    return next((run for run in of_number if run.sweep_id == sweep_id), None)


def controls_lock(folder: Path) -> FileLock | None:
    """Take the lock of who trains the controls of a folder's reference; None: another process does."""
    return FileLock.take(folder / CONTROLS_LOCK)


def controls_in_training(folder: Path) -> bool:
    """Whether another process trains them, or the reference that will have them."""
    if not (folder / CONTROLS_LOCK).exists():
        return False
    lock = controls_lock(folder)
    if lock is not None:
        lock.release()
    return lock is None


def take(left: Left) -> Resumed:
    """Go on with a run that belongs to one that is this process's already.

    Raises:
        BadInputError: another process trains it.
    """
    lock = _lock_of(left)
    if lock is None:
        raise BadInputError(f"{left.told} is being trained by another process")
    return Resumed(left, lock)


def runs_in(folder: Path) -> list[Left]:
    """Return the runs whose journals lie in a folder, the newest first."""
    found = []
    for path in _journals(folder.absolute()):
        store, begin = beginning(path)
        if begin and begin["params"]:  # else it is a report, or was refused
            found.append(Left(path, store, begin, _status(path)))
    return sorted(found, key=lambda run: int(run.begin["time_ms"]), reverse=True)


def go_on_there(config: DictConfig, resumed: Resumed) -> None:
    """Give a command the folder, the id and the store of the run that it goes on with."""
    left = resumed.left
    with read_write(config), open_dict(config), read_write(config.hydra):
        config.sweep_id = left.sweep_id
        config.hydra.run.dir = str(left.path.parent)
        if left.store.get("folder") == os.getcwd():  # else a relative address is another one
            config.tracking.uri = left.store["uri"]
            config.tracking.experiment_name = left.store["experiment_name"]


def as_written(config: DictConfig, key: str) -> Any:
    """Return a value with its interpolations: what they stand for is only known when a job starts."""
    block, _, name = key.rpartition(".")
    values: Any = OmegaConf.to_container(OmegaConf.select(config, block), resolve=False)
    return values[name]


def version_of(package: str) -> str:
    """Return the version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"


class Wanted:
    """The configuration whose run is looked for.

    Args:
        settings: the configuration.
        config: what it was made from, where a run's id is another one: its values may refer to the id.
    """

    def __init__(self, settings: Settings, config: DictConfig | None = None) -> None:
        self.settings, self._config = settings, config

    def differing(self, run: Left) -> dict[str, tuple[str, str]]:
        """Return the keys that matter and differ, each with the run's value and the wanted one."""
        settings = self.settings
        if self._config is not None and run.sweep_id != settings.sweep_id:
            settings = _validated(self._config, run.sweep_id)
        theirs, ours = _mattering(run.params), _mattering(settings.flat())
        ours["version.gaccum_exp"] = version_of("gaccum_exp")
        theirs["version.gaccum_exp"] = run.begin["tags"].get("version.gaccum_exp", "")
        if self.settings.chooses_accum_steps:
            for key in ("accum.steps", "data.micro_batch_size"):
                ours[key] = theirs.get(key, "") if run.chose_accum_steps else "auto"
        none = "not there"
        return {
            key: (theirs.get(key, none), ours.get(key, none))
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        }


def _unfinished(folder: Path, wanted: Wanted, sweep_id: str | None) -> Left | None:
    runs = runs_in(folder)
    for run in runs:
        if sweep_id not in (None, run.sweep_id) or wanted.differing(run):
            continue
        has_controls = run.status != "FINISHED" or not _lacks_controls(run, runs, wanted.settings)
        if sweep_id is not None or run.is_unfinished or not has_controls:
            return run
    return None


def something_is_left(folder: Path, settings: Settings) -> bool:
    """Whether a command's run, in its folder, is unfinished, or a control of it is."""
    runs = [run for run in runs_in(folder) if run.sweep_id == settings.sweep_id]
    return any(
        run.is_unfinished or (run.status == "FINISHED" and _lacks_controls(run, runs, settings))
        for run in runs
    )


def _lacks_controls(run: Left, runs: list[Left], settings: Settings) -> bool:
    """Whether a run that has finished is a reference some of whose controls are still to be trained."""
    if not settings.in_one_pass or not settings.audit.controls or settings.chooses_accum_steps:
        return False
    of_run = [r for r in runs if r.sweep_id == run.sweep_id and r.begin["tags"].get("control_of")]
    over = sum(not control.is_unfinished for control in of_run)
    # One whose memory ran out is no reference any more, and has none.
    return over < settings.audit.controls and b'"accum.steps_used"' not in run.path.read_bytes()


def _mattering(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the values that matter, as text."""
    return {key: str(value) for key, value in params.items() if not key.startswith(ANOTHER_ROUTE)}


def _named(config: DictConfig, asked: str, settings: Settings) -> Resumed:
    """Take the run that a command names.

    Raises:
        BadInputError: there is none, it has finished or is being trained, or it differs in what matters.
    """
    runs = [run for run in _runs_named(config, asked) if "control_of" not in run.begin["tags"]]
    if not runs:
        hint = nearest(asked, (AUTO, NEVER))
        raise BadInputError(f"resume={asked}: no such run: give the folder of one, or its id{hint}")
    run = runs[0]
    differing = Wanted(settings, config).differing(run)
    if settings.chooses_accum_steps:
        differing.pop("accum.steps", None)
    # A batch grows by whole micro-batches from the first N, so that another split is another training.
    may_differ = SPLIT if settings.accum.grow is None else SPLIT[2:]
    differing = {key: both for key, both in differing.items() if not key.startswith(may_differ)}
    if differing:
        said = [f"{k} ({there} there, {here} here)" for k, (there, here) in differing.items()]
        more = [f"and {len(said) - SAID} more"] if len(said) > SAID else []
        raise BadInputError(f"resume={asked}: another configuration: {', '.join(said[:SAID] + more)}")
    lock = _lock_of(run)
    if lock is None:
        raise BadInputError(f"resume={asked}: {run.told} is being trained by another process")
    run = replace(run, status=_status(run.path))
    if run.status == "FINISHED" and controls_in_training(run.path.parent):
        lock.release()
        raise BadInputError(f"resume={asked}: controls of {run.told} are being trained")
    if run.status == "FINISHED" and not _lacks_controls(run, runs_in(run.path.parent), settings):
        lock.release()
        raise BadInputError(f"resume={asked}: {run.told} has finished: nothing is left to be trained")
    return Resumed(run, lock)


def _runs_named(config: DictConfig, asked: str) -> list[Left]:
    """Return the runs in the folder that is named, or the one of an id, the newest first."""
    folder = Path(config.hydra.run.dir)
    for place in (Path(asked), folder.parent / asked):
        if os.path.isdir(place):  # Path.is_dir raises where a name is too long
            return runs_in(place)
    for place in _folders(config):
        for run in runs_in(place):
            if asked in (Delivered.of(run.path).run_id, run.begin["token"]):
                return [run]
    return []


def _folders(config: DictConfig) -> list[Path]:
    """Return the folders in which a run of the command may have been left, the newest first.

    That of the command itself, where it is given; else, where each command has one of its own, all that
    lie beside it.
    """
    folder = Path(config.hydra.run.dir)
    if "${" not in str(as_written(config, "hydra.run.dir")):
        return [folder]
    return [path for _, path in sorted(_beside(folder.parent), reverse=True)]


def _beside(place: Path) -> Iterator[tuple[float, Path]]:
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False) or entry.name.startswith("."):
                    continue
                if (found := entry.stat()).st_uid == os.getuid():  # runs of others are theirs
                    yield found.st_mtime, Path(entry.path)
    except OSError:  # there is no such place, or it is somebody else's
        return


def _journals(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder) if fnmatch.fnmatchcase(name, PATTERN)]
    except OSError:
        return []


def _may_go_on(path: Path, controls: bool) -> bool:
    """Whether a journal's end lets its run go on."""
    try:
        status = _status(path)
    except OSError:
        return False
    return status in (None, "KILLED") or (controls and status == "FINISHED")


def _status(path: Path) -> str | None:
    end = end_of(path)
    return str(end["status"]) if end else None


def _lock_of(run: Left) -> FileLock | None:
    """Take the lock of a run; None: the process that trains it lives."""
    until = time.monotonic() + PATIENCE_S
    while (lock := FileLock.take(run.path.with_suffix(".lock"))) is None:
        if time.monotonic() > until:
            return None
        time.sleep(0.02)
    return lock


def _validated(config: DictConfig, sweep_id: str | None = None) -> Settings:
    config = copy.deepcopy(config)
    with read_write(config), open_dict(config):
        config.pop("hydra", None)
        if sweep_id is not None:
            config.sweep_id = sweep_id
    return validate(config)
