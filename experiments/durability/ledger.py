"""What was trained held against what is stored: point by point, to the bit."""

import threading
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from gaccum_exp.tracking.metrics import EVAL_LOSS, GRADIENT_NORM, LEARNING_RATE, TRAIN_LOSS

FLUSH_S = 2.5
"""What is older than this when a process dies must be stored: two seconds, and a flush itself."""
STEP = (TRAIN_LOSS, LEARNING_RATE, GRADIENT_NORM)
"""What the witness notes of a step, in its order."""
FILES = frozenset({"config.yaml", "weights.pt"})
"""What every finished run keeps."""
_reading = threading.Lock()  # MLflow's client is shared by the tries that run side by side


@dataclass(frozen=True)
class Noted:
    """One line of the witness."""

    kind: str
    """step, evaluating or evaluated"""
    sweep: str
    arm: str
    pid: int
    global_step: int
    time_s: float
    values: tuple[float, ...]

    @property
    def points(self) -> dict[str, float]:
        """The metrics that must be stored of it."""
        names = {"step": STEP, "evaluated": (EVAL_LOSS,)}.get(self.kind, ())
        return dict(zip(names, self.values, strict=True))


def noted(truth: Path) -> list[Noted]:
    """Read what the witness has noted; a last line without an end was never written."""
    lines = truth.read_text().split("\n")[:-1] if truth.exists() else []
    return [
        Noted(kind, sweep, arm, int(pid), int(step), float(at), tuple(map(float.fromhex, values)))
        for kind, sweep, arm, pid, step, at, *values in map(str.split, lines)
    ]


@dataclass(frozen=True)
class Stored:
    """One run as MLflow's client reads it."""

    run_id: str
    name: str
    status: str
    sweep: str
    arm: str | None
    """None: it had not got as far as its parameters, or is no run of the witness."""
    points: dict[tuple[str, int], list[tuple[float, int]]]
    """Values and timestamps in ms by metric and step; more than one is one too many."""
    files: frozenset[str] = FILES
    """What is kept with it."""


def stored(
    uri: str, curves: Collection[str] | None = None, experiment: str | None = None
) -> list[Stored]:
    """Read all runs of a store but reports, or of an experiment of it; with these metrics or all."""
    with _reading:
        client = MlflowClient(uri)
        experiments = client.search_experiments(view_type=ViewType.ALL)
        if experiment is not None:
            experiments = [e for e in experiments if e.name == experiment]
        if not experiments:
            return []
        found: list[Run] = []
        token: str | None = None
        while token is None or token:
            page = client.search_runs(
                [e.experiment_id for e in experiments], "", ViewType.ALL, page_token=token
            )
            found.extend(page)
            token = page.token or ""
        return [_stored(client, run, curves) for run in found if run.data.tags.get("kind") != "report"]


def _stored(client: MlflowClient, run: Run, curves: Collection[str] | None) -> Stored:
    points: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for key in run.data.metrics if curves is None else curves:
        for metric in client.get_metric_history(run.info.run_id, key):
            points.setdefault((key, metric.step), []).append((metric.value, metric.timestamp))
    arm = run.data.params.get("optimizer.arm")
    sweep = run.data.tags.get("sweep_id", "")
    files = frozenset(file.path for file in client.list_artifacts(run.info.run_id))
    return Stored(run.info.run_id, run.info.run_name, run.info.status, sweep, arm, points, files)


@dataclass
class Findings:
    """What is wrong, in points or runs; `examples` are the first ones in words."""

    points: int = 0
    """That were trained and had to be there."""
    younger: int = 0
    """That are not there and need not be: younger than the last flush."""
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    """Values that are not those that were trained, or at steps that never were."""
    untimely: int = 0
    """Points whose timestamp is not that of their step: before its end, or after the next one's."""
    running: int = 0
    """Runs that are RUNNING."""
    runs_doubled: int = 0
    """Runs beyond one for an arm."""
    statuses: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        faults = self.lost, self.doubled, self.wrong, self.untimely, self.running, self.runs_doubled
        return not any(faults)

    def say(self, kind: str, text: str, count: int = 1) -> None:
        """Count something that is wrong."""
        setattr(self, kind, getattr(self, kind) + count)
        if len(self.examples) < 8:
            self.examples.append(f"{kind}: {text}")

    def __iadd__(self, other: "Findings") -> "Findings":
        for name in (f.name for f in fields(self) if f.name != "examples"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples += other.examples[: 8 - len(self.examples)]
        return self

    def __str__(self) -> str:
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "examples"}
        counts["statuses"] = " ".join(f"{k}×{n}" for k, n in sorted(self.statuses.items()))
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def compare(
    lines: Iterable[Noted], runs: Iterable[Stored], *, until_s: float | None = None,
    died: Collection[tuple[str, str]] | None = None,
) -> Findings:  # fmt: skip
    """Hold what the witness has noted against what is stored.

    Args:
        lines: of the witness.
        runs: all that are stored.
        until_s: what was trained before then must be there of an arm that died; None: all must.
        died: the arms (sweep, arm) that this is allowed to; None: every one.
    """
    found = Findings()
    arms: dict[tuple[str, str], list[Noted]] = {}
    for line in lines:
        arms.setdefault((line.sweep, line.arm), []).append(line)
    by_arm: dict[tuple[str, str], list[Stored]] = {}
    for run in runs:
        found.statuses[run.status] += 1
        if run.status == "RUNNING":
            found.say("running", f"{run.sweep} {run.name}")
        if run.status == "FINISHED" and not run.files >= FILES:
            found.say("lost", f"{run.sweep} {run.name}: {', '.join(sorted(FILES - run.files))}")
        if run.arm is not None:
            by_arm.setdefault((run.sweep, run.arm), []).append(run)
    for key, of_arm in by_arm.items():
        if len(of_arm) > 1:
            found.say("runs_doubled", f"{key}: {len(of_arm)} runs", len(of_arm) - 1)
        if key not in arms and any(run.points for run in of_arm):
            found.say("wrong", f"{key} was never trained")
    for key, of_truth in arms.items():
        limit = until_s if died is None or key in died else None
        _compare_arm(found, key, of_truth, by_arm.get(key, []), limit)
    return found


def _compare_arm(
    found: Findings, key: tuple[str, str], lines: list[Noted], runs: list[Stored], until_s: float | None
) -> None:
    truth: dict[tuple[str, int], tuple[float, float]] = {}
    for line in lines:
        for name, value in line.points.items():
            truth[name, line.global_step] = value, line.time_s
    # A point is taken after its step has ended, and before the next one has.
    ends = {line.global_step: line.time_s for line in lines if line.kind == "step"}
    for (name, step), (value, at) in truth.items():
        there = [point for run in runs for point in run.points.get((name, step), ())]
        must = until_s is None or at <= until_s
        found.points += must
        if not there:
            where = f"{key} {name} at step {step}"
            if must:
                age = (
                    "" if until_s is None else f", {until_s - at:.2f} s before the last that may be lost"
                )
                found.say("lost", where + age)
            else:
                found.younger += 1
            continue
        if len(there) > 1:
            found.say("doubled", f"{key} {name} at step {step}: {there}", len(there) - 1)
        for stored_value, time_ms in there:
            if stored_value != value:
                found.say("wrong", f"{key} {name} at step {step}: {stored_value!r}, not {value!r}")
            latest = ends.get(step + 1, at + 60)
            if name in STEP and not 1e3 * at - 2 <= time_ms <= 1e3 * latest + 2:
                found.say("untimely", f"{key} {name} at step {step}: {time_ms - 1e3 * at:.0f} ms late")
    for run in runs:
        for (name, step), values in run.points.items():
            if name in (*STEP, EVAL_LOSS) and (name, step) not in truth:
                found.say("wrong", f"{key} {name} at step {step}, which was never taken", len(values))
            elif (name, step) not in truth and len(values) > 1:
                found.say("doubled", f"{key} {name} at step {step}: {values}", len(values) - 1)
