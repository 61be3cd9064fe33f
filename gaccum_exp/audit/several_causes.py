"""Find the causes that another one hides: take the first away, and diagnose what is left.

What a module takes from its batch is taken away by freezing it, a state that moves by holding it. The
runs that are left are judged like any window, as often as they still differ from their large batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gaccum_exp.audit import result
from gaccum_exp.audit.diagnose import Diagnosis
from gaccum_exp.audit.rerun.passes import ACCUMULATED64, ONE_PASS64, Rerun, RerunnableWindow
from gaccum_exp.audit.result import Audit, Finding
from gaccum_exp.core.gradient import distance

MOST = 4
"""Causes of one window, at most."""
HIDDEN = "what else is wrong, if anything, cannot be told while it mixes samples"


@dataclass(frozen=True, slots=True)
class Judged:
    """A judgement of a window's runs."""

    audit: Audit
    found: Diagnosis
    rerun: Rerun
    """With its window weighed as it was judged."""


def causes_of_passes(first: Judged, again: Callable[[Rerun], Judged]) -> list[Finding]:
    """Return the causes that a window's passes show, in the order in which they were found.

    Args:
        first: the judgement of the window as it is, biased.
        again: judges runs in which a cause has been taken away.
    """
    every = [first]
    while every[-1].found.differs and len(every) < MOST:
        undone = every[-1].found.undone
        assert undone is not None
        judged = again(undone)
        # Of a type that was taken away as a whole, and mixes still, another module tells nothing new.
        if judged.audit.verdict != "biased" or _kind(judged) in map(_kind, every):
            break
        every.append(judged)
    mended = every[-1].rerun.window.recounted([])
    findings: list[Finding] = []
    for judged in every:
        own, *others = judged.audit.findings
        alone = own.moves if others else _alone(judged, mended, last=judged is every[-1])
        findings += [replace(own, moves=alone), *others]
    last = every[-1]
    mixes_still = last.found.undone is None or last.found.differs
    if last.audit.cause == result.BATCH_STATISTICS and mixes_still:
        detail = findings[-1].detail
        said = f"{detail}; {HIDDEN}" if detail else HIDDEN
        findings[-1] = replace(findings[-1], detail=said, moves=None)
    return findings


def _kind(judged: Judged) -> tuple[str | None, str | None]:
    return judged.audit.cause, judged.audit.culprit_type


def _alone(judged: Judged, mended: RerunnableWindow | None, *, last: bool) -> float | None:
    """Return how far a cause moves the gradient where those found after it are mended."""
    if last:
        return judged.audit.e64
    if mended is None:
        return None
    alone = replace(judged.rerun, window=mended.holding(None if judged.rerun.held else ()))
    return distance(alone.gradient(ACCUMULATED64), alone.gradient(ONE_PASS64))
