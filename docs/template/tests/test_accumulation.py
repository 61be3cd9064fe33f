"""The project's own loop, held against its large batch by the fixture that gaccum_exp brings."""

import pytest
import torch
from my_project.data import Waves
from my_project.loss import huber_where_known
from my_project.model import Denoiser
from torch.utils.data import DataLoader


@pytest.mark.parametrize("accum_steps", [2, 4])
def test_the_loop_takes_the_large_batchs_gradient(audit_loop, accum_steps):
    """It counts the known values of the whole window before the first backward pass."""
    torch.manual_seed(0)
    model = Denoiser(width=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = list(DataLoader(Waves(samples=8), batch_size=8 // accum_steps))
    count = sum(micro_batch["known"].sum() for micro_batch in window)

    with audit_loop(model, None, optimizer):
        for micro_batch in window:
            loss_sum, _ = huber_where_known(model, micro_batch)
            (loss_sum / count).backward()
        optimizer.step()
