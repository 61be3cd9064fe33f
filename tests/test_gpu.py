"""On an accelerator: where things are, what they cost, and that nothing waits. Skipped without one.

Nothing here is compared with a tolerance picked by hand. What rounding alone does to a run is measured
on the device, by training again with the samples of every window in another order.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from gaccum_exp.arms import plan as planning
from gaccum_exp.core.losses.placement import Placement
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.memory.meter import has_counters
from gaccum_exp.memory.storages import CATEGORIES
from gaccum_exp.train.build import build, load
from gaccum_exp.train.state import TrainState
from tests.program import Program
from tests.support import Collected, settings, step_at, trained

ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
DEVICE = ACCELERATOR or torch.device("cpu")
NO_COUNTERS = f"{DEVICE.type} does not count its peak"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ACCELERATOR is None, reason="torch finds no accelerator on this machine"),
]

MLP = ("model=mlp", "model.hidden=[32,32]", "data.global_batch_size=100", "train.steps=8")
ON_DEVICE = (*MLP, f"runtime.device={DEVICE.type}")
BLOCK = 512 if DEVICE.type == "cuda" else 1
"""Bytes to which CUDA's caching allocator rounds every allocation up."""
ORDERS = 8
"""Orders of samples in which the floor is measured."""
MORE_THAN_ORDER = 10
"""The host's kernels differ from the device's in every operation, another order of samples in one sum
only; a wrong gradient is off by orders of magnitude more (the last assertion of the test)."""


def weights(experiment: TrainState) -> Tensor:
    """Return all parameters as one vector on the host, in float64."""
    return torch.cat([p.detach().flatten().cpu().double() for p in experiment.parameters])


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return ‖ours − theirs‖ / ‖theirs‖."""
    return float((ours - theirs).norm() / theirs.norm())


def parameter_bytes(experiment: TrainState) -> int:
    """Return the size of all parameters in whole blocks of the device's allocator."""
    return sum(-(-p.numel() * p.element_size() // BLOCK) * BLOCK for p in experiment.parameters)


def tensors(window: list[Any]) -> list[Tensor]:
    """Return the tensors of all micro-batches of a window."""
    return [tensor for micro_batch in window for tensor in micro_batch]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Make every operation fail that waits for the device; torch warns that it may miss some."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_auto_means_the_accelerator() -> None:
    """Where there is one, it is what a run takes unless told otherwise."""
    assert build(settings(*MLP)).device.type == DEVICE.type


def test_parameters_and_micro_batches_are_on_the_device_and_windows_on_the_host() -> None:
    """One micro-batch at a time is moved there; optimizer state is where its parameters are."""
    experiment = build(settings(*ON_DEVICE, "accum.steps=4"))
    seen: list[tuple[str, int]] = []
    experiment.model.register_forward_pre_hook(
        lambda module, inputs: seen.append((inputs[0].device.type, len(inputs[0])))
    )
    window = next(experiment.windows_from(0))
    assert {t.device.type for t in tensors(window)} == {"cpu"}
    step_at(experiment, window, 0)
    assert seen == [(DEVICE.type, 25)] * 4
    state = [t for entry in experiment.optimizer.state.values() for t in entry.values()]
    placed = [*experiment.parameters, *(t for t in state if isinstance(t, Tensor))]
    assert {t.device.type for t in placed} == {DEVICE.type}


def test_a_run_agrees_with_the_cpu_and_over_n_within_what_the_order_of_samples_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight steps of the same run; and the mean of means on unequal micro-batches does not."""
    here = weights(trained(*ON_DEVICE)[0])
    host = weights(trained(*MLP, "runtime.device=cpu")[0])
    split = weights(trained(*ON_DEVICE, "accum.steps=7")[0])
    biased = weights(trained(*ON_DEVICE, "accum.steps=7", "accum.reduction=mean")[0])

    in_order = WindowPlan.indices
    floor = 0.0
    for order in range(ORDERS):

        def permuted(plan: WindowPlan, global_step: int, order: int = order) -> Tensor:
            indices = in_order(plan, global_step)
            generator = torch.Generator().manual_seed(1000 * order + global_step)
            return indices[torch.randperm(len(indices), generator=generator)]

        with monkeypatch.context() as patch:
            patch.setattr(WindowPlan, "indices", permuted)
            floor = max(floor, distance(weights(trained(*ON_DEVICE)[0]), here))
    assert floor > 0
    assert distance(host, here) <= MORE_THAN_ORDER * floor
    assert distance(split, here) <= MORE_THAN_ORDER * floor
    assert distance(biased, here) > 100 * MORE_THAN_ORDER * floor


def test_the_same_run_gives_the_same_weights_again() -> None:
    """With deterministic kernels, bit for bit."""
    call = (*ON_DEVICE, "runtime.deterministic=true")
    try:
        first, second = (weights(trained(*call)[0]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


@pytest.mark.skipif(not has_counters(DEVICE), reason=NO_COUNTERS)
def test_the_peak_is_the_allocators_and_the_trackers_split_stands_beside_it() -> None:
    """Both hold at least parameters and gradients, and the split adds up to the tracker's own peak."""
    experiment, sink = trained(*ON_DEVICE)
    assert sink.tags["memory.source"] == "allocator"
    assert sink.tags["memory.peak_phase"] in ("forward/backward", "optimizer step")
    (allocated,), (tracked,) = sink.curve("memory/peak_bytes"), sink.curve("memory/tracked_peak_bytes")
    parts = {part: sink.curve(f"memory/{part}_bytes")[0] for part in CATEGORIES}
    assert sum(parts.values()) == tracked
    assert parts["parameters"] == parameter_bytes(experiment)
    assert min(allocated, tracked) >= 2 * parameter_bytes(experiment)


CNN = (
    *("model=cnn", "model.width=32", "data=fake", "data.image_size=32", "data.size=512"),
    *("data.global_batch_size=256", "audit.at_start=false", f"runtime.device={DEVICE.type}"),
)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="fake tensors of the device are tried with CUDA")
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("optimizer", ["optimizer=sgd", "optimizer=adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_predicted_is_what_is_measured(steps: int, optimizer: str, precision: str) -> None:
    """Within 2 % of the tracked tensors; the allocator's peak, workspace included, is no smaller."""
    call = (*CNN, f"accum.steps={steps}", optimizer, f"runtime.precision={precision}", "train.steps=5")
    configured = settings(*call)
    predicted = planning.predicted_peak(configured, load(configured))
    _, sink = trained(*call)
    assert predicted is not None
    assert predicted.bytes == pytest.approx(sink.last["memory/tracked_peak_bytes"], rel=0.02)
    assert sink.last["memory/peak_bytes"] >= 0.98 * predicted.bytes
    assert sink.last["memory/allocator_reserved_bytes"] >= sink.last["memory/allocator_allocated_bytes"]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only CUDA's allocator keeps to a budget")
def test_a_window_out_of_memory_is_repeated_in_more_micro_batches() -> None:
    """By the allocator's own error; as a run with that N from the start, bit for bit."""
    call = (*CNN, "data.image_size=64", "train.steps=4", "runtime.deterministic=true")
    configured = settings(*call)
    predicted = planning.predicted_peak(configured, load(configured))
    assert predicted is not None
    torch.cuda.empty_cache()
    gib = (0.6 * predicted.bytes + planning.held_by_libraries(DEVICE)) / 2**30
    try:
        found, sink = trained(*call, "accum.on_oom=increase_steps", f"runtime.memory_budget_gib={gib}")
        used = sink.tags["accum.steps_used"]
        plain, _ = trained(*call, f"accum.steps={used}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.use_deterministic_algorithms(False)
    assert int(used) in (2, 4)
    assert torch.equal(weights(found), weights(plain))


@pytest.mark.skipif(not has_counters(DEVICE), reason=NO_COUNTERS)
def test_more_micro_batches_need_less_memory() -> None:
    """On a window whose activations outweigh the model; by the allocator's count."""
    wide = (*CNN, "train.steps=5")
    whole, split = (trained(*wide, f"accum.steps={n}")[1].curve("memory/peak_bytes")[0] for n in (1, 8))
    assert split < whole / 2


@pytest.mark.skipif(not has_counters(DEVICE), reason=NO_COUNTERS)
def test_the_order_of_arms_does_not_change_their_peaks(program: Program) -> None:
    """What an arm leaves behind is freed before the next one is measured."""
    peaks = []
    for steps in ("1,4", "4,1"):
        assert program.tiny("-m", f"accum.steps={steps}", f"runtime.device={DEVICE.type}").status == 0
        assert all(run.tags["memory.source"] == "allocator" for run in program.arms())
        peaks.append(
            {run.params["accum.steps"]: run.metrics["memory/peak_bytes"] for run in program.arms()}
        )
    assert peaks[0] == peaks[1]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="page-locked memory is CUDA's")
@pytest.mark.parametrize(
    "data",
    [
        (),
        ("model=custom", "model._target_=tests.strangers.Net",
         "data=custom", "data.train._target_=tests.strangers.Points"),
    ],
)  # fmt: skip
def test_windows_are_pinned_so_that_copies_need_not_wait(data: tuple[str, ...]) -> None:
    """Fetched by index or through a DataLoader; copying a pinned micro-batch does not synchronise."""
    mlp = MLP[:2] if not data else ()
    experiment = build(
        settings(*mlp, *data, "data.global_batch_size=12", "accum.steps=5", "runtime.device=cuda")
    )  # fmt: skip
    window = next(experiment.windows_from(0))
    assert all(tensor.is_pinned() for tensor in tensors(window))
    torch.cuda.synchronize()
    with waiting_is_an_error():
        moved = [Placement(DEVICE).place(micro_batch) for micro_batch in window]
    for tensor, there in zip(tensors(window), tensors(moved), strict=True):
        assert torch.equal(tensor, there.cpu())


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only CUDA can report that the host waited")
@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("optimizer=adamw", "scheduler=cosine", "model.dropout=0.1"),
        ("+criterion.weight=[1,2,1,1,1,1,1,1,1,1]",),
        ("+criterion.label_smoothing=0.1", "+criterion.ignore_index=3"),
    ],
)
def test_the_host_never_waits_for_the_device_within_a_window(
    options: tuple[str, ...], reduction: str
) -> None:
    """Between deliveries no operation synchronises, whatever the reduction; losses are read after."""
    experiment = build(settings(*ON_DEVICE, "accum.steps=3", f"accum.reduction={reduction}", *options))
    prepared = list(islice(experiment.windows_from(0), 6))
    sink = Collected()
    for step, window in enumerate(prepared[:3]):  # kernels are chosen and state is made
        step_at(experiment, window, step)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        for step, window in enumerate(prepared[3:], 3):
            sink.record(step + 1, step_at(experiment, window, step))
    sink.deliver()
    assert len(sink.curve("train/loss")) == 3


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only CUDA can report that the host waited")
def test_waiting_for_the_device_would_be_noticed() -> None:
    """The negative control of the two tests above."""
    there = torch.ones(3, device=DEVICE)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        there.sum().item()


def test_step_times_are_the_devices() -> None:
    """Measured by events in its stream: positive, and more for a window of many micro-batches."""
    few, many = (trained(*ON_DEVICE, "train.steps=30", f"accum.steps={n}")[1] for n in (1, 50))
    assert 0 < few.curve("time/step_s")[0] < many.curve("time/step_s")[0]
