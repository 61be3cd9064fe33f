"""A plan against what is measured, against brute force, and for models that will not be planned."""

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from gaccum_exp import plan_memory
from gaccum_exp.core.accumulate import accumulate_gradients
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.window import split_sizes
from gaccum_exp.memory.fake import fake_mode, nothing_left_behind, settle
from gaccum_exp.memory.meter import FORWARD_BACKWARD, OPTIMIZER_STEP, Peak, TensorMeter
from gaccum_exp.memory.plan import FLAT, MemoryPlan, knee, size
from gaccum_exp.memory.planner import Planner
from gaccum_exp.memory.storages import CATEGORIES
from gaccum_exp.models.cnn import CNN
from gaccum_exp.models.mlp import MLP
from tests.shortened import shortened

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": torch.optim.AdamW,
    "fused adamw": lambda p: torch.optim.AdamW(p, fused=True),
}
Pair = tuple[nn.Module, torch.optim.Optimizer]


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    return torch.randn(count, 3, 32, 32, generator=generator), labels


def a_cnn(optimizer: str = "sgd") -> Pair:
    torch.manual_seed(0)
    model = CNN(input_shape=(3, 32, 32), num_classes=10)
    return model, OPTIMIZERS[optimizer](model.parameters())


def measured(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, steps: int) -> Peak:
    """Return the peak of a window of the real model in the steady state."""
    sizes = split_sizes(len(batch[0]), steps)
    window = list(zip(*(t.split(sizes) for t in batch), strict=True))
    for _ in range(2):
        optimizer.zero_grad()
        tracked = TensorMeter(model, optimizer, CPU)
        with tracked:
            with tracked.phase(FORWARD_BACKWARD):
                loss_fn = tracked.loss_fn(CRITERION)
                accumulate_gradients(model, loss_fn, window)
            with tracked.phase(OPTIMIZER_STEP):
                optimizer.step()
    peak = tracked.peak()
    assert peak is not None
    return peak


CRITERION = CriterionLoss(nn.CrossEntropyLoss())


@pytest.mark.parametrize("optimizer", shortened(OPTIMIZERS, ["sgd", "adamw"]))
def test_the_predicted_peak_is_the_measured_one(optimizer: str) -> None:
    """For every N, with its parts and its phase, within 1 %; and 37 samples are no multiple of any.

    Other optimizers hold other state, whatever N is: of three N.
    """
    model, made = a_cnn(optimizer)
    batch = images(37)
    plan = plan_memory(model, nn.CrossEntropyLoss(), batch, made)
    assert [row.accum_steps for row in plan.rows] == [1, 2, 4, 8, 16, 32, 37]
    for row in plan.rows if optimizer == "sgd" else plan.rows[::3]:
        real = measured(model, made, batch, row.accum_steps)
        assert row.peak.bytes == pytest.approx(real.bytes, rel=0.01)
        assert row.peak.phase == real.phase
        for part in CATEGORIES:
            assert row.peak.parts[part] == pytest.approx(real.parts[part], rel=0.02, abs=2048)


def test_planning_moves_nothing() -> None:
    """Weights, gradients, optimizer state, running statistics, random state: all as they were."""
    model, optimizer = a_cnn("adamw")
    norm = nn.BatchNorm2d(3)
    whole = nn.Sequential(norm, model, nn.Dropout(0.5))
    whole(images(4)[0]).sum().backward()
    optimizer.step()
    before = [t.clone() for t in (*whole.state_dict().values(), *(p.grad for p in whole.parameters()))]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
    plan_memory(whole, nn.CrossEntropyLoss(), images(8), optimizer)
    after = [*whole.state_dict().values(), *(p.grad for p in whole.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(moments, [v for s in optimizer.state.values() for v in s.values()], strict=True)
    )
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert np.array_equal(state[2], np.random.get_state()[1])


def test_a_model_on_meta_is_planned_as_the_real_one() -> None:
    """With a batch on meta too, and an optimizer that is only a class."""
    with torch.device("meta"):
        empty = CNN(input_shape=(3, 32, 32), num_classes=10)
        batch = torch.empty(37, 3, 32, 32), torch.empty(37, dtype=torch.int64)
    without = plan_memory(empty, nn.CrossEntropyLoss(), batch, torch.optim.AdamW)
    real = plan_memory(a_cnn()[0], nn.CrossEntropyLoss(), images(37), torch.optim.AdamW)
    assert without.as_dict() == real.as_dict()


def test_a_batch_of_two_samples_stands_for_any_number() -> None:
    """And what is planned for needs no memory: a batch of a million images."""
    few = plan_memory(a_cnn()[0], nn.CrossEntropyLoss(), images(2), torch.optim.SGD, batch_size=11)
    many = plan_memory(a_cnn()[0], nn.CrossEntropyLoss(), images(11), torch.optim.SGD)
    assert few.as_dict() == many.as_dict()
    model = MLP(hidden=(8,), input_shape=(3, 32, 32), num_classes=10)
    huge = plan_memory(
        model, nn.CrossEntropyLoss(), images(2), torch.optim.SGD, batch_size=2**20,
        budget_bytes=2**30,
    )  # fmt: skip
    assert huge.rows[0].peak.parts["inputs"] >= 2**20 * 3 * 32 * 32 * 4
    assert huge.chosen_steps is not None
    assert huge.row(huge.chosen_steps).peak.bytes <= 2**30


def test_the_cost_of_a_plan_does_not_grow_with_n() -> None:
    """Three passes for every N in the table at most, though its windows have hundreds."""
    passes = 0

    class Counted(MLP):
        def forward(self, inputs: Tensor) -> Tensor:
            nonlocal passes
            passes += 1
            return super().forward(inputs)

    model = Counted(hidden=(8,), input_shape=(3, 32, 32), num_classes=10)
    plan = plan_memory(model, nn.CrossEntropyLoss(), images(2), torch.optim.SGD, batch_size=512)
    changes = 3
    assert passes <= 3 * (len(plan.rows) + changes + 1)


class Synthetic:
    """Peaks by a formula: activations in proportion to the micro-batch, and from the second one on
    gradients beside them.
    """

    extrapolated_from: tuple[int, ...] = ()

    def __init__(self, fixed: int, per_sample: int, step: int) -> None:
        self.fixed, self.per_sample, self.step = fixed, per_sample, step
        self.asked: list[int] = []

    def peaks(self, samples: int, steps: int) -> dict[str, Peak]:
        self.asked.append(steps)
        first, *others = split_sizes(samples, steps)
        second = others[0] * self.per_sample + self.fixed if others else 0
        gradients = self.fixed if second > first * self.per_sample else 0
        size = others[0] if gradients else first
        parts = dict.fromkeys(CATEGORIES, 0) | {
            "parameters": self.fixed, "gradients": gradients, "activations": size * self.per_sample,
        }  # fmt: skip
        passes = Peak(sum(parts.values()), FORWARD_BACKWARD, parts)
        return {FORWARD_BACKWARD: passes, OPTIMIZER_STEP: Peak(self.step, OPTIMIZER_STEP, parts)}


@given(
    samples=st.integers(1, 300),
    fixed=st.integers(0, 2000),
    per_sample=st.integers(1, 100),
    step=st.integers(0, 4000),
    budget=st.integers(0, 30_000),
    even=st.booleans(),
)
# Micro-batches of 2, 1, 1: no gradients are there yet beside the two samples.
@example(samples=4, fixed=50, per_sample=100, step=0, budget=250, even=False)
def test_the_chosen_n_is_the_smallest_that_fits(
    samples: int, fixed: int, per_sample: int, step: int, budget: int, even: bool
) -> None:
    """As trying every N finds it; and it is found without trying every N."""
    source = Synthetic(fixed, per_sample, step)
    planner = Planner(source, samples, equal_parts=even)  # type: ignore[arg-type]
    plan = planner.plan("cpu", budget)
    tried = len(source.asked)

    def fits(n: int) -> bool:
        return max(p.bytes for p in source.peaks(samples, n).values()) <= budget

    every = [n for n in range(1, samples + 1) if samples % n == 0 or not even]
    assert plan.chosen_steps == next((n for n in every if fits(n)), None)
    assert tried <= (len(planner.ladder()) + 10)
    assert len({row.accum_steps for row in plan.rows}) == len(plan.rows)
    peaks = {row.accum_steps: row.peak.bytes for row in plan.rows}
    assert all(peaks[n] > (1 + FLAT) * min(peaks.values()) for n in peaks if n < plan.knee_steps)
    assert peaks[plan.knee_steps] <= (1 + FLAT) * min(peaks.values())


def test_the_knee_is_where_one_per_cent_more_is_all_there_is_to_gain() -> None:
    """And the last N, where the peak still shrinks."""
    assert knee({1: 1000.0, 2: 500.0, 4: 303.0, 8: 301.0, 16: 300.0}) == 4
    assert knee({1: 1000.0, 2: 500.0, 4: 250.0}) == 4
    assert knee({1: 100.0}) == 1


def test_what_the_optimizer_step_holds_is_said_with_what_would_help() -> None:
    """A wide model and a small batch: AdamW's temporaries are the peak, and a fused step has none."""
    model = MLP(hidden=(2000, 2000), input_shape=(4,), num_classes=2)
    batch = torch.randn(4, 4), torch.zeros(4, dtype=torch.int64)
    plan = plan_memory(model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW)
    row = plan.row(plan.knee_steps)
    assert row.peak.phase == OPTIMIZER_STEP
    assert row.peak.parts["temporaries"] > 0
    said = str(plan)
    assert "from N = 1 the optimizer step is the peak" in said
    fused = next(a for a in plan.advice if a.change.name == "a fused optimizer")
    with_it = plan_memory(
        model, nn.CrossEntropyLoss(), batch, lambda p: torch.optim.AdamW(p, fused=True)
    )
    assert fused.peak_bytes == with_it.row(plan.knee_steps).peak.bytes
    assert fused.saved_bytes == row.peak.bytes - fused.peak_bytes > 0
    assert not any(a.change.name == "a fused optimizer" for a in with_it.advice)


class ByValue(nn.Module):
    """Takes another way for another value, which fake tensors have not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CNN(input_shape=(3, 32, 32), num_classes=10)

    def forward(self, inputs: Tensor) -> Tensor:
        scale = 2.0 if float(inputs.detach().abs().max()) > 1e6 else 1.0
        result: Tensor = self.inner(inputs) * scale
        return result


def test_a_model_that_depends_on_values_is_extrapolated_and_it_is_said() -> None:
    """From micro-batches of 4 and 8; here within 5 % of what is measured, and nothing is moved."""
    torch.manual_seed(0)
    model = ByValue()
    weights = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    plan = plan_memory(model, nn.CrossEntropyLoss(), images(64), optimizer)
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert plan.as_dict()["extrapolated"]
    assert plan.extrapolated_from == (4, 8)
    said = str(plan)
    assert "extrapolated for cpu" in said
    assert "Extrapolated, not predicted: measured on micro-batches of 4 and 8 samples" in said
    assert "This model's step depends on values (aten._local_scalar_dense.default)" in said
    for row in plan.rows:
        real = measured(model, optimizer, images(64), row.accum_steps)
        assert row.peak.bytes == pytest.approx(real.bytes, rel=0.05)


@pytest.mark.parametrize("on_meta", ["model", "batch"])
def test_a_model_that_depends_on_values_says_so_where_there_are_none(on_meta: str) -> None:
    """It cannot be run instead, and its own error tells more than that of running it on `meta`."""
    inputs, labels = images(4)
    with torch.device("meta" if on_meta == "model" else "cpu"):
        model = ByValue()
    batch = (inputs, labels) if on_meta == "model" else (inputs.to("meta"), labels.to("meta"))
    with pytest.raises(DataDependentOutputException) as raised:
        plan_memory(model, nn.CrossEntropyLoss(), batch, torch.optim.SGD)
    assert "If the step depends on values, give both with memory" in raised.value.__notes__[0]


@pytest.mark.parametrize(("given", "asked"), [(0, 4), (4, 0), (4, -1)])
def test_a_window_of_nothing_is_refused(given: int, asked: int) -> None:
    """With both numbers."""
    model = MLP(hidden=(8,), input_shape=(3, 32, 32), num_classes=10)
    said = f"a window of {asked} samples cannot be planned on a batch of {given}"
    with pytest.raises(ValueError, match=said):
        plan_memory(model, nn.CrossEntropyLoss(), images(given), torch.optim.SGD, batch_size=asked)


def test_what_is_wrong_with_the_model_is_raised_as_it_is() -> None:
    """And not taken for a forward pass that depends on values."""
    model = MLP(hidden=(8,), input_shape=(5,), num_classes=10)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        plan_memory(model, nn.CrossEntropyLoss(), images(4), torch.optim.SGD)


def test_an_n_that_the_model_refuses_is_left_out_and_said() -> None:
    """Batch statistics of a single value: a micro-batch of one sample is none for this model."""
    layers = nn.Linear(3 * 32 * 32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
    model = nn.Sequential(nn.Flatten(), *layers)
    plan = plan_memory(model, nn.CrossEntropyLoss(), images(8), torch.optim.SGD, budget_bytes=1)
    assert [row.accum_steps for row in plan.rows] == [1, 2, 4]
    assert any("N = 8 is left out" in note and "more than 1 value" in note for note in plan.notes)
    assert plan.chosen_steps is None
    assert "No N fits the budget of 1 B" in str(plan)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"lr": torch.tensor(0.1)}])
def test_an_optimizer_that_has_stepped_is_planned_as_a_new_one(options: dict[str, Any]) -> None:
    """Its counts of steps are read by the step, and are no values that a model depends on."""
    model = MLP(hidden=(8,), input_shape=(3, 32, 32), num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    new = plan_memory(model, nn.CrossEntropyLoss(), images(4), optimizer)
    measured(model, optimizer, images(4), 1)
    count = next(iter(optimizer.state.values()))["step"].item()
    stepped = plan_memory(model, nn.CrossEntropyLoss(), images(4), optimizer)
    assert not stepped.extrapolated_from
    assert [r.peak for r in stepped.rows] == [r.peak for r in new.rows]
    assert next(iter(optimizer.state.values()))["step"].item() == count


class Wrapping(torch.optim.Optimizer):
    """An optimizer with attributes of its own, as SAM and Lookahead are."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step()


def test_an_optimizer_with_attributes_of_its_own_is_planned() -> None:
    """Which torch leaves out when it copies one."""
    model = MLP(hidden=(8,), input_shape=(3, 32, 32), num_classes=10)
    optimizer = Wrapping(model.parameters())
    plan = plan_memory(model, nn.CrossEntropyLoss(), images(4), optimizer)
    inner = plan_memory(model, nn.CrossEntropyLoss(), images(4), OPTIMIZERS["sgd"](model.parameters()))
    assert not plan.extrapolated_from
    assert not optimizer.inner.state
    # Only the inner optimizer knows of its momentum, so that is not told from what is held beside.
    assert [r.micro_batch_size for r in plan.rows] == [r.micro_batch_size for r in inner.rows]


class Scaled(nn.Module):
    """Tensors in a list and in a dictionary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(hidden=(8,), input_shape=(3, 32, 32), num_classes=10)
        self.factors = [torch.ones(10)]
        self.offsets = {"all": torch.zeros(10)}

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.inner(inputs) * self.factors[0] + self.offsets["all"]
        return result


def test_tensors_in_containers_of_a_model_on_meta_are_brought_along() -> None:
    """As its parameters are."""
    with torch.device("meta"):
        model = Scaled()
    plan = plan_memory(model, nn.CrossEntropyLoss(), images(4), torch.optim.SGD)
    here = plan_memory(Scaled(), nn.CrossEntropyLoss(), images(4), torch.optim.SGD)
    assert not plan.extrapolated_from
    assert plan.rows == here.rows


@functools.lru_cache
def ones(count: int) -> Tensor:
    """Return what is computed once for every model of this process."""
    return torch.ones(count)


def test_nothing_fake_is_left_outside() -> None:
    """Neither in a cache, nor as the gradient of a module that only the loss function knows."""

    class Cached(MLP):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * ones(10)

    head = nn.Linear(10, 10)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        outputs = head(model(batch[0]))
        return nn.functional.cross_entropy(outputs, batch[1], reduction="sum"), len(outputs)

    model = Cached(hidden=(8,), input_shape=(3, 32, 32), num_classes=10)
    plan_memory(model, loss_fn, images(4), torch.optim.SGD)
    assert type(ones(10)) is Tensor
    assert head.weight.grad is None
    kept = torch.zeros_like(head.weight)
    head.weight.grad = kept
    plan_memory(model, loss_fn, images(4), torch.optim.SGD)
    assert head.weight.grad is kept
    assert not kept.any()


def test_sizes_are_written_in_figures() -> None:
    """Between 1000 and 1024 as well."""
    numbers = (0, 999, 1000, 1023, 1024, 2**20 - 1, 1020 * 2**20, 2**33)
    said = "0 B, 999 B, 1000 B, 1023 B, 1 KiB, 1024 KiB, 1020 MiB, 8 GiB"
    assert ", ".join(map(size, numbers)) == said


def test_a_single_sample_has_no_other_n() -> None:
    """And no peak that shrinks up to it."""
    model = MLP(hidden=(8,), input_shape=(3, 32, 32), num_classes=10)
    said = str(plan_memory(model, nn.CrossEntropyLoss(), images(1), torch.optim.SGD))
    assert "There is no other N than 1 to compare with." in said
    assert "shrinks up to" not in said


def test_an_n_whose_last_micro_batch_is_refused_is_left_out() -> None:
    """Six samples in four micro-batches are 2, 2, 1 and 1."""
    layers = nn.Linear(3 * 32 * 32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
    model = nn.Sequential(nn.Flatten(), *layers)
    plan = plan_memory(model, nn.CrossEntropyLoss(), images(6), torch.optim.SGD)
    assert [row.accum_steps for row in plan.rows] == [1, 2]
    assert any("N = 4 is left out, with micro-batches of 2 and 1:" in note for note in plan.notes)


class Pairs(nn.Module):
    """Takes samples two by two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.linear(inputs)
        return (result - result.view(-1, 2, 10).mean(1).repeat_interleave(2, 0)).contiguous()


def test_an_n_that_the_model_refuses_in_its_own_way_is_left_out_too() -> None:
    """Twelve samples in eight micro-batches are odd numbers of them."""
    batch = torch.randn(12, 3), torch.zeros(12, dtype=torch.int64)
    plan = plan_memory(Pairs(), nn.CrossEntropyLoss(), batch, torch.optim.SGD)
    assert [row.accum_steps for row in plan.rows] == [1, 2]
    assert "N = 4 is left out, with micro-batches of 3: shape '[-1, 2, 10]' is invalid" in str(plan)


def test_mappings_dictionaries_of_outputs_and_loss_functions_are_planned() -> None:
    """Any pytree as a batch, and a loss function of one's own."""

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        outputs = model(batch["image"])
        return nn.functional.cross_entropy(outputs, batch["label"], reduction="sum"), len(outputs)

    inputs, labels = images(16)
    model, optimizer = a_cnn()
    own = plan_memory(model, loss_fn, {"image": inputs, "label": labels}, optimizer)
    usual = plan_memory(model, nn.CrossEntropyLoss(), (inputs, labels), optimizer)
    assert [r.peak.bytes for r in own.rows] == [r.peak.bytes for r in usual.rows]
    assert isinstance(own, MemoryPlan)


def test_a_process_that_has_settled_is_searched_for_leftovers_all_the_same() -> None:
    """What is frozen for the garbage collector may hold caches and gradients: they are searched."""

    @functools.lru_cache
    def mask() -> Tensor:
        return torch.ones(3)

    @functools.cache
    def nested(*sizes: int) -> list[Any]:
        found: list[Any] = [{"masks": (torch.ones(sizes), "and others")}]
        return [found]

    parameter = nn.Parameter(torch.ones(3))
    settle()
    with nothing_left_behind(), fake_mode():
        (parameter.sum() * mask().sum()).backward()
        assert isinstance(mask(), FakeTensor)
        assert isinstance(nested(2, 3)[0][0]["masks"][0], FakeTensor)
        nested(1).append(nested(1))  # it holds itself
    assert type(mask()) is Tensor
    assert type(nested(2, 3)[0][0]["masks"][0]) is Tensor
    assert parameter.grad is None
