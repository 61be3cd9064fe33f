"""The audit of an arm as a file and on the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gaccum_exp.audit.result import Audit
from gaccum_exp.report.text import audit_printout

AUDIT = "audit.json"
"""The audit of an arm, in the arm's folder."""


def write(audit: Audit, folder: Path) -> Path:
    """Write `audit.json`: every field of the audit; a number that is not finite is null."""
    path = folder / AUDIT
    path.write_text(json.dumps(_strict(audit.as_dict()), indent=2, allow_nan=False) + "\n")
    return path


def show(name: str, audit: Audit) -> None:
    """Print an audit for people."""
    audit_printout.print_audit(name, audit)


def show_sweep(outcomes: Sequence[Mapping[str, Any]]) -> None:
    """Print the verdicts of a sweep's arms, from how they ended and what they have written."""
    audit_printout.print_table([(str(o["name"]), _told(o)) for o in outcomes])


def _told(outcome: Mapping[str, Any]) -> Audit | str:
    """Return an arm's audit, without its parameters, or why there is none."""
    path = Path(outcome["folder"]) / AUDIT
    if outcome["status"] != "FINISHED" or not path.exists():
        return f"{outcome['status']}: {outcome['reason']}"
    nested = ("culprits", "checks", "parameters")
    told = json.loads(path.read_text())
    return Audit(**{f.name: told[f.name] for f in fields(Audit) if f.name not in nested})


def _strict(value: Any) -> Any:
    """Return the same with None for every number that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return value
