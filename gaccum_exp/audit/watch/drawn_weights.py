"""Whether weights of a loss that change from micro-batch to micro-batch were drawn, as mixup's are.

What a loop draws for its weights cannot be asked of it. But a draw is known again: from the random state
in which the pass before ended, the same draw gives the same number.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from gaccum_exp.core.seeding import random_state_kept, set_random_states

SHAPES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1.0, 1.5, 2.0, 4.0)
"""Parameters of a symmetric beta distribution that recipes for mixup and CutMix name."""
SAME = 1e-5
"""Relative: how close a weight, seen in the loop's precision, is to the number that was drawn."""


def drawn(fractions: Sequence[float], states: Sequence[list[Any]]) -> bool:
    """Whether each of these weights, in parts of 1, is what a usual draw gives at its random state."""
    return bool(states) and all(
        any(math.isclose(f, x, rel_tol=SAME) for n in _first_numbers(at) for x in (n, 1 - n))
        for f, at in zip(fractions, states, strict=True)
    )


def _first_numbers(states: list[Any]) -> Iterator[float]:
    """Yield the number that each usual draw gives first at a random state."""
    with random_state_kept():
        for draw in _draws():
            set_random_states(states)
            yield draw()


def _draws() -> Iterator[Callable[[], float]]:
    yield from (random.random, np.random.random, lambda: float(torch.rand(())))
    for shape in SHAPES:
        yield partial(random.betavariate, shape, shape)
        yield partial(np.random.beta, shape, shape)
        yield partial(_beta_of_torch, shape)


def _beta_of_torch(shape: float) -> float:
    return float(torch.distributions.Beta(shape, shape, validate_args=False).sample())
