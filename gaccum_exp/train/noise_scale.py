"""The hook that measures the gradient noise scale of some windows, from their own micro gradients."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from gaccum_exp.core.feed import Window, draws_samples
from gaccum_exp.core.micro_gradients import (
    OF_DRAWS,
    MicroGradients,
    Seen,
    coarsest_type,
    require_independent,
    samples_in,
)
from gaccum_exp.core.noise_scale import TRAILING, Noise, noise_of, quotient_of_means
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.device_and_precision import needs_closure
from gaccum_exp.train.hooks import PASSES, Hook, Values
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import moves_weights
from gaccum_exp.train.two_sample_check import first_samples

log = logging.getLogger(__name__)


class NoiseScale(Hook):
    """Measures every so many windows, those of a single micro-batch excepted: they tell nothing.

    Args:
        state: of the training.
        sink: takes trace and squared norm of each measured window, and the scale of the last ones.
    """

    phases = frozenset({PASSES})

    def __init__(self, state: TrainState, sink: Sink) -> None:
        settings = state.settings
        self._sink, self._every = sink, settings.noise.every_steps or 0
        of_set = settings.noise.of == "training_set"
        self._training_samples = state.plan.samples if of_set else None
        self._trailing: deque[tuple[Noise, Noise | None]] = deque(maxlen=TRAILING)
        self._seen: MicroGradients | None = None
        """Of the window in hand, where it is measured."""
        self._begun: Sequence[Seen] = ()
        """Of the window that a training goes on with in its middle."""
        self._sizes: list[int] = []
        self._loss_scale = 1.0
        self._said = False

    @staticmethod
    def asked_for(state: TrainState) -> bool:
        """Whether there is something to be measured; a control is there for its loss curve alone."""
        settings = state.settings
        return settings.noise.every_steps is not None and settings.audit.control_seed is None

    def begin(self, state: TrainState) -> None:
        """Refuse a training that has no noise scale; say of one that shows none how it would.

        Raises:
            BadInputError: it has none, and why.
        """
        stages = state.settings.stages
        single = [stage for stage in stages if stage.accum_steps * state.split_factor == 1]
        if single:
            log.warning("%s", _of_one_micro_batch(state, single[0].global_batch_size))
        if len(single) == len(stages) and state.settings.accum.on_oom != "increase_steps":
            return
        try:
            _require_one_gradient_each(state)
        except BadInputError as error:
            asked = f"noise.every_steps={self._every} is refused: "
            why = str(error).removeprefix("noise scale: ")
            raise BadInputError(f"{asked}{why}; or use noise.every_steps=null") from None
        self._sink.describe({"noise.of": state.settings.noise.of})

    def around(self, phase: str, state: TrainState, window: Window) -> AbstractContextManager[None]:
        """See the micro gradients of a window that is measured."""
        if state.global_step % self._every or len(window) < 2:
            return nullcontext()
        if self._training_samples is not None and not state.plan.in_one_epoch(state.global_step):
            return nullcontext()  # its samples are not all drawn without replacement
        return self._watching(state, window)

    @contextmanager
    def _watching(self, state: TrainState, window: Window) -> Iterator[None]:
        begun, rows = state.begun, self._begun
        self._begun = ()
        if begun is not None and len(rows) != begun.passes_done:
            yield  # it was begun unseen
            return
        sizes = None if begun is None else state.begun_sizes
        self._sizes = sizes or split_sizes(state.plan.size(state.global_step), len(window))
        self._loss_scale = 1.0 if state.scaler is None else float(state.scaler.get_scale())
        # Should this window fail and come again, its second attempt has another one.
        self._seen = MicroGradients(state.parameters, state.optimizer, () if begun is None else rows)
        with self._seen.watching(begun):
            yield

    def after_micro_batch(self, state: TrainState, accumulator: AccumulatorState) -> None:
        """Take what was seen as the micro-batch's that has just passed."""
        if self._seen is not None:
            self._seen.end_micro_batch(accumulator, self._sizes[accumulator.passes_done - 1])

    def after(self, state: TrainState, window: Window, values: Values) -> None:
        """Record what the window has told."""
        seen, self._seen = self._seen, None
        if seen is None or not moves_weights(values):
            return
        if seen.unfit is not None:
            if not self._said:
                log.warning("no noise scale of step %d: %s", state.global_step, seen.unfit)
            self._said = True
            return
        plain, in_adam = noise_of(seen.rows, self._loss_scale, self._training_samples)
        if plain is None:
            return
        self._trailing.append((plain, in_adam))
        found = _numbers([noise for noise, _ in self._trailing])
        if in_adam is not None:
            of_adam = _numbers([noise for _, noise in self._trailing if noise is not None])
            found |= {metrics.in_adam_metric(key): value for key, value in of_adam.items()}
        self._sink.record(state.global_step, found)

    def state_dict(self) -> dict[str, Any]:
        """Return what the trailing windows have told, and what was seen of the one in hand."""
        pairs = [[None if of is None else list(of) for of in pair] for pair in self._trailing]
        rows = [] if self._seen is None else self._seen.rows
        return {"trailing": pairs, "rows": [list(row) for row in rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._trailing.clear()
        for plain, in_adam in state["trailing"]:
            self._trailing.append((Noise(*plain), None if in_adam is None else Noise(*in_adam)))
        self._begun = [Seen(*row) for row in state["rows"]]


def _numbers(windows: Sequence[Noise]) -> dict[str, float]:
    """Return the metrics of the last window and of all, those that are finite, as a store takes them."""
    scale = quotient_of_means(windows)
    values = {
        metrics.NOISE_TRACE: windows[-1].trace,
        metrics.NOISE_SQUARED_NORM: windows[-1].squared_norm,
        metrics.NOISE_SCALE: scale.value,
        metrics.NOISE_SCALE_LOW: scale.low if len(windows) > 1 else math.nan,
        metrics.NOISE_SCALE_HIGH: scale.high,
    }
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _require_one_gradient_each(state: TrainState) -> None:
    """Raise a `BadInputError` where samples have no gradients of their own, or these cannot be seen."""
    if state.strategy.takes_window_at_once:
        raise BadInputError(
            "under strategy=cached one loss is taken over the whole window, and no sample has a "
            "gradient of its own: use strategy=in_place, if the loss is a sum over samples"
        )
    if not state.strategy.leaves_gradient:
        raise BadInputError(
            f"under strategy={state.strategy.name} no sum of a window's micro gradients is held, with "
            "which each would be compared: use strategy=in_place"
        )
    if needs_closure(type(state.optimizer).step):
        raise BadInputError(
            f"{type(state.optimizer).__name__} evaluates a window at several weights in one step: use "
            "another optimizer"
        )
    if state.plan.lengths is not None:
        raise BadInputError(
            "under data.sort_by_length=true micro-batches are no random parts of their window, the "
            "first of its short sequences, the last of its long ones: use data.sort_by_length=false"
        )
    first = first_samples(state.train_data, state.plan)
    draws = require_independent(
        state.model,
        state.loss_fn,
        first,
        samples_in([first], dim=0),
        state.parameters,
        coarsest_type(state.parameters, state.placement.autocast),
    )
    if state.settings.noise.of != "training_set":
        return
    plan = state.plan
    if plan.full_window > plan.samples:
        raise BadInputError(
            f"a window of {plan.full_window} samples holds some of data.train's {plan.samples} twice, "
            "and tells nothing of a training set's noise: use noise.of=population"
        )
    if draws:
        raise BadInputError(f"{OF_DRAWS}: use noise.of=population")
    if draws_samples(state.train_data):
        raise BadInputError(
            "data.train draws random numbers for a sample (augmentation), whose noise does not vanish "
            "in a window of the whole training set, as the samples' does: use noise.of=population"
        )


def _of_one_micro_batch(state: TrainState, samples: int) -> str:
    """Return what is to be said of windows with N = 1."""
    every = f"noise.every_steps={state.settings.noise.every_steps}: a window of one micro-batch"
    if samples < 2:
        return f"{every} has no micro gradients to compare, and one sample cannot be split"
    fitting = next(n for n in (8, 4, 2, *range(3, samples + 1)) if samples % n == 0)
    return (
        f"{every} has no micro gradients to compare, and is not measured: accum.steps={fitting} splits "
        f"its {samples} samples and has {fitting}"
    )
