"""Seconds of a window beside its peak, and advice as one writes it in a script."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from gaccum_exp import plan_memory
from gaccum_exp.core.step_times import StepTime
from gaccum_exp.memory import timing
from gaccum_exp.memory.meter import FORWARD_BACKWARD, Meter, Peak
from gaccum_exp.memory.plan import MemoryPlan, Row
from gaccum_exp.memory.predict import MeteredStep
from gaccum_exp.memory.storages import CATEGORIES
from gaccum_exp.models.mlp import MLP


def a_plan(*rows: Row) -> MemoryPlan:
    return MemoryPlan(8, "cpu", rows, None, None, 1)


def row(accum_steps: int, size: int, time: StepTime | None = None) -> Row:
    peak = Peak(size, FORWARD_BACKWARD, dict.fromkeys(CATEGORIES, 0))
    return Row(accum_steps, 8 // accum_steps, peak, time)


def test_a_plan_has_the_seconds_of_the_n_that_it_ran() -> None:
    """On copies: weights, optimizer state and random numbers stay; its advice is for a script."""
    torch.manual_seed(0)
    model = MLP(input_shape=(8,), num_classes=3, hidden=[64, 64])
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(12, 8), torch.randint(3, (12,))
    state = torch.get_rng_state()
    plan = plan_memory(
        model, nn.CrossEntropyLoss(), batch, optimizer, batch_size=24, budget_bytes=2**30, timed=True
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.state
    times = {row.accum_steps: row.time for row in plan.rows if row.time is not None}
    assert times.keys() == {1, 2, 4, 8}
    assert all(t.windows == 10 and 0 < t.low_s <= t.median_s <= t.high_s for t in times.values())
    assert plan.row(1).as_dict()["median_s"] == times[1].median_s
    said = str(plan)
    assert "Seconds of a window, measured on copies for cpu: medians of 10 in turn" in said
    assert "fused=True among the optimizer's arguments" in said
    assert "runtime." not in said


def test_an_n_beyond_what_is_free_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is said, with what is free; so is one that the model refuses."""

    def take(window: list[int], meter: Meter) -> None:
        if window == [2] * 4:
            raise ValueError("expected more than 2 samples.")

    step = MeteredStep(
        nn.Identity(), torch.optim.SGD([torch.zeros(1)]), torch.device("cpu"), list, take, nullcontext
    )
    monkeypatch.setattr(timing, "free_bytes", lambda device: 124)
    waited = iter([0.0, 1e9])
    monkeypatch.setattr(timing, "waited_s", lambda: next(waited))
    plan = timing.with_times(a_plan(row(1, 100), row(2, 99), row(4, 50), row(8, 40)), step)
    assert [r.accum_steps for r in plan.rows if r.time is not None] == [2, 8]
    assert plan.notes == (
        "N = 1 is not timed: 124 B are free on cpu.",
        "N = 4 could not be timed: expected more than 2 samples.",
        plan.notes[-1],
    )
    assert "of that time other processes had the processor" in plan.notes[-1]


def test_windows_without_memory_cannot_be_timed() -> None:
    """A model on meta is planned, and refused where seconds are asked for."""
    with torch.device("meta"):
        model = nn.Linear(4, 1)
    batch = torch.randn(4, 4, device="meta"), torch.randn(4, 1, device="meta")
    with pytest.raises(ValueError, match="timed=True runs windows"):
        plan_memory(model, nn.MSELoss(), batch, torch.optim.SGD, timed=True)


@pytest.mark.parametrize(
    ("other", "last"),
    [
        (StepTime(2.0, 1.9, 2.1, 10), "2.00"),
        (StepTime(2.0, 1.0, 2.1, 10), "≈"),
        (StepTime(2.0, 1.9, 2.1, 9), "1.9 to 2.1"),
    ],
)
def test_no_ratio_is_stated_where_times_do_not_differ_measurably(other: StepTime, last: str) -> None:
    """Nor of fewer than ten windows."""
    plan = a_plan(row(1, 100, StepTime(1.0, 0.9, 1.1, 10)), row(2, 100, other))
    line = next(line for line in plan.time_lines() if line.split()[:2] == ["2", "4"])
    assert line.endswith(last)
