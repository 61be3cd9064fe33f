"""Disks that are full while a journal, store or outcome is written, and folders that are removed."""

import contextlib
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.durability.command import (
    TRUTH,
    Folders,
    Running,
    complaints,
    deliver,
    next_command,
    said_again,
)
from experiments.durability.kills import WINDOWS, arguments, await_moment, phase, took_s, unfinished
from experiments.durability.ledger import FLUSH_S, Findings, Stored, compare, noted, stored
from experiments.durability.tries import Options, Result, Tried, many, result

MIB = 24
ATTACKS = ("outputs", "store", "both", "outcome", "arm's folder", "outputs' folder", "store's file")
"""What is full, or removed."""


def cannot_mount() -> str | None:
    """Return why no small disk can be made here; None: it can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), mib=1):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no file system can be mounted here ({error})"


@contextlib.contextmanager
def small_disk(folder: Path, mib: int = MIB) -> Iterator[Path]:
    """Mount a file system of so many MiB on a folder while the block lasts."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


class Filler:
    """Keeps a disk full, to the last byte, until it is told to let go."""

    def __init__(self, disk: Path) -> None:
        self._file = disk / "filler"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._fill)
        self._thread.start()

    def _fill(self) -> None:
        with self._file.open("wb", buffering=0) as file:
            while not self._over.is_set():
                for size in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)) == size and not self._over.is_set():
                            pass
                time.sleep(0.005)

    def let_go(self) -> None:
        """Give the space back."""
        self._over.set()
        self._thread.join()
        self._file.unlink()


def disk(options: Options) -> Result:
    """Fill disks and remove folders at random moments."""
    why = cannot_mount()
    if why is not None:
        return Result(f"skipped: {why}", "", why, True)
    tries = many("disk", 28, _one, options)
    extra = (
        "What is full is a file system of its own, to the last byte, from a random moment on (a third "
        "over the command's whole life, the others over its windows), for up to five seconds or to the "
        "command's end; *outcome*: from the last window on. Acknowledged is what was trained "
        f"{FLUSH_S} s before the journal's disk was full (all, where the store's was alone), "
        "and what was in the store when a folder was removed."
    )
    return result(tries, extra)


def _one(draw: random.Random, places: Folders, number: int) -> Tried | None:
    attack = ATTACKS[number % len(ATTACKS)]
    folder = places.new(f"disk {number}")
    # A third of the moments over the whole life of a command, the others over its training.
    moment = (
        draw.uniform(0, took_s("single", places)) if draw.random() < 0.33 else draw.randint(1, WINDOWS)
    )
    full_s = draw.choice((draw.uniform(0.5, 5), None))
    if attack in ATTACKS[:4]:
        with small_disk(folder / "disk") as mounted:
            tried = _fill(attack, folder, mounted, moment, full_s)
            if tried is not None and not tried.sound:  # what is on the disk goes with it
                shutil.copytree(mounted, folder / "left", symlinks=True)
    else:
        tried = _remove(attack, folder, moment)
    places.done(folder, keep=tried is not None and not tried.sound)
    return tried


def _fill(attack: str, folder: Path, mounted: Path, moment: float, full_s: float | None) -> Tried | None:
    home = mounted if attack == "both" else folder
    where = []
    if attack in ("outputs", "outcome"):
        where = ["hydra.run.dir=disk/outputs/${sweep_id}"]
    database = (mounted if attack in ("store", "both") else folder) / "mlflow.db"
    if home == mounted or attack == "store":
        shutil.move(folder / "mlflow.db", database)
    where += [f"tracking.uri=sqlite:///{database}"]
    running = Running(folder, *arguments("single", folder), *where, cwd=home)
    if attack == "outcome":
        while running.alive and not any(line.global_step == WINDOWS for line in noted(folder / TRUTH)):
            time.sleep(0.02)
    elif not await_it(running, moment):
        running.settled()
        return None
    tried = Tried(f"full: {attack}{', for good' if full_s is None else ', for a while'}")
    at, filler = time.time(), Filler(mounted)
    if full_s is not None:
        await_moment(running, at - running.start_s + full_s)
        filler.let_go()
    running.ended()
    left = running.settled()
    if full_s is None:
        filler.let_go()
    tried.problems += [f"left running: {line}" for line in left]
    lines = noted(folder / TRUTH)
    tried.when = phase(lines, folder, at, 1, WINDOWS)
    tried.problems += complaints(running, (0, 1, 2), "the training") + said_again(running)
    # What lies on the small disk is where the deliverer looks; the next command begins where it was.
    outputs = mounted if attack in ("outputs", "outcome") else home
    after = [deliver(folder, "--uri", f"sqlite:///{database}", cwd=outputs)] if has_runs(outputs) else []
    following = next_command(folder, *where, cwd=home)
    for command, who in (
        *((one, "gaccum_exp deliver") for one in after),
        (following, "the next command"),
    ):
        tried.problems += complaints(command, 0, who) + said_again(command)
    runs = stored(f"sqlite:///{database}")
    journal_full = attack != "store"
    until_s, died = (at - FLUSH_S, unfinished(runs, lines)) if journal_full else (None, None)
    tried.found = compare(noted(folder / TRUTH), runs, until_s=until_s, died=died)
    return tried


def await_it(running: Running, moment: float) -> bool:
    """Wait for a time after the start, or for a window where the moment is an integer."""
    if not isinstance(moment, int):
        return await_moment(running, moment)
    while running.alive and sum(line.kind == "step" for line in noted(running.folder / TRUTH)) < moment:
        time.sleep(0.02)
    return running.alive


def has_runs(folder: Path) -> bool:
    """Whether runs have been written below."""
    return (folder / "outputs").exists()


def _remove(attack: str, folder: Path, moment: float) -> Tried | None:
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    running = Running(folder, *arguments("single", folder))
    if not await_it(running, moment):
        running.settled()
        return None
    tried = Tried(f"removed: {attack}")
    before = stored(uri) if attack != "store's file" else []
    at = time.time()
    if attack == "store's file":
        for path in folder.glob("mlflow.db*"):
            path.unlink(missing_ok=True)
    for path in folder.glob("outputs/*" if attack == "arm's folder" else "outputs"):
        if attack != "store's file":
            shutil.rmtree(path, ignore_errors=True)
    running.ended()
    tried.problems += [f"left running: {line}" for line in running.settled()]
    lines = noted(folder / TRUTH)
    tried.when = phase(lines, folder, at, 1, WINDOWS)
    tried.problems += complaints(running, (0, 1, 2), "the training") + said_again(running)
    tried.problems += complaints(next_command(folder), 0, "the next command")
    runs = stored(uri)
    tried.found = compare(noted(folder / TRUTH), runs, until_s=0.0)
    not_there(tried.found, before, runs)
    return tried


def not_there(found: Findings, before: list[Stored], after: list[Stored]) -> None:
    """Count what was stored before and is not any more."""
    there = {
        (run.run_id, *key, *point) for run in after for key, of in run.points.items() for point in of
    }
    for run in before:
        for key, values in run.points.items():
            for point in values:
                found.points += 1
                if (run.run_id, *key, *point) not in there:
                    found.say("lost", f"{run.name} {key}, which was in the store")
