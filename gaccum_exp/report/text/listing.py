"""List the sweeps and runs that there are, the newest first: what each varied, and how it was judged."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.table import Table
from rich.text import Text

from gaccum_exp.report.compare.swept_keys import swept_keys, swept_values
from gaccum_exp.report.text.terminal import LOOK, console
from gaccum_exp.report.text.verdict_notes import SOUND, rank
from gaccum_exp.report.text.wording import NOT_AUDITED
from gaccum_exp.tracking.records import RunRecord, last_of_each_arm

MOST_LISTED = 20
_MOST_VALUES = 4
_KINDS = ("arm", "audit")
"""Of runs that a report is of; a plan or an advice is of no arm."""
_ENDS = {"FAILED": "failed", "KILLED": "interrupted", "RUNNING": "running"}


@dataclass(frozen=True, slots=True)
class Listed:
    """A sweep, or a single run, in the words of a list."""

    sweep_id: str
    begun_s: float
    """In seconds since 1970."""
    model: str
    swept: str
    """`N=1,2,4 lr=0.1,0.2`"""
    verdicts: str
    """`1 biased, 2 equivalent, 1 failed`"""


def list_runs(runs: Iterable[RunRecord]) -> list[Listed]:
    """Return sweeps and single runs, the newest first."""
    sweeps: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        if run.tags.get("kind") in _KINDS and not run.is_control:
            sweeps[run.tags["sweep_id"]].append(run)
    listed = [_listed(sweep_id, last_of_each_arm(arms)) for sweep_id, arms in sweeps.items()]
    return sorted(listed, key=lambda of: (-of.begun_s, of.sweep_id))


def print_listed(listed: Sequence[Listed], where: str) -> None:
    """Print the list, of many the newest, and what to do with it."""
    out = console()
    if not listed:
        out.print(f"There is no sweep in {where}.", highlight=False)
        return
    table = Table(**LOOK)
    for header, shortest in (("id", 22), ("begun", 12), ("model", 5), ("swept", 10), ("verdicts", 12)):
        fixed = header in ("id", "begun")
        table.add_column(header, no_wrap=fixed, overflow="fold", min_width=shortest if fixed else None)
    for of in listed[:MOST_LISTED]:
        table.add_row(*map(Text, (of.sweep_id, say_when(of.begun_s), of.model, of.swept, of.verdicts)))
    out.print(table)
    if len(listed) > MOST_LISTED:
        out.print(f"and {len(listed) - MOST_LISTED} older ones in {where}.", highlight=False)
    example = f"python -m gaccum_exp report {listed[0].sweep_id}"
    out.print(Text(f"\n{example}\n  several ids are compared as one; --format says what is written"))


def say_when(begun_s: float) -> str:
    """`29 Nov 23:32`, or of another year `29 Nov 2025`, in local time."""
    when = datetime.fromtimestamp(begun_s)
    return f"{when:%d %b %H:%M}" if when.year == datetime.now().year else f"{when:%d %b %Y}"


def _listed(sweep_id: str, arms: Sequence[RunRecord]) -> Listed:
    models = dict.fromkeys(_model_of(arm) for arm in arms)
    kinds = {arm.tags["kind"] for arm in arms} - {"arm"}
    return Listed(
        sweep_id,
        min(arm.start_time_ms for arm in arms) / 1000,
        ", ".join(model for model in models if model),
        " ".join([*(f"{kind}:" for kind in kinds), _say_swept(arms)]),
        _say_verdicts(arms),
    )


def _model_of(arm: RunRecord) -> str:
    chosen = arm.tags.get("choice.model", arm.params.get("model._target_", "").rpartition(".")[2])
    # One that is chosen by a name: torchvision's, or one that Python code has handed over.
    return arm.params.get("model.name", chosen).rpartition(".")[2]


def _say_swept(arms: Sequence[RunRecord]) -> str:
    """Say N and what else differs, of many values the first and the last."""
    values: dict[str, dict[str, None]] = {"N": {}, "reduction": {}}
    keys = swept_keys(arms)
    for arm in sorted(arms, key=lambda arm: (_n_of(arm), arm.start_time_ms)):
        if n := _n_of(arm):
            values["N"][str(n)] = None
        own = {"reduction": arm.params["accum.reduction"]} if arm.params else {}
        refused = {} if arm.params else {keys[key]: value for key, value in _typed(arm) if key in keys}
        for key, value in (*own.items(), *swept_values(arm, keys), *refused.items()):
            values.setdefault(key, {})[value] = None
    several = {key: list(of) for key, of in values.items() if len(of) > 1 or key == "N"}
    return " ".join(f"{key}={_shortened(of)}" for key, of in several.items() if of)


def _typed(arm: RunRecord) -> list[tuple[str, str]]:
    """Return the keys and values of its overrides: all that is known of an arm that was refused."""
    return [
        (key.lstrip("+"), value) for key, _, value in (line.partition("=") for line in arm.overrides)
    ]


def _n_of(arm: RunRecord) -> int:
    asked = "" if arm.params else dict(_typed(arm)).get("accum.steps", "")
    return arm.accum_steps or (int(asked) if asked.isdecimal() else 0)


def _shortened(values: Sequence[str]) -> str:
    if len(values) <= _MOST_VALUES:
        return ",".join(values)
    return f"{','.join(values[: _MOST_VALUES - 2])},…,{values[-1]} ({len(values)})"


def _say_verdicts(arms: Sequence[RunRecord]) -> str:
    """Say how many arms have which verdict, the worst first, and how many did not finish.

    One pass is the large batch itself, and is left out where nothing is wrong with it.
    """
    judged = [arm for arm in arms if arm.finished]
    if any(arm.accum_steps != 1 for arm in arms):
        sound = (None, "", *SOUND)
        judged = [arm for arm in judged if arm.accum_steps != 1 or arm.tags.get("verdict") not in sound]
    verdicts = Counter(arm.tags.get("verdict") or NOT_AUDITED for arm in judged)
    ends = Counter(_ENDS.get(arm.status, arm.status.lower()) for arm in arms if not arm.finished)
    worst_first = sorted(verdicts, key=lambda verdict: (verdict == NOT_AUDITED, rank(verdict)))
    said = [f"{verdicts[verdict]} {verdict}" for verdict in worst_first]
    return ", ".join([*said, *(f"{number} {word}" for word, number in ends.items())])
