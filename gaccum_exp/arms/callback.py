"""The beginning of a run or a sweep, as a Hydra callback: only Hydra knows when it begins, and where.

The end is no callback: Hydra skips that when an arm raises, and turns errors in it into warnings. It
comes after Hydra in the command line, which reads what the arms have left: their `arm.json`, and their
runs in the store.
"""

import json
import logging
import math
import os
import sys
import time
import traceback
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from hydra import compose
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.arms import continued, handed_over, resume
from gaccum_exp.arms.context import Launch, current_command, overrides_of
from gaccum_exp.arms.continued import Continued, SweepNote
from gaccum_exp.arms.extension import require_swept
from gaccum_exp.arms.outcome import BAD_INPUT
from gaccum_exp.config import explain
from gaccum_exp.config.arguments import quoted
from gaccum_exp.config.files import OURS, conf_dir, options
from gaccum_exp.config.schema import FiguresConfig, check_figures, check_id
from gaccum_exp.errors import BadInputError, complain
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.shipper import announce, helper_address, start_helper, wait_for_store
from gaccum_exp.tracking.store_uri import experiment_name, refuse_password, tracking_uri

log = logging.getLogger(__name__)
MOST_ARMS = 10_000
"""Hydra composes the arms of a sweep before the first one begins, some twenty a second."""
SHARING = (".BasicLauncher", ".JoblibLauncher", ".LocalLauncher", ".SlurmLauncher")
"""Launchers whose jobs write to the command's own folder: on its host, or on one that shares it."""


class SweepStart(Callback):
    """Notes where a run or a sweep writes and records, and prepares what its arms share."""

    def __init__(self) -> None:
        self._pinned: list[str] = []
        """Overrides that every job of a sweep is given besides its own."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a single run, and start the process that will record it."""
        with _refusing():
            continued.refuse_without_sweep(config)
            _refuse_places(config)
            _refuse_hidden_files(config)
            check_figures(cast(FiguresConfig, OmegaConf.to_object(config.figures)))
            _decide_where(config)
            resumed = resume.of_command(config)
            if resumed is not None:
                resume.go_on_there(config, resumed)
            _note_launch(config, Path(config.hydra.run.dir), multirun=False, resumed=resumed)
            start_helper()
            _have_left_runs_delivered(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a sweep, tell its jobs what it varies, and refuse it where nothing can be recorded."""
        with _refusing():
            self._start_sweep(config, kwargs["config_name"])

    def _start_sweep(self, config: DictConfig, config_name: str | None) -> None:
        configured, given = _parsed(_configured_overrides(config)), _parsed(overrides_of(config.hydra))
        overrides = [*configured, *given]
        swept = [o.get_key_element().lstrip("+") for o in (*given, *configured) if o.is_sweep_override()]
        _refuse_places(config)
        check_figures(
            cast(FiguresConfig, OmegaConf.to_object(config.figures))
        )  # of the sweep, and of no arm
        planned = _arms_of(config, overrides)
        _refuse_hidden_files(config, overrides)
        command_id = str(config.sweep_id)
        before, command = continued.asked_for(config, overrides, command_id), current_command.get()
        if before is not None:
            if command is not None:
                command.lock = before.lock
            _take_up(config, before)
            swept = list(dict.fromkeys([*before.swept_keys, *swept]))
        given_values = {
            o.get_key_element().lstrip("+"): o.sweep_iterator()
            for o in overrides
            if o.is_discrete_sweep()
        }
        require_swept(config.sweep.extend, swept, given_values)
        _refuse_passwords(config, config_name, overrides)
        if config.resume not in (resume.AUTO, resume.NEVER):
            raise BadInputError(f"resume={config.resume}: names one run, and not the arms of a sweep")
        # What is appended here reaches every job, whatever process or host a launcher runs it on. Of
        # Hydra's own block, it is not among the overrides that name and record an arm; what is not is
        # taken from them again when the job starts.
        self._pinned = [f"sweep_id={quoted(config.sweep_id)}", *_decide_where(config, before)]
        note = SweepNote(
            config.sweep_id, command_id, time.time(), swept_keys=swept,
            arms=[] if before is None else before.places,
            uncounted=not str(OmegaConf.select(config, "hydra.launcher._target_")).endswith(SHARING),
        )  # fmt: skip
        start_helper()
        typed = "" if command is None else continued.as_asked(command)
        seeds = _one_job_for_all_seeds(config) if config.sweep.vectorize == "seed" else 1
        jobs = None if planned is None else planned // seeds
        unnamed = [*config.hydra.job.config.override_dirname.exclude_keys]
        unnamed += [line.partition("=")[0] for line in self._pinned]
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.overrides.hydra += [
                f"+hydra.callbacks.sweep.swept_keys=[{','.join(map(quoted, swept))}]",
                f"+hydra.callbacks.sweep.helper={quoted(helper_address())}",
                f"+hydra.callbacks.sweep.command_id={quoted(command_id)}",
                f"+hydra.callbacks.sweep.command={quoted(urllib.parse.quote(typed))}",
                f"+hydra.callbacks.sweep.jobs={'null' if jobs is None else jobs}",
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(quoted, unnamed))}]",
                *self._pinned,
            ]
            if before is not None:
                config.hydra.overrides.hydra += _of_what_is_there(config, before, command_id)
        _note_launch(config, Path(config.hydra.sweep.dir), multirun=True)
        if command is not None:
            if command.caller is not None:
                handed_over.write(Path(config.hydra.sweep.dir), command.caller.handed_over)
            command.planned, command.command_id = planned, command_id
            command.extend = config.sweep.extend
        if _composed(config, config_name) is not None:  # else it is said without MLflow
            arms = "arms" if planned is None else f"{planned} arm{'' if planned == 1 else 's'}"
            over = f" over {', '.join(swept)}" if swept else ""
            print(f"sweep {config.sweep_id}: {arms}{over}", file=sys.stderr, flush=True)
            _prepare_store(config, Path(config.hydra.sweep.dir))
            _note_sweep(note, Path(config.hydra.sweep.dir))
            _have_left_runs_delivered(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave a job's own overrides, which are what it differs in."""
        job: Any = HydraConfig.instance().cfg
        with read_write(job.hydra):
            left = [line for line in overrides_of(job.hydra) if line not in self._pinned]
            job.hydra.overrides.task = left


def _take_up(config: DictConfig, before: Continued) -> None:
    """Let a command be one of an earlier sweep's: under its id, in its folder, which jobs do not see."""
    with read_write(config), read_write(config.hydra), open_dict(config.hydra):
        config.sweep_id = before.sweep_id
        config.hydra.overrides.task = [
            line
            for line in overrides_of(config.hydra)
            if line.partition("=")[0].lstrip("+") not in continued.KEYS
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
    subdir = resume.as_written(config, "hydra.sweep.subdir")
    listed = json.dumps({digest: list(arm) for digest, arm in known.items()})
    return [
        f"+hydra.callbacks.sweep.known={quoted(listed)}",
        f"hydra.sweep.subdir={quoted(f'{command_id}/{subdir}')}",
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
            decided.append(f"tracking.{key}={quoted(value)}")
    with read_write(to):
        to.update(meant)
    return decided


@contextmanager
def _refusing() -> Iterator[None]:
    """End the command with bad input where anything is raised: Hydra would warn of it, and go on."""
    try:
        yield
    except Exception as error:
        command = current_command.get()
        if command is not None and command.raw and not isinstance(error, BadInputError):
            traceback.print_exc()
        line = explain.one_line(error, [] if command is None else command.arguments)
        (complain if command is None else command.complain)(line)
        # The one exception that Hydra does not turn into a warning here.
        raise SystemExit(BAD_INPUT) from None


def _refuse_places(config: DictConfig) -> None:
    """Refuse an id or a name that would have a run write outside its own folder."""
    check_id("sweep_id", config.sweep_id)
    for key in ("job.name", "output_subdir", "sweep.subdir"):
        value = resume.as_written(config, f"hydra.{key}")
        if value is not None and (Path(str(value)).is_absolute() or ".." in Path(str(value)).parts):
            raise BadInputError(
                f"hydra.{key}={value}: leads out of the output folder; give a name below it"
            )


def _refuse_hidden_files(config: DictConfig, overrides: Sequence[Override] = ()) -> None:
    """Refuse a file of the user's own that is chosen by name, and behind which one of ours is found."""
    runtime, primary = config.hydra.runtime, str(config.hydra.job.config_name)
    registry, ours = SourcesRegistry.instance(), (conf_dir(), OURS)
    sources = [
        registry.resolve(s.schema)(provider=s.provider, path=f"{s.schema}://{s.path}")
        for s in runtime.config_sources
        if s.schema in ("file", "pkg") and s.provider != "hydra"
    ]
    own = [source for source in sources if source.path not in ours]
    if not own:
        return
    chosen = {f"{group}/{name}": f"{group}={name}" for group, name in runtime.choices.items()}
    for override in overrides:
        if override.is_discrete_sweep() and (group := override.get_key_element()) in runtime.choices:
            named = override.sweep_string_iterator()
            chosen |= {f"{group}/{name}": f"{group}={name}" for name in named}
    for path, said in {**chosen, primary: f"--config-name={primary}"}.items():
        first = next((source for source in sources if source.is_config(path)), None)
        hidden = next((source for source in own if source.is_config(path)), None)
        if hidden is None or first is None or first.path not in ours:
            continue
        if path == primary and not hidden.provider.startswith(("command-line", "hydra.searchpath")):
            continue  # another project's, whose files are found wherever it is installed
        way_out = "give yours another name" + (" and --config-name" if path == primary else "")
        raise BadInputError(
            f"{said}: {hidden.full_path()} has a file of that name, and the program's own is found "
            f"first: {way_out}"
        )


def _arms_of(config: DictConfig, overrides: list[Override]) -> int | None:
    """Return how many arms a sweep has; None: its sweeper decides that as it goes.

    Raises:
        BadInputError: none, more than can be composed, or several that would share a folder.
    """
    loader, values = GlobalHydra.instance().config_loader(), dict[str, int]()
    for override in overrides:
        override.config_loader = loader
        key, line = override.get_key_element().lstrip("+"), override.input_line
        values.pop(key, None)  # the last one holds
        if not override.is_sweep_override():
            continue
        if key in ("sweep_id", "sweep.seeds") or key.startswith("figures."):
            raise BadInputError(f"{line}: is one for all arms; leave it out")
        if not override.is_discrete_sweep():
            continue
        values[key] = _number_of_values(override)
        if not values[key]:
            known = options(key)
            raise BadInputError(
                f"{line}: has no value, so nothing would be run"
                + (f"; {key} is one of {', '.join(known)}" if known else "")
            )
    arms, sweeper = math.prod(values.values()), config.hydra.sweeper
    if not str(sweeper._target_).endswith("BasicSweeper"):
        return None  # what others draw from a range is their own affair
    if sweeper.max_batch_size is not None and sweeper.max_batch_size < 1:
        given = f"hydra.sweeper.max_batch_size={sweeper.max_batch_size}"
        raise BadInputError(f"{given}: must be at least 1; null: all arms at once")
    if arms > MOST_ARMS:
        each = " × ".join(f"{key} {number:,}" for key, number in values.items())
        raise BadInputError(
            f"-m: {each} are {arms:,} arms, more than {MOST_ARMS:,}; sweep over fewer values"
        )
    subdir = resume.as_written(config, "hydra.sweep.subdir")
    if arms > 1 and "${" not in str(subdir):
        raise BadInputError(
            f"hydra.sweep.subdir={subdir}: {arms} arms would write to one folder; have each its own "
            "(${hydra.job.num})"
        )
    return arms


def _number_of_values(override: Override) -> int:
    """Return how many values a sweep gives a key, without making a list of them."""
    value = override.value()
    if not isinstance(value, RangeSweep):
        return sum(1 for _ in override.sweep_iterator())
    start, stop, step = (Decimal(str(x)) for x in (value.start, value.stop, value.step))
    if not (start.is_finite() and stop.is_finite() and step.is_finite() and step):
        raise BadInputError(
            f"{override.input_line}: is no range: its ends and its step must be numbers, the step not 0"
        )
    return max(0, math.ceil((stop - start) / step))


def _refuse_passwords(config: DictConfig, config_name: str | None, given: list[Override]) -> None:
    """Raise `BadInputError` where the address of an arm of a sweep would hold a password."""
    found = {s.path for s in config.hydra.runtime.config_sources if s.schema in ("file", "pkg")}
    sources = found - {conf_dir(), OURS, "hydra.conf"}
    for override in given:
        key, swept = str(override.key_or_group), override.is_discrete_sweep()
        if key.startswith("tracking"):
            for value in override.sweep_iterator() if swept else [override.value()]:
                refuse_password(str(value.text if isinstance(value, QuotedString) else value))
        if swept and sources and "." not in key:  # a block's file of the user's own can set it, too
            for choice in override.sweep_string_iterator():
                arm = _composed(config, config_name, {override.get_key_element(): choice})
                refuse_password(str(arm.tracking.uri) if arm is not None else "")


def _note_launch(
    config: DictConfig, folder: Path, *, multirun: bool, resumed: resume.Resumed | None = None
) -> None:
    command = current_command.get()
    if command is not None:
        command.resumed = resumed
        command.launch = Launch(
            folder=Path(os.path.abspath(folder)),  # as Hydra names those of its jobs
            sweep_id=str(config.sweep_id),
            tracking_uri=str(config.tracking.uri),
            experiment_name=str(config.tracking.experiment_name),
            multirun=multirun,
            called=command.caller is not None,
        )


def _configured_overrides(config: DictConfig) -> list[str]:
    """Return what the configuration has the sweeper vary or set, as on the command line."""
    return [f"{k}={v}" for k, v in dict(config.hydra.sweeper.get("params") or {}).items()]


def _one_job_for_all_seeds(config: DictConfig) -> int:
    """Make one job of all seeds that the sweeper would vary, and return how many it is of."""
    hydra = config.hydra
    # Hydra gives its own sweeper the overrides after this callback. Others ask for one value at a time,
    # and wait for its result.
    if not str(hydra.sweeper._target_).endswith("BasicSweeper"):
        log.warning("sweep.vectorize=seed: only Hydra's basic sweeper varies seeds that can be stacked")
        return 1
    configured = _configured_overrides(config)
    overrides = _parsed([*configured, *overrides_of(hydra)])
    of_seed = [o for o in overrides if o.get_key_element().lstrip("+") == "seed"]
    if not of_seed or not of_seed[-1].is_discrete_sweep():
        return 1
    seeds = list(of_seed[-1].sweep_string_iterator())
    if len(set(seeds)) < max(2, len(seeds)):
        return 1
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
    return len(seeds)


def _composed(
    config: DictConfig, config_name: str | None, chosen: Mapping[str, str] | None = None
) -> DictConfig | None:
    """Compose the first arm, or that with these choices; None where Hydra will say what is wrong."""
    overrides = []
    for override in _parsed(overrides_of(config.hydra)):
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
    if wait_for_store(journal.path):
        print(f"recorded in {to.uri}, experiment {to.experiment_name}", file=sys.stderr)


def _have_left_runs_delivered(config: DictConfig) -> None:
    """Have the helper deliver, and end, what commands have left that were killed or had no store."""
    for folder in (Path(config.hydra.run.dir), Path(config.hydra.sweep.dir)):
        # Where commands have folders of their own, side by side, in all of these.
        place = folder.parent if str(config.sweep_id) in folder.name else folder
        if place.is_dir():
            announce(place.absolute())
