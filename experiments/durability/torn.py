"""Journals that are torn at every byte, and whose bits are flipped: nothing wrong is ever delivered."""

import contextlib
import io
import json
import random
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.durability.command import Folders, complaints, overrides, run
from experiments.durability.ledger import stored
from experiments.durability.tries import Options, Result, folders_of

BIG_FLIPS = 2000
DELIVERED = 40
"""Damaged journals of each kind that are delivered to a store, beside all that are read."""


def lines_of(journal: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a journal that is whole, each with its record; read here independently."""
    found = []
    for line in journal.split(b"\n")[:-1]:
        checksum, _, rest = line.partition(b" ")
        if int(checksum, 16) != zlib.crc32(rest):
            raise ValueError(f"{checksum!r} is not the checksum of {rest[:60]!r}")
        found.append((line + b"\n", json.loads(rest)))
    return found


def torn(options: Options) -> Result:
    """Damage a small journal in every way there is, and a big one at random places."""
    draw = random.Random(f"torn {options.seed}")
    with folders_of(options) as places:
        small, big = journal_of(places, "small", 12), journal_of(places, "big", options.windows or 4000)
        start = time.monotonic()
        trial = Trial(places, small)
        content = small.read_bytes()
        cuts: Iterable[int] = range(len(content) + 1)
        if options.tries is not None:
            cuts = draw.sample(range(len(content) + 1), min(len(content), options.tries))
        trial.read("torn at every byte of every record", (content[:cut] for cut in cuts))
        flips = range(8 * len(content)) if options.tries is None else _some(draw, content, options.tries)
        trial.read("every bit of a small journal flipped", (flipped(content, bit) for bit in flips))
        large = Trial(places, big)
        bits = _some(draw, big.read_bytes(), options.tries or BIG_FLIPS)
        large.read("bits of a big journal flipped", (flipped(big.read_bytes(), bit) for bit in bits))
        read_s = time.monotonic() - start
        few = min(DELIVERED, options.tries or DELIVERED)
        last = [content[:cut] for cut in last_records(content)]
        trial.deliver("torn and delivered", draw.sample(last, min(len(last), few)))
        at = _some(draw, content, few)
        trial.deliver("flipped and delivered", [flipped(content, bit) for bit in at])
        trials = [trial, large]
    rows = [
        f"| {what} | {of.size:,} | {n:,} | {of.dropped[what]:,} |"
        for of in trials
        for what, n in of.tried.items()
    ]
    problems = [line for of in trials for line in of.problems]
    wrong = sum(of.wrong for of in trials)
    unsaid = sum(of.unsaid for of in trials)
    count = sum(of.tried.total() for of in trials)
    table = ["| damage | bytes of the journal | tried | records dropped |", "|---|---|---|---|", *rows]
    details = "\n".join([*table, "", *(f"- {line}" for line in problems[:20])])
    return Result(
        f"{count:,} journals",
        "; ".join([f"{wrong} wrong points", f"dropped without a word: {unsaid}", *problems[:1]]),
        f"{details}\n\nRead in {read_s:.0f} s.", not problems and not wrong and not unsaid,
    )  # fmt: skip


def journal_of(places: Folders, name: str, windows: int) -> Path:
    """Train so many windows, and return the journal of the run."""
    folder = places.new(f"torn {name}")
    command = run(folder, *overrides(folder, windows=windows, pause_s=0.0, eval_every=5))
    wrong = complaints(command, 0, "the training")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    (journal,) = folder.rglob("journal.jsonl")
    return journal


def flipped(content: bytes, bit: int) -> bytes:
    """Return it with one bit the other way round."""
    copy = bytearray(content)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


def last_records(content: bytes) -> list[int]:
    """Return every place inside the last record of points, and inside the last record."""
    lines = lines_of(content)
    ends = [sum(len(line) for line, _ in lines[: i + 1]) for i in range(len(lines))]
    chosen = [i for i, (_, record) in enumerate(lines) if record["kind"] == "points"][-1:]
    return [cut for i in (*chosen, len(lines) - 1) for cut in range(ends[i] - len(lines[i][0]), ends[i])]


def _some(draw: random.Random, content: bytes, count: int) -> list[int]:
    return sorted(draw.sample(range(8 * len(content)), min(count, 8 * len(content))))


class Trial:
    """Damages of one journal, and what the program made of them."""

    def __init__(self, places: Folders, path: Path) -> None:
        self.places, self.path = places, path
        self.size = path.stat().st_size
        self.records = [record for _, record in lines_of(path.read_bytes())]
        self._known = Counter(_word(record) for record in self.records)
        self.tried: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.wrong = self.unsaid = 0
        self.problems: list[str] = []

    def read(self, what: str, damaged: Iterable[bytes]) -> None:
        """Read damaged journals; whatever is read must have been written."""
        from gaccum_exp.tracking.journal import read_journal

        copy = self.places.base / "damaged.jsonl"
        for content in damaged:
            copy.write_bytes(content)
            self.tried[what] += 1
            try:
                records, notes = read_journal(copy)
            except Exception as error:  # a damaged journal is no reason to end
                self._say(f"{what}: {type(error).__name__}: {error}")
                continue
            self.judge(what, content, records, bool(notes))

    def judge(self, what: str, content: bytes, records: list[Any], said: bool) -> None:
        """Hold what was read of a damaged journal against what was written."""
        read = Counter(_word(record) for record in records)
        invented = read - self._known
        if invented:
            self.wrong += invented.total()
            self._say(f"{what}: {next(iter(invented))[:120]} was never written")
        # A journal that ends at a record's end lacks the others, and shows nothing of it.
        torn_between = self.path.read_bytes().startswith(content) and content[-1:] in (b"", b"\n")
        missing = (self._known - read).total()
        self.dropped[what] += 0 if torn_between else missing
        if missing and not said and not torn_between:
            self.unsaid += 1
            self._say(f"{what}: {missing} records dropped without a word")

    def deliver(self, what: str, damaged: Iterable[bytes]) -> None:
        """Deliver damaged journals to a store; whatever is there must have been recorded."""
        from gaccum_exp.tracking.deliver import main

        truth = {point for run in stored(self._uri(self.path.parents[2])) for point in _points_of(run)}
        folder = self.places.new(f"delivered {what}")
        for number, content in enumerate(damaged):
            one = folder / f"{number}" / "run"
            shutil.copytree(
                self.path.parent,
                one,
                ignore=lambda _, names: [n for n in names if n.startswith("journal")],
            )
            (one / self.path.name).write_bytes(content)
            self.tried[what] += 1
            experiment = f"{what} {number}"
            arguments = [str(one), "--uri", self._uri(folder), "--experiment", experiment, "--end-stale"]
            try:
                with (
                    contextlib.redirect_stderr(io.StringIO()),
                    contextlib.redirect_stdout(io.StringIO()),
                ):
                    main(arguments)
            except Exception as error:  # the same
                self._say(f"{what}: {type(error).__name__}: {error}")
            runs = stored(self._uri(folder), experiment=experiment)
            points = [point for run in runs for point in _points_of(run)]
            wrong = len(set(points) - truth) + len(points) - len(set(points))
            self.dropped[what] += max(0, len(truth) - len(set(points)))
            if wrong or len(runs) > 1:
                self.wrong += wrong
                self._say(f"{what} {number}: {wrong} wrong points, {len(runs)} runs")

    def _uri(self, folder: Path) -> str:
        return f"sqlite:///{folder / 'mlflow.db'}"

    def _say(self, problem: str) -> None:
        if len(self.problems) < 20:
            self.problems.append(problem)


def _word(record: Any) -> str:
    return json.dumps(record if isinstance(record, dict) else vars(record), sort_keys=True, default=str)


def _points_of(run: Any) -> list[tuple[str, int, float, int]]:
    return [(*key, *point) for key, values in run.points.items() for point in values]
