"""May the seeds of an arm be trained as one? Found out by doing both, on copies.

The first windows of the first and the last seed are trained alone and together, in float64. The weights
must move alike, and the metrics agree, as closely as where only the order of the samples is another. So
nothing is taken from the name of a layer or an optimizer: one that mixes what is stacked moves weights
otherwise, and a model that cannot be vmapped says so by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gaccum_exp.audit.agreement import IN_FLOAT64, Agreement
from gaccum_exp.config.schema import Settings
from gaccum_exp.core.feed import Window
from gaccum_exp.core.gradient import Gradient, distance
from gaccum_exp.core.seeding import (
    derive_seed,
    random_state_kept,
    random_states,
    same_states,
    seed_model,
)
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import metrics
from gaccum_exp.train.build import TrainingData, build
from gaccum_exp.train.device_and_precision import needs_closure
from gaccum_exp.train.evaluation import evaluate
from gaccum_exp.train.hooks import Values
from gaccum_exp.train.stacked_seeds import StackedState, take_stacked_step
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import NO_HOOKS, take_step

COMPARED = 2
"""Windows: the second is trained from weights and optimizer state that the first has moved."""
Trace = dict[str, Gradient]
"""What a training has done: how its weights moved, and each metric's values."""


class NotStackableError(Exception):
    """The seeds have to be trained one after the other; the message says why."""


def stackable(settings: Sequence[Settings], loaded: TrainingData) -> list[TrainState]:
    """Build the experiments of an arm's seeds, once it is seen that they can be trained as one.

    Args:
        settings: of the seeds.
        loaded: for the first of them.

    Raises:
        NotStackableError: they cannot, and why.
        BadInputError: the configuration does not lead to a runnable experiment.
    """
    why = _ruled_out(settings[0]) or _more_than_the_seed(settings)
    if why is None and loaded.drawn:
        why = "its data are drawn at random, so that each seed has data of its own"
    if why is not None:
        raise NotStackableError(why)
    with random_state_kept():
        _try_out([settings[0], settings[-1]], loaded)
        return [build(one, loaded.of_seed(one.seed)) for one in settings]


def _ruled_out(settings: Settings) -> str | None:
    """Return what in the configuration a stacked training does not know."""
    strategy = settings.strategy.get("_target_")
    runtime, accum, workers = settings.runtime, settings.accum, settings.data.workers
    found = {
        "accum.steps=auto": settings.chooses_accum_steps,
        "accum.on_oom=increase_steps": accum.on_oom == "increase_steps",
        "accum.buffer_dtype=float32": accum.buffer_dtype != "same",
        f"strategy._target_={strategy}": strategy != "gaccum_exp.core.strategies.InPlace",
        f"runtime.precision={runtime.precision}": runtime.precision not in ("fp32", "fp64"),
        "runtime.compile=true": runtime.compile,
        "runtime.activation_checkpointing=true": runtime.activation_checkpointing,
        f"data.workers={workers}": workers > 0,
        f"noise.every_steps={settings.noise.every_steps}": settings.noise.every_steps is not None,
    }
    return next((key for key, holds in found.items() if holds), None)


def _more_than_the_seed(settings: Sequence[Settings]) -> str | None:
    first = settings[0].flat()
    for other in settings[1:]:
        differing = {k for k, v in other.flat().items() if first.get(k) != v} - {"seed"}
        if differing:
            return f"{', '.join(sorted(differing))} depends on the seed"
    return None


def _try_out(settings: Sequence[Settings], loaded: TrainingData) -> None:
    exact = [replace(one, runtime=replace(one.runtime, precision="fp64")) for one in settings]
    try:
        alone = [_alone(one, loaded) for one in exact]
        reordered = [_alone(one, loaded, backwards=True) for one in exact]
        together = _together(exact, loaded)
    except (NotStackableError, BadInputError):
        raise
    except Exception as error:  # whatever a model, a loss or an optimizer says to being stacked
        first = (str(error).splitlines() or [""])[0]
        raise NotStackableError(f"{type(error).__name__}: {first}") from error
    found = Agreement(_apart(together, alone), _apart(reordered, alone), IN_FLOAT64)
    if not found.agrees:
        raise NotStackableError(
            f"in {COMPARED} windows the seeds' trainings come out otherwise together than alone, by "
            f"{found.error:.1g} in float64 (another order of the samples: {found.floor:.1g})"
        )


def _alone(settings: Settings, loaded: TrainingData, *, backwards: bool = False) -> Trace:
    """Train a seed's first windows the ordinary way, or with the samples of micro-batches reversed."""
    state = build(settings, loaded.of_seed(settings.seed))
    if needs_closure(type(state.optimizer).step):
        name = type(state.optimizer).__name__
        raise NotStackableError(f"{name} evaluates a window several times in a step")
    before, curves = _weights(state), []
    buffers = {name: buffer.clone() for name, buffer in state.modules.named_buffers()}
    for window in islice(state.windows_from(0), COMPARED):
        curves.append(_quiet_step(state, _reversed(window) if backwards else window))
        state.global_step += 1
    for name, buffer in state.modules.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise NotStackableError(f"passes change its buffer {name.partition('.')[2]}")
    if state.eval_data is not None:
        curves.append(evaluate(state))
    return _trace(state, before, curves)


def _quiet_step(state: TrainState, window: Window) -> Values:
    """Take a step that may draw nothing, on a window in which something counts."""
    seed_model(derive_seed(state.settings.seed, "model", state.global_step), state.device)
    generators = random_states()
    values = take_step(state, window)
    if not same_states(generators, random_states()):
        raise NotStackableError("its passes draw random numbers")
    if not values:
        raise NotStackableError("there are windows in which nothing counts")
    if any(key.startswith(f"{metrics.TRAIN_LOSS}/") for key in values):
        raise NotStackableError("its loss has several terms")
    return values


def _together(settings: Sequence[Settings], loaded: TrainingData) -> list[Trace]:
    """Train the seeds' first windows as one."""
    state = StackedState([build(one, loaded.of_seed(one.seed)) for one in settings])
    before, curves = [_weights(seed) for seed in state.seeds], []
    for window in islice(state.windows_from(0), COMPARED):
        if any(part.together is None for part in window):
            raise NotStackableError("the micro-batches of its seeds differ in shape")
        curves.append(take_stacked_step(state, window, NO_HOOKS))
        state.global_step += 1
    if state.seeds[0].eval_data is not None:
        curves.append(evaluate(state.seeds[0], state.over))
    return [
        _trace(seed, before[number], [_of(number, values) for values in curves])
        for number, seed in enumerate(state.seeds)
    ]


def _of(number: int, values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    return {k: v[number] if isinstance(v, Tensor) and v.ndim else v for k, v in values.items()}


def _weights(state: TrainState) -> Gradient:
    return {name: p.detach().clone() for name, p in state.modules.named_parameters()}


def _trace(state: TrainState, before: Gradient, curves: Sequence[Mapping[str, float | Tensor]]) -> Trace:
    now = _weights(state)
    trace = {"weights": {name: now[name] - weight for name, weight in before.items()}}
    for at, values in enumerate(curves):
        trace |= {f"{key} {at}": {key: torch.as_tensor(value)} for key, value in values.items()}
    return trace


def _apart(some: Sequence[Trace], others: Sequence[Trace]) -> float:
    """Return the largest relative distance of anything in them; infinite where one is not finite."""
    distances = [
        distance(one[key], other[key]) for one, other in zip(some, others, strict=True) for key in other
    ]
    return max(distances) if all(map(math.isfinite, distances)) else math.inf


def _reversed(window: Window) -> Window:
    """Return the window with the samples of every micro-batch in the opposite order."""
    flipped: Any = tree_map_only(Tensor, lambda t: t.flip(0) if t.ndim else t, window)
    return list(flipped)
