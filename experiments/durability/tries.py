"""Many tries of an attack, each with random numbers of its own, so that any can be repeated alone."""

import random
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from experiments.durability.command import Folders, folders
from experiments.durability.ledger import Findings

SIDE_BY_SIDE = 2
"""Tries at a time, one for each core."""


@dataclass
class Options:
    """What the command line says of a part."""

    tries: int | None = None
    """None: as many as the part has by itself."""
    minutes: float | None = None
    """No new try is begun after these."""
    seed: int = 0
    only: int | None = None
    """The number of the one try to make."""
    keep: Path | None = None
    """Where the folders of tries stay; None: they are removed."""
    windows: int | None = None
    """Of the long run, of a run through the proxy, and of the one whose big journal is damaged."""


@dataclass
class Tried:
    """What came of one try."""

    what: str
    """The attack."""
    when: str = ""
    """What it hit."""
    found: Findings = field(default_factory=Findings)
    problems: list[str] = field(default_factory=list)
    """What is wrong beside points and runs: a status, a traceback, processes that are left."""
    notes: dict[str, float] = field(default_factory=dict)
    """What was measured."""
    number: int = -1

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return self.found.sound and not self.problems


@dataclass
class Result:
    """A row of the table, and what stands below it."""

    tried: str
    wrong: str
    details: str
    sound: bool
    found: Findings = field(default_factory=Findings)


def folders_of(options: Options) -> AbstractContextManager[Folders]:
    """Give folders for tries, in the place that the command line says."""
    return folders(options.keep)


One = Callable[[random.Random, Folders, int], Tried | None]
"""Makes the try of a number; None: it hit nothing, and does not count."""


def many(
    part: str, default: int, one: One, options: Options,
    enough: Callable[[list[Tried]], bool] | None = None,
) -> list[Tried]:  # fmt: skip
    """Make tries until so many count, two at a time; say at once what is wrong with one.

    Args:
        part: its name.
        default: how many are made where the command line does not say.
        one: makes one.
        options: of the command line.
        enough: whether these are enough; None: where they are as many as the command line says.
    """
    wanted, start = options.tries if options.tries and not enough else default, time.monotonic()
    numbers = iter([options.only]) if options.only is not None else iter(range(4 * wanted))
    done: list[Tried] = []

    def work(places: Folders) -> None:
        for number in _locked(numbers):
            late = options.minutes is not None and time.monotonic() - start > 60 * options.minutes
            if len(done) >= wanted or late or (enough is not None and enough(done)):
                return
            try:
                tried = one(random.Random(f"{part} {options.seed} {number}"), places, number)
            except Exception:  # of the study itself; the other tries go on
                tried = Tried("the study itself", problems=[traceback.format_exc()])
            if tried is None:
                continue
            tried.number = number
            done.append(tried)
            if not tried.sound or options.only is not None:
                print(_line(part, options, tried), flush=True)
            elif len(done) % 10 == 0:
                print(f"{part}: {len(done)} of {wanted}, {time.monotonic() - start:.0f} s", flush=True)

    with folders_of(options) as places, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for worker in [pool.submit(work, places) for _ in range(SIDE_BY_SIDE)]:
            worker.result()
    return sorted(done, key=lambda tried: tried.number)


def _locked(numbers: Iterator[int | None]) -> Iterator[int]:
    # A list's iterator or a range's is advanced whole under the interpreter's lock.
    while (number := next(numbers, None)) is not None:
        yield number


def _line(part: str, options: Options, tried: Tried) -> str:
    again = f"build.py {part} --seed {options.seed} --only {tried.number} --keep kept"
    lines = [f"{part} {tried.number}: {tried.what}, {tried.when}: {tried.found}", f"  again: {again}"]
    return "\n".join(lines + [f"  {line}" for line in (*tried.found.examples, *tried.problems)])


def total(tries: list[Tried]) -> Findings:
    """Add up what was found."""
    found = Findings()
    for tried in tries:
        found += tried.found
    return found


def lost_or_doubled(tries: list[Tried]) -> str:
    """Return the last column: what was lost, doubled, wrong or RUNNING, of how many points."""
    found = total(tries)
    parts = [f"{found.lost} of {found.points:,} points lost", f"{found.doubled} doubled"]
    for name in ("wrong", "untimely"):
        if getattr(found, name):
            parts.append(f"{getattr(found, name)} {name}")
    parts += [f"{found.running} runs RUNNING"]
    if found.runs_doubled:
        parts.append(f"{found.runs_doubled} runs doubled")
    others = sum(bool(tried.problems) for tried in tries)
    return ", ".join(parts) + (f"; something else in {others} tries" if others else "")


def counted(tries: list[Tried], names: tuple[str, str] = ("attack", "what it hit")) -> str:
    """Return a table of how many tries hit what, and how many were sound."""
    rows: Counter[tuple[str, str]] = Counter((t.what, t.when) for t in tries)
    sound: Counter[tuple[str, str]] = Counter((t.what, t.when) for t in tries if t.sound)
    lines = [f"| {names[0]} | {names[1]} | tries | sound |", "|---|---|---|---|"]
    lines += [
        f"| {what} | {when} | {n} | {sound[what, when]} |" for (what, when), n in sorted(rows.items())
    ]
    faults = [
        f"- try {t.number} ({t.what}, {t.when}): {in_a_line([*t.found.examples, *t.problems])}"
        for t in tries
        if not t.sound
    ]
    return "\n".join(lines) + ("\n\n" + "\n".join(faults[:20]) if faults else "")


def in_a_line(words: list[str], longest: int = 400) -> str:
    """Return words for a page: in one line, without the paths of the machine that they were said on."""
    text = re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "…/", " ".join("; ".join(words).split()))
    return text.replace("|", "/")[:longest]


def result(
    tries: list[Tried], extra: str = "", names: tuple[str, str] = ("attack", "what it hit")
) -> Result:
    """Make a row of tries."""
    details = counted(tries, names) + (f"\n\n{extra}" if extra else "")
    sound = all(tried.sound for tried in tries)
    return Result(f"{len(tries)} tries", lost_or_doubled(tries), details, sound, total(tries))
