"""The memory of a configured experiment, before it is run: what each N needs, and which N fits."""

import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from gaccum_exp.config.schema import Settings
from gaccum_exp.core.feed import windows
from gaccum_exp.core.modes import eagerly, evaluation_mode
from gaccum_exp.core.reductions import reduction_named
from gaccum_exp.core.seeding import random_state_kept
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.available import free_bytes
from gaccum_exp.memory.fake import fake_mode, nothing_left_behind, resized, samples_in
from gaccum_exp.memory.meter import Peak, TensorMeter, highest
from gaccum_exp.memory.plan import BF16, CHECKPOINTING, FUSED, Change, MemoryPlan, size
from gaccum_exp.memory.planner import Planner, peak_source, with_advice
from gaccum_exp.memory.predict import MeteredStep, Predicted, decisive_sizes
from gaccum_exp.memory.storages import OutputBytes
from gaccum_exp.train.build import TrainingData, build
from gaccum_exp.train.first_samples import first_samples
from gaccum_exp.train.hooks import Hooks
from gaccum_exp.train.memory_meters import MeterPhases, measured_windows
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step

log = logging.getLogger(__name__)
PLAN = "plan.json"
HEADROOM = 0.9
"""What of the free memory a window may hold where no budget is given: operators need some beside."""
_ALSO_SPLIT = ("data.micro_batch_size", "accum.schedule", "accum.schedule_lr")
"""Keys beside accum.steps that say how a window is split."""


def budget_bytes(settings: Settings, device: torch.device) -> int | None:
    """Return what the tensors of a window may hold at its peak; None where nobody can say.

    To be asked before the model is there.
    """
    libraries = held_by_libraries(device)
    budget = settings.runtime.memory_budget_gib
    if budget is not None:
        return max(0, int(budget * 2**30) - libraries)
    free = free_bytes(device)
    return None if free is None else int(HEADROOM * free)


def held_by_libraries(device: torch.device) -> int:
    """Return what is allocated once a matrix product has been taken: cuBLAS keeps its workspaces.

    One for the forward and one for the backward pass, which autograd runs in a thread of its own.
    """
    if device.type != "cuda":
        return 0
    weight = torch.ones(16, 16, device=device, requires_grad=True)
    torch.autograd.backward((weight @ weight).sum())
    del weight
    return torch.cuda.memory_allocated(device)


def planner_of(settings: Settings, loaded: TrainingData, samples: int) -> Planner:
    """Return what predicts the peaks of windows of so many samples for every N.

    Raises:
        BadInputError: model, loss and data do not fit together.
    """
    source, notes = peak_source(
        lambda: _fake(settings, loaded), lambda: _subject(build(settings, loaded), None), samples
    )
    return Planner(
        source,
        samples,
        equal_parts=reduction_named(settings.accum.reduction).needs_equal_parts,
        notes=notes,
    )


@nothing_left_behind()
def plan(settings: Settings, loaded: TrainingData) -> MemoryPlan:
    """Plan the memory of a window for every N, against the budget."""
    asked, held = loaded.plan.largest_batch, loaded.plan.full_window
    planner = planner_of(settings, loaded, asked)
    planned = planner.plan(str(loaded.device), budget_bytes(settings, loaded.device))
    if held < asked:
        note = (
            f"Windows of {asked} samples ask for more data: data.train holds {held}, and so would they."
        )
        planned = replace(planned, notes=(*planned.notes, note))
    libraries = held_by_libraries(loaded.device)
    if libraries:
        note = f"Beside these tensors libraries hold {size(libraries)}, which the budget is without."
        planned = replace(planned, notes=(*planned.notes, note))
    if not isinstance(planner.source, Predicted):
        return planned
    return with_advice(planned, lambda change: _changed(settings, loaded, change))


@nothing_left_behind()
def with_fitting_steps(settings: Settings, loaded: TrainingData) -> tuple[Settings, str]:
    """Return the settings with the smallest N that fits the budget, and that in words.

    Raises:
        BadInputError: no N fits, or there is no budget.
    """
    budget = budget_bytes(settings, loaded.device)
    if budget is None:
        raise BadInputError(
            f"accum.steps=auto: what {loaded.device} has free cannot be asked; "
            "set runtime.memory_budget_gib"
        )
    planner = planner_of(settings, loaded, loaded.plan.full_window)
    steps = planner.smallest_fitting(budget)
    if steps is None:
        rows = filter(None, map(planner.row, planner.ladder()))
        least = min(row.peak.bytes for row in rows)
        raise BadInputError(
            f"accum.steps=auto: no N fits the budget of {size(budget)}; the smallest peak is "
            f"{size(least)}"
        )
    row = planner.row(steps)
    assert row is not None
    return settings.with_steps(steps), (
        f"N = {steps} is the smallest whose predicted peak, {size(row.peak.bytes)}, "
        f"fits the budget of {size(budget)}"
    )


def plainly_fits(state: TrainState, budget: int) -> bool:
    """Whether a run needs so little that nobody has to predict how much before it begins.

    Six times the weights, and, four times over, all that any operator makes in a forward pass of two
    samples, in proportion to the micro-batch. A prediction is far closer, and first takes importing
    torch's compiler, which is as long as importing torch.
    """
    given = first_samples(state.train_data, state.plan)
    model, settings = state.model, state.settings
    try:
        with (
            random_state_kept(),
            eagerly(),
            evaluation_mode(model),
            torch.no_grad(),
            OutputBytes() as outputs,
        ):
            state.loss_fn(model, given)
    except Exception:  # whatever it is, the prediction is there
        return False
    micro = max(-(-stage.global_batch_size // stage.accum_steps) for stage in settings.stages)
    weights = sum(p.nbytes for p in state.modules.parameters())
    return bool(6 * weights + 4 * outputs.bytes * micro / max(1, samples_in(given)) < budget)


@nothing_left_behind()
def predicted_peak(settings: Settings, loaded: TrainingData) -> Peak | None:
    """Return the peak predicted for the windows whose memory is measured; None where it needs values."""
    try:
        subject = _fake(settings, loaded)
        stage = max(settings.stages, key=lambda s: -(-s.global_batch_size // s.accum_steps))
        samples = min(stage.global_batch_size, loaded.plan.full_window)  # an epoch may hold less
        return highest(Predicted(subject, samples).peaks(samples, stage.accum_steps))
    except Exception as error:  # whatever is wrong with it will be said by the run itself
        log.debug("the peak was not predicted: %s", error)
        return None


def require_room(
    settings: Settings, loaded: TrainingData, predicted: Peak | None, budget: int | None
) -> None:
    """Refuse a run that is predicted to be larger than the budget, and say which N would fit.

    Raises:
        BadInputError: with both sizes.
    """
    if predicted is None or budget is None or predicted.bytes <= budget:
        return
    if settings.accum.on_oom == "increase_steps":
        return
    with nothing_left_behind():
        fitting = planner_of(settings, loaded, loaded.plan.full_window).smallest_fitting(budget)
    instead = "no N fits" if fitting is None else f"accum.steps={fitting} fits"
    raise BadInputError(
        f"accum.steps={settings.accum_steps} does not fit: its predicted peak is "
        f"{size(predicted.bytes)}, {_named(settings)} {size(budget)}; {instead}"
    )


def _named(settings: Settings) -> str:
    given = settings.runtime.memory_budget_gib is not None
    return "runtime.memory_budget_gib" if given else f"of what is free {HEADROOM:.0%} are"


def command(planned: MemoryPlan, arguments: Sequence[str]) -> str:
    """Return what trains with the planned N, given the arguments that it was planned with."""
    replaced = {"task": None, "accum.steps": planned.chosen_steps or planned.knee_steps}
    if any(_key(a) in _ALSO_SPLIT for a in arguments):  # N would contradict it, or multiply the batch
        replaced |= dict.fromkeys(_ALSO_SPLIT) | {"data.global_batch_size": planned.global_batch_size}
    left = [a for a in arguments if _key(a) not in replaced]
    said = [f"{key}={value}" for key, value in replaced.items() if value is not None]
    return shlex.join(["python", "-m", "gaccum_exp", *left, *said])


def _key(argument: str) -> str:
    return argument.split("=")[0].lstrip("+")


def write(planned: MemoryPlan, folder: Path) -> Path:
    """Write `plan.json`."""
    path = folder / PLAN
    path.write_text(json.dumps(planned.as_dict(), indent=2) + "\n")
    return path


def _fake(settings: Settings, loaded: TrainingData) -> MeteredStep:
    mode = fake_mode()
    with random_state_kept():
        return _subject(build(settings, loaded, fake=mode), mode)


def _changed(settings: Settings, loaded: TrainingData, change: Change) -> MeteredStep | None:
    """Return the experiment with something else changed than N; None where it is so already."""
    runtime = settings.runtime
    if change == CHECKPOINTING and not runtime.activation_checkpointing:
        settings = replace(settings, runtime=replace(runtime, activation_checkpointing=True))
    elif change == BF16 and settings.precision == "fp32":
        settings = replace(settings, runtime=replace(runtime, precision="bf16"))
    elif change == FUSED and not settings.optimizer.get("fused"):
        settings = replace(settings, optimizer={**settings.optimizer, "fused": True})
    else:
        return None
    return _fake(settings, loaded)


def _subject(state: TrainState, mode: FakeTensorMode | None) -> MeteredStep:
    """Return the experiment's own step, on its own windows or on such as these."""
    shaped = _WindowsLike(state)

    @contextmanager
    def context() -> Iterator[None]:
        with random_state_kept(), eagerly(), mode or nullcontext():
            yield

    def step(window: list[Any], tracked: TensorMeter) -> None:
        metered = replace(state, loss_fn=tracked.loss_fn(state.loss_fn), global_step=shaped.global_step)
        take_step(metered, window, Hooks([MeterPhases(tracked)]))

    return MeteredStep(state.modules, state.optimizer, state.device, shaped, step, context)


class _WindowsLike:
    """Micro-batches of any size, as the experiment's data has them, on the host.

    Where samples are stacked, all have the same shape, and two of them stand for any number. Where a
    data set makes micro-batches in a way of its own, as of texts of any length, they are those of the
    window whose memory is measured in training.
    """

    def __init__(self, state: TrainState) -> None:
        self._data, self._plan = state.train_data, state.plan
        own = hasattr(self._data, "gather") or hasattr(self._data, "collate_fn")
        stacked = type(self._data) is TensorDataset or not own
        self._two = first_samples(self._data, self._plan) if stacked else None
        self.global_step = max(measured_windows(state), default=0)

    def __call__(self, sizes: Sequence[int]) -> list[Any]:
        """Return the first micro-batch, the largest of the others, and the last where it is smaller."""
        if self._two is not None:
            return [
                resized(self._two, samples, torch.device("cpu")) for samples in decisive_sizes(sizes)
            ]
        plan = replace(self._plan, global_batch_size=sum(sizes))
        steps = range(self.global_step, self.global_step + 1)
        with random_state_kept():
            first, *others = next(windows(self._data, plan, accum_steps=len(sizes), global_steps=steps))
        return [
            first,
            *sorted(others, key=_elements)[-1:],
            *others[-1:][: len(decisive_sizes(sizes)) - 2],
        ]


def _elements(micro_batch: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(micro_batch) if isinstance(leaf, Tensor))
