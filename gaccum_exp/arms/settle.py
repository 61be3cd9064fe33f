"""The last thing that a command does: see that all is in the store, and say where to look."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import Journal, journals_below
from gaccum_exp.tracking.mlflow_ui import ui_lines

DELIVER = "python -m gaccum_exp deliver"


def record_report(
    journal: Journal, sweep_id: str, files: Iterable[Path], view: Mapping[str, str]
) -> None:
    """Record a comparison's files as a run of their own, outside the sweep's filter.

    Args:
        journal: of that run, which has not begun.
        sweep_id: of what was compared.
        files: in the journal's folder.
        view: tags of the experiment that arrange what the link shows.
    """
    tags = {"kind": "report", "report_of": sweep_id}
    journal.begin(f"report {sweep_id}", params={}, tags=tags, texts={})
    for path in files:
        journal.keep_file(path)
    journal.append("experiment_tags", tags=dict(view))
    journal.end("FINISHED")
    shipper.announce(journal.path)


def close_without_report(journal: Journal) -> None:
    """Close a sweep's journal where there is no comparison to record."""
    journal.end("FINISHED")
    shipper.announce(journal.path)


def settle(folders: Sequence[Path]) -> list[Path]:
    """Wait until the journals below these folders are delivered; return those that are not."""
    paths = [path for folder in folders for path in journals_below(folder)]
    for path in paths:
        if not Delivered.of(path).settled:
            shipper.announce(path)
    return shipper.finish()


def say_where(
    folders: Sequence[Path],
    uri: str,
    sweep_id: str | None,
    view: Path | None = None,
    to: TextIO | None = None,
) -> None:
    """Wait until all is delivered, and print how to deliver what is left, or where a sweep is seen.

    Args:
        folders: of the journals.
        uri: of their store.
        sweep_id: None where there is nothing to be compared.
        view: the journal that holds how MLflow shows the sweep; None: there is none.
        to: the stream that it is printed to; None: stdout.
    """
    to = to or sys.stdout
    if left := settle(folders):
        here = Path.cwd()
        below = " ".join(str(f.relative_to(here) if f.is_relative_to(here) else f) for f in folders)
        if all(Delivered.of(path).state == "refused" for path in left):
            print(
                f"\nNot in the store, which cannot be used; elsewhere: {DELIVER} --uri URI {below}",
                file=to,
            )
        else:
            print(f"\nNot in the store yet; once it is back: {DELIVER} {below}", file=to)
        return
    if sweep_id is None:
        return
    known = (Delivered.of(path) for folder in folders for path in journals_below(folder))
    experiment_id = next((d.experiment_id for d in known if d.experiment_id is not None), None)
    if experiment_id is not None:
        arranged = view is not None and not Delivered.of(view).refused
        print(
            "\nCompare in MLflow:",
            *(f"  {line}" for line in ui_lines(uri, experiment_id, sweep_id, arranged)),
            sep="\n",
            file=to,
        )
