"""Random loops under `watch`: a few in every run of the suite, more by the study's own command."""

import random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from experiments.random_loops.judge import (
    ROUNDING,
    accumulated_error,
    faulty_loop,
    judged,
    moved,
    sound_loop,
)
from experiments.random_loops.plan import FAULTS, Scope
from experiments.random_loops.source import text_of

SCOPE = Scope()
PLANTED = sorted(FAULTS)
A_DOZEN = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink one that fails takes minutes, and it prints itself
    suppress_health_check=list(HealthCheck),
)
DRAWS = st.randoms(use_true_random=False)


@A_DOZEN
@given(DRAWS)
def test_watch_accuses_no_random_sound_loop(rng: random.Random) -> None:
    """Each is the large batch's to rounding, measured without `watch` before it is judged."""
    outcome = judged(sound_loop(rng, SCOPE))
    assert outcome.said == "sound", f"{text_of(outcome.plan)}\n{outcome.plan}\n{outcome.audit}"


@A_DOZEN
@given(DRAWS, st.sampled_from(PLANTED))
def test_watch_catches_every_random_faulty_loop(rng: random.Random, fault: str) -> None:
    """Biased, and with the cause that names the planted fault; or inconclusive, and never sound."""
    outcome = judged(faulty_loop(rng, fault, SCOPE))
    assert outcome.said in ("caught", "inconclusive"), (
        f"{text_of(outcome.plan)}\n{outcome.plan}\n{outcome.audit}"
    )


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_every_fault_can_be_drawn_and_moves_the_gradient(fault: str) -> None:
    """Its sound twin, from the same draws, is the large batch's."""
    plan = faulty_loop(random.Random(fault), fault)
    assert plan.fault == fault
    assert moved(plan)


def test_accumulate_gradients_gives_sound_loops_of_every_kind_their_large_batch() -> None:
    """Whatever a loop divides by, to rounding in float64; each was measured as it was drawn."""
    plans = [sound_loop(random.Random(seed)) for seed in range(50)]
    assert {plan.form for plan in plans} == set(Scope().forms)
    assert {plan.how for plan in plans} == set(Scope().how)
    assert any(plan.empty for plan in plans)
    assert any(plan.further and plan.apart for plan in plans)
    errors = [error for plan in plans if (error := accumulated_error(plan)) is not None]
    assert len(errors) > 15
    assert max(errors) <= ROUNDING
