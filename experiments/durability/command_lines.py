"""Command lines that hold anything: each is answered in a line, and nothing else happens."""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.durability import hostile
from experiments.durability.command import Running, folders
from experiments.durability.tries import Options, Result, in_a_line
from gaccum_exp import cli
from gaccum_exp.arms import child, serve
from gaccum_exp.train.stopping import Stop

IN_PROCESS, AS_PROCESSES = 5_000, 200
PATIENCE_S = 120
"""After so long a line hangs."""
SAID = (
    "run 2",
    "sweep 2",
    "recorded in ",
    "tracking: ",
    "data.train holds ",
    "accum.partial_window=carry",
)
"""How lines begin that are said beside the one that is asked for."""


class HangsError(BaseException):
    """A line has taken too long."""


@dataclass
class Judged:
    """What came of lines, by kind."""

    tried: Counter[str] = field(default_factory=Counter)
    statuses: dict[str, Counter[object]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """A sentence and the line."""

    def add(self, kind: str, line: Sequence[str], status: object, faults: list[str]) -> None:
        """Count a line."""
        self.tried[kind] += 1
        self.statuses.setdefault(kind, Counter())[status] += 1
        self.problems += [f"{kind}: {fault}: {shlex.join(line)[:300]!r}" for fault in faults]


def command_lines(options: Options) -> Result:
    """Give the program lines of every kind, in this process and as processes of their own."""
    inside, outside = Judged(), Judged()
    number = options.tries or IN_PROCESS
    processes = max(1, round(number * AS_PROCESSES / IN_PROCESS))
    with folders(options.keep) as places:
        for name, run, judged, few in (
            ("command_lines", in_this_process, inside, number),
            ("processes", as_processes, outside, processes),
        ):
            folder = places.new(name, store=False)
            work = folder / "a" / "b" / "c"
            hostile.broken_files(work)
            shutil.copyfile(places.store, work / "mlflow.db")
            run(judged, folder, work, few, options)
    wrong = inside.problems + outside.problems
    lines = ["| kind | in process | as processes | statuses |", "|---|---|---|---|"]
    for kind in hostile.KINDS:
        ended = Counter[object]()
        for judged in (inside, outside):
            ended += judged.statuses.get(kind, Counter())
        named = ", ".join(f"{status}: {count}" for status, count in sorted(ended.items(), key=str))
        lines.append(f"| {kind} | {inside.tried[kind]} | {outside.tried[kind]} | {named} |")
    lines += ["", *(f"- {in_a_line([problem])}" for problem in wrong[:20])]
    tried = f"{inside.tried.total():,} in process, {outside.tried.total():,} as processes"
    return Result(
        tried, f"{len(wrong)} tracebacks, hangs, false 0, other words", "\n".join(lines), not wrong
    )


def generated(number: int, options: Options) -> Iterator[tuple[str, list[str]]]:
    """Yield so many lines with their kinds, in turn; the same for the same seed."""
    kinds, start = list(hostile.KINDS), time.monotonic()
    for index in range(number):
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            return
        kind = kinds[index % len(kinds)]
        if options.only is None or options.only == index:
            yield kind, hostile.KINDS[kind](random.Random(f"command_lines {options.seed} {index}"))


def in_this_process(judged: Judged, folder: Path, work: Path, number: int, options: Options) -> None:
    """Run lines by calling `main`; arms of sweeps run here too."""
    before = Path.cwd()
    os.chdir(work)
    try:
        with _arms_here():
            for kind, line in generated(number, options):
                began = time.time()
                status, said = _called(line, folder)
                faults = faults_of(line, status, said, work, folder, began)
                judged.add(kind, line, status, faults)
                for name in ("outputs", "multirun"):  # what thousands leave, each command would look at
                    shutil.rmtree(work / name, ignore_errors=True)
                if judged.tried.total() % 100 == 0:
                    print(f"command_lines: {judged.tried.total()} of {number}", flush=True)
                if faults or options.only is not None:
                    print(f"{kind}: {faults}: {shlex.join(line)!r}\n{said[-800:]}", flush=True)
    finally:
        os.chdir(before)


def as_processes(judged: Judged, folder: Path, work: Path, number: int, options: Options) -> None:
    """Run lines as `python -m gaccum_exp`."""
    for kind, line in generated(number, Options(seed=options.seed + 1, minutes=options.minutes)):
        line = [
            word.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for word in line
        ]
        began = time.time()
        running = Running(folder, *line, cwd=work)
        status = running.ended(PATIENCE_S)
        said = running.err.read_text(errors="replace")
        running.settled()
        running.out.unlink()
        running.err.unlink()
        faults = faults_of(line, status, said, work, folder, began)
        judged.add(kind, line, status, faults)
        if faults:
            print(f"{kind}: {faults}: {shlex.join(line)!r}\n{said[-800:]}", flush=True)


def faults_of(
    line: Sequence[str], status: object, said: str, work: Path, folder: Path, began_s: float
) -> list[str]:
    """Say what is wrong with how a line was answered.

    Args:
        line: what was given.
        status: the exit status; None: it hung; else what was raised.
        said: on stderr.
        work: the working directory.
        folder: a few levels above it, in which there was nothing else.
        began_s: when the line began.
    """
    faults = []
    if status is None:
        faults.append("hangs")
    elif not isinstance(status, int) or status not in range(6):
        faults.append(f"ends with {status}")
    if "Traceback" in said:
        faults.append("a traceback")
    own = [row for row in said.splitlines() if row.strip() and not row.startswith(SAID)]
    if status == 2 and len(own) != 1:
        faults.append(f"{len(own)} lines, not one")
    if status == 2 and own and not ("gaccum_exp" in own[0].split(":")[0] or " failed: " in own[0]):
        faults.append("not the program's words")
    if status == 0 and not _only_shows(line) and not _finished(work, began_s):
        faults.append("0, and nothing has run")
    outside = {p for p in folder.iterdir() if not p.name.startswith(("out-", "err-"))} - {folder / "a"}
    outside |= {*(folder / "a").iterdir()} - {folder / "a" / "b"}
    outside |= {*(folder / "a" / "b").iterdir()} - {work}
    if outside:
        faults.append(f"written outside: {sorted(p.name for p in outside)}")
    return faults


def _only_shows(line: Sequence[str]) -> bool:
    if line and line[0] in ("report", "deliver"):
        return True
    with contextlib.suppress(ValueError):
        return cli.command_line(line).only_shows
    return False


def _finished(work: Path, began_s: float) -> bool:
    """Whether an arm has finished since, and none has failed."""
    files = [path for path in work.rglob("arm.json") if path.stat().st_mtime >= began_s]
    found = [json.loads(path.read_text())["status"] for path in files]
    return bool(found) and set(found) == {"FINISHED"}


def _called(line: list[str], folder: Path) -> tuple[object, str]:
    """Call `main` and return its status, or what it raised, and what it said on stderr."""
    streams = [os.dup(1), os.dup(2)]
    out, err = folder / "out-", folder / "err-"
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)

    def hangs(number: int, frame: FrameType | None) -> None:
        raise HangsError

    said_to = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # as in a process of the command's own
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE_S)
    status: object = None
    try:
        status = cli.main(line)
    except HangsError:
        pass
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = said_to
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)
    return status, err.read_text(errors="replace")


@contextlib.contextmanager
def _arms_here() -> Iterator[None]:
    """Have the arms of sweeps run in this process, which needs no other one to import torch again."""

    def ask(stop: Stop, before: Any, what: str, *given: Any) -> child.Answer:
        with stop.held():
            return child.Answer(serve._DONE[what](given[0], stop))

    asked, start = child._ask, child.start
    child._ask, child.start = ask, lambda: None
    try:
        yield
    finally:
        child._ask, child.start = asked, start
