"""The process in which a sweep's arms run, seen from the one in which Hydra runs its jobs.

One child takes arm after arm, so that torch is imported once; one that dies has ended its arm alone, and
is replaced. The process that starts it imports no torch: it waits, and passes on what asks for an end.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from gaccum_exp.arms import continued
from gaccum_exp.arms.context import (
    ArmContext,
    Launch,
    command_here,
    contexts_of_seeds,
    given_name,
    name_of,
)
from gaccum_exp.arms.outcome import (
    RUNNING,
    Outcome,
    is_alive,
    process_started,
    read_outcome,
    read_outcomes,
)
from gaccum_exp.config import schema as config
from gaccum_exp.errors import BadInputError, first_line
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.journal import end_left, journals_below
from gaccum_exp.tracking.metrics import EVAL_LOSS, TRAIN_LOSS
from gaccum_exp.tracking.processes import python
from gaccum_exp.tracking.read_back import Journals
from gaccum_exp.train.stopping import SIGNALS, Stop, StoppedError, of_signal, say_at_once

if TYPE_CHECKING:
    from gaccum_exp.arms.report import Report

log = logging.getLogger(__name__)
PATIENCE_S = 30.0
"""So long an arm may take to end when that is asked for; then its process is ended."""
NOTICE = (
    f"waiting up to {PATIENCE_S:.0f} s for what runs to end after its micro-batch; a second signal ends "
    "it at once"
)
WITHOUT_OUTCOME = "ended without an outcome"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a job finds in its process, to be had in the child too."""

    folder: str
    """The working directory."""
    environment: dict[str, str]
    path: list[str]
    """Where modules are imported from."""
    hydra: Any
    """The job's configuration with Hydra's own, which sets up logging, as plain containers."""
    helper: str | None
    """Where the process that delivers to the store listens."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child says of a request."""

    result: Any = None
    reason: str | None = None
    """Why there is no result."""
    stopped: StoppedError | None = None
    """What has ended it."""
    spent: bool = False
    """Whether something is left in the child that no other arm should meet."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a job's arms."""

    outcomes: dict[Path, Outcome] = field(default_factory=dict)
    """By the arm's folder."""
    apart: bool = False
    """Whether its arms are to be run one by one: none of them has begun."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What became of a sweep's comparison."""

    files: tuple[Path, ...] = ()
    """That were made."""
    view: Mapping[str, str] = field(default_factory=dict)
    """The tags of an experiment that arrange how MLflow shows the sweep."""
    report: "Report | None" = None
    """What it shows, where somebody is to be handed that."""


def _parent() -> int:
    """Return the process that has started this one, even where it is dead already."""
    # Of joblib's workers it is known.
    made_by = getattr(multiprocessing.current_process(), "_parent_pid", None)
    return os.getppid() if made_by is None or is_alive(made_by) else int(made_by)


_PARENT = _parent()
"""Of a launcher's worker the command, if that is what has started it."""


def _is_orphan() -> bool:
    """Whether this is a launcher's worker whose command is dead, and which lives on, as joblib's do."""
    return command_here() is None and os.getppid() != _PARENT


_idle = threading.Event()
"""Set while a launcher's worker has no job in hand."""


@cache
def _watch_command() -> None:
    """End a launcher's worker once it has nothing to do and its command is dead; joblib's wait on."""

    def watch() -> None:
        while not _is_orphan() or not _idle.is_set():
            time.sleep(1)
        end()
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


class DiedError(Exception):
    """The child has ended; the message says how, after "its process"."""


class _Child:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        program = f"from gaccum_exp.arms.serve import serve; serve({theirs.fileno()})"
        # In a session of its own: Ctrl-C in a terminal is meant for this process, which passes it on.
        # What is passed on waits there until it can be followed, and does not end Python as it starts.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process = subprocess.Popen(
                python(program), pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.connection = Connection(ours.detach())
        self._used = False

    def send(self, what: str, *given: Any) -> None:
        """Send a request, and the streams that its words go to.

        Raises:
            DiedError: there is nobody to take it.
        """
        request, streams = pickle.dumps(given), [_open(1), _open(2)]
        with socket.fromfd(self.connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                self.connection.send((what, request))
                socket.send_fds(connection, [b"-"], streams)
            except OSError:
                raise DiedError(self._end()) from None
            finally:
                for stream in streams:
                    os.close(stream)
        self._used = True

    def receive(self, stop: Stop) -> Any:
        """Return the next message; pass on a request to end, and then wait for so long and no longer.

        Raises:
            DiedError: there is none.
        """
        until = float("inf")
        while not self.connection.poll(0.1):
            if stop.asked is None and _is_orphan():
                stop.asked = StoppedError("its command has ended", 143)
            if stop.asked is not None and until == float("inf"):
                until = time.monotonic() + PATIENCE_S
                with contextlib.suppress(OSError):
                    self.connection.send(("stop", stop.asked))
            if time.monotonic() > until:
                self.process.kill()
                self.process.wait()
                raise DiedError(f"did not end within {PATIENCE_S:.0f} s")
            # A process that it has forked may hold its end of the connection.
            if self.process.poll() is not None and not self.connection.poll(0):
                raise DiedError(self._end())
        try:
            return self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            raise DiedError(self._end()) from None

    def _end(self) -> str:
        """Return how it has ended."""
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "was no longer to be spoken to"
        if status >= 0:
            return f"ended with status {status}"
        hint = ", as by hand or where memory runs out" if status == -signal.SIGKILL else ""
        return f"was ended by signal {-status} ({signal.Signals(-status).name}){hint}"

    def close(self) -> None:
        """Let it end."""
        self.connection.close()
        if not self._used:
            self.process.kill()

    def wait(self) -> None:
        """Wait until it has ended, whatever hangs there."""
        try:
            self.process.wait(timeout=10)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # nothing is left to be lost
            self.process.kill()
            self.process.wait()


_children: dict[int, list[_Child]] = {}
"""The last one takes arms; by the process that started them: a forked one must not use its parent's."""


def start() -> None:
    """Start the child, if there is none that takes arms."""
    own = _children.setdefault(os.getpid(), [])
    if own and not own[-1].connection.closed and own[-1].process.poll() is None:
        return
    own[:] = [child for child in own if child.process.poll() is None]
    own.append(_Child())


@atexit.register
def end() -> None:
    """End the child, if there is one, and those before it that still have something to do."""
    own = _children.pop(os.getpid(), [])
    for child in own:
        child.close()
    for child in own:
        child.wait()


def _forget() -> None:
    for children in _children.values():
        for child in children:
            child.connection.close()
    _children.clear()


os.register_at_fork(after_in_child=_forget)


def run_job(
    context: ArmContext, stop: Stop, outcomes: dict[Path, Outcome], helper: str | None
) -> float | None:
    """Run the arms of a sweep's job, but for those that the sweep has already; return its objective.

    Args:
        context: of the job.
        stop: asked to end it.
        outcomes: takes how each arm ended, by its folder.
        helper: address of the process that delivers to the store; None: one of this process's own.

    Raises:
        StoppedError: somebody wants the command to end.
    """
    command_id = context.command_id
    if command_id in _stopped:  # a launcher may go on giving jobs
        raise _stopped[command_id]
    if command_here() is None:
        _watch_command()
    continued.look(context.sweep_folder, command_id)
    if helper is not None:
        shipper.use_helper(helper)
    arms = contexts_of_seeds(context)
    _idle.clear()
    try:
        left = [arm for arm in arms if not _answered(arm, outcomes)]
        job = left[0] if len(left) == 1 else context
        if 1 < len(left) < len(arms):
            job = context.with_values({"sweep.seeds": [arm.config.seed for arm in left]})
        if left and _given(job, left, stop, outcomes):
            for arm in left:
                _given(arm, [arm], stop, outcomes)
    except StoppedError as error:
        _stopped[command_id] = error
        raise
    finally:
        _idle.set()
        if context.known:
            continued.remove_job_folder(context.folder, [arm.folder for arm in arms])
    # None and not NaN for an arm that failed: Optuna's sweeper goes on after the one alone.
    return outcomes[arms[0].folder].objective if len(arms) == 1 else None


def _answered(arm: ArmContext, outcomes: dict[Path, Outcome]) -> bool:
    """Whether the sweep has this arm's end already; it then counts for this command too."""
    known, there = arm.known_arm, read_outcome(arm.folder)
    # A job that a batch system has put back into its queue may have done its work already.
    same = there is not None and (there.command_id, there.digest) == (arm.command_id, arm.digest)
    if there is not None and same and there.status != RUNNING and not there.again:
        outcomes[arm.folder] = there
        return True
    if known is None or known.status is None:
        return False
    if there is None or there.status != known.status:  # its end is of a host that shares no folder
        there = Outcome(
            arm.sweep_id, known.name, known.status, known.reason, task=str(arm.config.task),
            verdict=known.verdict, audit_asked=known.audit_asked,
            objective=known.objective, digest=arm.digest,
        )  # fmt: skip
    else:
        _write(replace(there, command_id=arm.command_id), arm.folder)
    outcomes[arm.folder] = replace(there, command_id=arm.command_id)
    return True


_stopped: dict[str, StoppedError] = {}
"""The commands whose sweeps have been stopped in this process."""


def _given(
    job: ArmContext,
    arms: list[ArmContext],
    stop: Stop,
    outcomes: dict[Path, Outcome],
) -> bool:
    """Have a job done; return whether its arms are to be run one by one."""

    def note_running(process: int) -> None:
        continued.look(job.sweep_folder, job.command_id)  # once more: `pass_on` sees it from here on
        for arm in arms:
            _write(_running(arm, process), arm.folder)

    stop.look()
    try:
        # As it is it cannot be pickled where a plugin has classes of its own in it.
        hydra: Any = HydraConfig.instance().cfg
        hydra = None if hydra is None else OmegaConf.to_container(hydra)
        if hydra is not None:
            hydra["hydra"]["runtime"]["output_dir"] = str(job.folder)  # where an arm's log belongs
        surroundings = _surroundings(hydra, shipper.helper_address())
        answer = _ask(stop, note_running, "arm", job, surroundings)
    except DiedError as died:
        answer = Answer(reason=f"its process {died}")
        if len(arms) > 1 and stop.asked is None and not any(journals_below(a.folder) for a in arms):
            return True  # of what is common to them; which of them it is shows when they are alone
    except Exception as error:  # it cannot be sent
        answer = Answer(reason=f"{type(error).__name__}: {first_line(error)}")
    done = answer.result or Ended()
    if done.apart:
        return True
    stopped = answer.stopped or stop.asked
    for arm in arms:
        outcome = done.outcomes.get(arm.folder) or read_outcome(arm.folder) or _running(arm)
        if (outcome.sweep_id, outcome.command_id) != (arm.sweep_id, arm.command_id):
            outcome = _running(arm)  # another command's, which had the folder before
        if outcome.status == RUNNING:
            why = None if stopped is None else stopped.reason
            outcome = ended(arm.folder, outcome, why, answer.reason or WITHOUT_OUTCOME)
        elif answer.reason:
            log.warning("%s: after it had ended, %s", outcome.name, answer.reason)
        outcomes[arm.folder] = outcome
    if stopped is not None:
        raise StoppedError(stopped.reason, stopped.status)
    return False


def ended(folder: Path, running: Outcome, stopped: str | None, reason: str = WITHOUT_OUTCOME) -> Outcome:
    """Write down, and return, how an arm ended that can no longer do that itself.

    Args:
        folder: of the arm.
        running: what it was.
        stopped: why the command was ended, if it was.
        reason: else, why the arm failed.
    """
    status, reason = ("FAILED", reason) if stopped is None else ("KILLED", stopped)
    ended_as: dict[str, Any] = {"status": status, "reason": reason, "again": True}
    ended_as |= _recorded_end(folder, running)
    outcome = replace(running, host=None, process=None, process_started=None, **ended_as)
    if outcome.status == "FAILED":
        log.error("%s failed: %s", running.name, outcome.reason)
    _write(outcome, folder)
    try:
        end_left(folder, status, reason)
        for path in journals_below(folder):
            shipper.announce(path)
    except (OSError, ValueError) as error:
        log.warning("%s: its journal could not be ended (%s)", running.name, error)
    return outcome


def _recorded_end(folder: Path, running: Outcome) -> dict[str, Any]:
    """Return what an arm's journal says of its end in a command, as fields of an outcome, if anything.

    It died between the two, and its run's end in the store is the journal's.
    """
    try:
        runs = Journals(folder).sweep(running.sweep_id, ())
    except (OSError, ValueError, KeyError):  # one that cannot be read says nothing
        return {}
    for run in runs:
        own = running.command_id in (None, *run.tags.get("command_id", "").split())
        if own and run.status != RUNNING and not run.is_control:
            objective = run.metrics.get(EVAL_LOSS, run.metrics.get(TRAIN_LOSS)) if run.finished else None
            return {
                "status": run.status, "reason": run.tags.get("failure"),
                "verdict": run.tags.get("verdict"), "objective": objective,
                "again": run.status == "KILLED",
            }  # fmt: skip
    return {}


def _write(outcome: Outcome, folder: Path) -> None:
    try:
        outcome.write(folder)
    except OSError as error:
        log.error("%s: its outcome cannot be written (%s)", outcome.name, error)


def _running(arm: ArmContext, process: int | None = None) -> Outcome:
    asked = False
    try:
        settings = config.validate(arm.config)
        name, asked = name_of(arm, settings), settings.audit_asked
        if settings.chooses_accum_steps:
            name = given_name(arm)
    except BadInputError:
        name = given_name(arm)
    return Outcome(
        arm.sweep_id, name, RUNNING, task=str(arm.config.task), audit_asked=asked,
        host=platform.node(), process=process,
        process_started=None if process is None else process_started(process),
        digest=arm.digest, command_id=arm.command_id,
    )  # fmt: skip


def report(launch: Launch, stop: Stop) -> Compared:
    """Compare the arms of a sweep in the child, where torch is.

    Raises:
        BadInputError: nothing can be compared.
        StoppedError: somebody wants the command to end.
    """
    answer = Answer()
    for _ in range(2):  # once more where something has ended the process, which loses nothing
        try:
            answer = _ask(stop, lambda process: None, "report", launch, _surroundings())
            break
        except DiedError as died:
            answer = Answer(reason=f"the process that compares {died}")
        stop.look()
    stop.look()
    if answer.stopped is not None:
        raise answer.stopped
    if answer.reason:
        raise BadInputError(answer.reason)
    compared: Compared = answer.result
    return compared


def _ask(stop: Stop, before: Callable[[int], None], what: str, *given: Any) -> Answer:
    """Give the child a request and return its answer; `before`: called with its process's id.

    Raises:
        DiedError: it has ended meanwhile.
    """
    with stop.held(NOTICE):
        for last in (False, True):
            stop.look()
            start()
            child, begun = _children[os.getpid()][-1], False
            stop.before_end = child.process.kill
            try:
                before(child.process.pid)
                child.send(what, *given)
                begun = child.receive(stop) == "begun"
                answer: Answer = child.receive(stop)
                if answer.spent:
                    child.close()
                return answer
            except DiedError:
                child.close()
                if begun or last:  # else it had died before, of nothing that it was asked
                    raise
            finally:
                stop.before_end = None
    raise AssertionError("unreachable")


def pass_on(launch: Launch, number: int) -> None:
    """Pass a signal on to the arms that other processes of this host run; wait until they have ended."""
    say_at_once(of_signal(number), NOTICE)
    continued.note_stopped(launch.folder, of_signal(number))
    time.sleep(0.1)  # what has looked before is noted as running by then
    until, asked = time.monotonic() + PATIENCE_S, set[int]()
    while time.monotonic() < until:
        outcomes = read_outcomes(launch.folder, launch.sweep_id).values()
        running = {o.process for o in outcomes if o.runs_here and o.process is not None}
        for process in running - asked:
            with contextlib.suppress(OSError):
                os.kill(process, number)
        asked |= running
        if not running:
            return
        time.sleep(0.1)


def _surroundings(hydra: Any = None, helper: str | None = None) -> Surroundings:
    return Surroundings(os.getcwd(), dict(os.environ), list(sys.path), hydra, helper)


def _open(stream: int) -> int:
    """Return a copy of one of this process's streams, or of nothing where it is closed."""
    try:
        return os.dup(stream)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
