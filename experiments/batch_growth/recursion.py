"""SGD on noisy linear regression without sampling: the expected loss, by the moments of its error.

Inputs are Gaussian with covariance H = diag(λ), targets w*·x plus noise of variance σ². With
m_i = E[(w − w*)_i²], a step at rate η on B samples gives (fourth moments of a Gaussian)

    m_i <- (1 − η λ_i)² m_i + (η²/B) (λ_i² m_i + λ_i Σ_j λ_j m_j) + (η²/B) σ² λ_i

and the excess loss is ½ Σ λ_i m_i. The recursion is exact; nothing is drawn.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from gaccum_exp.core.batch_growth import grow, growing_accum_steps
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.optim.schedules import cosine
from gaccum_exp.train.batch_rules import rates_of

SPECTRUM = 1 / torch.arange(1, 21, dtype=torch.float64)
NOISE = 1.0
"""σ²; the error begins at 1 in every direction."""
FIRST_BATCH, WINDOWS, MICRO_BATCH, LARGEST = 8, 4000, 2, 64
"""N from 4 to 64 micro-batches of two samples: batches of 8 to 128."""
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
"""Of the largest stable rate at the first batch."""
SCHEDULES = ("cosine", "growth", "√ rule (wrong for SGD)", "constant rate")
Windows = list[tuple[float, int]]
"""Rate and batch of each."""


@dataclass(frozen=True)
class Ended:
    """What the recursion comes to at one rate."""

    share: float
    """Of the largest stable rate."""
    losses: dict[str, float]
    """Excess loss by schedule."""
    windows: dict[str, int]
    """Optimizer steps by schedule."""

    @cached_property
    def cosine(self) -> float:
        """Of the schedule that the others are held against."""
        return self.losses["cosine"]

    @cached_property
    def growth(self) -> float:
        """Of the batch that grows by SGD's own rule."""
        return self.losses["growth"]


def excess_loss(
    spectrum: Tensor, noise: float, moments: Tensor, windows: Iterable[tuple[float, int]]
) -> float:
    """Return the expected excess loss after windows of these rates and batches.

    Args:
        spectrum: λ, (dimensions,), float64.
        noise: σ².
        moments: E[(w − w*)_i²] at the beginning, (dimensions,).
        windows: rate and batch of each.
    """
    for rate, batch in windows:
        loss = spectrum @ moments
        spread = spectrum * (spectrum * moments + loss + noise)
        moments = (1 - rate * spectrum) ** 2 * moments + rate**2 / batch * spread
    return float(spectrum @ moments) / 2


def largest_stable_rate(spectrum: Tensor, batch: int) -> float:
    """Return a rate at which no direction's moment grows: 2 / (λ_1 + (λ_1 + Σ λ)/B) [sufficient]."""
    return float(2 / (spectrum[0] + (spectrum[0] + spectrum.sum()) / batch))


def scheduled(peak: float, windows: int = WINDOWS) -> dict[str, Windows]:
    """Return rate and batch of every window, by schedule, at equal samples."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], peak)
    rates = [rate for (rate,) in rates_of(optimizer, cosine(optimizer, windows), windows)]
    plan = WindowPlan(windows * FIRST_BATCH, FIRST_BATCH, 0)
    accum_steps = growing_accum_steps(rates, FIRST_BATCH // MICRO_BATCH, LARGEST)

    def growing(rule: str) -> Windows:
        growth = grow(plan, accum_steps, MICRO_BATCH, rule)
        staged = plan.in_stages(growth.stages)
        steps = zip(growth.base_steps, growth.factors, strict=False)
        return [(rates[step] * factor, staged.size(k)) for k, (step, factor) in enumerate(steps)]

    fixed: Sequence[Windows] = [[(rate, FIRST_BATCH) for rate in of] for of in (rates, [peak] * windows)]
    every = fixed[0], growing("linear"), growing("sqrt"), fixed[1]
    return dict(zip(SCHEDULES, every, strict=True))


def final_losses(shares: Sequence[float] = SHARES, windows: int = WINDOWS) -> list[Ended]:
    """Return what every schedule comes to, at each peak rate."""
    limit, ones = largest_stable_rate(SPECTRUM, FIRST_BATCH), torch.ones_like(SPECTRUM)
    found = []
    for share in shares:
        by_schedule = scheduled(share * limit, windows)
        losses = {n: excess_loss(SPECTRUM, NOISE, ones, w) for n, w in by_schedule.items()}
        found.append(Ended(share, losses, {n: len(w) for n, w in by_schedule.items()}))
    return found
