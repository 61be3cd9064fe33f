"""How far a journal is delivered, in a file beside it: written by its deliverer, read by anyone."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gaccum_exp.tracking.journal import whole_size
from gaccum_exp.tracking.notes import write_note


@dataclass(slots=True)
class Delivered:
    """What is known of a journal in its store."""

    uri: str | None = None
    experiment_name: str | None = None
    offset: int = 0
    """Bytes of the journal whose records the store has taken."""
    state: Literal["unknown", "ready", "away", "refused"] = "unknown"
    """Of the store: `refused` where it cannot be used and the user has to mend something."""
    reason: str | None = None
    """Why it is away or refused."""
    away_since_ms: int | None = None
    """Since when it has not answered."""
    creating: bool = False
    """Whether a run has been asked for: there may be one, also without an answer."""
    host: str | None = None
    """Where it was delivered from: a database that is a file is another one elsewhere."""
    run_id: str | None = None
    experiment_id: str | None = None
    refused: bool = False
    """Whether the store has refused something of it, and holds all else."""
    settled: bool = False
    """Whether the run has ended, in the store too: not where it goes on since."""

    @classmethod
    def of(cls, journal: Path) -> "Delivered":
        """Read what stands beside a journal; what cannot be read is nothing."""
        try:
            known = cls(**json.loads(_path(journal).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()
        known.settled = known.settled and whole_size(journal) <= known.offset
        return known

    def write(self, journal: Path) -> None:
        """Write it beside the journal.

        Raises:
            OSError: it cannot be written.
        """
        write_note(_path(journal), asdict(self))


def _path(journal: Path) -> Path:
    return journal.with_suffix(".delivery.json")
