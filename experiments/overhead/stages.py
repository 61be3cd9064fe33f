"""Where the time of a sweep goes beside its windows: the program's own functions, timed.

    python experiments/overhead/stages.py <arguments of gaccum_exp>

It prints JSON: what, to the seconds of each call. One may hold another.
"""

import contextlib
import functools
import importlib
import io
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

STAGES: dict[str, str] = {
    "the arm, all in all": "gaccum_exp.arms.run_arm:run_arm",
    "Hydra composes its configuration (twice)": (
        "hydra._internal.config_loader_impl:ConfigLoaderImpl.load_sweep_config"
    ),
    "garbage of the arm before": "gaccum_exp.arms.run_arm:clear",
    "data sets": "gaccum_exp.arms.run_arm:load",
    "model, loss, optimizer": "gaccum_exp.arms.run_arm:build",
    "begin the run": "gaccum_exp.arms.life:Life.begin",
    "training, audits included": "gaccum_exp.arms.run_arm:train",
    "audits": "gaccum_exp.train.audits:WindowAudits.judge",
    "evaluations": "gaccum_exp.train.evaluation:evaluate",
    "keep the weights": "gaccum_exp.arms.life:Life.keep_weights",
    "predict its memory": "gaccum_exp.arms.plan:predicted_peak",
    "wait for the store": "gaccum_exp.tracking.sink:JournalSink.ready",
    "end the run": "gaccum_exp.tracking.sink:JournalSink.close",
    "comparison and figures": "gaccum_exp.arms.report:report_sweep",
}


def main(arguments: Iterable[str]) -> dict[str, list[float]]:
    """Run the program with the stages timed."""
    found: dict[str, list[float]] = {name: [] for name in STAGES}
    from gaccum_exp import cli  # before torch, as the program does

    for name, where in STAGES.items():
        time_calls(where, found[name])
    in_this_process()
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(list(arguments))
    return found


def in_this_process() -> None:
    """Have arms and comparison done here, where they are timed, and not in a process of their own."""
    from gaccum_exp.arms import child, seeds, serve

    def run_job(context: Any, stop: Any, outcomes: Any, helper: Any) -> None:
        outcomes.update(seeds.run_job(context, stop).outcomes)

    child.start = lambda: None
    child.run_job = run_job
    child.report = serve._compare


def time_calls(where: str, into: list[float]) -> None:
    """Put a function in the place of another that notes how long each call took."""
    module, _, path = where.partition(":")
    *owners, last = path.split(".")
    owner: Any = importlib.import_module(module)
    for name in owners:
        owner = getattr(owner, name)
    plain = getattr(owner, last)

    @functools.wraps(plain)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - start)

    setattr(owner, last, timed)


if __name__ == "__main__":
    found = main(sys.argv[1:])
    print(json.dumps(found))
