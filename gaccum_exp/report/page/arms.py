"""Prepare what the page says of each arm: its configuration, its provenance, and how to run it again."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.tracking.records import RunRecord

COMMAND = "python -m gaccum_exp"
_PLACES = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "hydra.searchpath")
"""What of a sweep's line says where configuration lies, and each of its arms needs alone."""
_NOT_PROVENANCE = (
    *("verdict", "cause", "culprit", "remedy", "detail", "failure", "role", "kind"),  # said elsewhere
    *("mlflow.", "run_token", "choice."),  # the store's own; and what the configuration says
)
"""How tags begin that are no part of it."""


def arm_section(comparison: Comparison, records: Mapping[str, RunRecord]) -> dict[str, Any]:
    """Return what all arms share, and of each what sets it apart."""
    arms = [(row, records[row.run_id]) for row in comparison.rows]
    params = [run.params for _, run in arms if run.params]
    # An arm that was refused has run on nothing.
    tags = _shared(_provenance(run) for _, run in arms if run.params or not params)
    return {
        "shared_params": _shared(params),
        "shared_tags": {key: value for key, value in tags.items() if key != "command"},  # said above
        "arms": [_arm(row, run, records, tags) for row, run in arms],
    }


def commands(runs: Sequence[RunRecord]) -> list[str]:
    """Return what was typed: a line for each command.

    Of runs that do not tell it, those of earlier versions, it is put together, or there is one for each.
    """
    lines = list(dict.fromkeys(run.tags["command"] for run in runs if "command" in run.tags))
    of_command: dict[str, list[list[str]]] = {}
    for run in runs:
        given = run.overrides
        known = of_command.setdefault(run.tags.get("command_id", ""), [])
        told = "command" in run.tags or "overrides" not in run.tags
        if not told and not run.is_control and given not in known:
            known.append(given)
    lines += [line for arms in of_command.values() for line in _lines(arms)]
    sweeps = dict.fromkeys(run.tags["sweep_id"] for run in runs if run.tags.get("sweep_id"))
    if sweeps:
        lines.append(f"{COMMAND} report {shlex.join(sweeps)}")
    return lines


def _lines(arms: Sequence[Sequence[str]]) -> list[str]:
    """Return one sweep's command if the arms are every combination of their values, else one each."""
    if len(arms) == 1:
        return [" ".join([COMMAND, *map(shlex.quote, arms[0])])]
    values: dict[str, list[str]] = {}
    for arm in arms:
        for key, _, value in (line.partition("=") for line in arm):
            if value not in values.setdefault(key, []):
                values[key].append(value)
    if arms and prod(map(len, values.values())) == len(arms):
        swept = (f"{key}={','.join(of)}" for key, of in values.items())
        return [" ".join([COMMAND, "-m", *map(shlex.quote, swept)])]
    return [" ".join([COMMAND, *map(shlex.quote, arm)]) for arm in arms]


def _arm(
    row: ComparisonRow, run: RunRecord, records: Mapping[str, RunRecord], shared: Mapping[str, str]
) -> dict[str, Any]:
    reference = records.get(row.reference_run_id or "")
    other = {} if reference is None or row.is_reference else reference.params
    differs = [
        (key, run.params.get(key, "–"), other.get(key, "–"))
        for key in sorted(run.params.keys() | other.keys())
        if other and run.params.get(key) != other.get(key)
    ]
    given = [*_places(shlex.split(run.tags.get("command", ""))), *run.overrides]
    own = {key: value for key, value in _provenance(run).items() if shared.get(key) != value}
    return {
        "name": row.name,
        "role": "" if row.is_audit else row.role,
        "verdict": row.verdict or "",
        "status": row.status,
        "reference": reference.name if other and reference else "",
        "differs": differs,
        "own": {"run id": run.run_id, **own},
        "remedy": run.tags.get("remedy") or run.tags.get("detail") or "",
        "failure": row.failure or "",
        "command": " ".join([COMMAND, *map(shlex.quote, given)]) if run.tags.get("overrides") else "",
    }


def _places(words: Sequence[str]) -> list[str]:
    found: list[str] = []
    for word, after in pairwise([*words, ""]):
        name, equals, _ = word.partition("=")
        if name in _PLACES:
            found += [word] if equals else [word, after]
    return found


def _provenance(run: RunRecord) -> dict[str, str]:
    return {key: value for key, value in sorted(run.tags.items()) if not key.startswith(_NOT_PROVENANCE)}


def _shared(every: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return what all of these have in common, by key."""
    sets = [set(of.items()) for of in every]
    return dict(sorted(set.intersection(*sets))) if sets else {}
