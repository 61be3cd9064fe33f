"""Many writers on one store: all of them at once, from before there is a store."""

import time
from dataclasses import replace

from experiments.durability.command import TRUTH, Folders, Running, complaints, overrides
from experiments.durability.ledger import compare, noted, stored
from experiments.durability.server import mlflow_server, no_postgresql, postgresql
from experiments.durability.tries import Options, Result, Tried, folders_of, result

WRITERS = 8
POINTS = 10_000


def writers(options: Options) -> Result:
    """Train runs side by side, each of as many points, on SQLite and on PostgreSQL."""
    points = options.tries or POINTS
    tries, why = [], no_postgresql()
    with folders_of(options) as places:
        tries.append(side_by_side(places, "SQLite", points, where=None))
        print(f"writers: {tries[-1].what}: {tries[-1].found} {tries[-1].problems}", flush=True)
        if why is None:
            with (
                postgresql(places.new("postgresql")) as database,
                mlflow_server(places.new("server"), database) as server,
            ):
                tries.append(
                    side_by_side(places, "mlflow server over PostgreSQL", points, where=server.uri)
                )
            print(f"writers: {tries[-1].what}: {tries[-1].found} {tries[-1].problems}", flush=True)
    extra = "; ".join(
        f"{t.what}: trained after {t.notes['trained_s']:.0f} s, stored after {t.notes['stored_s']:.0f} s"
        for t in tries
    )
    row = result(tries, extra + (f". PostgreSQL skipped: {why}." if why else "."))
    tried = f"{WRITERS} writers × {points:,} points on {', and on '.join(t.what for t in tries)}"
    return replace(row, tried=tried + (f"; PostgreSQL skipped: {why}" if why else ""))


def side_by_side(places: Folders, what: str, points: int, where: str | None) -> Tried:
    """Start writers at once, and hold what is stored against what they have trained."""
    folder = places.new(f"writers {what}", store=False)
    uri = where or f"sqlite:///{folder / 'mlflow.db'}"
    windows = -(-points // 3)  # of three points each
    tried, start = Tried(what, when="all at once, no store before"), time.monotonic()
    running = []
    for number in range(WRITERS):
        own = folder / f"{number}"
        own.mkdir()
        few = overrides(folder, windows=windows, pause_s=0.0)
        running.append(Running(own, *few, f"tracking.uri={uri}", f"seed={number}"))
    for number, one in enumerate(running):
        one.ended()
        tried.problems += complaints(one, 0, f"writer {number}")
    tried.notes["trained_s"] = time.monotonic() - start
    for one in running:
        tried.problems += [f"left running: {line}" for line in one.settled(300)]
    tried.notes["stored_s"] = time.monotonic() - start
    tried.found = compare(noted(folder / TRUTH), stored(uri))
    if tried.found.statuses["FINISHED"] != WRITERS:
        tried.problems.append(f"runs: {dict(tried.found.statuses)}")
    return tried
