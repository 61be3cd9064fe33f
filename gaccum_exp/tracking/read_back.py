"""Runs as their journals tell them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import Record, beginning, journals_below, read_journal
from gaccum_exp.tracking.records import Curve, RunRecord


class Journals:
    """The runs whose journals lie below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        """What is to be said of journals that are damaged."""
        self._files: dict[str, dict[str, Path]] = {}
        self._paths: dict[str, Path] = {}

    def sweep(self, sweep_id: str, curves: Sequence[str]) -> list[RunRecord]:
        """Return the runs of a sweep with these curves, oldest first."""
        runs = []
        for path in journals_below(self.folder):
            _, begin = beginning(path)
            if not begin or begin["tags"].get("sweep_id") != sweep_id:
                continue
            records, notes = read_journal(path)
            run = run_of(path, records, curves)
            runs.append(run)
            self.notes += notes
            files = {r["name"]: path.parent / r["path"] for r in records if r["kind"] == "file"}
            self._files[run.run_id], self._paths[run.run_id] = files, path
        return sorted(runs, key=lambda run: run.start_time_ms)

    def path_of(self, run_id: str) -> Path | None:
        """Return the journal of a run that was read; None: it is none of these."""
        return self._paths.get(run_id)

    def store(self) -> tuple[str, str] | None:
        """Return the address and the experiment that they belong to; None where there is no journal."""
        for path in journals_below(self.folder):
            if store := beginning(path)[0]:
                return store["uri"], store["experiment_name"]
        return None

    def holds(self, run_id: str) -> bool:
        """Whether a run that was read is one of these."""
        return run_id in self._files

    def fetch(self, run_id: str, name: str, folder: str) -> str | None:
        """Return where a file of a run that was read lies; None if there is no such file."""
        path = self._files.get(run_id, {}).get(name)
        return str(path) if path is not None and path.exists() else None


def run_of(path: Path, records: Iterable[Record], curves: Sequence[str]) -> RunRecord:
    """Return the run that a journal's records tell, as its store would.

    Its id is the store's once the run has been delivered that far, till then the journal's own.
    """
    begin: Record = {}
    tags: dict[str, str] = {}
    status = "RUNNING"
    last: dict[str, tuple[int, int, float]] = {}
    points: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
    for record in records:
        match record["kind"]:
            case "begin":
                begin = record
                tags |= record["tags"]
            case "tags":
                tags |= record["tags"]
            case "points" | "compared":
                tags |= record.get("tags", {})
                for global_step, time_ms, values in record["points"]:
                    for key, value in values.items():
                        if key in curves:
                            points[key].append((global_step, value, time_ms))
                        if key not in last or (global_step, time_ms) >= last[key][:2]:
                            last[key] = global_step, time_ms, value
            case "resume":
                status = "RUNNING"
                tags.pop("failure", None)
            case "end":
                status = record["status"]
                if record["failure"] is not None:
                    tags["failure"] = record["failure"]
    delivered = Delivered.of(path)
    return RunRecord(
        run_id=delivered.run_id or begin["token"],
        experiment_id=delivered.experiment_id or "",
        name=begin["name"],
        status=status,
        start_time_ms=begin["time_ms"],
        params={key: str(value) for key, value in begin["params"].items()},
        tags=tags,
        metrics={key: value for key, (_, _, value) in last.items()},
        curves={key: _curve(points[key]) for key in curves if key in points},
    )


def _curve(points: list[tuple[int, float, int]]) -> Curve:
    return Curve(*zip(*sorted(points), strict=True))
