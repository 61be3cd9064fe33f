"""kill -9: of the training, of the helper that delivers, of both, of the server that takes it."""

import random
import threading
import time
from pathlib import Path

from experiments.durability.command import (
    TRUTH,
    Folders,
    Process,
    Running,
    complaints,
    deliver,
    kill,
    next_command,
    overrides,
)
from experiments.durability.ledger import FLUSH_S, Noted, Stored, compare, noted, stored
from experiments.durability.server import MlflowServer
from experiments.durability.tries import Options, Result, Tried, many, result

WINDOWS = 700
"""Some five seconds of training: two flushes, and the two seconds that may be lost."""
SWEEP = ("-m", "accum.steps=1,2")
SWEEP_WINDOWS = 500
COMMON = {"eval_every": 60, "eval_pause_s": 0.05}
TOOK_S: dict[str, float] = {}
"""How long an undisturbed command takes, while another one runs beside it."""
_measuring = threading.Lock()


def arguments(shape: str, folder: Path) -> list[str]:
    """Return the command line of a single run or of a sweep of two arms."""
    if shape == "single":
        return overrides(folder, windows=WINDOWS, **COMMON)
    return [*SWEEP, *overrides(folder, windows=SWEEP_WINDOWS, **COMMON)]


def took_s(shape: str, places: Folders) -> float:
    """Return how long such a command takes that nobody disturbs."""
    with _measuring:
        if shape not in TOOK_S:
            folders = [places.new(f"undisturbed {shape} {i}") for i in range(2)]
            running = [Running(folder, *arguments(shape, folder)) for folder in folders]
            ends = []
            for one in running:
                status = one.ended()
                ends.append(time.time() - one.start_s)
                if status != 0:
                    raise RuntimeError(f"an undisturbed command ends with {status}: {one.text}")
                one.settled()
            for folder in folders:
                found = compare(noted(folder / TRUTH), stored(f"sqlite:///{folder / 'mlflow.db'}"))
                if not found.sound:
                    raise RuntimeError(f"undisturbed: {found}: {found.examples}")
            TOOK_S[shape] = min(ends)
    return TOOK_S[shape]


def phase(lines: list[Noted], folder: Path, at: float, arms: int, windows: int) -> str:
    """Say what a command was doing at a moment."""
    before = [line for line in lines if line.time_s <= at]
    if not before:
        return "start"
    if before[-1].kind == "evaluating":
        return "evaluation"
    ended = sum(path.stat().st_mtime <= at for path in folder.rglob("arm.json"))
    if ended == arms:
        return "comparison"
    if before[-1].global_step == windows:
        return "end of a run"
    return "between arms" if ended == len({line.arm for line in before}) else "window"


def training(options: Options) -> Result:
    """Kill trainings at random moments, and hold what is left against what was trained."""
    tries = many("training", 100, _kill_training, options)
    moments = ", ".join(f"{shape}: {seconds:.1f} s" for shape, seconds in TOOK_S.items())
    young = sum(tried.found.younger for tried in tries)
    extra = (
        f"Moments are drawn uniformly over the life of the command (undisturbed, {moments}); "
        f"*delivery*: at the moment that a journal grows. {young} points that were younger than the "
        "last flush are not there."
    )
    return result(tries, extra)


def _kill_training(draw: random.Random, places: Folders, number: int) -> Tried | None:
    whom = ("single", "single", "sweep, parent", "sweep, child", "sweep, both")[number % 5]
    shape = whom.partition(",")[0]
    life, folder = took_s(shape, places), places.new(f"training {number}")
    aimed = draw.random() < 0.2
    growth, moment = draw.randint(1, 8), draw.uniform(0, life)
    running = Running(folder, *arguments(shape, folder))
    hit = await_growth(running, growth) if aimed else await_moment(running, moment)
    victims = victims_of(running, whom, noted(folder / TRUTH))
    if not hit or not victims:
        running.ended()
        running.settled()
        places.done(folder, keep=False)
        return None
    at = kill(victims)
    tried = Tried(f"kill -9, {whom}")
    problems = tried.problems
    running.ended()
    problems += [f"left running: {line}" for line in running.settled()]
    lines = noted(folder / TRUTH)
    arms, windows = (1, WINDOWS) if shape == "single" else (2, SWEEP_WINDOWS)
    tried.when = "delivery" if aimed else phase(lines, folder, at, arms, windows)
    if whom == "sweep, child" and "the process that compares" in running.text:
        problems += complaints(
            running, 1, "the sweep"
        )  # whose arms are stored, and named to be compared
    elif whom == "sweep, child":
        problems += sweep_goes_on(running, folder, arms)
    after = next_command(folder)
    problems += complaints(after, 0, "the next command")
    runs = stored(f"sqlite:///{folder / 'mlflow.db'}")
    tried.found = compare(
        noted(folder / TRUTH), runs, until_s=at - FLUSH_S, died=unfinished(runs, lines)
    )
    places.done(folder, keep=not tried.sound)
    return tried


def victims_of(running: Running, whom: str, lines: list[Noted]) -> list[Process]:
    """Return the processes to be killed."""
    found = running.trainings()
    first = [process for process in found if process.pid == running.pid]
    others = [process for process in found if process.pid != running.pid]
    if whom == "sweep, parent" or whom == "single":
        return first
    if whom == "sweep, both":
        return found
    trains = {line.pid for line in lines[-1:]}
    return [process for process in others if process.pid in trains or not trains]


def await_moment(running: Running, seconds: float) -> bool:
    """Wait until so long after the start; False: the command ends before."""
    while (left := running.start_s + seconds - time.time()) > 0:
        if not running.alive:
            return False
        time.sleep(min(0.02, left))
    return running.alive


def await_growth(running: Running, times: int) -> bool:
    """Wait until the journals below have grown so many times; False: the command ends before."""
    before, journals, looked_s = 0, list[Path](), 0.0
    while running.alive:
        if not journals or time.monotonic() - looked_s > 0.5:
            journals, looked_s = sorted(running.folder.rglob("journal*.jsonl")), time.monotonic()
        size = sum(path.stat().st_size for path in journals if path.exists())
        if size > before:
            times, before = times - 1, size
            if times <= 0:
                return True
        time.sleep(0.0005 if journals else 0.02)
    return False


def sweep_goes_on(running: Running, folder: Path, arms: int) -> list[str]:
    """Say what is wrong with the end of a sweep of which a child was killed."""
    text, status = running.text, running.process.returncode
    problems = [] if "Traceback" not in text else [f"a traceback: {text[-400:]}"]
    ends = [path.read_text() for path in folder.glob("multirun/*/*/arm.json")]
    finished = sum('"FINISHED"' in end for end in ends)
    if len(ends) < arms or finished < arms - 1:
        problems.append(f"{len(ends)} outcomes of {arms} arms, {finished} finished")
    if not list(folder.glob("multirun/*/comparison.csv")):
        problems.append("nothing is compared")
    expected = 0 if finished == arms else 1
    if status != expected:
        problems.append(f"status {status}, not {expected}: {text[-300:]}")
    return problems


def unfinished(runs: list[Stored], lines: list[Noted]) -> set[tuple[str, str]]:
    """Return the arms that are not stored as finished: of these alone something may be lost."""
    finished = {(run.sweep, run.arm) for run in runs if run.status == "FINISHED"}
    return {(line.sweep, line.arm) for line in lines} - finished


def helper(options: Options) -> Result:
    """Kill helpers, both, and servers that stay away for a while or for good."""
    servers = Servers()
    try:
        tries = many("helper", 60, lambda *a: _kill_recording(servers, *a), options)
    finally:
        servers.close()
    waits = [f"{tried.notes['away_s']:.0f} s" for tried in tries if "away_s" in tried.notes]
    ends = [tried.notes["ends_s"] for tried in tries if "ends_s" in tried.notes]
    extra = f"The server was away for {', '.join(waits)}." if waits else ""
    if ends:
        extra += f" Where it stayed away, the command took {min(ends):.1f} to {max(ends):.1f} s in all."
    return result(tries, extra)


class Servers:
    """A server for each thread that makes tries; each try has an experiment of its own."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._started: list[MlflowServer] = []

    def of_thread(self, places: Folders) -> MlflowServer:
        """Return the thread's server, started."""
        if not hasattr(self._own, "server"):
            folder = places.base / f"server-{threading.get_ident()}"
            folder.mkdir()
            self._own.server = MlflowServer(folder)
            self._started.append(self._own.server)
            self._own.server.start()
        server: MlflowServer = self._own.server
        return server

    def close(self) -> None:
        """Kill them all."""
        for server in self._started:
            server.kill()


def _kill_recording(servers: Servers, draw: random.Random, places: Folders, number: int) -> Tried | None:
    whom = ("helper", "server, back", "helper three times", "server, never back", "both")[number % 5]
    shape = draw.choice(("single", "sweep"))
    life, folder = took_s(shape, places), places.new(f"helper {number}")
    moments = sorted(draw.uniform(0, life) for _ in range(3 if whom == "helper three times" else 1))
    if whom.startswith("server"):
        return _kill_server(servers.of_thread(places), draw, places, folder, shape, moments[0], whom)
    running = Running(folder, *arguments(shape, folder))
    hits, at = 0, 0.0
    for moment in moments:
        if await_moment(running, moment):
            victims = running.helpers() if whom.startswith("helper") else running.processes()
            at = kill(victims)
            hits += bool(victims)
    if not hits:
        running.ended()
        running.settled()
        places.done(folder, keep=False)
        return None
    tried = Tried(f"kill -9, {whom} ({shape})")
    running.ended()
    tried.problems += [f"left running: {line}" for line in running.settled()]
    lines = noted(folder / TRUTH)
    arms, windows = (1, WINDOWS) if shape == "single" else (2, SWEEP_WINDOWS)
    tried.when = phase(lines, folder, at, arms, windows)
    if whom != "both":
        tried.problems += complaints(running, 0, "the training")
    after = next_command(folder)
    tried.problems += complaints(after, 0, "the next command")
    runs = stored(f"sqlite:///{folder / 'mlflow.db'}")
    if whom == "both":
        tried.found = compare(
            noted(folder / TRUTH), runs, until_s=at - FLUSH_S, died=unfinished(runs, lines)
        )
    else:
        tried.found = compare(noted(folder / TRUTH), runs)
    places.done(folder, keep=not tried.sound)
    return tried


def _kill_server(
    server: MlflowServer, draw: random.Random, places: Folders, folder: Path, shape: str, moment: float,
    whom: str,
) -> Tried | None:  # fmt: skip
    away_s = draw.uniform(0, 30)
    experiment = folder.name
    where = [f"tracking.uri={server.uri}", f"tracking.experiment_name={experiment}"]
    running = Running(folder, *arguments(shape, folder), *where)
    hit = await_moment(running, moment)
    tried = Tried(f"kill -9, {whom} ({shape})")
    at = time.time()
    server.kill()
    if whom == "server, back":
        tried.notes["away_s"] = away_s
        time.sleep(away_s)
        server.start()
    running.ended()
    if whom == "server, never back":
        tried.notes["ends_s"] = time.time() - running.start_s
        if hit and "gaccum_exp deliver" not in running.text:
            tried.problems.append(f"does not say how to deliver: {running.text[-300:]}")
    tried.problems += [f"left running: {line}" for line in running.settled()]
    lines = noted(folder / TRUTH)
    arms, windows = (1, WINDOWS) if shape == "single" else (2, SWEEP_WINDOWS)
    tried.when = phase(lines, folder, at, arms, windows) if hit else "after its end"
    tried.problems += complaints(running, 0, "the training")
    if whom == "server, never back":
        server.start()
    to = ["--uri", server.uri, "--experiment", experiment]
    after = deliver(folder, *to)
    tried.problems += complaints(after, 0, "gaccum_exp deliver")
    tried.found = compare(noted(folder / TRUTH), stored(server.uri, experiment=experiment))
    places.done(folder, keep=not tried.sound)
    return tried if hit else None
