"""May the seeds of an arm be trained as one? Found out by doing both, on copies.

The first windows of the first and the last seed are trained alone and together, in float64. The weights
must move alike, and the metrics agree, as closely as where only the order of the samples is another. So
nothing is taken from the name of a layer or an optimizer: one that mixes what is stacked moves weights
otherwise, and a model that cannot be vmapped says so by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gaccum_exp.audit.verdict import Measured
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
from gaccum_exp.train.build import Materials, build
from gaccum_exp.train.evaluation import evaluate
from gaccum_exp.train.loop import train_step, training_windows
from gaccum_exp.train.runtime import needs_closure
from gaccum_exp.train.stacked import StackedTraining
from gaccum_exp.train.state import Experiment

CANARIES = 2
"""Windows: the second is trained from weights and optimizer state that the first has moved."""
Trace = dict[str, Gradient]
"""What a training has done: how its weights moved, and each metric's values."""


class NotStackableError(Exception):
    """The seeds have to be trained one after the other; the message says why."""


def stackable(settings: Sequence[Settings], loaded: Materials) -> list[Experiment]:
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
    runtime, accum, workers = settings.runtime, settings.accum, settings.data.workers
    found = {
        "accum.steps=auto": settings.chooses_accum_steps,
        "accum.on_oom=increase_steps": accum.on_oom == "increase_steps",
        "accum.buffer_dtype=float32": accum.buffer_dtype != "same",
        f"runtime.precision={runtime.precision}": runtime.precision not in ("fp32", "fp64"),
        "runtime.compile=true": runtime.compile,
        "runtime.activation_checkpointing=true": runtime.activation_checkpointing,
        f"data.workers={workers}": workers > 0,
    }
    return next((key for key, holds in found.items() if holds), None)


def _more_than_the_seed(settings: Sequence[Settings]) -> str | None:
    first = settings[0].flat()
    for other in settings[1:]:
        differing = {k for k, v in other.flat().items() if first.get(k) != v} - {"seed"}
        if differing:
            return f"{', '.join(sorted(differing))} depends on the seed"
    return None


def _try_out(settings: Sequence[Settings], loaded: Materials) -> None:
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
    e64, floor = _apart(together, alone), _apart(reordered, alone)
    found = Measured(identical=False, e=e64, floor=floor, e64=e64, floor64=floor)
    if not found.same_function:
        raise NotStackableError(
            f"in {CANARIES} windows the seeds' trainings come out otherwise together than alone, by "
            f"{e64:.1g} in float64 (another order of the samples: {floor:.1g})"
        )


def _alone(settings: Settings, loaded: Materials, *, backwards: bool = False) -> Trace:
    """Train a seed's first windows the ordinary way, or with the samples of micro-batches reversed."""
    experiment = build(settings, loaded.of_seed(settings.seed))
    if needs_closure(type(experiment.optimizer).step):
        name = type(experiment.optimizer).__name__
        raise NotStackableError(f"{name} evaluates a window several times in a step")
    before, curves = _weights(experiment), []
    buffers = {name: buffer.clone() for name, buffer in experiment.modules.named_buffers()}
    for step, window in zip(range(CANARIES), training_windows(experiment), strict=False):
        curves.append(_quiet_step(experiment, _reversed(window) if backwards else window, step))
    for name, buffer in experiment.modules.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise NotStackableError(f"passes change its buffer {name.partition('.')[2]}")
    if experiment.eval_data is not None:
        curves.append(evaluate(experiment))
    return _trace(experiment, before, curves)


def _quiet_step(
    experiment: Experiment, window: Window, global_step: int
) -> Mapping[str, float | Tensor]:
    seed_model(derive_seed(experiment.settings.seed, "model", global_step), experiment.device)
    states = random_states()
    values = train_step(experiment, window, global_step)
    if not same_states(states, random_states()):
        raise NotStackableError("its passes draw random numbers")
    if not values:
        raise NotStackableError("there are windows in which nothing counts")
    return values


def _together(settings: Sequence[Settings], loaded: Materials) -> list[Trace]:
    """Train the seeds' first windows as one."""
    experiments = [build(one, loaded.of_seed(one.seed)) for one in settings]
    training = StackedTraining(experiments)
    before, curves = [_weights(experiment) for experiment in experiments], []
    for step, window in zip(range(CANARIES), training.windows(), strict=False):
        if any(part.together is None for part in window):
            raise NotStackableError("the micro-batches of its seeds differ in shape")
        curves.append(training.step(window, step)[0])
    if experiments[0].eval_data is not None:
        curves.append(training.evaluate())
    return [
        _trace(experiment, before[number], [_of(number, values) for values in curves])
        for number, experiment in enumerate(experiments)
    ]


def _of(number: int, values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    return {k: v[number] if isinstance(v, Tensor) and v.ndim else v for k, v in values.items()}


def _weights(experiment: Experiment) -> Gradient:
    return {name: p.detach().clone() for name, p in experiment.modules.named_parameters()}


def _trace(
    experiment: Experiment, before: Gradient, curves: Sequence[Mapping[str, float | Tensor]]
) -> Trace:
    now = _weights(experiment)
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
