"""The process in which a sweep's arms run, from within: it takes a request, does it, and answers."""

import atexit
import gc
import importlib
import logging
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from omegaconf import OmegaConf

from gaccum_exp.arms import handed_over
from gaccum_exp.arms.child import PATIENCE_S, Answer, Compared, Ended, Surroundings
from gaccum_exp.arms.context import ArmContext, Launch
from gaccum_exp.arms.continued import lacks, with_those_elsewhere
from gaccum_exp.arms.outcome import read_outcomes
from gaccum_exp.arms.process import SPENT, process_restored
from gaccum_exp.arms.streams import forgiving
from gaccum_exp.errors import BadInputError, TrackingError, first_line
from gaccum_exp.tracking import shipper
from gaccum_exp.train.stopping import SIGNALS, Stop, StoppedError, listening, silence_workers

END_S = 5.0
"""So long what arms have left to be done at the end of the process may take."""
Request = tuple[str, bytes, list[int]]


def serve(descriptor: int) -> None:
    """Answer requests, one after the other, until the process that started this one is gone."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever ends it while nothing is in hand
    server = _Server(Connection(descriptor))
    threading.Thread(target=server.listen, daemon=True).start()
    gc.disable()  # imports leave next to no garbage, and the search for it takes a sixth of their time
    importlib.import_module("gaccum_exp.arms.seeds")
    heard: Any = signal.getsignal(signal.SIGCHLD)
    while True:
        request = server.requests.get()
        if request is None:
            break
        signal.signal(signal.SIGCHLD, heard)
        try:
            answer = server.answer(request)
        except BaseException as error:  # what there is of an outcome is in its file
            traceback.print_exc()
            answer = Answer(reason=f"{type(error).__name__}: {first_line(error)}", spent=True)
        heard = silence_workers()
        with suppress(OSError):
            server.connection.send(answer)
    _end()


def _end() -> None:
    """End the process, whatever an arm's model has left to hang there."""

    def give_up() -> None:
        time.sleep(END_S)
        os._exit(0)

    threading.Thread(target=give_up, daemon=True).start()
    with suppress(BaseException):
        atexit._run_exitfuncs()
    _flush()
    os._exit(0)


class _Server:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        os.register_at_fork(after_in_child=connection.close)
        self.requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._streams = os.dup(1), os.dup(2)
        self._waiting = 0
        """Requests that have come and not begun."""
        self._stop: Stop | None = None
        """Asked to end the request in hand."""

    def listen(self) -> None:
        """Take what comes, in a thread of its own, until there is nobody to send anything."""
        asked = StoppedError("its command has ended", 143)
        with suppress(EOFError, OSError):
            while True:
                what, given = self.connection.recv()
                if what == "stop":
                    self._end(given)
                    continue
                with socket.fromfd(self.connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
                    streams = socket.recv_fds(end, 1, 2)[1]
                self._waiting += 1
                self.requests.put((what, given, streams))
        self.requests.put(None)
        self._end(asked)
        time.sleep(PATIENCE_S)
        os._exit(asked.status)

    def _end(self, asked: StoppedError) -> None:
        if self._stop is not None:
            self._stop.tell(asked)
        elif self._waiting:  # nothing has begun
            os._exit(asked.status)

    def answer(self, request: Request) -> Answer:
        """Answer a request in the surroundings of its sender; leave the process as it was."""
        what, given, streams = request
        with (
            listening() as stop, stop.held(notice=""), forgiving(says=False), process_restored(),
            self._spoken_to(streams),
        ):  # fmt: skip
            self._stop = stop
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked since the process began
            self._waiting -= 1
            self.connection.send("begun")
            result = reason = stopped = None
            try:
                subject, surroundings = pickle.loads(given)
                _enter(surroundings)
                result = _DONE[what](subject, stop)
            except StoppedError as error:
                stopped = error
            except (BadInputError, TrackingError) as error:
                reason = first_line(error)
            finally:
                self._stop = None
                _flush()
        left = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
        return Answer(result, reason, stopped=stopped or stop.asked, spent=bool(left) or SPENT.is_set())

    @contextmanager
    def _spoken_to(self, streams: list[int]) -> Iterator[None]:
        """Let words go to these streams meanwhile."""
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        try:
            yield
        finally:
            for number, stream in zip((1, 2), self._streams, strict=True):
                os.dup2(stream, number)


def _enter(surroundings: Surroundings) -> None:
    os.chdir(surroundings.folder)
    for key in os.environ.keys() - surroundings.environment.keys():
        del os.environ[key]
    os.environ.update(surroundings.environment)
    sys.path[:] = surroundings.path
    if surroundings.helper is not None:
        shipper.use_helper(surroundings.helper)
    if surroundings.hydra is None:
        logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
        return
    setup_globals()
    job = OmegaConf.create(surroundings.hydra)
    HydraConfig.instance().cfg = job
    configure_log(job.hydra.job_logging, job.hydra.verbose)


class SaidOnce(logging.Filter):
    """Lets what is said of several arms in the same words through once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is new."""
        text = record.getMessage()
        is_new = text not in self._said
        self._said.add(text)
        return is_new


@lru_cache(maxsize=1)
def _said_once(sweep_id: str) -> SaidOnce:
    """Return what remembers the words of a sweep; the last one's are kept."""
    return SaidOnce()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def _run(context: ArmContext, stop: Stop) -> Ended:
    from gaccum_exp.arms.seeds import run_job

    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.FileHandler):  # an arm's own log has all that is said of it
            handler.addFilter(_said_once(context.sweep_id))
    with handed_over.looked_for_in(context.sweep_folder):
        return run_job(context, stop)


def _compare(launch: Launch, stop: Stop) -> Compared:
    """Compare what was trained or audited, and print it."""
    outcomes = read_outcomes(launch.folder, launch.sweep_id)
    if lacks(launch.folder, launch.sweep_id, outcomes):
        with stop.at_once(), suppress(BadInputError, TrackingError):  # else of those that are here
            outcomes = with_those_elsewhere(
                launch.folder, launch.sweep_id, outcomes, launch.tracking_uri, launch.experiment_name
            )
    with stop.at_once():
        if outcomes and not any(outcome.task in ("train", "audit") for outcome in outcomes.values()):
            return Compared()
        from gaccum_exp.arms.report import Runs, print_report, report_sweep

        runs = Runs(launch.tracking_uri, launch.experiment_name, launch.folder)
        report = report_sweep(runs, [launch.sweep_id], launch.folder)
        if not launch.called:
            print_report(report)
        return Compared(report.files, report.view, report if launch.called else None)


_DONE: dict[str, Callable[[Any, Stop], Any]] = {"arm": _run, "report": _compare}
