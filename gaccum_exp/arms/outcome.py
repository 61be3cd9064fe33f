"""How an arm ended: written to its folder, read back at the end of the command, and its exit status."""

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

OUTCOME_FILE = "arm.json"
OK, RUN_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
VERDICT_STATUS = {"biased": 3, "inconclusive": 5, "stochastic": 4}
"""Exit statuses of the verdicts that are not 0, the one first that outranks the others."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an arm ended."""

    sweep_id: str
    name: str
    status: str
    """FINISHED, FAILED or KILLED"""
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

    def write(self, folder: Path) -> None:
        """Write `arm.json`."""
        # Moved into place, so that a reader of the folder finds it whole or not at all.
        temporary = folder / f"{OUTCOME_FILE}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, folder / OUTCOME_FILE)


def read_outcomes(folder: Path, sweep_id: str) -> dict[Path, Outcome]:
    """Return how the arms of a sweep ended, by the arm's folder, in the order of the folders."""
    found = {}
    for path in sorted(folder.rglob(OUTCOME_FILE)):
        values = json.loads(path.read_text())
        if values["sweep_id"] == sweep_id:  # another sweep may have used the folder before
            found[path.parent] = Outcome(**values)
    return found


def exit_status(outcomes: Collection[Outcome], *, multirun: bool) -> int:
    """Return 1 if a run failed (2 if it is a single one and its input was at fault), else the verdicts'.

    Of several arms' verdicts that were asked for, the first of 3, 5, 4 that any has earned; else 0.
    """
    failed = [outcome for outcome in outcomes if outcome.status != "FINISHED"]
    if failed:
        return BAD_INPUT if not multirun and failed[0].bad_input else RUN_FAILED
    earned = {outcome.verdict for outcome in outcomes if outcome.audit_asked}
    return next((status for verdict, status in VERDICT_STATUS.items() if verdict in earned), OK)
