"""Models and data workers that take their process down, and signals, to one process or to all."""

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.durability.command import (
    HERE,
    TRUTH,
    Folders,
    Running,
    complaints,
    kill,
    next_command,
    overrides,
    run,
)
from experiments.durability.kills import unfinished
from experiments.durability.ledger import FLUSH_S, compare, noted, stored
from experiments.durability.tries import Options, Result, Tried, many, result
from experiments.durability.unruly import HARMLESS

WINDOWS = 150
ARMS = 3
STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


@dataclass(frozen=True)
class Case:
    """An arm that misbehaves: what it does and where, among which others."""

    fault: str
    place: str = "window"
    """build, window or evaluation, of a model; worker or data: where a sample is fetched."""
    launcher: str = "sweep"
    """sweep, joblib (two arms at a time), or single"""


FATAL = (
    "sys.exit(0)", "sys.exit(3)", "os._exit(0)", "os._exit(3)", "SIGSEGV", "SIGABRT", "SIGKILL",
    "unencodable", "silent", "odd", "unpicklable", "recursion", "memory",
)  # fmt: skip
CASES = (
    *(Case(fault) for fault in FATAL),
    *(Case(fault) for fault in sorted(HARMLESS)),
    *(Case(fault, "build") for fault in ("sys.exit(0)", "os._exit(0)", "SIGSEGV", "odd")),
    *(Case(fault, "evaluation") for fault in ("sys.exit(3)", "SIGABRT")),
    *(Case(f, "worker") for f in ("SIGKILL", "os._exit(0)", "sys.exit(0)", "unencodable", "SIGSEGV")),
    *(Case(fault, "data") for fault in ("sys.exit(0)", "os._exit(3)")),
    *(Case(fault, launcher="joblib") for fault in ("os._exit(0)", "SIGSEGV")),
    *(
        Case(f, launcher="single")
        for f in ("sys.exit(0)", "sys.exit(3)", "odd", "unencodable", "silent")
    ),
    Case("SIGKILL", "worker", "single"),
)


@dataclass(frozen=True)
class Signal:
    """A signal, once or twice, to the first process or to all."""

    number: signal.Signals
    twice: bool
    to_all: bool
    shape: str


SIGNALS = tuple(
    Signal(number, twice, to_all, shape)
    for number in STATUS
    for twice in (False, True)
    for to_all in (False, True)
    for shape in ("single", "sweep")
)
ALL: tuple[Case | Signal, ...] = (*CASES, *SIGNALS)


def models(options: Options) -> Result:
    """Let every fault happen in one arm of a sweep, and send every signal."""
    tries = many("models", len(ALL), _one, options)
    ends = [tried.notes["ends_s"] for tried in tries if "ends_s" in tried.notes]
    extra = f"After a signal commands ended within {min(ends):.1f} to {max(ends):.1f} s." if ends else ""
    return result(tries, extra, ("what", "where"))


def _one(draw: random.Random, places: Folders, number: int) -> Tried | None:
    # Spread over the kinds, so that a few tries see each of them.
    case = ALL[number * 23 % len(ALL)]
    folder = places.new(f"models {number}")
    tried = _fault(case, folder) if isinstance(case, Case) else _signal(case, folder, draw)
    if tried is not None:
        places.done(folder, keep=not tried.sound)
    return tried


def unruly(case: Case, folder: Path) -> list[str]:
    """Return the command line of a case; of a sweep's arms the one with seed 1 misbehaves."""
    armed = "1" if case.launcher == "single" else "${seed}"
    few = overrides(folder, windows=WINDOWS, pause_s=0.0, eval_every=50)
    if case.place in ("worker", "data"):
        few += [
            f"data.train._target_={HERE}.unruly.UnrulyPoints", f"+data.train.fault='{case.fault}'",
            f"+data.train.armed={armed}", f"+data.train.in_worker={str(case.place == 'worker').lower()}",
            f"data.workers={1 if case.place == 'worker' else 0}",
        ]  # fmt: skip
    else:
        few += [
            f"model._target_={HERE}.unruly.Unruly", f"+model.fault='{case.fault}'",
            f"+model.place={case.place}", f"+model.armed={armed}",
        ]  # fmt: skip
    if case.launcher == "single":
        return few
    beside = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if case.launcher == "joblib" else []
    return ["-m", *few, f"seed=range({ARMS})", *beside]


def _fault(case: Case, folder: Path) -> Tried:
    tried = Tried(case.fault, f"{case.place}, {case.launcher}")
    ended = run(folder, *unruly(case, folder))
    goes_on = case.fault in HARMLESS and case.place not in ("worker", "data")
    tried.problems += complaints(ended, 0 if goes_on else 1, "the command")
    runs = stored(f"sqlite:///{folder / 'mlflow.db'}")
    lines = noted(folder / TRUTH)
    # A process that is gone at once leaves what is older than its last flush.
    tried.found = compare(lines, runs, until_s=0.0, died=unfinished(runs, lines))
    arms = 1 if case.launcher == "single" else ARMS
    finished = tried.found.statuses["FINISHED"]
    if finished != (arms if goes_on else arms - 1):
        tried.problems.append(f"runs: {dict(tried.found.statuses)}")
    if not goes_on:
        failed = [p.read_text() for p in folder.rglob("arm.json") if '"FAILED"' in p.read_text()]
        if len(failed) != 1 or '"reason": null' in failed[0]:
            tried.problems.append(f"{len(failed)} outcomes say FAILED, with a reason: {failed}")
    if arms > 1 and not list(folder.glob("multirun/*/comparison.csv")):
        tried.problems.append("nothing is compared")
    return tried


def _signal(case: Signal, folder: Path, draw: random.Random) -> Tried | None:
    name = f"{case.number.name} {'twice' if case.twice else 'once'}"
    tried = Tried(name, f"{case.shape}, to {'all processes' if case.to_all else 'the first process'}")
    few = overrides(folder, windows=400, eval_every=100, eval_pause_s=0.05)
    sweep = ["-m", f"seed=range({ARMS})"] if case.shape == "sweep" else []
    running = Running(folder, *sweep[:1], *few, *sweep[1:])
    step, second_s = draw.randint(1, 700 if sweep else 390), draw.uniform(0.02, 1)
    while running.alive and len(noted(folder / TRUTH)) < step:
        time.sleep(0.02)

    def send() -> float:
        processes = running.processes()
        return kill(processes if case.to_all else processes[:1], case.number)

    if not running.alive:
        running.settled()
        return None
    at = send()
    if case.twice:
        time.sleep(second_s)
        if running.alive:
            send()
    status = running.ended()
    tried.notes["ends_s"] = time.time() - at
    tried.problems += [f"left running: {line}" for line in running.settled()]
    allowed = {STATUS[case.number]} | (
        {-case.number} if case.twice and case.number != signal.SIGUSR1 else set()
    )
    tried.problems += complaints(running, allowed, "the command")
    if case.twice:
        tried.problems += complaints(next_command(folder), 0, "the next command")
    lines, runs = noted(folder / TRUTH), stored(f"sqlite:///{folder / 'mlflow.db'}")
    until_s = at - FLUSH_S if case.twice else at
    tried.found = compare(lines, runs, until_s=until_s, died=unfinished(runs, lines))
    if not case.twice and status is not None:
        of_sweep = [path.read_text() for path in folder.rglob("arm.json")]
        if not any('"KILLED"' in text for text in of_sweep):
            tried.problems.append(f"no outcome says KILLED: {of_sweep}")
        if any('"FINISHED"' in text for text in of_sweep) and not list(folder.rglob("comparison.csv")):
            tried.problems.append("nothing is compared")
    return tried
