"""The verdicts of a sweep's audits in words: which N have which, and what is to blame.

What an audit found is read from the run's tags. An arm without them was not audited, and is never
passed off as sound.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gaccum_exp.audit.result import SEVERITY
from gaccum_exp.report.compare.pairing import Group, Source, steps_of
from gaccum_exp.report.compare.row import ComparisonRow
from gaccum_exp.report.compare.swept_keys import Swept
from gaccum_exp.report.text.notes import Labelled, with_settings
from gaccum_exp.report.text.wording import MISSING, say_controls, say_list, say_numbers

SOUND = ("identical", "equivalent")
NOT_AUDITED = "not audited"
_MOST_FINDINGS = 6
_MOST_OUTSIDE = 12
_WORST_FIRST: tuple[str | None, ...] = (
    *(verdict for verdict in reversed(SEVERITY) if verdict not in SOUND),
    None,  # what was not looked at comes after what is known to be wrong
    *(verdict for verdict in reversed(SEVERITY) if verdict in SOUND),
)
_SAID: Mapping[str | None, str] = {
    "identical": "identical to the large batch",
    "equivalent": "equivalent to the large batch",
    None: NOT_AUDITED,
}


@dataclass(frozen=True, slots=True)
class _Finding:
    """What an audit blames, and what it advises."""

    verdict: str
    cause: str | None
    culprit: str | None
    culprit_type: str | None
    remedy: str | None

    @property
    def text(self) -> str:
        """`biased by batch statistics at bn1: replace BatchNorm2d by GroupNorm.`"""
        kind = f" ({self.culprit_type})" if self.culprit_type else ""
        where = f" at {self.culprit}{kind}" if self.culprit else ""
        remedy = f": {self.remedy.rstrip('.')}" if self.remedy else ""
        return f"{_blame(self.verdict, self.cause)}{where}{remedy}."


def say_verdict(row: ComparisonRow) -> str:
    """Return the table's word; a reference is what others are compared with, audited or not."""
    if row.verdict is None and row.role in ("reference", "stored reference"):
        return MISSING
    return row.verdict or NOT_AUDITED


def say_verdicts(rows: Iterable[ComparisonRow]) -> str:
    """Say which N have which verdict, the worst first: `N = 8 is biased; N = 2 and 4 are …`.

    Of repetitions the worst counts. One pass over the window is the large batch itself, and is left
    out where nothing is wrong with it; so is an arm that ended before it was audited.
    """
    by_steps: dict[int, list[ComparisonRow]] = {}
    for row in rows:
        trivial = row.steps == 1 and row.verdict in (None, *SOUND)
        if row.steps is not None and not trivial and (row.verdict or row.finished):
            by_steps.setdefault(row.steps, []).append(row)
    said: dict[str, list[int]] = {}
    for worst in _WORST_FIRST:
        for steps, repeated in sorted(by_steps.items()):
            if min(map(rank, repeated)) == _WORST_FIRST.index(worst):
                said.setdefault(_predicate(worst, repeated), []).append(steps)
    return "; ".join(
        f"N = {say_numbers(steps)} {'are' if len(steps) > 1 else 'is'} {words}"
        for words, steps in said.items()
    )


def verdict_notes(groups: Labelled) -> tuple[str, ...]:
    """Say for every distinct finding that is not sound which N it concerns, and what to do."""
    found: dict[_Finding, dict[str, set[int]]] = {}
    for group, setting in groups:
        for arm in group.arms:
            tags = {
                key: arm.tags.get(key) or None for key in ("cause", "culprit", "culprit_type", "remedy")
            }
            tags["remedy"] = tags["remedy"] or arm.tags.get("detail")
            verdict, steps = arm.tags.get("verdict"), steps_of(arm)
            if verdict and verdict not in SOUND and steps is not None:
                arms = found.setdefault(_Finding(verdict, **tags), {})
                arms.setdefault(setting.label, set()).add(steps)
    ordered = sorted(_fewer(found).items(), key=lambda item: _order(*item))
    return tuple(_say_finding(finding, arms, len(groups)) for finding, arms in ordered)


def control_notes(groups: Labelled, rows: Sequence[ComparisonRow]) -> tuple[str, ...]:
    """Say which curves left their envelope, and which controls could not be used."""
    left: dict[str, list[str]] = {}
    rows_outside: dict[Swept, list[ComparisonRow]] = {}
    for row in rows:
        if row.control == "outside":
            rows_outside.setdefault(row.setting, []).append(row)
    for group, setting in groups:
        outside = rows_outside.get(setting, [])
        if outside:
            arms = [f"N = {row.steps} from step {row.left_at}" for row in outside]
            if len(arms) > _MOST_OUTSIDE:
                arms[_MOST_OUTSIDE:] = [f"{len(arms) - _MOST_OUTSIDE} more"]
            sentence = f"outside the envelope of {say_controls(outside)}: {say_list(arms)}."
            if any(row.verdict in SOUND for row in outside):
                sentence += (
                    " Where the audit is sound, a window that it did not judge may be at fault, as "
                    "the partial one that ends an epoch (audit.every_steps=1 tells), or rounding leapt "
                    "(more controls tell)."
                )
            left.setdefault(sentence, []).append(setting.label)
        unused = _say_unused(group)
        if unused:
            left.setdefault(unused, []).append(setting.label)
    return tuple(with_settings(left, len(groups)))


def _say_unused(group: Group) -> str | None:
    unused = len(group.controls) - len(group.usable_controls)
    if not unused:
        return None
    if group.source in (Source.STAND_IN, Source.NONE):
        return "the controls bound nothing, because there is no one-pass reference to hold them against."
    return (
        f"{unused} of {say_controls(len(group.controls))} did not finish, or ran on another device or "
        "other data than the reference, and bound nothing."
    )


def _fewer(found: dict[_Finding, dict[str, set[int]]]) -> dict[_Finding, dict[str, set[int]]]:
    """Where remedies differ in numbers for each N, let one stand for all of a cause."""
    if len(found) <= _MOST_FINDINGS:
        return found
    merged: dict[_Finding, dict[str, set[int]]] = {}
    speakers: dict[_Finding, _Finding] = {}
    for finding, arms in sorted(found.items(), key=lambda item: _order(*item)):
        speaker = speakers.setdefault(replace(finding, remedy=None), finding)
        for label, steps in arms.items():
            merged.setdefault(speaker, {}).setdefault(label, set()).update(steps)
    return merged


def _say_finding(finding: _Finding, arms: Mapping[str, set[int]], n_groups: int) -> str:
    steps = sorted(set().union(*arms.values()))
    sentence = f"N = {say_numbers(steps)}: {finding.text}"
    (said,) = with_settings({sentence: list(arms)}, n_groups)
    return said


def _order(finding: _Finding, arms: Mapping[str, set[int]]) -> tuple[object, ...]:
    words = (finding.cause or "", finding.culprit or "", finding.remedy or "")
    return _WORST_FIRST.index(_known(finding.verdict)), min(map(min, arms.values())), words


def _predicate(verdict: str | None, rows: Sequence[ComparisonRow]) -> str:
    if verdict in _SAID or verdict is None:
        return _SAID[verdict]
    causes = {row.cause for row in rows if row.verdict == verdict}
    return _blame(verdict, causes.pop() if len(causes) == 1 else None)


def _blame(verdict: str, cause: str | None) -> str:
    if cause is None:
        return verdict
    return f"{verdict} by {cause}" if verdict == "biased" else f"{verdict} because of {cause}"


def rank(row: ComparisonRow) -> int:
    """Order rows by their verdict, the worst first."""
    return _WORST_FIRST.index(_known(row.verdict))


def _known(verdict: str | None) -> str | None:
    """Return the verdict; one that this version does not know settles nothing."""
    return verdict if verdict in _WORST_FIRST else "inconclusive"
