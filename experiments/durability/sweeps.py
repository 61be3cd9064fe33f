"""Sweeps that are ended at random moments and go on: every arm once, and more of them added."""

import csv
import random
import re
import shlex
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from experiments.durability.command import (
    TRUTH,
    Folders,
    Running,
    complaints,
    kill,
    overrides,
    run,
)
from experiments.durability.kills import await_moment
from experiments.durability.ledger import Stored, noted, stored
from experiments.durability.tries import Options, Result, Tried, many, result
from gaccum_exp.arms.continued import SweepNote

WINDOWS = 150
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "basic": (),
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
}
ATTACKS = ("Ctrl-C", "SIGTERM", "kill -9, parent", "kill -9, child", "kill -9, all")
FIRST, ADDED = "seed=0,1,2", "seed=3,2,0,1"
TOOK_S: dict[str, float] = {}
"""How long an undisturbed sweep takes under each launcher."""
_measuring = threading.Lock()
MOST_TIMES = 6
"""A sweep that does not end after so many commands is wrong."""


def sweeps(options: Options) -> Result:
    """End sweeps at random moments, go on with them until they are whole, and add an arm."""
    tries = many("sweeps", 24, _one, options)
    times = Counter(int(tried.notes["commands"]) for tried in tries if "commands" in tried.notes)
    counted = ", ".join(f"{number} in {of} tries" for number, of in sorted(times.items()))
    said = sum(tried.notes.get("said", 0) for tried in tries)
    extra = (
        "Wrong is an arm that finished twice or never, that is there twice in the comparison, whose end "
        "was trained anew after it had finished, or that is RUNNING; another status than 0 at the end. "
        f"Commands until a sweep was whole: {counted}; {said:.0f} of them were run as the one before "
        "had printed them, the others with `sweep.resume=last`."
    )
    row = result(tries, extra, ("how it was ended", "launcher, commands that were ended"))
    sound = sum(tried.sound for tried in tries)
    return replace(row, wrong=f"every arm there once, and whole, in {sound} of {len(tries)}")


def arguments_of(launcher: str, folder: Path) -> list[str]:
    """Return the command line of a sweep without what it varies."""
    trained = overrides(folder, windows=WINDOWS, pause_s=0.01)
    return ["-m", *trained, "accum.steps=2", *LAUNCHERS[launcher]]


def took_s(launcher: str, places: Folders) -> float:
    """Return how long a sweep takes that nobody disturbs."""
    with _measuring:
        if launcher not in TOOK_S:
            folder = places.new(f"undisturbed {launcher}")
            running = Running(folder, *arguments_of(launcher, folder), FIRST)
            if running.ended() != 0:
                raise RuntimeError(f"an undisturbed sweep fails: {running.text}")
            TOOK_S[launcher] = time.time() - running.start_s
            running.settled()
            places.done(folder, keep=False)
        return TOOK_S[launcher]


def _one(draw: random.Random, places: Folders, number: int) -> Tried | None:
    launcher, attack = list(LAUNCHERS)[number % 3], ATTACKS[number % 5]
    hits = draw.choice((1, 1, 2))
    moments = [draw.uniform(1.0, took_s(launcher, places)) for _ in range(hits)]
    folder = places.new(f"sweeps {number}")
    line = arguments_of(launcher, folder)
    tried = Tried(attack, notes={"said": 0})
    ended, arguments = 0, [*line, FIRST]
    commands, whole = 0, False
    while not whole and commands < MOST_TIMES:
        commands += 1
        running = Running(folder, *arguments)
        if moments and await_moment(running, moments.pop()):
            ended += _attack(running, attack)
        running.ended()
        tried.problems += [f"left running: {left}" for left in running.settled()]
        if "Traceback" in running.text and "joblib" not in running.text:
            tried.problems.append(f"a traceback: {running.text[-400:]}")
        status = running.process.returncode
        whole = status == 0 or (status < 0 and _is_whole(folder))
        begun = bool(list(folder.glob("multirun/*/command.json")))
        arguments = [*line, FIRST, *["sweep.resume=last"] * begun]
        printed = re.findall(r"; to go on:\n  \S+ -m gaccum_exp (.+)\n", running.text)
        if printed:
            arguments = shlex.split(printed[0])
            tried.notes["said"] += 1
        elif begun and status in (130, 143):
            tried.problems.append(f"does not say how to go on: {running.text[-300:]}")
    if not ended:
        places.done(folder, keep=False)
        return None
    tried.when = f"{launcher}, {ended}"
    tried.notes["commands"] = commands
    if not whole:
        tried.problems.append(f"not whole after {commands} commands: {running.text[-400:]}")
    else:
        (sweep,) = {path.parent for path in folder.glob("multirun/*/command.json")}
        tried.problems += wrong_with(sweep, folder, {0, 1, 2})
        added = run(folder, *line, ADDED, f"sweep.into={sweep.name}")
        tried.problems += complaints(added, 0, "the one that adds")
        tried.problems += wrong_with(sweep, folder, {0, 1, 2, 3})
    places.done(folder, keep=not tried.sound)
    return tried


def _is_whole(folder: Path) -> bool:
    """Whether a command has noted that the sweep is whole; it may have been killed right after."""
    notes = (SweepNote.of(path.parent) for path in folder.glob("multirun/*/command.json"))
    return any(note.whole for note in notes if note is not None)


def _attack(running: Running, attack: str) -> bool:
    """End a command; return whether there was anything to be ended."""
    if not running.alive:
        return False
    if attack in ("Ctrl-C", "SIGTERM"):
        running.process.send_signal(signal.SIGINT if attack == "Ctrl-C" else signal.SIGTERM)
        return True
    found = running.trainings()
    first = [process for process in found if process.pid == running.pid]
    others = [process for process in found if process.pid != running.pid]
    victims = {"parent": first, "child": others[-1:], "all": found}[attack.partition(", ")[2]]
    kill(victims)
    time.sleep(0.1)
    return bool(victims)


def wrong_with(sweep: Path, folder: Path, expected: set[int]) -> list[str]:
    """Say what is wrong with a sweep that is whole: an arm that is not there once, in every place."""
    problems = []
    with (sweep / "comparison.csv").open() as file:
        rows = Counter(
            (int(row["name"].rpartition("=")[2]), row["status"]) for row in csv.DictReader(file)
        )
    if rows != dict.fromkeys(((seed, "FINISHED") for seed in expected), 1):
        problems.append(f"the comparison has {dict(rows)}")
    runs: list[Stored] = stored(f"sqlite:///{folder / 'mlflow.db'}", curves=())
    finished = Counter(run.arm for run in runs if run.status == "FINISHED" and run.sweep == sweep.name)
    if finished != dict.fromkeys((f"2-{seed}" for seed in expected), 1):
        problems.append(f"the store has as finished {dict(finished)}")
    problems += [f"{run.name} is RUNNING" for run in runs if run.status == "RUNNING"]
    ends = Counter(
        line.arm for line in noted(folder / TRUTH)
        if (line.kind, line.global_step, line.sweep) == ("step", WINDOWS, sweep.name)
    )  # fmt: skip
    # Killed between its last step and its end, an arm is trained to the end once more.
    problems += [
        f"{arm} was trained to its end {times} times" for arm, times in ends.items() if times > 2
    ]
    return problems
