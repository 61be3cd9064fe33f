"""The result of an audit: verdict, cause, remedy, and the numbers that they rest on."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gaccum_exp.audit.audited_window import AuditedWindow

Verdict = Literal["identical", "equivalent", "stochastic", "biased", "inconclusive"]
SEVERITY: tuple[Verdict, ...] = ("identical", "equivalent", "stochastic", "inconclusive", "biased")
"""From best to worst: of several windows, the worst verdict is the loop's."""

BATCH_STATISTICS = "batch statistics"
"""Shown by: forward whole and in micro-batches: the first module whose inputs agree sample by sample
and whose outputs do not."""
RANDOMNESS = "randomness"
"""Shown by: the generator's state moves; every draw is recorded and replayed for each sample."""
UNEQUAL_DENOMINATORS = "unequal denominators"
"""Shown by: weighing each micro-batch by what it counts gives the large batch's gradient."""
LOSS_SCALE = "loss scale"
"""Shown by: the gradient is a multiple of the large batch's; the factor is said."""
NOT_ADDITIVE = "loss not additive over samples"
"""Shown by: all modules agree, and the large batch's loss is not made of its parts'."""
STALE_OR_MISSING = "stale or missing gradients"
"""Shown by: the gradient at the step is not the sum of what the window's passes gave; some of them,
or those left from before, are."""
LOW_PRECISION = "low-precision accumulation"
"""Shown by: added up in float64, the same micro gradients are right."""
MOVING_STATE = "state moves in the window"
"""Shown by: with the state that a module, a criterion or a teacher had at the window's first pass,
it is the large batch's."""
OTHER_OPTIMIZER = "another optimizer"
"""Shown by: the gradient is the large batch's, and the step that a strategy takes with it (`adam_a`,
`batch_size_invariant_adam`), from the present moments, is not."""
UNKNOWN = "unknown"
"""Shown by: none of these; what was ruled out is said."""
CAUSES = (
    *(BATCH_STATISTICS, RANDOMNESS, UNEQUAL_DENOMINATORS, LOSS_SCALE, NOT_ADDITIVE),
    *(STALE_OR_MISSING, LOW_PRECISION, MOVING_STATE, OTHER_OPTIMIZER, UNKNOWN),
)


BESIDE_MODEL = "beside the model"
"""The name of a culprit that is no part of the model."""


def module_said(name: str, kind: str) -> str:
    """Return a module in a sentence: `module "0.1" (BatchNorm2d)`; the model's own name is empty."""
    if name == BESIDE_MODEL:
        return f"{kind}, {name}"
    return f'module "{name}" ({kind})' if name else f"the model itself ({kind})"


@dataclass(frozen=True, slots=True)
class ParameterError:
    """One parameter's part in the difference between the accumulated and the one-pass gradient."""

    name: str
    error: float
    """‖g_N − g_1‖ / ‖g_1‖ of this parameter alone."""
    share: float
    """‖g_N − g_1‖ of this parameter over ‖g_1‖ of all."""
    norm: float
    """‖g_1‖ of this parameter."""


@dataclass(frozen=True, slots=True)
class Culprit:
    """A module that makes a sample's output depend on how the window is split."""

    name: str
    """Dotted, as in `model.named_modules()`; the model itself is the empty string."""
    type: str
    """Class name."""
    cause: str

    @property
    def said(self) -> str:
        """It in a sentence: `module "0.1" (BatchNorm2d)`."""
        return module_said(self.name, self.type)


@dataclass(frozen=True, slots=True)
class Mixing:
    """Where samples are mixed beside model and loss, and what to do about it."""

    culprit: Culprit
    remedy: str


@dataclass(frozen=True, slots=True)
class Check:
    """A fault beside the gradient: in the schedule, an average, the memory or the reported loss."""

    name: str
    """schedule | average of the weights | memory | reported loss"""
    finding: str
    """A sentence."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause of several, in the fields that an audit has for it."""

    cause: str
    culprit: str | None
    culprit_type: str | None
    remedy: str | None
    detail: str | None
    moves: float | None
    """How far it alone moves the gradient, in parts of the norm that it has without it; None: that
    could not be told apart."""

    def lines(self, number: str = "") -> Iterator[str]:
        """Yield the cause, by its number where there are several, its remedy, and what was seen."""
        moves = f"{self.moves or 0:.2g} × its norm"
        far = "" if self.moves is None else f" (by itself it moves the gradient by {moves})"
        yield f"cause{number}: {self.where}{far}"
        if self.remedy:  # random numbers are no fault
            yield f"{'note' if self.cause == RANDOMNESS else 'remedy'}: {self.remedy}"
        if self.detail:
            yield f"seen: {self.detail}"

    @property
    def where(self) -> str:
        """The cause, and the module that it is at."""
        if self.culprit_type is None:
            return self.cause
        return f"{self.cause} at {module_said(self.culprit or '', self.culprit_type)}"


@dataclass(frozen=True, slots=True, repr=False)
class Audit:
    """The verdict on one window (on several: the worst window's).

    Norms are Euclidean, over all parameters taken together unless said otherwise.
    """

    verdict: Verdict
    accum_steps: int
    """N, micro-batches of the window."""
    reduction: str
    """How the gradients were accumulated; of a loop that is watched, as its losses' divisors show it:
    mean (each micro-batch's own mean) | global_mean (sums over the window's count) | sum (neither)."""
    e64: float | None = None
    """‖g_N − g_1‖ / ‖g_1‖ in float64; None where that could not be had."""
    e: float | None = None
    """The same in the run's own precision."""
    floor: float | None = None
    """The rounding floor: how far g_1 lies from other summation orders in that precision, and from
    itself in float64; the largest."""
    scale: float | None = None
    """The accumulated gradient along the large batch's *mean* gradient: 1 for a mean, n for a sum."""
    denominator: float | None = None
    """What the window's loss sum is divided by for its mean."""
    cause: str | None = None
    """One of CAUSES; None where there is nothing to explain. Of `inconclusive` it is what the
    experiments point to, and not proven."""
    culprit: str | None = None
    """The first culprit's dotted name."""
    culprit_type: str | None = None
    remedy: str | None = None
    """What to do about it, in a sentence."""
    detail: str | None = None
    """What was seen, what was ruled out, or what would settle an open question."""
    moves: float | None = None
    """Of several causes: how far this one alone moves the gradient, as in a `Finding`."""
    besides: tuple[Finding, ...] = ()
    """Further causes that were established, the strongest first: each stays when others are mended."""
    culprits: tuple[Culprit, ...] = ()
    checks: tuple[Check, ...] = ()
    parameters: tuple[ParameterError, ...] = ()
    """Worst first."""
    window: AuditedWindow | None = None
    """What was in it, what was counted and weighed, and the error of each layer; None where that could
    not be had."""

    @property
    def sound(self) -> bool:
        """Whether it is the large batch's gradient, up to rounding, and no check found a fault."""
        return self.verdict in ("identical", "equivalent") and not self.checks

    def noting(self, detail: str) -> "Audit":
        """Return the audit with a further detail."""
        return replace(self, detail=f"{self.detail}; {detail}" if self.detail else detail)

    def report(self) -> str:
        """Return the verdict in a few lines; where there is none, the reason instead of its numbers."""
        open_question = self.verdict == "inconclusive"
        # They would read like a good result, or a bad one, that nobody vouches for.
        first = (self.detail or "nothing was measured") if open_question else self._numbers_said()
        lines = [f"{self.verdict} (N = {self.accum_steps}, {self.reduction}): {first}"]
        named = {self.culprit, *(other.culprit for other in self.besides)}
        others = _counted([c for c in self.culprits if c.name not in named])
        detail = None if open_question else self.detail
        if self.cause is not None:
            count = len(self.findings)
            number = f" 1 of {count}" if count > 1 else ""
            first_line, *rest = replace(self.findings[0], detail=detail).lines(number)
            lines += [first_line, *([f"also: {', '.join(others)}"] if others else []), *rest]
        else:
            lines += [f"remedy: {self.remedy}"] if self.remedy else []
            lines += [f"seen: {detail}"] if detail else []
        for place, other in enumerate(self.besides, start=2):
            lines += other.lines(f" {place} of {len(self.findings)}")
        return "\n".join([*lines, *(f"{check.name}: {check.finding}" for check in self.checks)])

    def _numbers_said(self) -> str:
        """Return what was measured, in words."""
        measured = self.e if self.e is not None else self.e64
        if measured is None:
            return self.detail or "nothing was measured"
        beside = {
            "its passes in float64:": self.e64 if self.e is not None else None,
            "rounding alone: up to": self.floor,
        }
        also = "; ".join(f"{what} {number:.2g}" for what, number in beside.items() if number is not None)
        said = f"off by {measured:.2g} × the norm of the large batch's gradient"
        along = "" if self.scale is None else f"; projected on it {self.scale:.2g} × as long"
        return f"{said}{f' ({also})' if also else ''}{along}"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every cause that was established, the strongest first."""
        if self.cause is None:
            return ()
        own = Finding(self.cause, self.culprit, self.culprit_type, self.remedy, self.detail, self.moves)
        return own, *self.besides

    @property
    def remedies(self) -> str | None:
        """What to do about all causes, in a sentence."""
        others = [f"besides, {other.where}: {other.remedy}" for other in self.besides]
        return "; ".join([self.remedy or "", *others]) if others else self.remedy

    def led_by(self, findings: Sequence[Finding]) -> "Audit":
        """Return the audit with these causes; how far each moves the gradient is said of several."""
        first, *others = findings
        first = first if others else replace(first, moves=None)
        return replace(
            self, cause=first.cause, culprit=first.culprit, culprit_type=first.culprit_type,
            remedy=first.remedy, detail=first.detail, moves=first.moves, besides=tuple(others),
        )  # fmt: skip

    def __str__(self) -> str:
        return self.report()

    def __repr__(self) -> str:
        return f"<{'; '.join(self.report().splitlines())}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the report where IPython or a notebook shows the audit."""
        printer.text(self.report())

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as written to `audit.json`; its window has a file of its own."""
        values = asdict(replace(self, window=None))
        del values["window"]
        return values

    @classmethod
    def of_dict(cls, values: dict[str, Any]) -> "Audit":
        """Return the audit that has these plain values."""
        parts = {"culprits": Culprit, "checks": Check, "parameters": ParameterError, "besides": Finding}
        made = {key: tuple(kind(**part) for part in values.get(key, ())) for key, kind in parts.items()}
        return cls(**{**values, **made})


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Order causes by how far they move the gradient; those of which that is not known come last."""
    return sorted(findings, key=lambda f: math.inf if f.moves is None else -f.moves)


def _counted(culprits: Iterable[Culprit]) -> list[str]:
    """Name each culprit, and those of one type together, by how many they are."""
    by_type: dict[tuple[str, str], list[str]] = {}
    for culprit in culprits:
        by_type.setdefault((culprit.type, culprit.cause), []).append(culprit.name)
    return [
        f"{module_said(names[0], kind)}: {cause}"
        if len(names) == 1
        else f"{len(names)} of type {kind}: {cause}"
        for (kind, cause), names in by_type.items()
    ]


def worst(audits: Iterable[Audit]) -> Audit:
    """Return the audit with the worst verdict, the first of equal ones."""
    return max(audits, key=lambda audit: SEVERITY.index(audit.verdict))
