"""Draw loops whose soundness is measured; say what `watch` and `accumulate_gradients` make of them."""

import random
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

import gaccum_exp
from experiments.random_loops.ground import (
    gradients,
    ground,
    large_batch,
    listed,
    relative,
    stepped_with,
)
from experiments.random_loops.plan import FAULTS, Plan, Scope, drawn, faulty_twin
from gaccum_exp.audit.result import UNEQUAL_DENOMINATORS, UNKNOWN

ROUNDING = 1e-12
"""What a sound loop may be off by in float64, relative."""
COUNTS = 1e-9
"""What a fault must move the gradient by, relative."""
EVERYTHING = Scope()


class GeneratorError(AssertionError):
    """A loop that was meant to be sound is not: the generator is wrong."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was said of one loop."""

    plan: Plan
    said: str
    """Of a sound loop: sound, accused, inconclusive, another N. Of a faulty one: caught, missed, wrong
    cause, inconclusive."""
    audit: Any


def sound_loop(rng: random.Random, scope: Scope = EVERYTHING) -> Plan:
    """Draw a loop whose gradient is the large batch's, up to a constant factor."""
    plan = drawn(rng, scope)
    _, error = relative(stepped_with(plan), large_batch(plan))
    if not error <= ROUNDING:
        raise GeneratorError(f"{plan} is {error:.1e} off the large batch")
    return plan


def faulty_loop(rng: random.Random, fault: str, scope: Scope = EVERYTHING) -> Plan:
    """Draw a loop with a fault that moves its gradient."""
    scope = FAULTS[fault].scope(scope)
    while True:
        plan = faulty_twin(drawn(rng, scope), fault)
        if plan is not None and moved(plan):
            return plan


def moved(plan: Plan) -> bool:
    """Whether the planted fault moves the gradient: its direction, or its size by the clip or an N."""
    c, error = relative(stepped_with(plan), large_batch(plan))
    scaled = plan.fault in ("not divided", "divided twice", "a micro-batch short", "never zeroed")
    return error > COUNTS or (scaled and abs(c - 1) > COUNTS)


def judged(plan: Plan) -> Outcome:
    """Run the loop under `watch`; return what that says, and whether it is right."""
    built = ground(plan)
    with (
        warnings.catch_warnings(),
        gaccum_exp.watch(built.model, built.watched, built.optimizer) as audit,
    ):
        warnings.simplefilter("ignore")
        built.run()
    return Outcome(plan, _said(plan, audit), audit)


def _said(plan: Plan, audit: Any) -> str:
    if audit.verdict == "inconclusive":
        return "inconclusive"
    if plan.fault is None:
        if not audit.sound:
            return "accused"
        counted = sum(1 for index in range(plan.accum_steps) if not _skipped(plan, index))
        return "sound" if audit.accum_steps == counted else "another N"
    if audit.verdict != "biased":
        return "missed"
    causes = FAULTS[plan.fault].causes
    # Where the gradient has few elements, nothing but a known count can tell whose share is wrong.
    untold = plan.middle == "few" and UNEQUAL_DENOMINATORS in causes and audit.cause in (None, UNKNOWN)
    return "caught" if not causes or audit.cause in causes or untold else "wrong cause"


def _skipped(plan: Plan, index: int) -> bool:
    """Whether the loop passes a micro-batch over, since nothing in it counts."""
    guarded = plan.empty is not None and not plan.reads_sums and not plan.terms[-1].of.clamped
    return guarded and len(plan.terms) == 1 and plan.empty == (plan.terms[0].name, index)


def accumulated_error(plan: Plan) -> float | None:
    """Return how far `accumulate_gradients` on the plan's window is off the large batch; None: no fit.

    Its loss function is by hand: `(sum, count)` of one term, or a mapping of such for several.
    """
    several = len(plan.terms) > 1
    if plan.fault or any(term.summed for term in plan.terms):
        return None
    built = ground(replace(plan, single=False))

    def loss_fn(model: torch.nn.Module, m: dict[str, torch.Tensor]) -> Any:
        given = [m["x"], m["u"]] if plan.further else [m["x"]]
        outputs, taught = [listed(model(x)) for x in given], [listed(built.teacher(x)) for x in given]
        terms = {}
        for term in plan.terms:
            is_taught = term.kind == "teacher"
            target = taught[term.call][term.head].detach() if is_taught else m[term.name]
            keep = m.get(f"{term.name}_keep", torch.ones(()))
            total, count = term.of.by_hand(outputs[term.call][term.head], target, keep)
            # A clamp is of the window's count, and some micro-batch of each window has a positive.
            terms[term.name] = total, float(target.sum() if term.of.clamped else count), term.weight
        return terms if several else terms["a"][:2]

    gaccum_exp.accumulate_gradients(built.net, loss_fn, built.window)
    c, error = relative(gradients(built.net), large_batch(plan))
    return max(error, abs(c - 1))
