"""How an arm ended: written to its folder, read back at the end of the command, and its exit status.

Before an arm of a sweep is given to a process, it says RUNNING there, and where. That it is over is
never taken from how a process ended, only from what it wrote.
"""

import json
import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from gaccum_exp.tracking.metrics import EVAL_LOSS, TRAIN_LOSS
from gaccum_exp.tracking.notes import write_note
from gaccum_exp.tracking.records import last_of_each_arm

OUTCOME_FILE = "arm.json"
OK = 0
"""Done; where an audit was asked for, every verdict is `identical` or `equivalent`."""
RUN_FAILED = 1
"""A run failed, or its records could not be written."""
BAD_INPUT = 2
"""The input was refused, in a line that says why, or nothing was run."""
INTERRUPTED = 130
"""Interrupted by Ctrl-C (SIGINT); 143 by SIGTERM, SIGUSR1 or SIGUSR2."""
RUNNING = "RUNNING"
VERDICT_STATUS = {"biased": 3, "inconclusive": 5, "stochastic": 4}
"""Exit statuses of the verdicts that are not 0, the one first that outranks the others."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an arm ended."""

    sweep_id: str
    name: str
    status: str
    """FINISHED, FAILED or KILLED; before that RUNNING"""
    reason: str | None = None
    task: str = "train"
    verdict: str | None = None
    """Of the worst window audited."""
    audit_asked: bool = False
    """Whether the exit status answers for the verdict."""
    bad_input: bool = False
    """Whether the reason is the user's to mend."""
    objective: float | None = None
    """The last evaluation loss, or training loss without evaluation: what a sweeper may minimise."""
    host: str | None = None
    """On which it is running; None: it is over."""
    process: int | None = None
    """The id there of the process that runs it."""
    process_started: int | None = None
    """When that process has started, as `process_started` says: its id may be another's later."""
    digest: str | None = None
    """Of the arm's configuration: see `ArmContext.digest`."""
    command_id: str | None = None
    """Of the last command that had this arm among its own."""
    again: bool = False
    """Whether its end was none of its own, so that it is to go on: it was interrupted, its process died,
    its records could not be written."""

    @property
    def runs_here(self) -> bool:
        """Whether it is running, in a process of this host that is alive."""
        if self.status != RUNNING or self.host != platform.node():
            return False
        return type(self.process) is int and is_alive(self.process, self.process_started)

    def write(self, folder: Path) -> None:
        """Write `arm.json`."""
        write_note(folder / OUTCOME_FILE, asdict(self))


def is_alive(process: int, started: int | None = None) -> bool:
    """Whether a process of this host is alive, and not another one that has got its id.

    Args:
        process: its id.
        started: as `process_started` returned it then; None: not known.
    """
    if process <= 1:  # to signal these means something else
        return False
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        pass
    except (OSError, OverflowError):
        return False
    found = _stat_of(process)
    if found is None:  # on a system without such files; else it has just ended
        return _stat_of(os.getpid()) is None
    state, began = found
    return state not in "ZX" and started in (None, began)  # else nobody has asked yet how it ended


def process_started(process: int) -> int | None:
    """Return when a process of this host has started, in ticks since that was; None if unknown."""
    found = _stat_of(process)
    return None if found is None else found[1]


def _stat_of(process: int) -> tuple[str, int] | None:
    """Return the state of a process and when it has started (fields 3 and 22 of proc_pid_stat(5))."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def read_outcomes(folder: Path, sweep_id: str) -> dict[Path, Outcome]:
    """Return how the arms of a sweep ended, by the arm's folder, in the order of the folders."""
    found = {path.parent: read_outcome(path.parent) for path in sorted(folder.rglob(OUTCOME_FILE))}
    # Another sweep may have used the folder before.
    return {arm: outcome for arm, outcome in found.items() if outcome and outcome.sweep_id == sweep_id}


def read_outcome(folder: Path) -> Outcome | None:
    """Return an arm's outcome as its folder has it; None where it has none that can be read."""
    try:
        return Outcome(**json.loads((folder / OUTCOME_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def outcomes_in_store(uri: str, experiment_name: str, sweep_id: str) -> dict[Path, Outcome]:
    """Return how the arms of a sweep ended, by their folder in the sweep's, as its store has it.

    For arms that ran where they share no folder with the command.

    Raises:
        BadInputError: the store cannot be used.
        StoreAwayError: it does not answer.
    """
    from gaccum_exp.tracking.mlflow_store import Store  # seconds, which no other command pays

    return {
        Path(run.tags.get("arm", run.run_id)): Outcome(
            sweep_id, run.name, run.status, run.tags.get("failure"),
            task=run.params.get("task", "train"), verdict=run.tags.get("verdict"),
            audit_asked=run.params.get("audit.every_steps", "None") != "None"
            or run.params.get("task") == "audit",
            objective=run.last(EVAL_LOSS) if run.last(EVAL_LOSS) is not None else run.last(TRAIN_LOSS),
            host=run.tags.get("host") if run.status == RUNNING else None,
            digest=run.tags.get("digest"), command_id=run.tags.get("command_id", "").rpartition(" ")[2],
            again=run.status in ("KILLED", RUNNING),
        )
        for run in last_of_each_arm(Store(uri, experiment_name).sweep(sweep_id, ()))
        if not run.is_control
    }  # fmt: skip


def exit_status(outcomes: Collection[Outcome], *, multirun: bool) -> int:
    """Return 1 if a run failed (2 if it is a single one and its input was at fault), else the verdicts'.

    Of several arms' verdicts that were asked for, the first of 3, 5, 4 that any has earned; else 0.
    """
    failed = [outcome for outcome in outcomes if outcome.status != "FINISHED"]
    if failed:
        return BAD_INPUT if not multirun and failed[0].bad_input else RUN_FAILED
    earned = {outcome.verdict for outcome in outcomes if outcome.audit_asked}
    return next((status for verdict, status in VERDICT_STATUS.items() if verdict in earned), OK)
