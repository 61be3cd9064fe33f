"""Say which N have which verdict, what is to blame, and which loss curves left their envelope."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gaccum_exp.audit.result import SEVERITY, module_said
from gaccum_exp.report.arm_limit import by_n
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.pairing import Group, Source
from gaccum_exp.report.compare.swept_keys import Setting
from gaccum_exp.report.text.notes import with_settings
from gaccum_exp.report.text.wording import NOT_AUDITED, say_controls, say_list, say_numbers

SOUND = ("identical", "equivalent")
_MOST_FINDINGS = 6
_MOST_OUTSIDE = 12
_WORST_FIRST: tuple[str | None, ...] = (
    *(verdict for verdict in reversed(SEVERITY) if verdict not in SOUND),
    None,  # what was not audited comes after what is known to be wrong
    *(verdict for verdict in reversed(SEVERITY) if verdict in SOUND),
)
_SAID: Mapping[str | None, str] = {
    "identical": "identical to the large batch",
    "equivalent": "equivalent to the large batch",
    None: NOT_AUDITED,
}


@dataclass(frozen=True, slots=True)
class _Finding:
    verdict: str
    cause: str | None
    culprit: str
    remedy: str | None
    detail: str | None
    """Where or how it was found."""

    @property
    def text(self) -> str:
        """`biased by batch statistics at module "bn1" (BatchNorm2d): replace it by GroupNorm.`"""
        where = f" at {self.culprit}" if self.culprit else ""
        told = self.remedy or self.detail
        remedy = f": {told.rstrip('.')}" if told else ""
        detail = f" ({self.detail})" if self.remedy and self.detail else ""
        return f"{_blame(self.verdict, self.cause)}{where}{detail}{remedy}."


def say_verdicts(rows: Iterable[ComparisonRow]) -> str:
    """Say which N have which verdict (of repetitions the worst), the worst first: `N = 8 is biased`."""
    # One pass is the large batch itself, and is left out where nothing is wrong with it; so is an arm
    # that ended before it was audited.
    judged = [
        row
        for row in rows
        if (row.verdict or row.finished) and not (row.accum_steps == 1 and row.verdict in (None, *SOUND))
    ]
    said: dict[str, list[int]] = {}
    worst_of_n = {n: min(rank(row.verdict) for row in rows) for n, rows in by_n(judged).items()}
    for n, repeated in sorted(by_n(judged).items(), key=lambda item: (worst_of_n[item[0]], item[0])):
        verdict = _WORST_FIRST[worst_of_n[n]]
        causes = {row.cause for row in repeated if row.verdict == verdict}
        words = _SAID.get(verdict) or _blame(str(verdict), causes.pop() if len(causes) == 1 else None)
        said.setdefault(words, []).append(n)
    return "; ".join(
        f"N = {say_numbers(every)} {'are' if len(every) > 1 else 'is'} {words}"
        for words, every in said.items()
    )


def verdict_notes(groups: Sequence[Group]) -> tuple[str, ...]:
    """Say for every distinct finding that is not sound which N it concerns, and what to do."""
    found: dict[_Finding, dict[str, set[int]]] = {}
    for group in groups:
        for arm in group.arms:
            verdict, cause, kind, remedy, detail = (
                arm.tags.get(key) or None
                for key in ("verdict", "cause", "culprit_type", "remedy", "detail")
            )
            if verdict and verdict not in SOUND and arm.accum_steps is not None:
                name = arm.tags.get("culprit", "")
                culprit = module_said(name, kind) if kind else name
                finding = _Finding(verdict, cause, culprit, remedy, detail)
                arms = found.setdefault(finding, {}).setdefault(group.setting.label, set())
                arms.add(arm.accum_steps)
    found = dict(sorted(found.items(), key=_order))
    if len(found) > _MOST_FINDINGS:
        # One finding stands for all of a cause where remedies differ in numbers for each N.
        merged: dict[_Finding, dict[str, set[int]]] = {}
        first_of: dict[_Finding, _Finding] = {}
        for finding, of_setting in found.items():
            alike = replace(finding, remedy=None, detail=None)
            arms_of = merged.setdefault(first_of.setdefault(alike, finding), {})
            for label, of_label in of_setting.items():
                arms_of.setdefault(label, set()).update(of_label)
        found = dict(sorted(merged.items(), key=_order))
    notes: list[str] = []
    for finding, of_setting in found.items():
        every = sorted(set().union(*of_setting.values()))
        sentence = f"N = {say_numbers(every)}: {finding.text}"
        notes += with_settings(((sentence, label) for label in of_setting), len(groups))
    return tuple(notes)


def control_notes(groups: Sequence[Group], rows: Sequence[ComparisonRow]) -> tuple[str, ...]:
    """Say which curves left their envelope, and which controls could not be used."""
    said: list[tuple[str, str]] = []
    rows_outside: dict[Setting, list[ComparisonRow]] = {}
    for row in rows:
        if row.control == "outside":
            rows_outside.setdefault(row.setting, []).append(row)
    for group in groups:
        outside = rows_outside.get(group.setting)
        if outside:
            arms = [f"N = {row.accum_steps} from step {row.left_at}" for row in outside]
            if len(arms) > _MOST_OUTSIDE:
                arms[_MOST_OUTSIDE:] = [f"{len(arms) - _MOST_OUTSIDE} more"]
            controls = say_controls(row.controls for row in outside)
            sentence = f"outside the envelope of {controls}: {say_list(arms)}."
            if any(row.verdict in SOUND for row in outside):
                sentence += (
                    " Where the audit is sound, a window that it did not judge may be at fault, as "
                    "the partial one that ends an epoch (audit.every_steps=1 tells), or rounding leapt "
                    "(more controls tell)."
                )
            said.append((sentence, group.setting.label))
        unused = len(group.controls) - len(group.usable_controls)
        if unused:
            sentence = (
                f"{unused} of {say_controls([len(group.controls)])} did not finish, or ran on another "
                "device or other data than the reference, and bound nothing."
            )
            if group.source in (Source.STAND_IN, Source.NONE):
                why = "there is no one-pass reference to hold them against"
                sentence = f"the controls bound nothing, because {why}."
            said.append((sentence, group.setting.label))
    return tuple(with_settings(said, len(groups)))


def _order(item: tuple[_Finding, Mapping[str, set[int]]]) -> tuple[object, ...]:
    finding, of_setting = item
    words = (finding.cause or "", finding.culprit, finding.remedy or finding.detail or "")
    return rank(finding.verdict), min(map(min, of_setting.values())), words


def _blame(verdict: str, cause: str | None) -> str:
    if cause is None:
        return verdict
    return f"{verdict} by {cause}" if verdict == "biased" else f"{verdict} because of {cause}"


def rank(verdict: str | None) -> int:
    """Order verdicts, the worst first."""
    # A verdict that this version does not know settles nothing.
    return _WORST_FIRST.index(verdict if verdict in _WORST_FIRST else "inconclusive")
