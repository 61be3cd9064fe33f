"""A training of a million windows: what its processes hold in memory, and what it says meanwhile."""

import sqlite3
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from experiments.durability.command import TRUTH, Running, complaints, overrides
from experiments.durability.ledger import STEP, Findings, noted
from experiments.durability.tries import Options, Result, Tried, folders_of, lost_or_doubled

WINDOWS = 1_000_000
EVERY_S = 5.0
QUIET_S = 30.5
"""Half a minute, as exactly as silences are measured."""
FLAT = 0.05
"""Memory is called flat where the line through its samples rises by less than this part of it."""


@dataclass
class Samples:
    """What a process held, KiB, at times after its first sample."""

    at_s: list[float] = field(default_factory=list)
    kib: list[int] = field(default_factory=list)

    def settled(self) -> tuple[list[float], list[int]]:
        """Return the samples after the first tenth."""
        first = len(self.at_s) // 10
        return self.at_s[first:], self.kib[first:]


@dataclass(frozen=True)
class Slope:
    """A straight line through samples."""

    per_s: float
    error: float
    """Its standard error."""
    seconds: float
    """From the first sample to the last."""
    median: float

    @property
    def rise(self) -> float:
        """By what part of the median the line rises over all."""
        return self.per_s * self.seconds / self.median


def slope(at: Sequence[float], values: Sequence[float]) -> Slope:
    """Fit a straight line by least squares."""
    n, mean_at, mean = len(at), statistics.fmean(at), statistics.fmean(values)
    spread = sum((t - mean_at) ** 2 for t in at)
    per_s = sum((t - mean_at) * (v - mean) for t, v in zip(at, values, strict=True)) / spread
    rest = sum((v - mean - per_s * (t - mean_at)) ** 2 for t, v in zip(at, values, strict=True))
    error = (rest / max(1, n - 2) / spread) ** 0.5
    return Slope(per_s, error, at[-1] - at[0], statistics.median(values))


def windows(options: Options) -> Result:
    """Train the windows, and watch."""
    count = options.windows or WINDOWS
    with folders_of(options) as places:
        folder = places.new("windows")
        few = overrides(folder, windows=count, pause_s=0.0)
        running = Running(
            folder, *few, "data.eval._target_=null", "~data.eval.samples", "~data.eval.seed"
        )
        held, longest_s = watch(running)
        tried = Tried(f"{count:,} windows", problems=complaints(running, 0, "the training"))
        wall_s = time.time() - running.start_s
        tried.problems += [f"left running: {line}" for line in running.settled(600)]
        tried.found = all_stored(folder / TRUTH, folder / "mlflow.db")
    if longest_s > QUIET_S:
        tried.problems.append(f"nothing said for {longest_s:.0f} s")
    lines = [
        "| process | samples | median, MiB | slope, KiB per 1,000 windows | rise after a tenth |",
        "|---|---|---|---|---|",
    ]
    for name, samples in held.items():
        at, kib = samples.settled()
        if len(at) < 3:
            continue
        line = slope(at, kib)
        if line.rise > FLAT:
            tried.problems.append(f"the {name}'s memory rises by {100 * line.rise:.1f} %")
        scale = (samples.at_s[-1] - samples.at_s[0]) / count * 1000
        median, low, high = (f"{value / 1024:.1f}" for value in (line.median, min(kib), max(kib)))
        lines.append(
            f"| {name} | {len(at)} | {median} ({low} to {high}) "
            f"| {line.per_s * scale:.3f} ± {line.error * scale:.3f} | {100 * line.rise:.2f} % |"
        )
    details = "\n".join(lines) + (
        f"\n\n{wall_s:.0f} s in all; the longest silence on stderr after its first line was "
        f"{longest_s:.1f} s. " + "; ".join(tried.problems)
    )
    memory = "memory flat" if tried.sound else "; ".join(tried.problems)[:300]
    return Result(
        f"{count:,} windows",
        f"{lost_or_doubled([tried])}; {memory}, silent for at most {longest_s:.0f} s",
        details, tried.sound, tried.found,
    )  # fmt: skip


def watch(running: Running) -> tuple[dict[str, Samples], float]:
    """Sample the memory of a command's processes until it ends; return that, and its longest silence.

    A process is sampled while windows are trained: what a comparison at the end holds is no leak.
    """
    held: dict[str, Samples] = defaultdict(Samples)
    said, said_s, longest_s = 0, None, 0.0
    due, trained = 0.0, 0
    while running.alive:
        now = time.monotonic()
        size = running.err.stat().st_size
        if size > said:
            longest_s = max(longest_s, 0.0 if said_s is None else now - said_s)
            said, said_s = size, now
        if now >= due:
            truth = running.folder / TRUTH
            grown = truth.stat().st_size if truth.exists() else 0
            if grown > trained:
                sample(running, held, now)
            due, trained = now + EVERY_S, grown
        time.sleep(0.2)
    if said_s is not None:
        longest_s = max(longest_s, time.monotonic() - said_s)
    for samples in held.values():  # the last window may have been over when the last sample was taken
        del samples.at_s[-1:], samples.kib[-1:]
    return dict(held), longest_s


def sample(running: Running, held: dict[str, Samples], now: float) -> None:
    """Take down what each kind of process holds; of several of a kind, their sum."""
    kinds = {"helper": running.helpers(), "training": running.trainings()}
    for name, processes in kinds.items():
        kib = sum(process.resident_kib or 0 for process in processes)
        if kib:
            held[name].at_s.append(now)
            held[name].kib.append(kib)


def all_stored(truth: Path, database: Path) -> Findings:
    """Hold millions of points against a SQLite store's own table: its client would take an hour."""
    lines = [line for line in noted(truth) if line.kind == "step"]
    found = Findings(points=len(STEP) * len(lines))
    with closing(sqlite3.connect(database)) as connection:
        for (status,) in connection.execute("SELECT status FROM runs"):
            found.statuses[status] += 1
            if status == "RUNNING":
                found.say("running", "the run")
        for place, name in enumerate(STEP):
            rows = connection.execute(
                "SELECT step, value FROM metrics WHERE key = ? ORDER BY step", (name,)
            )
            there: dict[int, list[float]] = defaultdict(list)
            for step, value in rows:
                there[step].append(value)
            for line in lines:
                values = there.pop(line.global_step, [])
                if not values:
                    found.say("lost", f"{name} at step {line.global_step}")
                elif len(values) > 1:
                    found.say("doubled", f"{name} at step {line.global_step}", len(values) - 1)
                elif values[0] != line.values[place]:
                    found.say("wrong", f"{name} at step {line.global_step}: {values[0]!r}")
            if there:
                found.say("wrong", f"{name} at steps that were never taken", len(there))
    return found
