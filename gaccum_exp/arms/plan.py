"""Predict the memory of a configured experiment: what each N needs, and which N fits."""

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
from gaccum_exp.memory.available import HEADROOM, free_bytes
from gaccum_exp.memory.fake import fake_mode, nothing_left_behind, resized, samples_in
from gaccum_exp.memory.meter import Meter, Peak, highest
from gaccum_exp.memory.plan import BF16, CHECKPOINTING, FUSED, Change, MemoryPlan, size
from gaccum_exp.memory.planner import Planner, peak_source, with_advice
from gaccum_exp.memory.predict import MeteredStep, Predicted, decisive_sizes
from gaccum_exp.memory.storages import OutputBytes
from gaccum_exp.train.build import TrainingData, build
from gaccum_exp.train.hooks import Hooks
from gaccum_exp.train.memory_meters import MeterPhases, measured_windows
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step
from gaccum_exp.train.two_sample_check import first_samples

log = logging.getLogger(__name__)
PLAN = "plan.json"
_ALSO_SPLIT = (
    *("data.micro_batch_size", "accum.schedule", "accum.schedule_lr"),
    *("accum.grow", "accum.grow_to"),
)
"""Keys besides accum.steps that say how a window is split."""


def budget_bytes(settings: Settings, device: torch.device) -> int | None:
    """Return the bytes that the tensors of a window may hold at its peak; None where that is unknown.

    To be called before the model is built.
    """
    libraries = held_by_libraries(device)
    budget = settings.runtime.memory_budget_gib
    if budget is not None:
        return max(0, int(budget * 2**30) - libraries)
    free = free_bytes(device)
    return None if free is None else int(HEADROOM * free)


def held_by_libraries(device: torch.device) -> int:
    """Return the bytes that cuBLAS keeps as workspaces, once matrix products have been taken."""
    if device.type != "cuda":
        return 0
    # One for the forward and one for the backward pass, which autograd runs in a thread of its own.
    weight = torch.ones(16, 16, device=device, requires_grad=True)
    torch.autograd.backward((weight @ weight).sum())
    del weight
    return torch.cuda.memory_allocated(device)


def planner_of(settings: Settings, loaded: TrainingData, samples: int) -> Planner:
    """Return the planner of windows of so many samples, for every N.

    Raises:
        BadInputError: model, loss and data do not fit together.
    """
    source, notes = peak_source(
        lambda: _fake(settings, loaded), lambda: _subject(build(settings, loaded), None), samples
    )
    reduction = reduction_named(settings.accum.reduction)
    return Planner(source, samples, equal_parts=reduction.needs_equal_parts, notes=notes)


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
def with_fitting_accum_steps(settings: Settings, loaded: TrainingData) -> tuple[Settings, str]:
    """Return the settings with the smallest N that fits the budget, and a sentence that says so.

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
    accum_steps = planner.smallest_fitting(budget)
    if accum_steps is None:
        rows = filter(None, map(planner.row, planner.ladder()))
        least = min(row.peak.bytes for row in rows)
        raise BadInputError(
            f"accum.steps=auto: no N fits the budget of {size(budget)}; the smallest peak is "
            f"{size(least)}"
        )
    row = planner.row(accum_steps)
    assert row is not None
    return settings.with_accum_steps(accum_steps), (
        f"N = {accum_steps} is the smallest whose predicted peak, {size(row.peak.bytes)}, "
        f"fits the budget of {size(budget)}"
    )


def plainly_fits(state: TrainState, budget: int) -> bool:
    """Whether a run needs so little that it may begin without a prediction.

    The bound: six times the weights, and four times all that operators allocate in a forward pass of
    two samples, in proportion to the micro-batch.
    """
    # A prediction is far closer, but first imports torch's compiler, which takes as long as torch.
    given = first_samples(state.train_data, state.plan)
    model, settings = state.model, state.settings
    if state.strategy.takes_window_at_once:  # of such a loss no bound is known
        return False
    try:
        outputs = OutputBytes()
        with random_state_kept(), eagerly(), evaluation_mode(model), torch.no_grad(), outputs:
            state.loss_fn(model, given)
    except Exception:  # whatever it is, a prediction is made instead
        return False
    micro = max(-(-stage.global_batch_size // stage.accum_steps) for stage in settings.stages)
    weights = sum(p.nbytes for p in state.modules.parameters())
    return bool(6 * weights + 4 * outputs.bytes * micro / max(1, samples_in(given)) < budget)


@nothing_left_behind()
def predicted_peak(settings: Settings, loaded: TrainingData) -> Peak | None:
    """Predict the peak of the windows whose memory is measured; None where passes need values."""
    try:
        subject = _fake(settings, loaded)
        # From the second micro-batch on the gradients are there beside the activations.
        stage = max(
            settings.stages, key=lambda s: (-(-s.global_batch_size // s.accum_steps), s.accum_steps)
        )
        samples = min(stage.global_batch_size, loaded.plan.full_window)  # an epoch may hold less
        return highest(Predicted(subject, samples).peaks(samples, stage.accum_steps))
    except Exception as error:  # the run itself will meet whatever is wrong
        log.debug("the peak was not predicted: %s", error)
        return None


def refuse_over_budget(
    settings: Settings, loaded: TrainingData, predicted: Peak | None, budget: int | None
) -> None:
    """Refuse a run whose predicted peak exceeds the budget, and name an N that fits.

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
    if fitting is not None and settings.accum.grow is not None:  # whose micro-batch is fixed
        instead = f"data.micro_batch_size={loaded.plan.full_window // fitting} fits"
    given = settings.runtime.memory_budget_gib is not None
    limit = "runtime.memory_budget_gib" if given else f"of what is free {HEADROOM:.0%} are"
    raise BadInputError(
        f"accum.steps={settings.accum_steps} does not fit: its predicted peak is "
        f"{size(predicted.bytes)}, {limit} {size(budget)}; {instead}"
    )


def command(planned: MemoryPlan, arguments: Sequence[str]) -> str:
    """Return the command that trains with the planned N, given the arguments of the plan."""
    replaced = {"task": None, "accum.steps": planned.chosen_steps or planned.knee_steps}
    keys = [a.split("=")[0].lstrip("+") for a in arguments]
    if not set(keys).isdisjoint(_ALSO_SPLIT):  # N would contradict it, or multiply the batch
        replaced |= dict.fromkeys(_ALSO_SPLIT) | {"data.global_batch_size": planned.global_batch_size}
    kept = [a for a, key in zip(arguments, keys, strict=True) if key not in replaced]
    chosen = [f"{key}={value}" for key, value in replaced.items() if value is not None]
    return shlex.join(["python", "-m", "gaccum_exp", *kept, *chosen])


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
    """Return the experiment with a change other than N; None where it is made already."""
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
    """Return the experiment's own step, on windows of its own shapes."""
    shaped = _ShapedWindows(state)

    @contextmanager
    def context() -> Iterator[None]:
        with random_state_kept(), eagerly(), mode or nullcontext():
            yield

    def take(window: list[Any], meter: Meter) -> None:
        metered = replace(state, loss_fn=meter.loss_fn(state.loss_fn), global_step=shaped.global_step)
        take_step(metered, window, Hooks([MeterPhases(meter)]))

    step = state.modules, state.optimizer, state.device, shaped, take, context, state.strategy
    return MeteredStep(*step)


class _ShapedWindows:
    """Windows of any sizes in the shapes of the experiment's data, on the host."""

    def __init__(self, state: TrainState) -> None:
        self._data, self._plan, self._strategy = state.train_data, state.plan, state.strategy
        own = hasattr(self._data, "gather") or hasattr(self._data, "collate_fn")
        stacked = type(self._data) is TensorDataset or not own
        # Stacked samples all have the same shape, and two stand for any number. A data set that collates
        # by itself, as of texts of any length, gives the window whose memory is measured in training.
        self._two = first_samples(self._data, self._plan) if stacked else None
        self.global_step = max(measured_windows(state), default=0)

    def __call__(self, sizes: Sequence[int]) -> list[Any]:
        """Return the first micro-batch, the largest of the others, and the last where it is smaller."""
        if self._two is not None:
            host = torch.device("cpu")
            decisive = decisive_sizes(sizes, self._strategy)
            return [resized(self._two, samples, host) for samples in decisive]
        plan = replace(self._plan, global_batch_size=sum(sizes))
        now = range(self.global_step, self.global_step + 1)
        with random_state_kept():
            window = next(windows(self._data, plan, accum_steps=len(sizes), global_steps=now))
        if self._strategy.takes_window_at_once:
            return window
        first, *others = window

        def elements(micro_batch: Any) -> int:
            return sum(leaf.numel() for leaf in tree_leaves(micro_batch) if isinstance(leaf, Tensor))

        return [
            first,
            *sorted(others, key=elements)[-1:],
            *others[-1:][: len(decisive_sizes(sizes)) - 2],
        ]
