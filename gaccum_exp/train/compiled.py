"""torch.compile, and whether the compiled model gives the gradient that the eager one gives.

Compiled accumulation has been silently wrong (pytorch/pytorch#96693), so it is not taken on trust:
before training, a window is run eagerly, compiled, and in float64. The compiled gradient may be
no further from float64 than rounding puts the eager one.
"""

import logging
from contextlib import AbstractContextManager, nullcontext

from gaccum_exp.audit.agreement import AGAINST_FLOAT64, Agreement
from gaccum_exp.audit.configured_window import ConfiguredWindow
from gaccum_exp.audit.rerun.passes import ACCUMULATED64, RECORDING, Rerun
from gaccum_exp.core.feed import Window, windows
from gaccum_exp.core.gradient import Gradient, distance, finite, gradient_of
from gaccum_exp.core.modes import evaluation_mode
from gaccum_exp.core.module_state import held_by, states_of
from gaccum_exp.core.seeding import derive_seed, random_state_kept, seed_model
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.available import out_of_memory
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.hooks import Hook
from gaccum_exp.train.state import TrainState

log = logging.getLogger(__name__)
COMPARED = 3
"""Windows: where a kink of the model is switched by rounding alone, one may accuse a sound compiler."""
TELLING = 0.1
"""Relative: where rounding explains more than this, a window does not tell a wrong gradient."""


class CompiledCheck(Hook):
    """Compares compiled and eager gradients before the training begins."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def begin(self, state: TrainState) -> None:
        """Record how close they are, of a training that begins; refuse what `check_compiled` refuses."""
        found = check_compiled(state)
        if state.global_step == 0:  # else the run has recorded it when it began
            self._sink.record(0, found)


def check_compiled(state: TrainState) -> dict[str, float]:
    """Compare compiled and eager gradients; the model and every random state stay as they were.

    The windows are of the stage with the most micro-batches. A model that draws random numbers is
    compared in evaluation mode: compiled kernels draw others.

    Returns:
        The metrics of a window on which they agree; none where no gradient was finite, which is said.

    Raises:
        BadInputError: the gradients differ by more than rounding on each of COMPARED windows; or they
            cannot be compared, since the model draws random numbers in evaluation mode as well.
    """
    compared: list[Agreement] = []
    with random_state_kept():  # which fetching a window moves as well
        stage = max(state.stage_windows, key=lambda steps: state.accum_steps(steps[0]))
        data, plan, n = state.train_data, state.plan, state.accum_steps
        for window in windows(data, plan, accum_steps=n, global_steps=stage[:COMPARED]):
            compared += _compared(state, window)
            if compared and compared[-1].agrees and compared[-1].limit <= TELLING:
                break
    telling = [found for found in compared if found.limit <= TELLING] or compared
    for found in telling:
        if found.agrees:
            return {metrics.COMPILED_ERROR: found.error, metrics.COMPILED_FLOOR: found.limit}
    if telling:
        said = ", ".join(f"{c.error:.2g} (rounding explains {c.limit:.2g})" for c in telling)
        raise BadInputError(
            "runtime.compile=true: the compiled gradient is not the eager one, relative distance "
            f"{said}; use runtime.compile=false"
        )
    log.warning("compiled and eager gradient are not compared: they are not finite")
    return {}


def _compared(state: TrainState, window: Window) -> list[Agreement]:
    """Compare the compiled gradient's distance from float64 with the eager one's.

    An empty list where they are not finite: training will say so.
    """
    configured, (eager, exact, drawn) = _run_eagerly(state, window)
    mode: AbstractContextManager[None] = nullcontext()
    if drawn:
        log.warning("the model draws random numbers: compiled and eager are compared in evaluation mode")
        mode = evaluation_mode(state.model)
    with mode:
        if drawn:
            if len(window) > 1:
                state.strategy.inspect(state.model, state.loss_fn, window)
            eager, exact, drawn = _eager(state, configured)
        if drawn:
            raise BadInputError(
                "runtime.compile=true: the model draws random numbers in evaluation mode too, so its "
                "compiled gradient cannot be compared with the eager one; use runtime.compile=false"
            )
        compiled = _compiled(state, configured)
    if not finite(exact) or not finite(eager):
        return []
    return [Agreement(distance(compiled, exact), distance(eager, exact), AGAINST_FLOAT64)]


def _run_eagerly(
    state: TrainState, window: Window
) -> tuple[ConfiguredWindow, tuple[Gradient, Gradient, bool]]:
    """Run a window, or less of it where float64 does not fit, at a loss scale that does not overflow."""
    scale = 1.0 if state.scaler is None else state.scaler.get_scale()
    how = state.reduction, state.strategy, scale
    configured = ConfiguredWindow(state.model, state.loss_fn, window, *how)
    while True:
        try:
            found = _eager(state, configured)
        except Exception as error:
            if not out_of_memory(error) or max(configured.sizes) < 2:
                raise
            configured = configured.halved()
            continue
        if finite(found[0]) or configured.loss_scale <= 1:
            return configured, found
        configured = configured.descaled()


def _eager(state: TrainState, window: ConfiguredWindow) -> tuple[Gradient, Gradient, bool]:
    """Return the eager gradient, the same in float64, and whether random numbers were drawn."""
    with random_state_kept():
        seed_model(derive_seed(state.settings.seed, "model", 0), state.device)
        rerun = Rerun(window, state.device)
        return rerun.gradient(RECORDING), rerun.gradient(ACCUMULATED64), rerun.draws.any


def _compiled(state: TrainState, window: ConfiguredWindow) -> Gradient:
    """Accumulate on the model itself, and leave nothing behind."""
    parameters = window.modules.parameters()
    gradients = [(parameter, parameter.grad) for parameter in parameters.values()]
    states = states_of([state.modules, *held_by(state.loss_fn)])
    for parameter in parameters.values():
        parameter.grad = None
    try:
        with random_state_kept():
            window.accumulate(lambda index: nullcontext(), state.placement.place)
        return gradient_of(parameters)
    finally:
        for of in states:
            of.put_back()
        for parameter, grad in gradients:
            parameter.grad = grad
