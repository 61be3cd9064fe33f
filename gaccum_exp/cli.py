"""The command line: the only hydra.main.

Exit status: 0; 1 a run failed; 2 bad input, or nothing was run; 3 biased; 4 stochastic; 5 inconclusive;
130 interrupted by Ctrl-C (SIGINT); 143 by SIGTERM, SIGUSR1 or SIGUSR2. 3 to 5 only where an audit was
asked for: `task=audit`, or `audit.every_steps` is set. Under `-m` it is decided at the end, from what
the arms have left: the first of 1, 3, 5, 4 that any arm earned.
"""

import gc
import io
import json
import logging
import os
import platform
import shlex
import sys
import time
import urllib.parse
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gaccum_exp import __version__
from gaccum_exp.arms import child, continued, handed_over, resume
from gaccum_exp.arms.context import (
    ArmContext,
    Caller,
    Command,
    KnownArm,
    Launch,
    Turn,
    command_here,
    current_command,
    given_name,
    name_of,
    overrides_of,
)
from gaccum_exp.arms.extension import further
from gaccum_exp.arms.outcome import (
    BAD_INPUT,
    INTERRUPTED,
    OK,
    RUN_FAILED,
    RUNNING,
    Outcome,
    exit_status,
    read_outcomes,
)
from gaccum_exp.arms.process import process_restored
from gaccum_exp.arms.settle import close_without_report, record_report, say_where
from gaccum_exp.arms.streams import forgiving
from gaccum_exp.config import explain
from gaccum_exp.config import schema as config
from gaccum_exp.config.arguments import CommandLine, command_line
from gaccum_exp.config.help import asked_of, help_on
from gaccum_exp.errors import BadInputError, TrackingError, complain
from gaccum_exp.train.stopping import StoppedError, listening

log = logging.getLogger(__name__)
_LOST_PROCESS = {"BrokenExecutor", "UncompletedJobError", "WorkerCrashedError"}
"""What launchers raise of a process that has died, by name: joblib's loky, submitit, Ray."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; leave the process as it was.

    Args:
        arguments: what follows the program's name; None: those of this process.

    Raises:
        Exception: whatever stopped Hydra, its sweeper or launcher, under HYDRA_FULL_ERROR=1 alone.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["check"]:
        return _check(given[1:])
    with forgiving(), listening() as stop:
        while True:
            with process_restored():
                # Imports leave next to no garbage, and the search for it takes a sixth of their time. An
                # arm turns it on again.
                gc.disable()
                try:
                    if given[:1] in (["report"], ["deliver"]):
                        return _word(given)
                    command = Command(stop, given)
                    status = _run(command)
                except BadInputError as error:
                    complain(explain.one_line(error, given))
                    return BAD_INPUT
                except KeyboardInterrupt as interrupt:  # while comparing
                    return _status(interrupt)
                except SystemExit as end:  # of --help, and of a configuration that was refused
                    if isinstance(end.code, str):
                        raise
                    return end.code or OK
            if not command.further:
                return status
            given = list(command.further)


def call(caller: Caller, arguments: Sequence[str]) -> Command:
    """Run a sweep for Python code, and return the command once it has ended.

    As `main`, but that what is wrong is raised, and what it shows is handed over and not printed. The
    process of its arms ends with it: a caller may change modules before the next sweep, or need the
    memory.

    Args:
        caller: who asks.
        arguments: as on a command line.

    Raises:
        BadInputError: the command cannot be used, or nothing can be compared.
        KeyboardInterrupt: it was interrupted, and has ended in order.
        SystemExit: another signal has asked the process to end.
    """
    given, complaints = list(arguments), list[str]()
    try:
        with listening() as stop:
            while True:
                with process_restored():
                    command = Command(stop, given, caller, complaints=complaints)
                    status = _run(command)
                if not command.further:
                    break
                given = list(command.further)
    except StoppedError as stopped:  # while comparing
        raise _asked_to_end(stopped.reason, stopped.status) from None
    finally:
        child.end()
    if command.interrupted is not None:
        raise _asked_to_end(command.interrupted, status)
    refused = [outcome for outcome in command.outcomes.values() if outcome.bad_input]
    if refused and len(refused) == len(command.outcomes):
        raise BadInputError(refused[0].reason or "")
    if command.report is None:
        raise BadInputError(complaints[-1] if complaints else f"{caller.call()}: has trained nothing")
    for line in complaints:
        complain(line)
    return command


def _asked_to_end(reason: str, status: int) -> BaseException:
    """Return what is raised where somebody wants Python code to end: Ctrl-C, or another signal."""
    return KeyboardInterrupt(reason) if status == INTERRUPTED else SystemExit(status)


def _check(given: list[str]) -> int:
    """Run somebody's script, whose streams, signals and settings are its own."""
    from gaccum_exp.arms.check import main as check

    try:
        return check(given)
    except BadInputError as error:
        complain(error, "gaccum_exp check")
        return BAD_INPUT


def _word(given: list[str]) -> int:
    """Run a command beside the runner."""
    try:
        if given[0] == "report":
            from gaccum_exp.arms.report import main as report

            return report(given[1:])
        from gaccum_exp.tracking.deliver import main as deliver

        return deliver(given[1:])
    except KeyboardInterrupt as interrupt:
        complain(str(interrupt) or "interrupted", f"gaccum_exp {given[0]}")
        raise
    except OSError as error:  # of a folder or a file that was named
        raise BadInputError(f"{error.filename}: {error.strerror}") from None


def _status(interrupt: KeyboardInterrupt) -> int:
    return interrupt.status if isinstance(interrupt, StoppedError) else INTERRUPTED


def _run(command: Command) -> int:
    """Run what Hydra makes of a command's arguments, then compare what there is; return its status."""
    line = command_line(command.arguments)
    if "--version" in line.flags:
        print(_version())
        return OK
    if "--help" in line.flags and (asked := asked_of(line.overrides)):
        print(help_on(asked, explain.own_folders(command.arguments)))
        return OK
    if line.multirun:
        child.start()  # it imports torch, while Hydra composes
    config.register(f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}")
    # Ask Hydra for its exceptions instead of its own report and exit, unless the user wants them raw.
    command.raw = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *line.for_hydra]
    try:
        return _launched(command, line)
    finally:
        if command.caller is not None and command.launch is not None:
            handed_over.remove(command.launch.folder)
        if command.lock is not None:
            command.lock.release()


def _launched(command: Command, line: CommandLine) -> int:
    """Have Hydra launch what a command asks for; return its exit status."""
    stop, given, raw, status, interrupted = command.stop, command.arguments, command.raw, OK, None
    lost_process = False

    def pass_on(number: int) -> None:  # what other processes run, where a launcher waits in this one
        if command.launch is not None and command.launch.multirun:
            child.pass_on(command.launch, number)

    stop.before_raising = pass_on
    token = current_command.set(command)
    try:
        _refuse_overrides_of_ours(line)
        with _hydra_speaks(line):
            task()
    except KeyboardInterrupt as interrupt:
        status, interrupted = _status(interrupt), str(interrupt) or "interrupted"
    except Exception as error:  # of Hydra, its sweeper or launcher; an arm ends by itself
        if raw and not isinstance(error, BadInputError):
            _end(command, RUN_FAILED)  # the arms that have ended are there to be compared
            raise
        command.complain(explain.one_line(error, given))
        status = RUN_FAILED if command.outcomes else BAD_INPUT
        lost_process = not _LOST_PROCESS.isdisjoint(kind.__name__ for kind in type(error).__mro__)
    finally:
        if command.resumed is not None:
            command.resumed.lock.release()
        current_command.reset(token)
        config.register()  # without this command's id
        stop.before_raising = None
    if stop.asked is not None:
        status, interrupted = stop.asked.status, stop.asked.reason
        stop.followed()
    status = _end(command, status, interrupted, lost_process=lost_process)
    command.interrupted = interrupted
    if interrupted is not None:
        launch = command.launch
        if launch is None or not (command.outcomes or read_outcomes(launch.folder, launch.sweep_id)):
            complain(f"{interrupted} before anything was run")
        _say_what_goes_on(command)
    return status


def _say_what_goes_on(command: Command) -> None:
    """Name the command that goes on with a run that was interrupted, or its control: the same one."""
    launch, settings, given = command.launch, command.settings, command.arguments
    if launch is None or settings is None or settings.task != "train":
        return
    if not resume.something_is_left(launch.folder, settings):
        return
    line = shlex.join([*continued.program(given), *continued.going_on(given)])
    print(f"gaccum_exp: the same command goes on: {line}", file=sys.stderr)


def _version() -> str:
    """Return the program's version, and those of what its numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    others = []
    for package, name in (("torch", "torch"), ("MLflow", "mlflow")):
        with suppress(PackageNotFoundError):
            others.append(f"{package} {version(name)}")
    return f"gaccum_exp {__version__} ({', '.join([*others, f'Python {platform.python_version()}'])})"


def _refuse_overrides_of_ours(line: CommandLine) -> None:
    """Refuse overrides of the callback that notes where a command writes."""
    for override in line.overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key == "hydra.callbacks" or f"{key}.".startswith("hydra.callbacks.sweep."):
            raise BadInputError(
                f"{override}: notes where runs are recorded, and is the program's own; callbacks of "
                "yours go beside it (+hydra.callbacks.mine._target_=...)"
            )


@contextmanager
def _hydra_speaks(line: CommandLine) -> Iterator[None]:
    """Turn what Hydra prints in place of an error into one: warnings, and lines of what only shows."""
    said = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"hydra\._internal\.(utils|config_loader_impl)")
        try:
            with redirect_stderr(said) if line.only_shows else nullcontext():
                yield
        except SystemExit as end:
            if not end.code or not said.getvalue():
                raise
            raise BadInputError(f"{' '.join(line.for_hydra)}: {said.getvalue()}") from None


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="config")
def task(cfg: DictConfig) -> float | None:
    """Run one job; what it returns is for sweepers that minimise something."""
    # Launchers pickle this function with the names that it uses, and a context variable cannot be.
    job, command = HydraConfig.get(), command_here()
    swept = (job.callbacks or {}).get("sweep")
    if swept is None or (command is not None and command.launch is None):
        complain(
            "hydra.callbacks.sweep: is not there, by which it is known where runs are recorded; a file "
            "of your own begins with `defaults: [config, _self_]`, and leaves it as it is"
        )
        raise SystemExit(BAD_INPUT)
    context = ArmContext(
        config=cfg,
        folder=Path(job.runtime.output_dir),
        overrides=tuple(overrides_of(job)),
        choices=dict(job.runtime.choices),
        swept_keys=tuple(swept.get("swept_keys", ())),
        multirun=job.mode == RunMode.MULTIRUN,
        owns_terminal=command is not None,
        home=Path(job.runtime.cwd),
        command_id=str(swept.get("command_id", cfg.sweep_id)),
        command=_typed(swept, command),
        sweep_folder=_folder_of_sweep(job) if job.mode == RunMode.MULTIRUN else None,
        known={digest: KnownArm(*arm) for digest, arm in json.loads(swept.get("known", "{}")).items()},
    )
    if context.multirun:
        outcomes = {} if command is None else command.outcomes
        over = sum(arm.status is not None for arm in context.known.values())
        number, jobs = int(job.job.num) + 1, swept.get("jobs")
        turn = Turn(number, jobs) if command is None else command.turn(number, jobs, over)
        began_s = time.monotonic()
        with listening() if command is None else nullcontext(command.stop) as stop:
            try:
                return child.run_job(replace(context, turn=turn), stop, outcomes, swept.get("helper"))
            finally:
                known = context.known_arm
                if command is not None and (known is None or known.status is None):
                    command.taken_s.append(time.monotonic() - began_s)
    try:
        settings = config.validate(cfg)
        if settings.sweep.seeds is not None:
            raise BadInputError(f"sweep.seeds={cfg.sweep.seeds}: is written by -m seed=0,1,2")
    except BadInputError as error:  # answered at once, without waiting for torch and MLflow
        complain(error)
        raise SystemExit(BAD_INPUT) from None
    assert command is not None
    command.settings = settings
    name = given_name(context) if settings.chooses_accum_steps else name_of(context, settings)
    print(f"run {settings.sweep_id}: {name}", file=sys.stderr, flush=True)
    from gaccum_exp.arms.run_arm import run_arm  # two seconds, with torch

    outcome = run_arm(context, settings, command.stop, command.resumed)
    command.outcomes[context.folder] = outcome
    return outcome.objective


def _typed(swept: Mapping[str, Any], command: Command | None) -> str:
    """Return the line that asked for a job, of a sweep as it was handed on."""
    if "command" in swept or command is None:
        return urllib.parse.unquote(str(swept.get("command", "")))
    return continued.as_asked(command)


def _folder_of_sweep(job: HydraConf) -> Path:
    """Return it without the dots of `../elsewhere`, as Hydra names those of its jobs."""
    return Path(os.path.abspath(Path(job.runtime.cwd, job.sweep.dir)))


def _end(
    command: Command, status: int, interrupted: str | None = None, *, lost_process: bool = False
) -> int:
    """Compare what the arms have left, and let their outcomes decide the status.

    Args:
        command: that Hydra has done with.
        status: earned so far.
        interrupted: by what; None: it was not.
        lost_process: whether a launcher gave up as one of its processes had died.
    """
    launch = command.launch
    if launch is None:
        return status
    found = read_outcomes(launch.folder, launch.sweep_id) | command.outcomes
    outcomes = {folder: _over(folder, outcome, interrupted) for folder, outcome in found.items()}
    if not launch.multirun:
        return _compare(command, launch, outcomes, status)
    gave_up, compared = status == RUN_FAILED, False  # the sweeper or the launcher
    try:
        try:
            outcomes = _with_those_elsewhere(command, launch, outcomes, status)
        except (BadInputError, TrackingError) as error:
            complain(f"what became of arms that ran elsewhere is not known: {error}")
            status = status or RUN_FAILED
        continued.note_arms(launch.folder, command.command_id, outcomes, command.planned)
        left = continued.what_is_left(outcomes, command.command_id, command.planned)
        if lost_process and left == (0, 0):  # one that had its arm's end behind it
            print("gaccum_exp: every arm has come to its end all the same", file=sys.stderr)
            status, gave_up = OK, False
        end = OK
        if interrupted is None and status == OK and command.extend is not None:
            _extend(command, launch)
        if not command.further:
            end = _compare(command, launch, outcomes, status)
        compared = True
    finally:
        broken = interrupted is not None or not compared
        _say_how_to_go_on(command, launch, outcomes, broken=broken, gave_up=gave_up)
    return end


def _extend(command: Command, launch: Launch) -> None:
    """Have a sweep's command be followed by one with further arms, where its best value is an end.

    Where nothing follows though it is an end, it is said why.
    """
    from gaccum_exp.arms.report import Runs

    note = continued.SweepNote.of(launch.folder)
    runs = Runs(launch.tracking_uri, launch.experiment_name, launch.folder)
    try:
        key, swept_keys = str(command.extend), note.swept_keys if note else ()
        more = further(runs.sweep(launch.sweep_id), key, swept_keys, command.arguments)
    except (BadInputError, TrackingError) as error:
        complain(str(error))
        return
    if more is None:
        return
    print(more.said, file=sys.stderr)
    if more.overrides:
        _end_journal(command, [], {})
        command.further = continued.with_further_arms(command.arguments, launch.sweep_id, more.overrides)


def _with_those_elsewhere(
    command: Command, launch: Launch, here: dict[Path, Outcome], status: int
) -> dict[Path, Outcome]:
    """Return the arms of a sweep, also those that share no folder with this command, if there are any.

    Raises:
        BadInputError: as `continued.with_those_elsewhere`; StoreAwayError: likewise.
    """
    _, never = continued.what_is_left(here, command.command_id, command.planned)
    missing = status == OK and (not here if never is None else never > 0)
    if not missing and not continued.lacks(launch.folder, launch.sweep_id, here):
        return here
    return continued.with_those_elsewhere(
        launch.folder, launch.sweep_id, here, launch.tracking_uri, launch.experiment_name
    )


def _say_how_to_go_on(
    command: Command, launch: Launch, outcomes: Mapping[Path, Outcome], *, broken: bool, gave_up: bool
) -> None:
    """Say what is left of a sweep and the command that goes on with it; else note that it is whole."""
    unfinished, never = continued.what_is_left(outcomes, command.command_id, command.planned)
    note = continued.SweepNote.of(launch.folder)
    if note is None:  # nothing could be recorded
        return
    own = note.command_id == command.command_id
    if own and not unfinished and not broken and not (gave_up and never):
        with suppress(OSError):
            replace(note, whole=True).write(launch.folder)
        return
    if not own and (note.whole or not broken):
        return
    left = continued.say_left(unfinished, never, command.planned) if own else "nothing more was begun"
    line = continued.command_line(command, launch.sweep_id)
    print(f"\ngaccum_exp: {left}; to go on:\n  {line}", file=sys.stderr)


def _compare(command: Command, launch: Launch, outcomes: Mapping[Path, Outcome], status: int) -> int:
    if not outcomes:
        _end_journal(command, [], {})
        if status == OK and launch.multirun:
            command.complain("nothing was run: what the sweep varies has no value")
            return BAD_INPUT
        return status
    earned = exit_status(list(outcomes.values()), multirun=launch.multirun)
    trained = any(outcome.task == "train" for outcome in outcomes.values())
    compared = child.Compared()
    try:
        if launch.multirun:
            compared = child.report(launch, command.stop)
            command.report = compared.report
        elif trained and status == OK and earned not in (RUN_FAILED, BAD_INPUT):
            from gaccum_exp.arms.report import Runs, show_run

            runs = Runs(launch.tracking_uri, launch.experiment_name, launch.folder)
            show_run(runs, launch.sweep_id)
    except (BadInputError, TrackingError) as error:
        command.complain(f"nothing is compared: {error}")
        status = status or RUN_FAILED
    finally:
        _end_journal(command, compared.files, compared.view)
    shown = launch.sweep_id if launch.multirun and trained else None
    recorded = command.journal.path if command.journal is not None and compared.files else None
    to = sys.stdout if command.caller is None else sys.stderr
    say_where([launch.folder], launch.tracking_uri, shown, recorded, to)
    return status or earned


def _end_journal(command: Command, files: Sequence[Path], view: Mapping[str, str]) -> None:
    """Record a sweep's report, if there is one, and how MLflow shows the sweep."""
    if command.journal is None or command.launch is None:
        return
    try:
        if files:
            record_report(command.journal, command.launch.sweep_id, files, view)
        else:
            close_without_report(command.journal)
    except TrackingError as error:
        complain(f"the report is not recorded: {error}")


def _over(folder: Path, outcome: Outcome, interrupted: str | None) -> Outcome:
    """Return how an arm ended; one that says that it runs, and whose process is dead, has failed."""
    if outcome.status != RUNNING:
        return outcome
    if not outcome.runs_here and (interrupted is None or outcome.host == platform.node()):
        return child.ended(folder, outcome, interrupted)
    log.warning("%s is still running (process %s on %s)", outcome.name, outcome.process, outcome.host)
    return outcome
