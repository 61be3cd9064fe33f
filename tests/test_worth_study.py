"""What a batch is worth: the study's arithmetic, on losses that are made up."""

import math

import pytest

from experiments.worth_it.build import (
    Arm,
    answer,
    best_rate,
    best_three,
    bootstrapped,
    critical,
    exponent,
    losses_of,
    table,
)

BATCHES, RATES, SEEDS = (16, 64, 128, 512), (0.001, 0.002, 0.004, 0.008, 0.016), (0, 1, 2)


def arms(power: float, worse: float = 0.0) -> list[Arm]:
    """Parabolas in log rate, their minima at 0.002 × (batch / 16)^power; the largest batch `worse`."""
    made = []
    for beta2 in ("fixed", "half_life"):
        for batch in BATCHES if beta2 == "fixed" else (16, 128, 512):
            best = math.log(0.002) + power * math.log(batch / 16)
            for rate in RATES:
                for seed in SEEDS:
                    loss = 1 + 0.1 * (math.log(rate) - best) ** 2 + 0.01 * seed
                    loss += worse * (batch == 512)
                    made.append(Arm(beta2, batch, rate, seed, loss, (90.0, 70.0, None)))
    return made


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_the_exponent_of_the_best_rate_is_found_from_parabolas(power: float) -> None:
    """And of minima that do not depend on the seed the interval has no width."""
    losses = losses_of(arms(power))
    assert exponent(losses, SEEDS) == pytest.approx(power, abs=1e-9)
    assert bootstrapped(losses) == pytest.approx((power,) * 3, abs=1e-9)


def test_a_best_rate_at_an_end_or_beside_one_that_diverged_stands_for_itself() -> None:
    """There is no parabola."""
    assert best_rate({0.1: 1.0, 0.2: 2.0, 0.4: 3.0}) == 0.1
    assert best_rate({0.1: 2.0, 0.2: 1.0, 0.4: math.inf}) == 0.2
    assert best_rate({0.1: 2.0, 0.2: 1.0, 0.4: 2.0}) == pytest.approx(0.2)


def test_the_critical_batch_is_the_largest_within_twice_the_spread() -> None:
    """The spread here is 0.01."""
    assert critical(losses_of(arms(0.0))) == (512, True)
    assert critical(losses_of(arms(0.0, worse=0.019))) == (512, True)
    assert critical(losses_of(arms(0.0, worse=0.05))) == (128, False)


def test_seeds_are_added_at_the_best_rate_and_its_neighbours() -> None:
    """At an end at the last three; and the page says what came of it."""
    made = arms(0.5)
    assert best_three(made, 16) == [0.001, 0.002, 0.004]
    assert best_three(made, 512) == [0.004, 0.008, 0.016]
    said = answer(made)
    assert "0.50 (0.50 to 0.50" in said
    assert "at least 512" in said
    assert "| 512 | 32 | 31 |" in table(made)
    assert "above 70" in table(made)
