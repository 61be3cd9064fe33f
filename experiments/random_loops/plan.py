"""What is drawn of a random loop: a sound plan, and the faults that can be planted in it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from experiments.random_loops.terms import KINDS, LABELLED, OWN, Term
from gaccum_exp.audit import result

FORMS = ("functions", "criterion", "own", "compute_loss", "module", "model")
"""Who computes the loss: torch's functions in the loop, a torch.nn criterion, the loop's own function of
the outputs; or, as a whole, a function that calls the model, a module of the outputs, or the model."""
WHOLE = ("compute_loss", "module", "model")
EQUAL = ("equal", "inside")
HOW = ("equal", "share", "sums", "after", "raw", "inside")
"""How a sound loop divides: means / N where micro-batches count alike; means by their share of what the
window counts; sums over the window's count; sums, and the gradients afterwards; sums undivided; means
divided by N inside the loop's own function."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What may be drawn."""

    forms: tuple[str, ...] = FORMS
    how: tuple[str, ...] = HOW
    most_terms: int = 3
    second_call: bool = True
    empty: bool = True
    summed: bool = True
    apart: bool = True
    tokens: bool = True
    few: bool = True
    kinds: tuple[str, ...] = tuple(KINDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A loop of one window."""

    seed: int
    """Of weights and data."""
    sizes: tuple[int, ...]
    """Samples of each micro-batch."""
    further: tuple[int, ...] = ()
    """Samples of each micro-batch's second call of the model, if there is one."""
    tokens: int = 0
    """Length of the sequences; 0: samples are single vectors."""
    terms: tuple[Term, ...]
    form: str
    how: str
    apart: bool = False
    """Whether each term has its own backward pass."""
    empty: tuple[str, int] | None = None
    """The term, and the micro-batch in which it counts nothing."""
    middle: str = "plain"
    """plain | layer norm | frozen batch norm | few: what the model is made of."""
    clipped: bool = False
    """Whether the window's gradient is clipped."""
    single: bool = False
    """Whether it runs in float32, and not in float64."""
    told: bool = False
    """Whether `watch` is given the one loss function of `functions`."""
    returns: str = "loss"
    """What a function that computes the whole loss returns: loss, a tuple, or a dict."""
    fault: str | None = None

    @property
    def accum_steps(self) -> int:
        """N."""
        return len(self.sizes)

    @property
    def written(self) -> str:
        """How the loop divides as it is written."""
        return "equal" if self.fault == "mean of means" else self.how

    @property
    def whole(self) -> bool:
        """Whether one function or module computes the whole loss."""
        return self.form in WHOLE

    @property
    def reads_sums(self) -> bool:
        """Whether the loop asks for sums."""
        return self.written in ("sums", "after", "raw")

    def width(self, term: Term) -> int:
        """Return the outputs per sample that a term reads."""
        return 1 if self.middle == "few" else term.of.width

    def kept(self, term: Term, index: int) -> int:
        """Return how many samples or elements of a micro-batch count in a term; -1: as they come."""
        if self.empty == (term.name, index):
            return 0
        equal = self.how in EQUAL
        if term.kind == "weighted":
            return 0 if equal else -1
        size = (self.further if term.call else self.sizes)[index] * (self.tokens or 1)
        most = size if term.kind == "ignored" else size * self.width(term)
        return random.Random(f"{self.seed} {term.name} {0 if equal else index}").randint(1, most)


def drawn(rng: random.Random, scope: Scope = Scope()) -> Plan:  # it is frozen
    """Draw the plan of a sound loop."""
    form = rng.choice(scope.forms)
    how = rng.choice([h for h in scope.how if _can(form, h)])
    equal, accum_steps = how in EQUAL, rng.randint(2, 5)
    alone = how in ("after", "raw") or (form in WHOLE and how == "share")
    most_terms = 1 if alone else scope.most_terms
    kinds = _kinds(rng, form, how, min(most_terms, rng.choice([1, 2, 2, 3])), scope)
    calls = [0] * len(kinds)
    if scope.second_call and len(kinds) > 1 and form != "model" and rng.random() < 0.35:
        calls = [0, *(rng.randint(0, 1) for _ in kinds[2:]), 1]
    empties = [k for k in range(len(kinds)) if _can_be_empty(form, how, kinds[k])]
    emptied = rng.choice(empties) if scope.empty and empties and rng.random() < 0.5 else None
    if emptied is not None:  # last, so that a loss is there to which it may be added or not
        kinds.append(kinds.pop(emptied))
        calls.append(calls.pop(emptied))
    of_sum = scope.summed and how in ("sums", "equal", "share") and form in ("functions", "own")
    terms = []
    for k, kind in enumerate(kinds):
        may_be_sum = of_sum and k > 0 and kind != "teacher" and (emptied is None or k < len(kinds) - 1)
        summed = may_be_sum and rng.random() < 0.3
        weight = 1.0 if k == 0 else rng.choice([0.3, 0.7, 1.0, 1.7])
        terms.append(Term("abc"[k], kind, weight, k, calls[k], summed))
    middle = rng.choice(["plain", "plain", "layer norm", "frozen batch norm"])
    if scope.few and kinds[0] in ("mse", "masked", "focal") and len(kinds) == 1 and rng.random() < 0.4:
        middle = "few"
    samples = [rng.randint(2, 4)] * accum_steps if equal else _unequal(rng, accum_steps)
    further = [2 * size if equal else rng.randint(1, 6) for size in samples] if any(calls) else []
    return Plan(
        seed=rng.randrange(10_000),
        sizes=tuple(samples),
        further=tuple(further),
        tokens=3 if scope.tokens and kinds[0] != "centred" and rng.random() < 0.25 else 0,
        terms=tuple(terms),
        form=form,
        how=how,
        apart=scope.apart and form not in WHOLE and len(kinds) > 1 and rng.random() < 0.35,
        empty=None if emptied is None else (terms[-1].name, rng.randrange(accum_steps)),
        middle=middle,
        clipped=rng.random() < 0.3,
        single=rng.random() < 0.2,
        told=form == "functions" and len({t.of.call for t in terms}) == 1 and rng.random() < 0.5,
        returns=rng.choice(["loss", "loss", "tuple", "dict"]) if form in WHOLE else "loss",
    )


def _can(form: str, how: str) -> bool:
    if how == "inside":
        return form in ("own", "compute_loss", "module")
    return how in ("equal", "share", "sums") or form not in WHOLE


def _kinds(rng: random.Random, form: str, how: str, number: int, scope: Scope) -> list[str]:
    """Draw the terms' kinds: one criterion or function has one kind, a whole loss any."""
    of_torch: tuple[str, ...] = (*LABELLED, "mse")
    if form == "criterion":
        alike = [("ce", "ignored"), ("weighted",), ("mse",)]
        alike += [("centred",)] if how in ("equal", "share") else []
        allowed = rng.choice([kinds for kinds in alike if set(kinds) & set(scope.kinds)])
        number = 1 if allowed == ("centred",) else number
    elif form == "own":
        allowed = (rng.choice(OWN),)
    else:
        taught = ("teacher",) * 3 if form in ("functions", "compute_loss") else ()
        allowed = (*of_torch, *taught) if form == "functions" else (*of_torch, *OWN, *taught)
    allowed = tuple(kind for kind in allowed if kind in scope.kinds)
    kinds = [rng.choice(allowed) for _ in range(number)]
    # A loss that the teacher alone gives would leave nothing to learn from; and one teacher is enough.
    for k, kind in enumerate(kinds):
        if kind == "teacher" and (k == 0 or "teacher" in kinds[:k]):
            kinds[k] = "mse"
    return kinds


def _can_be_empty(form: str, how: str, kind: str) -> bool:
    if how in EQUAL or not KINDS[kind].can_be_empty:
        return False
    return form not in WHOLE or how == "sums"


def _unequal(rng: random.Random, accum_steps: int) -> list[int]:
    sizes = [rng.randint(1, 5) for _ in range(accum_steps)]
    return sizes if len(set(sizes)) > 1 else [*sizes[1:], sizes[0] + 2]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that can be planted."""

    fits: Callable[[Plan], bool]
    """Whether a sound plan leaves room for it, and whether the loop then shows it at all."""
    causes: tuple[str, ...]
    """Causes that name it; none: it has no name of its own."""
    changed: Callable[[Plan], Plan] = lambda plan: plan
    """What changes in the plan besides."""
    scope: Callable[[Scope], Scope] = lambda scope: scope
    """Where to look for plans that leave room for it."""


def _states_scale(plan: Plan) -> bool:
    """Whether the loop shows what it means the loss to be divided by."""
    if plan.written in ("equal", "inside", "share"):
        return True
    counts_known = plan.form in ("functions", "criterion") and len(plan.terms) == 1
    return plan.written == "sums" and (plan.whole or counts_known)


def _plain(plan: Plan) -> bool:
    """Whether the model may be given another middle."""
    return not plan.tokens and plan.middle != "few" and all(t.kind != "teacher" for t in plan.terms)


def _means(plan: Plan) -> list[Term]:
    return [term for term in plan.terms if not term.summed]


def _unclipped(plan: Plan) -> Plan:
    return replace(plan, clipped=False)


STATE = (result.BATCH_STATISTICS, "state moves in the window")
FAULTS: dict[str, Fault] = {
    "not divided": Fault(
        lambda p: p.how in EQUAL and not any(t.summed for t in p.terms), (result.LOSS_SCALE,)
    ),
    "divided twice": Fault(
        lambda p: _states_scale(p) and not any(t.summed for t in p.terms), (result.LOSS_SCALE,)
    ),
    "mean of means": Fault(
        lambda p: p.how in ("share", "sums") and not (p.empty and p.whole and not _clamped(p)),
        (result.UNEQUAL_DENOMINATORS,),
    ),
    "counted by samples": Fault(
        lambda p: p.how == "share" and any(t.kind in ("ignored", "weighted", *OWN) for t in p.terms),
        (result.UNEQUAL_DENOMINATORS,),
    ),
    "one term's count for another": Fault(
        lambda p: p.how == "share" and len(_means(p)) > 1,
        (result.UNEQUAL_DENOMINATORS,),
    ),
    "one term not divided": Fault(
        lambda p: p.how == "equal" and not p.whole and any(t.weight == 1 for t in _means(p)[1:]),
        (result.LOSS_SCALE, result.UNEQUAL_DENOMINATORS),
    ),
    "a term's weight moves": Fault(
        lambda p: len(p.terms) > 1 and p.how in ("share", "equal", "sums"), ()
    ),
    "zero_grad inside": Fault(lambda p: True, (result.STALE_OR_MISSING,), _unclipped),
    "cleared halfway": Fault(lambda p: p.accum_steps > 2, (result.STALE_OR_MISSING,), _unclipped),
    "only the first kept": Fault(lambda p: True, (result.STALE_OR_MISSING,), _unclipped),
    "never zeroed": Fault(lambda p: True, (result.STALE_OR_MISSING,)),
    "clipped inside": Fault(lambda p: True, (result.LOSS_SCALE,)),
    "a micro-batch short": Fault(  # a constant inside the loss is taken as given
        lambda p: p.how == "equal" and p.accum_steps > 2 and not any(t.summed for t in p.terms),
        (result.LOSS_SCALE,),
    ),
    "teacher moves": Fault(
        lambda p: any(t.kind == "teacher" for t in p.terms), STATE,
        scope=lambda s: replace(s, forms=("functions", "compute_loss")),
    ),
    "centre moves": Fault(
        lambda p: p.terms[0].kind == "centred", STATE,
        scope=lambda s: replace(s, forms=("criterion",), how=("equal", "share"), kinds=("centred",)),
    ),
    "batch normalisation": Fault(
        lambda p: _plain(p) and min((*p.sizes, *p.further)) > 1,
        (result.BATCH_STATISTICS,),
        lambda p: replace(p, middle="batch norm"),
    ),
    "a running mean": Fault(_plain, STATE, lambda p: replace(p, middle="running mean")),
    "a term couples samples": Fault(
        lambda p: p.form in ("compute_loss", "module") and p.how == "equal" and not p.tokens,
        (result.NOT_ADDITIVE,),
    ),
    "added up in bfloat16": Fault(
        lambda p: p.single and p.how != "raw", (result.LOW_PRECISION,), _unclipped
    ),
}  # fmt: skip
"""By name. A loop shows a fault where it states what it means: nothing tells that a constant weight of a
loss which is a sum already should have been another; and what is zeroed early in a window may be an
epoch's left-over, given up on purpose."""


def _clamped(plan: Plan) -> bool:
    return next(t for t in plan.terms if plan.empty and t.name == plan.empty[0]).of.clamped


def faulty_twin(plan: Plan, fault: str) -> Plan | None:
    """Plant a fault in a sound plan; None where that leaves no room for it."""
    planted = FAULTS[fault]
    return replace(planted.changed(plan), fault=fault) if planted.fits(plan) else None
