"""Whole commands, as a user starts them: start-up, a sweep, and arms side by side.

Times are wall times from the start of a process; contenders take turns. Each step is noted by
the optimizer (`stamped.py`), so nothing of the program is changed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from experiments.notebook import middle

ROOT = Path(__file__).resolve().parents[2]
SGD = (
    "optimizer=custom", "optimizer._target_=experiments.overhead.stamped.SGD", "optimizer.lr=0.1",
    "+optimizer.momentum=0.9",
)  # fmt: skip
IMPORTS = ("-c", "import torch, torchvision")
DEMO = ("-m", "accum.steps=1,2,4,8")
ARMS = ("-m", "accum.steps=1,2,4,8", "seed=0,1", "train.epochs=60", "audit.at_start=false")
"""Eight trainings of 360 windows."""


@dataclass(frozen=True)
class Ran:
    """One command, from its start to its end."""

    wall_s: float
    steps: tuple[tuple[int, float], ...] = ()
    """Process and seconds after the command's start, of each optimizer step in order."""

    @property
    def first_step_s(self) -> float:
        """When the first window was done."""
        return min(at for _, at in self.steps)


def ran(*arguments: str, folder: str) -> Ran:
    """Run this Python with these arguments in a folder."""
    stamps = Path(folder) / "stamps"
    stamps.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STAMPS": str(stamps)}
    start = time.time()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    wall_s = time.time() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = stamps.read_text().split("\n")[:-1] if stamps.exists() else []
    steps = tuple((int(p), float(at) - start) for p, at in map(str.split, lines))
    return Ran(wall_s, steps)


def program(*arguments: str, folder: str) -> Ran:
    """Run `python -m gaccum_exp` with the optimizer that notes its steps."""
    return ran("-m", "gaccum_exp", *arguments, *SGD, folder=folder)


def start(repeats: int) -> str:
    """Compare the time to the end of the first window with importing torch and torchvision alone."""
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program("train.steps=2", folder=folder)  # makes the store, and fills the disk's cache
        for _ in range(repeats):
            imports = ran(*IMPORTS, folder=folder).wall_s
            run = program("accum.steps=4", "train.steps=100", folder=folder)
            plain = program("accum.steps=4", "train.steps=100", "audit.at_start=false", folder=folder)
            with tempfile.TemporaryDirectory() as fresh:
                new = program("accum.steps=4", "train.steps=100", folder=fresh)
            for name, value in (
                ("`import torch, torchvision`, the whole process", imports),
                ("command to the end of the first window", run.first_step_s),
                ("the same without an audit at start", plain.first_step_s),
                ("the same with a store that has to be made", new.first_step_s),
                ("the whole command, 100 windows", run.wall_s),
                ("`--help`", ran("-m", "gaccum_exp", "--help", folder=folder).wall_s),
            ):
                rows.setdefault(name, []).append(value)
    base = next(iter(rows.values()))
    lines = ["| what | time | × the imports, pair by pair |", "|---|---|---|"]
    for name, values in rows.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        lines.append(f"| {name} | {middle(values, 's')} | {middle(ratios, '×')} |")
    return "\n".join(lines)


def trainings(run: Ran, arms: int) -> list[float]:
    """Return how long each arm's training took: from its first step to its last, and one step more."""
    times = [at for _, at in run.steps]
    size = len(times) // arms
    parts = [times[i * size : (i + 1) * size] for i in range(arms)]
    return [(part[-1] - part[0]) * size / (size - 1) for part in parts]


def sweep(repeats: int) -> str:
    """Hold a sweep of four arms against the sum of its trainings and one start."""
    shares: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            program("train.steps=2", folder=folder)
            one = program("-m", "accum.steps=1", "train.steps=2", folder=folder)
            whole = program(*DEMO, folder=folder)
            bare = program(*DEMO, "audit.at_start=false", folder=folder)
        for name, run in (("with", whole), ("without", bare)):
            trained = sum(trainings(run, 4))
            ratios[name].append((run.wall_s - one.wall_s) / trained)
        trained = sum(trainings(whole, 4))
        last = max(at for _, at in whole.steps)
        for name, value in (
            ("the whole sweep", whole.wall_s),
            ("its four trainings", trained),
            ("one start: a sweep of one arm of two windows", one.wall_s),
            ("before the first window's end", whole.first_step_s),
            ("between the arms", last - whole.first_step_s - trained),
            ("after the last window: comparison and figures", whole.wall_s - last),
            ("the whole sweep without audits", bare.wall_s),
        ):
            shares.setdefault(name, []).append(value)
    lines = ["| what | time |", "|---|---|"]
    lines += [f"| {name} | {middle(values, 's')} |" for name, values in shares.items()]
    lines += [
        f"| (the sweep − one start) / its trainings, {name} audits | {middle(values, '×')} |"
        for name, values in ratios.items()
    ]
    return "\n".join(lines)


def stages(repeats: int) -> str:
    """Return where the time of the arms after the first goes, from the program's own functions."""
    found: dict[str, list[float]] = {}
    calls: dict[str, float] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            program("train.steps=2", folder=folder)
            arguments = (str(Path(__file__).with_name("stages.py")), *DEMO)
            done = subprocess.run(
                [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=True
            )
        for name, times in json.loads(done.stdout).items():
            each = len(times) // 4  # calls of an arm; what is called once is the sweep's
            seconds = sum(times[each:]) / 3 if each else sum(times)
            found.setdefault(name, []).append(1e3 * seconds)
            calls[name] = each
    lines = ["| what | ms for an arm after the first |", "|---|---|"]
    lines += [
        f"| {name}{'' if calls[name] else ' (once for the sweep)'} | {middle(values, 'ms')} |"
        for name, values in found.items()
    ]
    return "\n".join(lines)


def many_arms(repeats: int) -> str:
    """Return the time of each quarter of a sweep of 200 tiny arms, an arm."""
    tiny = "model=mlp", "train.steps=10", "accum.steps=2", "seed=range(200)"
    rows: dict[str, list[float]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            program("train.steps=2", folder=folder)
            run = program("-m", *tiny, folder=folder)
        begun = [at for _, at in run.steps[::10]]
        between = [1e3 * (after - before) for before, after in pairwise(begun)]
        for number, name in enumerate(("first", "second", "third", "last")):
            quarter = between[number * 50 : number * 50 + 50]
            rows.setdefault(f"an arm of the {name} quarter", []).append(statistics.median(quarter))
        rows.setdefault("before the first window's end", []).append(1e3 * begun[0])
        after = run.wall_s - max(at for _, at in run.steps)
        rows.setdefault("after the last window: comparison and figures", []).append(1e3 * after)
    lines = ["| 200 arms of ten windows | ms |", "|---|---|"]
    lines += [f"| {name} | {middle(values, 'ms')} |" for name, values in rows.items()]
    return "\n".join(lines)


def side_by_side(repeats: int) -> str:
    """Hold eight arms in two processes against the same arms one after the other."""
    beside = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    lines = ["| eight arms | wall time | × | a window of the median arm |", "|---|---|---|---|"]
    for model in ("mlp", "cnn"):
        walls: dict[str, list[float]] = {}
        steps: dict[str, list[float]] = {}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                program("train.steps=2", folder=folder)
                for name, extra in (("one after the other", ()), ("two at a time", beside)):
                    run = program(*ARMS, f"model={model}", *extra, folder=folder)
                    walls.setdefault(name, []).append(run.wall_s)
                    steps.setdefault(name, []).append(1e3 * median_step_s(run))
        first = next(iter(walls.values()))
        for name, values in walls.items():
            ratios = [value / other for value, other in zip(values, first, strict=True)]
            times = f"{middle(values, 's')} | {middle(ratios, '×')} | {middle(steps[name], 'ms')}"
            lines.append(f"| {model.upper()}, {name} | {times} |")
    return "\n".join(lines)


def median_step_s(run: Ran) -> float:
    """Return the median time between two steps of a process."""
    gaps = []
    for _, steps in groupby(sorted(run.steps), key=lambda step: step[0]):
        times = [at for _, at in steps]
        gaps += [after - before for before, after in pairwise(times)]
    return statistics.median(gaps)
