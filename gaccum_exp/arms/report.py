"""`python -m gaccum_exp report <sweep_id>`: read a sweep's runs back, compare, tabulate, draw.

A sweep does the same at its end.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gaccum_exp.arms.outcome import BAD_INPUT, OK
from gaccum_exp.config.schema import TrackingConfig
from gaccum_exp.errors import BadInputError
from gaccum_exp.report.compare.comparison import Comparison, compare, write_csv
from gaccum_exp.report.compare.pairing import Source, group_runs, shared_config
from gaccum_exp.report.text.table import print_comparison
from gaccum_exp.tracking.metrics import TRAIN_LOSS
from gaccum_exp.tracking.mlflow_ui import experiment_tags, ui_lines
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.tracking.sink import kept_weights

if TYPE_CHECKING:
    from gaccum_exp.tracking.mlflow_store import Store

COMPARED_CURVES = (TRAIN_LOSS,)
"""What is compared at every global step; of other metrics a report takes the last value."""


def main(arguments: Sequence[str]) -> int:
    """Run `gaccum_exp report` with these arguments and return its exit status."""
    default = TrackingConfig()
    parser = argparse.ArgumentParser(prog="python -m gaccum_exp report", description=__doc__)
    parser.add_argument("sweep_id", help="as printed at the end of the sweep; the runs' tag")
    parser.add_argument("--uri", default=default.uri, help="MLflow tracking URI (%(default)s)")
    parser.add_argument("--experiment", default=default.experiment_name, help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the files (reports/<sweep_id>)")
    given = parser.parse_args(arguments)
    out = given.out or Path("reports") / given.sweep_id
    from gaccum_exp.tracking.mlflow_store import Store  # a second, which `--help` need not wait for

    try:
        store = Store(given.uri, given.experiment)
        report_sweep(store, given.sweep_id, out)
    except BadInputError as error:
        print(f"gaccum_exp report: {error}", file=sys.stderr)
        return BAD_INPUT
    return OK


def report_sweep(store: "Store", sweep_id: str, folder: Path) -> Comparison:
    """Compare a stored sweep; print the table, write its files to `folder` and to MLflow.

    Raises:
        BadInputError: the store cannot be reached, or holds no such sweep.
    """
    from gaccum_exp.report.figures.save_figures import (
        draw,  # with matplotlib, which a single run does without
    )

    runs, stored = read_sweep(store, sweep_id)
    comparison = compare(runs, stored, partial(kept_weights, store))
    folder.mkdir(parents=True, exist_ok=True)
    files = [write_csv(comparison, folder / "comparison.csv"), *draw(comparison, runs, folder)]
    store.write_report(sweep_id, files)
    for key, value in experiment_tags(sweep_id).items():
        store.set_experiment_tag(key, value)
    print_comparison(comparison)
    # Each figure lies beside its PNG as SVG.
    shown = [f"  {path}" for path in files if path.suffix != ".svg"]
    ui = ui_lines(store.uri, store.experiment_id, sweep_id)
    print("", *shown, "\nCompare in MLflow:", *(f"  {line}" for line in ui), sep="\n")
    return comparison


def show_run(store: "Store", sweep_id: str) -> None:
    """Compare a single run with what the store holds, and print it; nothing is written.

    Raises:
        BadInputError: as `report_sweep`.
    """
    comparison = compare(*read_sweep(store, sweep_id), partial(kept_weights, store))
    print_comparison(comparison)
    print(f"\nFigures: python -m gaccum_exp report {sweep_id}")


def read_sweep(store: "Store", sweep_id: str) -> tuple[list[RunRecord], list[RunRecord]]:
    """Return the runs of a sweep, and stored references for those that have none among them.

    Raises:
        BadInputError: the store cannot be reached, or holds no such sweep.
    """
    runs = store.sweep(sweep_id, COMPARED_CURVES)
    if not runs:
        raise BadInputError(f"{sweep_id}: no such sweep at {store.uri}")
    alone = [g.arms[0] for g in group_runs(runs) if g.source in (Source.STAND_IN, Source.NONE)]
    alone = [arm for arm in alone if arm.params]  # one that was refused has no reference anywhere
    if not alone:
        return runs, []
    # The rest of the store is searched only now, and curves are read of the references taken alone.
    groups = group_runs(runs, store.references(shared_config(alone)))
    taken = {
        g.reference.run_id: g.reference for g in groups if g.reference and g.source is Source.STORED
    }
    return runs, store.with_curves(list(taken.values()), COMPARED_CURVES)
