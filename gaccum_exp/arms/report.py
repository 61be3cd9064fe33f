"""`python -m gaccum_exp report <sweep_id>`: read a sweep's runs back, compare, tabulate, draw.

A sweep does the same at its end.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaccum_exp.arms.compared import add_comparison
from gaccum_exp.arms.continued import lacks
from gaccum_exp.arms.outcome import BAD_INPUT, OK, read_outcome, read_outcomes
from gaccum_exp.arms.settle import record_report, say_where
from gaccum_exp.audit.audited_window import AuditedWindow
from gaccum_exp.config.schema import check_id
from gaccum_exp.errors import Arguments, BadInputError, StoreAwayError, TrackingError, complain, nearest
from gaccum_exp.report.compare.audited_windows import window_of
from gaccum_exp.report.compare.batches import BatchComparison, compare_batches, write_batches
from gaccum_exp.report.compare.comparison import Comparison, compare, write_csv
from gaccum_exp.report.compare.pairing import Source, group_runs, shared_config
from gaccum_exp.report.text.listing import list_runs, print_listed
from gaccum_exp.report.text.table import print_comparison
from gaccum_exp.report.text.table_files import write_latex, write_markdown
from gaccum_exp.tracking import shipper
from gaccum_exp.tracking.journal import Journal, beginning, journals_below
from gaccum_exp.tracking.metrics import EVAL_LOSS, OF_NOISE, TRAIN_LOSS
from gaccum_exp.tracking.mlflow_ui import experiment_tags
from gaccum_exp.tracking.read_back import Journals
from gaccum_exp.tracking.records import RunRecord, last_of_each_arm, with_those_elsewhere
from gaccum_exp.tracking.sink import kept_weights
from gaccum_exp.tracking.store_uri import (
    DEFAULT_EXPERIMENT,
    DEFAULT_URI,
    experiment_name,
    tracking_uri,
)

if TYPE_CHECKING:
    from gaccum_exp.tracking.mlflow_store import Store

log = logging.getLogger(__name__)
FOLDERS = (Path("multirun"), Path("outputs"))
"""Where sweeps and runs write, unless they are told otherwise."""
FORMATS = ("html", "md", "latex", "csv", "pdf", "svg", "png")
"""What a report may be written as."""
COMPARED_CURVES = (TRAIN_LOSS, EVAL_LOSS, *OF_NOISE)
"""What is compared, or told, by the global step; of other metrics a report takes the last value."""


def main(arguments: Sequence[str]) -> int:
    """Run `gaccum_exp report` with these arguments and return its exit status."""
    parser = Arguments(prog="gaccum_exp report", description=__doc__)
    named = "as printed at the end of a sweep, the runs' tag; several are compared as one"
    parser.add_argument("sweep_id", nargs="*", help=f"{named}; without one they are listed")
    parser.add_argument(
        "--uri", help=f"MLflow tracking URI (the sweep's, MLFLOW_TRACKING_URI, {DEFAULT_URI})"
    )
    named = f"(the sweep's, MLFLOW_EXPERIMENT_NAME, {DEFAULT_EXPERIMENT})"
    parser.add_argument("--experiment", help=named)
    parser.add_argument("--out", type=Path, help="folder of the files (reports/<sweep_id>)")
    written = f"files to write: of {', '.join(FORMATS)} (html, csv, and the sweep's figures)"
    parser.add_argument("--format", action="append", metavar="FORMAT,...", help=written)
    try:
        given = parser.parse_args(arguments)
        for sweep_id in given.sweep_id:
            check_id("sweep_id", sweep_id)
        formats = formats_of(given.format)
        if not given.sweep_id:
            for key in ("format", "out"):
                if getattr(given, key) is not None:
                    raise BadInputError(f"--{key}: of no sweep; give its id ({parser.prog} lists them)")
            return _list_sweeps(given.uri, given.experiment)
        report, journal = report_again(given.sweep_id, given.uri, given.experiment, given.out, formats)
    except (BadInputError, TrackingError) as error:
        complain(error, "gaccum_exp report")
        return BAD_INPUT
    print_report(report)
    shown = report.sweep_ids[0] if len(report.sweep_ids) == 1 else None
    say_where([report.folder], report.uri, shown, journal)
    return OK


def report_again(
    sweep_ids: Sequence[str],
    uri: str | None = None,
    experiment: str | None = None,
    out: Path | None = None,
    formats: Sequence[str] | None = None,
) -> tuple["Report", Path]:
    """Compare sweeps that have ended, write the files and record them; where from is as `main` says.

    Returns:
        What they show, and the journal of the report.

    Raises:
        BadInputError: no such sweep, no store that can be used, or no folder to write to.
        StoreAwayError: the store does not answer, and there are no journals.
    """
    for sweep_id in sweep_ids:
        check_id("sweep_id", sweep_id)
    sweep_ids = list(dict.fromkeys(sweep_ids))
    out = out or Path("reports") / "+".join(sweep_ids)
    _refuse_file(out)
    folders = [folder for sweep_id in sweep_ids if (folder := _folder_of(sweep_id)) is not None]
    own = next(filter(None, (Journals(folder).store() for folder in folders)), (None, None))
    experiment = experiment_name(experiment or own[1])
    runs = Runs(tracking_uri(uri or own[0], "--uri"), experiment, *folders)
    report = report_sweep(runs, sweep_ids, out, formats)
    journal = Journal.create(out, runs.uri, experiment)
    record_report(journal, " ".join(sweep_ids), report.files, report.view)
    for place in FOLDERS:
        if place.is_dir():
            shipper.announce(place.absolute())
    return report, journal.path


def formats_of(given: Sequence[str] | None, key: str = "--format") -> list[str] | None:
    """Return the formats that were asked for, each once; None: nothing was said of them.

    Raises:
        BadInputError: there is no such format.
    """
    words = [word.strip().lower() for line in given or () for word in line.split(",")]
    for word in words:
        if word not in FORMATS:
            raise BadInputError(f"{key}={word}: none of {', '.join(FORMATS)}{nearest(word, FORMATS)}")
    return list(dict.fromkeys(words)) or None


def _refuse_file(out: Path) -> None:
    """Refuse to write below a file.

    Raises:
        BadInputError: a part of the path is one.
    """
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        what = "" if there == out.absolute() else f"{there.name} "
        raise BadInputError(f"--out={out}: {what}is a file, not a folder")


def _list_sweeps(uri: str | None, experiment: str | None) -> int:
    """Print the sweeps that lie here, or else those of the store.

    Raises:
        BadInputError: the store cannot be used; StoreAwayError: it does not answer.
    """
    listed = list_runs(_runs_on_disk(FOLDERS)) if uri is None and experiment is None else []
    where = " and ".join(f"{folder}/" for folder in FOLDERS)
    if not listed:
        address = tracking_uri(uri, "--uri")
        where = address if uri or experiment else f"{where}, nor in {address}"
        if not address.startswith("sqlite:///") or Path(address.removeprefix("sqlite:///")).exists():
            listed = list_runs(Runs(address, experiment_name(experiment)).store.arms())
    print_listed(listed, where)
    return OK


def _runs_on_disk(places: Iterable[Path]) -> list[RunRecord]:
    """Return the runs whose journals lie in these folders, as they began and ended, without metrics."""
    runs = []
    for path in (path for place in places if place.is_dir() for path in journals_below(place)):
        _, begin = beginning(path)
        tags = dict(begin.get("tags", {}))
        outcome = read_outcome(path.parent)
        if not tags.get("sweep_id") or outcome is None:  # a report's, or that of a command that is dead
            continue
        if outcome.verdict is not None:
            tags["verdict"] = outcome.verdict
        params = {key: str(value) for key, value in begin["params"].items()}
        told = begin["token"], "", begin["name"], outcome.status, begin["time_ms"]
        runs.append(RunRecord(*told, params, tags, metrics={}))
    return runs


def _folder_of(sweep_id: str) -> Path | None:
    """Return the folder of a sweep's or a run's journals; None: they were written elsewhere."""
    if Path(sweep_id).name != sweep_id:
        return None
    return next((f / sweep_id for f in FOLDERS if (f / sweep_id).is_dir()), None)


def _lacks_arms(folder: Path, sweep_id: str) -> bool:
    """Whether a sweep has arms that left no folder in its own, or may have."""
    return lacks(folder, sweep_id, read_outcomes(folder, sweep_id))


class Runs:
    """The runs of a sweep: from their journals, as far as these are at hand, else from their store.

    Args:
        uri: of the store, which is opened when something is asked of it.
        experiment_name: there.
        folders: of the journals, one for each sweep that is at hand.
    """

    def __init__(self, uri: str, experiment_name: str, *folders: Path) -> None:
        self.uri, self._experiment_name = uri, experiment_name
        self.journals = [Journals(folder) for folder in folders]

    @cached_property
    def store(self) -> "Store":
        """The store.

        Raises:
            BadInputError: it cannot be used.
            StoreAwayError: it does not answer.
        """
        from gaccum_exp.tracking.mlflow_store import Store  # two seconds, which few commands need

        return Store(self.uri, self._experiment_name)

    def sweep(self, sweep_id: str) -> list[RunRecord]:
        """Return the arms, oldest first; raises as `store` does where there are no journals of them."""
        found = [run for of in self.journals for run in of.sweep(sweep_id, COMPARED_CURVES)]
        if not found or any(_lacks_arms(of.folder, sweep_id) for of in self.journals):
            try:
                found = with_those_elsewhere(found, self.store.sweep(sweep_id, COMPARED_CURVES))
            except (BadInputError, TrackingError) as error:
                if not found:
                    raise
                log.warning("arms that ran elsewhere are left out: %s", error)
        return last_of_each_arm(found)

    def fetch(self, run_id: str, name: str, folder: str) -> str | None:
        """Return a copy of a run's file, in a folder or where it lies; None if there is none."""
        at_hand = (of.fetch(run_id, name, folder) for of in self.journals)
        found = next(filter(None, at_hand), None)
        if found is None:
            with suppress(BadInputError, StoreAwayError):
                return self.store.fetch(run_id, name, folder)
        return found


@dataclass(frozen=True, slots=True)
class Report:
    """What a sweep shows, or several as one, and the files that tell it. It can be pickled."""

    sweep_ids: tuple[str, ...]
    folder: Path
    uri: str
    """Of the store."""
    comparison: Comparison
    arms: tuple[RunRecord, ...]
    """And controls."""
    batches: tuple[BatchComparison, ...]
    files: tuple[Path, ...]
    """In the folder: the page, tables, figures."""
    view: Mapping[str, str]
    """The tags of an experiment that arrange how MLflow shows the sweep; of several sweeps none."""


def report_sweep(
    runs: Runs, sweep_ids: Sequence[str], folder: Path, formats: Sequence[str] | None = None
) -> Report:
    """Compare a sweep, or the arms of several, and write files to `folder`.

    Args:
        runs: where the arms are read.
        sweep_ids: of the sweep, or of several.
        folder: of the files.
        formats: of these, out of `FORMATS`; None: the page, CSV, and figures as the sweep has them.

    Raises:
        BadInputError: the store cannot be used, or holds no such sweep.
        StoreAwayError: the store does not answer, and there are no journals.
    """
    # With a template's language, which a single run does without, and matplotlib below.
    from gaccum_exp.report.page.write_page import write_page

    arms, stored = read_sweeps(runs, sweep_ids)
    comparison = compare(arms, stored, partial(kept_weights, runs))
    view: dict[str, str] = {}
    if len(sweep_ids) == 1:  # else an arm may be held against another sweep's reference
        # It is delivered while figures are drawn.
        largest_ulp = add_comparison(runs, arms, stored, comparison)
        view = experiment_tags(sweep_ids[0], arms, largest_ulp)
    folder.mkdir(parents=True, exist_ok=True)
    batches = compare_batches(comparison, arms)
    wanted, of_figures = formats or ("csv", "html"), _figures_of(arms)
    if formats is not None:
        of_figures["formats"] = [kind for kind in formats if f".{kind}" in _DRAWN]
    files = [
        write(comparison, folder / name) for kind, (write, name) in _TABLES.items() if kind in wanted
    ]
    if batches and "csv" in wanted:
        files.append(write_batches(batches, folder / "batches.csv"))
    figures: list[Path] = []
    with ThreadPoolExecutor(1) as beside:  # what makes the page's scripts leaves Python to the figures
        told = comparison, arms, folder, batches, partial(_window_of, runs)
        page = beside.submit(write_page, *told) if "html" in wanted else None
        if of_figures.get("formats", True) and not comparison.is_of_audits:
            from gaccum_exp.report.figures.save_figures import draw

            figures = draw(comparison, arms, folder, batches, **of_figures)
        files += [] if page is None else [page.result()]
    return Report(
        sweep_ids=tuple(sweep_ids),
        folder=folder,
        uri=runs.uri,
        comparison=comparison,
        arms=tuple(arms),
        batches=tuple(batches),
        files=(*files, *figures),
        view=view,
    )


def print_report(report: Report) -> None:
    """Print the table, what it says in words, and where the files are."""
    print_comparison(report.comparison, report.batches)
    tables = [path for path in report.files if path.suffix not in _DRAWN]
    figures = [path for path in report.files if path.suffix in _DRAWN]
    # A figure is named once, whatever it is written as besides.
    named = {path.stem: path for path in sorted(figures, key=lambda path: path.suffix == ".png")}
    print(
        f"\nSweep{'s' if len(report.sweep_ids) > 1 else ''} {' + '.join(report.sweep_ids)}:",
        *(f"  {path}" for path in (*tables, *named.values())),
        sep="\n",
    )


_DRAWN = (".pdf", ".svg", ".png")
_TABLES = {
    "csv": (write_csv, "comparison.csv"),
    "md": (write_markdown, "comparison.md"),
    "latex": (write_latex, "comparison.tex"),
}
"""What writes the comparison's table, by format."""


def _figures_of(arms: Sequence[RunRecord]) -> dict[str, Any]:
    """Return how the last of the arms would have figures drawn, as far as any says so."""
    told = [arm.params for arm in arms if {"figures.width", "figures.format"} <= arm.params.keys()]
    if not told:
        return {}
    width, formats = told[-1]["figures.width"], re.findall(r"\w+", told[-1]["figures.format"])
    return {"width": float(width) if width[0].isdigit() else width, "formats": formats}


def _window_of(runs: Runs, run_id: str) -> AuditedWindow | None:
    """Return the window that a run was audited on, from its journal where that is at hand."""
    here = next((of for of in runs.journals if of.holds(run_id)), runs)  # no store is opened for it
    return window_of(here.fetch, run_id)


def show_run(runs: Runs, sweep_id: str) -> None:
    """Compare a single run with what the store holds, and print it; nothing is written.

    Raises:
        BadInputError: as `report_sweep`; StoreAwayError: likewise.
    """
    print_comparison(compare(*read_sweeps(runs, [sweep_id]), partial(kept_weights, runs)))
    print(f"\nFigures: python -m gaccum_exp report {sweep_id}")


def read_sweeps(runs: Runs, sweep_ids: Sequence[str]) -> tuple[list[RunRecord], list[RunRecord]]:
    """Return the runs of sweeps, and stored references for those that have none among them.

    Raises:
        BadInputError: as `report_sweep`; StoreAwayError: likewise.
    """
    arms: list[RunRecord] = []
    for sweep_id in sweep_ids:
        of_sweep = runs.sweep(sweep_id)
        if not of_sweep:
            searched = ", ".join(f"{folder}/" for folder in FOLDERS)
            raise BadInputError(f"{sweep_id}: no such sweep in {searched} or {runs.uri}")
        arms += of_sweep
    for note in dict.fromkeys(note for of in runs.journals for note in of.notes):
        log.warning("%s", note)
    alone = [g.arms[0] for g in group_runs(arms) if g.source in (Source.STAND_IN, Source.NONE)]
    alone = [arm for arm in alone if arm.params]  # one that was refused has no reference anywhere
    if not alone:
        return arms, []
    try:
        # The store is searched only now, and curves are read of the references taken alone.
        groups = group_runs(arms, runs.store.references(shared_config(alone)))
        taken = {
            g.reference.run_id: g.reference for g in groups if g.reference and g.source is Source.STORED
        }
        return arms, runs.store.with_curves(list(taken.values()), COMPARED_CURVES)
    except (BadInputError, TrackingError) as error:
        log.warning("no reference is looked for in the store: %s", error)
        return arms, []
