"""The audit of an arm as a file, and those of a sweep's arms on the terminal."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gaccum_exp.arms.outcome import Outcome
from gaccum_exp.audit.result import Audit
from gaccum_exp.report.text.audit_printout import print_table

AUDIT_FILE = "audit.json"
"""In the arm's folder."""


def write(audit: Audit, folder: Path) -> Path:
    """Write `audit.json`: every field of the audit; a number that is not finite is null."""
    path = folder / AUDIT_FILE
    path.write_text(json.dumps(_with_nulls(audit.as_dict()), indent=2, allow_nan=False) + "\n")
    return path


def print_audits(outcomes: Mapping[Path, Outcome]) -> None:
    """Print a sweep's verdicts: of each arm its audit, without its parameters, or why there is none.

    Args:
        outcomes: how the arms ended, by folder.
    """
    lines: list[tuple[str, Audit | str]] = []
    apart = ("culprits", "checks", "parameters", "window")
    plain = [f.name for f in fields(Audit) if f.name not in apart]
    for folder, outcome in outcomes.items():
        path = folder / AUDIT_FILE
        if outcome.status == "FINISHED" and path.exists():
            written = json.loads(path.read_text())
            lines.append((outcome.name, Audit(**{key: written[key] for key in plain})))
        elif outcome.status == "FINISHED":
            lines.append((outcome.name, f"{outcome.verdict}, and its file is in the store"))
        else:
            lines.append((outcome.name, f"{outcome.status}: {outcome.reason}"))
    print_table(lines)


def _with_nulls(value: Any) -> Any:
    """Return the same with None for every number that JSON cannot express."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(v) for v in value]
    return value
