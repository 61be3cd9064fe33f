"""torch.compile, and whether the compiled model gives the gradient that the eager one gives.

Compiled accumulation has been silently wrong (pytorch/pytorch#96693), so it is not taken on trust:
before training, a canary window is run eagerly, compiled, and in float64. The compiled gradient may be
no further from float64 than rounding puts the eager one.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

from gaccum_exp import metrics
from gaccum_exp.audit.bench import random_state_kept
from gaccum_exp.audit.gradient import Gradient, distance, finite, gradient_of
from gaccum_exp.audit.trial import Trial
from gaccum_exp.audit.verdict import RANGE, ROUNDING64
from gaccum_exp.audit.window import Accumulation, ConfiguredWindow
from gaccum_exp.core.feed import Window, windows
from gaccum_exp.core.modes import evaluation_mode
from gaccum_exp.core.seeding import derive_seed, seed_model
from gaccum_exp.errors import BadInputError
from gaccum_exp.experiment import Experiment

log = logging.getLogger(__name__)
CANARIES = 3
"""Windows: where a kink of the model is switched by rounding alone, one may accuse a sound compiler."""


def check_compiled(experiment: Experiment) -> dict[str, float]:
    """Compare compiled and eager gradients; weights, buffers and random state stay as they were.

    A model that draws random numbers is compared in evaluation mode: compiled kernels draw others.

    Returns:
        The metrics of the canary that agreed.

    Raises:
        BadInputError: the gradients differ by more than rounding, on each of CANARIES windows.
    """
    errors = []
    for window in islice(_canaries(experiment), CANARIES):
        error, floor = _compared(experiment, window)
        if error <= floor:
            return {metrics.COMPILED_ERROR: error, metrics.COMPILED_FLOOR: floor}
        errors.append(f"{error:.2g} (rounding explains {floor:.2g})")
    raise BadInputError(
        f"runtime.compile=true: the compiled gradient is not the eager one, relative distance "
        f"{', '.join(errors)}; use runtime.compile=false"
    )


def _canaries(experiment: Experiment) -> Iterator[Window]:
    steps = range(min(CANARIES, experiment.total_steps))
    data, plan = experiment.train_data, experiment.plan
    yield from windows(data, plan, accum_steps=experiment.accum_steps, global_steps=steps)


def _compared(experiment: Experiment, window: Window) -> tuple[float, float]:
    """Return how far the compiled gradient lies from float64, and how far rounding may put it."""
    reduction: Any = experiment.settings.accum.reduction
    how = Accumulation(reduction, experiment.sum_divisor, experiment.buffer_dtype)
    configured = ConfiguredWindow(experiment.model, experiment.loss_fn, window, how)
    eager, exact, drawn = _eager(experiment, configured)
    mode: AbstractContextManager[None] = nullcontext()
    if drawn:
        log.warning("the model draws random numbers: compiled and eager are compared in evaluation mode")
        mode = evaluation_mode(experiment.model)
    with mode:
        if drawn:
            eager, exact, _ = _eager(experiment, configured)
        compiled = _compiled(experiment, configured)
    if not finite(exact):
        return 0.0, 0.0  # nothing to compare; training will say so
    return distance(compiled, exact), max(RANGE * distance(eager, exact), ROUNDING64)


def _eager(experiment: Experiment, window: ConfiguredWindow) -> tuple[Gradient, Gradient, bool]:
    """Return the eager gradient, the same in float64, and whether random numbers were drawn."""
    with random_state_kept():
        seed_model(derive_seed(experiment.settings.seed, "model", 0), experiment.device)
        trial = Trial(window, device=experiment.device)
        return trial.record(), trial.accumulated(float64=True), trial.draws.any


def _compiled(experiment: Experiment, window: ConfiguredWindow) -> Gradient:
    """Accumulate on the model itself, and leave nothing behind."""
    buffers = [(buffer, buffer.clone()) for buffer in experiment.modules.buffers()]
    with random_state_kept():
        window.accumulate(lambda index: nullcontext(), experiment.placement.place)
    for buffer, before in buffers:
        buffer.copy_(before)
    return gradient_of(window.parts.parameters())
