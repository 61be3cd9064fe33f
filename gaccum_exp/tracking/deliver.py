"""`gaccum_exp deliver FOLDER ...`: bring what is recorded below folders to its store.

Also what was carried over from a machine without network. Runs that are being trained here go on; those
whose process is dead are ended as KILLED, those of other hosts only with `--end-stale`.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gaccum_exp.errors import Arguments, BadInputError, TrackingError, complain, first_line
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import journals_below
from gaccum_exp.tracking.store_uri import absolute, refuse_password

if TYPE_CHECKING:
    from gaccum_exp.tracking.delivery import Stores

LOCK_S = 3.0
"""So long another process that delivers a journal is waited for."""
PATIENCE_S = 20.0
"""So long a store that is away is waited for."""


def main(arguments: Sequence[str]) -> int:
    """Run `gaccum_exp deliver`; return 0, 1 if something is left or was refused, 2 for bad input."""
    parser = Arguments(prog="gaccum_exp deliver", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of runs or sweeps")
    parser.add_argument("--uri", help="MLflow tracking URI (as recorded)")
    parser.add_argument("--experiment", help="(as recorded)")
    parser.add_argument("--end-stale", action="store_true", help="end the runs of other hosts, too")
    try:
        given = parser.parse_args(arguments)
        refuse_password(given.uri or "", "--uri")
    except BadInputError as error:
        complain(error, "gaccum_exp deliver")
        return 2
    missing = [folder for folder in given.folders if not folder.is_dir()]
    if missing:
        print(f"gaccum_exp deliver: {missing[0]}: no such folder", file=sys.stderr)
        return 2
    paths = {path.absolute(): None for folder in given.folders for path in journals_below(folder)}
    if not paths:
        print("gaccum_exp deliver: no journal there (journal*.jsonl)", file=sys.stderr)
        return 2
    if given.uri is None and given.experiment is None:
        paths = {path: None for path in paths if not Delivered.of(path).settled}
    if not paths:
        print("Everything is delivered.")
        return 0
    from gaccum_exp.tracking.delivery import Stores  # with MLflow, which `--help` need not wait for

    if given.uri is not None:
        given.uri = absolute(given.uri, os.getcwd())
    stores, whole, said = Stores(), [], set[str]()
    for path in paths:
        try:
            whole.append(_deliver(path, stores, given, said))
        except Exception as error:  # of one that is damaged, or none of ours: the others are delivered
            why = f"{type(error).__name__}: {first_line(error)}"
            print(f"gaccum_exp deliver: {path}: {why}", file=sys.stderr)
            whole.append(False)
    return 0 if all(whole) else 1


def _deliver(path: Path, stores: "Stores", given: argparse.Namespace, said: set[str]) -> bool:
    """Deliver one journal and say how that went; return whether nothing is left to do.

    Args:
        path: of the journal.
        stores: where journals go.
        given: the command's arguments.
        said: the stores that have been named, a journal of somebody else's may name any, and why some do
            not take anything: that is said, and waited for, once.
    """
    from gaccum_exp.tracking.delivery import Delivery

    since = time.monotonic()
    while True:
        try:
            delivery = Delivery(path, stores, uri=given.uri, experiment_name=given.experiment)
            break
        except (OSError, TrackingError) as error:  # another process may be about to give up
            if time.monotonic() - since > LOCK_S:
                print(f"gaccum_exp deliver: {error}", file=sys.stderr)
                return False
        time.sleep(0.2)
    left_bytes, since = delivery.left_bytes, time.monotonic()
    if delivery.store not in said:
        print(f"to {delivery.store}")
        said.add(delivery.store)
    try:
        while not delivery.delivered.settled and delivery.delivered.state != "refused":
            if delivery.step():
                since = time.monotonic()
            elif delivery.caught_up and not delivery.end_if_dead(stale=given.end_stale):
                break
            elif not delivery.caught_up:
                if delivery.delivered.reason in said or time.monotonic() - since > PATIENCE_S:
                    break
                time.sleep(min(1.0, delivery.due_s))
    finally:
        delivery.close()
    for note in delivery.notes:
        print(f"gaccum_exp deliver: {note}", file=sys.stderr)
    known = delivery.delivered
    if known.settled:
        but = ", but for what was refused" if delivery.refused else ""
        print(f"{delivery.name}: delivered ({left_bytes:,} bytes){but}")
    elif not delivery.caught_up:
        if known.reason and known.reason not in said:
            print(f"gaccum_exp deliver: {known.reason}", file=sys.stderr)
            said.add(known.reason)
        print(f"{delivery.name}: left")
    elif delivery.foreign and not given.end_stale:
        host = delivery.owner["host"]
        print(f"{delivery.name}: delivered as far as it goes; it is of {host}, which may still train it "
              "(--end-stale ends it)")  # fmt: skip
        return True
    else:
        print(f"{delivery.name}: delivered as far as it goes; it is being trained")
        return True
    return known.settled and not delivery.refused
