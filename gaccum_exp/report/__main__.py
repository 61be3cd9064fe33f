"""`python -m gaccum_exp.report <sweep_id>`: read a sweep's runs back, compare, tabulate, draw.

What `python -m gaccum_exp -m …` does at its end, for a sweep that has ended long ago.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from gaccum_exp.config import TrackingConfig
from gaccum_exp.errors import BadInputError
from gaccum_exp.metrics import TRAIN_LOSS
from gaccum_exp.records import RunRecord
from gaccum_exp.report.compare import Comparison, compare, write_csv
from gaccum_exp.report.pairing import Source, group_runs, shared_config
from gaccum_exp.report.table import render, summary
from gaccum_exp.sink import kept_weights
from gaccum_exp.tracking_ui import experiment_tags, ui_lines

if TYPE_CHECKING:
    from gaccum_exp.tracking import Store

CURVES = (TRAIN_LOSS,)
"""What is compared step by step; of the other metrics a report has the last value."""


def main() -> int:
    """Run the command line and return its exit status."""
    default = TrackingConfig()
    parser = argparse.ArgumentParser(prog="python -m gaccum_exp.report", description=__doc__)
    parser.add_argument("sweep_id", help="as printed at the end of the sweep; the runs' tag")
    parser.add_argument("--uri", default=default.uri, help="MLflow tracking URI (%(default)s)")
    parser.add_argument("--experiment", default=default.experiment_name, help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the files (reports/<sweep_id>)")
    arguments = parser.parse_args()
    out = arguments.out or Path("reports") / arguments.sweep_id
    from gaccum_exp.tracking import Store  # it takes a second, which `--help` need not wait for

    try:
        store = Store(arguments.uri, arguments.experiment)
        report_sweep(store, arguments.sweep_id, out)
    except BadInputError as error:
        print(f"gaccum_exp.report: {error}", file=sys.stderr)
        return 2
    return 0


def report_sweep(store: "Store", sweep_id: str, folder: Path) -> Comparison:
    """Compare a stored sweep; print the table, write its files to `folder` and to MLflow.

    Raises:
        BadInputError: the store cannot be reached, or holds no such sweep.
    """
    from gaccum_exp.report.figures import draw  # with matplotlib, which a single run does without

    runs, stored = read_sweep(store, sweep_id)
    comparison = compare(runs, stored, partial(kept_weights, store))
    folder.mkdir(parents=True, exist_ok=True)
    files = [write_csv(comparison, folder / "comparison.csv"), *draw(comparison, runs, folder)]
    store.write_report(sweep_id, files)
    for key, value in experiment_tags(sweep_id).items():
        store.set_experiment_tag(key, value)
    _print(comparison, files, ui_lines(store.uri, store.experiment_id, sweep_id))
    return comparison


def show_run(store: "Store", sweep_id: str) -> None:
    """Print what there is to compare a single run with; nothing is written.

    Raises:
        BadInputError: as `report_sweep`.
    """
    comparison = compare(*read_sweep(store, sweep_id), partial(kept_weights, store))
    console = _console()
    console.print(render(comparison))
    console.print(summary(comparison), highlight=False)
    console.print(f"\nFigures: python -m gaccum_exp.report {sweep_id}", soft_wrap=True, highlight=False)


def read_sweep(store: "Store", sweep_id: str) -> tuple[list[RunRecord], list[RunRecord]]:
    """Return the runs of a sweep, and what the store has for those without a reference among them.

    Raises:
        BadInputError: the store cannot be reached, or holds no such sweep.
    """
    runs = store.sweep(sweep_id, CURVES)
    if not runs:
        raise BadInputError(f"{sweep_id}: no such sweep at {store.uri}")
    alone = [g.arms[0] for g in group_runs(runs) if g.source in (Source.STAND_IN, Source.NONE)]
    alone = [arm for arm in alone if arm.params]  # one that was refused has no reference anywhere
    if not alone:
        return runs, []
    # Only then is the rest of the store looked through, and the curves read of what is taken.
    groups = group_runs(runs, store.references(shared_config(alone)))
    taken = {
        g.reference.run_id: g.reference for g in groups if g.reference and g.source is Source.STORED
    }
    return runs, store.with_curves(list(taken.values()), CURVES)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 100)


def _print(comparison: Comparison, files: list[Path], ui: list[str]) -> None:
    console = _console()
    console.print(render(comparison))
    console.print(summary(comparison), highlight=False)
    console.print()
    for path in files:
        if path.suffix != ".svg":  # each figure lies beside its PNG as SVG
            console.print(f"  {path}", soft_wrap=True, highlight=False)
    console.print("\nCompare in MLflow:", highlight=False)
    for line in ui:
        console.print(f"  {line}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
