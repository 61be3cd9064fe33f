"""What a captured window costs at other N, against the plan of the same model made by hand."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gaccum_exp import plan_memory
from gaccum_exp.audit.check.captured import CapturedWindow, StepsAtAnyN
from gaccum_exp.audit.check.checked_loop import CheckedLoop, CheckEndedError
from gaccum_exp.audit.check.cost import cost_of
from gaccum_exp.memory.meter import Unmetered


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(3)
        )
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else torch.relu(block(x))
        return x


def captured(model: nn.Module, make: Any) -> CapturedWindow:
    """Return the window of 40 samples in micro-batches of 16, 16 and 8."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 32), torch.randint(32, (40,))
    loop = CheckedLoop(1, None, lambda: None)

    def script() -> None:
        with loop:
            optimizer = make(model.parameters(), lr=0.1)
            for inputs, target in zip(x.split(16), y.split(16), strict=False):
                loss = nn.functional.cross_entropy(model(inputs), target, reduction="sum")
                (loss / 40).backward()
            optimizer.step()

    with pytest.raises(CheckEndedError):
        script()
    (group,) = loop.groups.values()
    assert group.captured is not None
    return group.captured


def test_the_peaks_are_those_of_a_plan_of_the_model() -> None:
    """Within 2 %, for every N; weights, gradients, state and random numbers stay as they are."""
    model = Net()
    window = captured(model, torch.optim.AdamW)
    before = [t.clone() for p in model.parameters() for t in (p, p.grad) if t is not None]
    random = torch.get_rng_state()
    plan = cost_of(window, None, equal_parts=False)
    assert torch.equal(torch.get_rng_state(), random)
    now = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    assert all(map(torch.equal, before, now))
    assert not window.optimizers[0].state
    batch = torch.randn(40, 32), torch.randint(32, (40,))
    by_hand = plan_memory(model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW(model.parameters()))
    shared = {1, 2, 4, 8} & {row.accum_steps for row in plan.rows}
    assert shared == {1, 2, 4, 8}
    for n in shared:
        assert plan.row(n).peak.bytes == pytest.approx(by_hand.row(n).peak.bytes, rel=0.02)
        assert plan.row(n).time is not None


def test_a_window_runs_again_with_the_gradient_that_it_had() -> None:
    """In one pass, and in parts that the loop never had; checkpoints recompute as they do there."""
    for checkpointed in (False, True):
        model = Net(checkpointed)
        window = captured(model, torch.optim.SGD)
        weight = next(model.parameters())
        assert weight.grad is not None
        gradient = 40 * weight.grad
        with StepsAtAnyN(window) as steps:
            for sizes in ([40], [10] * 4, [13, 13, 14]):
                step = steps.real(whole=True)
                batch = step.window(sizes)
                assert [len(inputs) for inputs, *_ in batch] == sizes
                step.take(batch, Unmetered(step.modules, step.optimizer, step.device))
                copied = next(step.modules.parameters()).grad
                # The pattern is a micro-batch of its loss as it stands: the sum, without the division.
                torch.testing.assert_close(copied, gradient, rtol=1e-4, atol=1e-4)
        assert next(model.parameters()) is weight
