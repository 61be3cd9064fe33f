"""A store behind a bad network: sweeps that record through the proxy, and nothing else."""

import random
from dataclasses import replace
from pathlib import Path

from experiments.durability.command import TRUTH, Folders, complaints, deliver, overrides, run
from experiments.durability.ledger import compare, noted, stored
from experiments.durability.proxy import FAULTS, Proxy, proxied
from experiments.durability.server import MlflowServer, mlflow_server
from experiments.durability.tries import Options, Result, Tried, folders_of, many, result

REQUESTS = 2000
WINDOWS = 300
SEEDS = (0, 1)
"""At N = 1 and N = 2 each: the arms of a sweep."""
DELIVERIES = 12
"""So often what is left is delivered through the proxy; once more without it."""


def network(options: Options) -> Result:
    """Sweep after sweep through the proxy, until it has had so many requests."""
    wanted = options.tries or REQUESTS
    with folders_of(options) as places, mlflow_server(places.new("server")) as server:
        draw = random.Random(f"network {options.seed}")
        with proxied(server.port, draw) as proxy:

            def one(draw: random.Random, places: Folders, number: int) -> Tried:
                return through(proxy, server, places, number, options.windows or WINDOWS)

            tries = many("proxy", 200, one, options, enough=lambda _: proxy.done.total() >= wanted)
    rows = [f"| {name} | {proxy.done[name]} |" for name in FAULTS]
    row = result(tries, "\n".join(["| request | times |", "|---|---|", *rows]))
    return replace(row, tried=f"{proxy.done.total():,} requests")


def through(proxy: Proxy, server: MlflowServer, places: Folders, number: int, windows: int) -> Tried:
    """Run a sweep through the proxy, deliver what is left, and compare."""
    folder = places.new(f"network {number}")
    where = [f"tracking.uri={proxy.uri}", f"tracking.experiment_name={folder.name}"]
    few = overrides(folder, windows=windows, eval_every=20)
    seeds = f"seed={','.join(map(str, SEEDS))}"
    sweep = run(folder, "-m", *few, "accum.steps=1,2", seeds, *where)
    arms = 2 * len(SEEDS)
    tried = Tried(f"a sweep of {arms} arms", problems=complaints(sweep, 0, "the sweep"))
    if not list(folder.glob("multirun/*/comparison.csv")):
        tried.problems.append("nothing is compared")
    to = ["--experiment", folder.name]
    left, times = unsettled(folder), 0
    while left and times < DELIVERIES:
        deliver(folder, "--uri", proxy.uri, *to)
        left, times = unsettled(folder), times + 1
    tried.when = f"delivered by its end{f' and {times} commands more' if times else ''}"
    last = deliver(folder, "--uri", server.uri, *to)
    tried.problems += complaints(last, 0, "gaccum_exp deliver")
    tried.found = compare(noted(folder / TRUTH), stored(server.uri, experiment=folder.name))
    if tried.found.statuses["FINISHED"] != arms:
        tried.problems.append(f"runs: {dict(tried.found.statuses)}")
    places.done(folder, keep=not tried.sound)
    return tried


def unsettled(folder: Path) -> list[Path]:
    """Return the locks of runs that are not ended and delivered whole."""
    return sorted(path for path in folder.rglob("journal*.lock") if "delivery" not in path.name)
