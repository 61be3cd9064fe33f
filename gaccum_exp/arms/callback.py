"""The beginning of a run or a sweep, as a Hydra callback: only Hydra knows when it begins, and where.

The end is no callback: Hydra skips that when an arm raises, and turns errors in it into warnings. It
comes after Hydra in the command line, which reads what the arms have left: their `arm.json`, and their
runs in the store.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.arms import continued, resume
from gaccum_exp.arms.context import Launch, current_command
from gaccum_exp.arms.continued import Continued, SweepNote
from gaccum_exp.arms.outcome import BAD_INPUT
from gaccum_exp.config.schema import conf_dir
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.shipper import announce, helper_address, start_helper, wait_for_store
from gaccum_exp.tracking.store_uri import experiment_name, refuse_password, tracking_uri

log = logging.getLogger(__name__)


class SweepStart(Callback):
    """Notes where a run or a sweep writes and records, and prepares what its arms share."""

    def __init__(self) -> None:
        self._pinned: list[str] = []
        """Overrides that every job of a sweep is given besides its own."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a single run, and start the process that will record it."""
        with _refusing():
            continued.refuse_without_sweep(config)
            _decide_where(config)
            resumed = resume.of_command(config)
        if resumed is not None:
            resume.go_on_there(config, resumed)
        _note_launch(config, Path(config.hydra.run.dir), multirun=False, resumed=resumed)
        start_helper()
        _have_left_runs_delivered(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a sweep, tell its jobs what it varies, and refuse it where nothing can be recorded."""
        overrides = _parsed([*_given(config), *_configured_overrides(config)])
        swept = [o.get_key_element().lstrip("+") for o in overrides if o.is_sweep_override()]
        # What is appended here reaches every job, whatever process or host a launcher runs it on. Of
        # Hydra's own block, it is not among the overrides that name and record an arm; what is not is
        # taken from them again when the job starts.
        command_id = str(config.sweep_id)
        with _refusing():
            before = continued.asked_for(config, overrides, command_id)
            if before is not None:
                _take_up(config, before)
                swept = list(dict.fromkeys([*before.swept_keys, *swept]))
            _refuse_passwords(config, kwargs["config_name"], overrides)
            if config.resume not in (resume.AUTO, resume.NEVER):
                raise BadInputError(
                    f"resume={config.resume}: names one run, and not the arms of a sweep"
                )
            self._pinned = [f"sweep_id={_quoted(config.sweep_id)}", *_decide_where(config, before)]
        note = SweepNote(config.sweep_id, command_id, time.time(), swept_keys=swept)
        start_helper()
        unnamed = [*config.hydra.job.config.override_dirname.exclude_keys]
        unnamed += [line.partition("=")[0] for line in self._pinned]
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.overrides.hydra += [
                f"+hydra.callbacks.sweep.swept_keys=[{','.join(map(_quoted, swept))}]",
                f"+hydra.callbacks.sweep.helper={_quoted(helper_address())}",
                f"+hydra.callbacks.sweep.command_id={_quoted(command_id)}",
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(_quoted, unnamed))}]",
                *self._pinned,
            ]
            if before is not None:
                config.hydra.overrides.hydra += _of_what_is_there(config, before, command_id)
        _note_launch(config, Path(config.hydra.sweep.dir), multirun=True)
        self._note_plan(config, command_id)
        if config.sweep.vectorize == "seed":
            _one_job_for_all_seeds(config)
        if _composed(config, kwargs["config_name"]) is not None:  # else it is said without MLflow
            _prepare_store(config, Path(config.hydra.sweep.dir))
            _note_sweep(note, Path(config.hydra.sweep.dir))
            _have_left_runs_delivered(config)

    def _note_plan(self, config: DictConfig, command_id: str) -> None:
        command = current_command.get()
        if command is not None:
            given = _parsed([*_configured_overrides(config), *_given(config)])
            command.planned = continued.planned_arms(config, given)
            command.command_id = command_id

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave a job's own overrides, which are what it differs in."""
        job: Any = HydraConfig.instance().cfg
        with read_write(job.hydra):
            task = job.hydra.overrides.task
            job.hydra.overrides.task = [line for line in task if line not in self._pinned]


def _take_up(config: DictConfig, before: Continued) -> None:
    """Let a command be one of an earlier sweep's: under its id, in its folder, which jobs do not see."""
    with read_write(config), read_write(config.hydra), open_dict(config.hydra):
        config.sweep_id = before.sweep_id
        config.hydra.overrides.task = [
            line for line in _given(config) if line.partition("=")[0].lstrip("+") not in continued.KEYS
        ]


def _of_what_is_there(config: DictConfig, before: Continued, command_id: str) -> list[str]:
    """Return what tells jobs of the arms that there are, and keeps their folders from colliding."""
    known = before.known(rerun_failed=config.sweep.rerun_failed)
    over = sum(arm.status is not None for arm in known.values())
    failed = sum(arm.status == "FAILED" for arm in known.values())
    words = f"{before.asked}: of sweep {before.sweep_id} {over} of {len(known)} arms begun have ended"
    if failed:
        words += f", {failed} by a fault of their own (sweep.rerun_failed=true runs those again)"
    print(words, file=sys.stderr)
    subdir = OmegaConf.to_container(config.hydra.sweep)["subdir"]  # type: ignore[call-overload, index]
    listed = json.dumps({digest: list(arm) for digest, arm in known.items()})
    return [
        f"+hydra.callbacks.sweep.known={_quoted(listed)}",
        f"hydra.sweep.subdir={_quoted(f'{command_id}/{subdir}')}",
    ]


def _note_sweep(note: SweepNote, folder: Path) -> None:
    try:
        note.write(folder)
    except OSError as error:
        log.warning("%s cannot be written (%s): the sweep cannot go on later", folder, error.strerror)


def _decide_where(config: DictConfig, before: Continued | None = None) -> list[str]:
    """Decide which store and experiment are meant where nothing says so; return this as overrides.

    Those of the sweep that a command goes on with, if it does.

    Raises:
        BadInputError: others are named there.
    """
    to, decided = config.tracking, []
    theirs = (None, None) if before is None else (before.uri, before.experiment_name)
    meant = {
        "uri": tracking_uri(to.uri or theirs[0]),
        "experiment_name": experiment_name(to.experiment_name or theirs[1]),
    }
    for (key, value), known in zip(meant.items(), theirs, strict=True):
        if before is not None and known not in (None, value):
            raise BadInputError(
                f"tracking.{key}={value}: {before.asked} is recorded in {known}; leave it out"
            )
        if to[key] is None:
            decided.append(f"tracking.{key}={_quoted(value)}")
    with read_write(to):
        to.update(meant)
    return decided


@contextmanager
def _refusing() -> Iterator[None]:
    """End the command with bad input where that is raised."""
    try:
        yield
    except BadInputError as error:
        print(f"gaccum_exp: {error}", file=sys.stderr)
        # The one exception that Hydra does not turn into a warning here.
        raise SystemExit(BAD_INPUT) from None


def _refuse_passwords(config: DictConfig, config_name: str | None, given: list[Override]) -> None:
    """Raise `BadInputError` where the address of an arm of a sweep would hold a password."""
    sources = {s.path for s in config.hydra.runtime.config_sources if s.schema == "file"} - {conf_dir()}
    for override in given:
        key, swept = str(override.key_or_group), override.is_discrete_sweep()
        if key.startswith("tracking"):
            for value in override.sweep_iterator() if swept else [override.value()]:
                refuse_password(str(value.text if isinstance(value, QuotedString) else value))
        if swept and sources and "." not in key:  # a block's file of the user's own can set it, too
            for choice in override.sweep_string_iterator():
                arm = _composed(config, config_name, {override.get_key_element(): choice})
                refuse_password(str(arm.tracking.uri) if arm is not None else "")


def _quoted(value: str) -> str:
    """Return a value as Hydra's overrides have it."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (m[2] and "\\'"), value)
    return f"'{escaped}'"


def _note_launch(
    config: DictConfig, folder: Path, *, multirun: bool, resumed: resume.Resumed | None = None
) -> None:
    command = current_command.get()
    if command is not None:
        command.resumed = resumed
        command.launch = Launch(
            folder=folder.absolute(),
            sweep_id=str(config.sweep_id),
            tracking_uri=str(config.tracking.uri),
            experiment_name=str(config.tracking.experiment_name),
            multirun=multirun,
        )


def _given(config: DictConfig) -> list[str]:
    """Return the command line's overrides; what they refer to is another value in every arm."""
    lines: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return list(lines)


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
    overrides = _parsed([*configured, *_given(config)])
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


def _composed(
    config: DictConfig, config_name: str | None, chosen: Mapping[str, str] | None = None
) -> DictConfig | None:
    """Compose the first arm, or that with these choices; None where Hydra will say what is wrong."""
    overrides = []
    for override in _parsed(_given(config)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            overrides.append(str(override.input_line))
        elif override.is_choice_sweep() and not isinstance(override.value(), Glob):
            first = next(iter(override.sweep_string_iterator()))
            overrides.append(f"{key}={(chosen or {}).get(key, first)}")
    try:
        return compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException):
        return None


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
    with _refusing():
        wait_for_store(journal.path)
    print(f"recorded in {to.uri}, experiment {to.experiment_name}", file=sys.stderr)


def _have_left_runs_delivered(config: DictConfig) -> None:
    """Have the helper deliver, and end, what commands have left that were killed or had no store."""
    for folder in (Path(config.hydra.run.dir), Path(config.hydra.sweep.dir)):
        # Where commands have folders of their own, side by side, in all of these.
        place = folder.parent if str(config.sweep_id) in folder.name else folder
        if place.is_dir():
            announce(place.absolute())
