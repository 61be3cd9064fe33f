"""The public functions as somebody's typed code uses them: `make lint` has mypy judge it strictly."""

import functools
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import gaccum_exp
from gaccum_exp import BadInputError, SweepResult, compare, sweep


def make_net() -> nn.Module:
    return nn.Linear(4, 2)


def loss_fn(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    inputs, targets = micro_batch
    return nn.functional.mse_loss(model(inputs), targets, reduction="sum"), targets.numel()


def study() -> list[str]:
    try:
        result = sweep(
            "runtime.threads=1",
            model=make_net,
            criterion=loss_fn,
            data=(torch.zeros(8, 4), torch.zeros(8, 2)),
            optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            accum_steps=[1, 2, "auto"],
            seed=(0, 1),
        )
    except BadInputError as error:
        return [str(error)]
    sweep(model=nn.Linear(4, 2), criterion=nn.MSELoss(), optimizer=torch.optim.AdamW, accum_steps="auto")
    assert_type(result, SweepResult)
    assert_type(result.verdicts, dict[str, str | None])
    assert_type(result.folder, Path)
    assert_type(result.page, Path | None)
    assert_type(compare([result.sweep_id]), SweepResult)
    window = [(torch.zeros(2, 4), torch.zeros(2, 2))]
    assert_type(gaccum_exp.accumulate_gradients(make_net(), loss_fn, window).mean, Tensor)
    return [name for name, verdict in result.verdicts.items() if verdict == "biased"]
