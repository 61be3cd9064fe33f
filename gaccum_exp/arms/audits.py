"""The audit of an arm as a file."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gaccum_exp.audit.result import Audit

AUDIT_FILE = "audit.json"
"""In the arm's folder."""


def write(audit: Audit, folder: Path) -> Path:
    """Write `audit.json`: every field of the audit; a number that is not finite is null."""
    path = folder / AUDIT_FILE
    path.write_text(json.dumps(_with_nulls(audit.as_dict()), indent=2, allow_nan=False) + "\n")
    return path


def _with_nulls(value: Any) -> Any:
    """Return the same with None for every number that JSON cannot express."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(v) for v in value]
    return value
