"""What an optimizer's target is called with: parameters, pairs with their names, or groups by name."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.errors import BadInputError
from gaccum_exp.train.build import build
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step
from tests.support import SMALL, settings

NO_DECAY = "optimizer.param_groups=[{names:[*bias,*Norm*],weight_decay:0}]"
CNN = ("model=cnn", "model.width=4", "data=fake", "data.image_size=[1,8,8]", "data.size=32",
       "data.eval_size=8", "data.global_batch_size=16", "runtime.device=cpu")  # fmt: skip


def by_name(named_parameters: list[tuple[str, nn.Parameter]], lr: float) -> torch.optim.Optimizer:
    """A stranger's: SGD that decays what is called weight."""
    weights = [p for name, p in named_parameters if name.endswith("weight")]
    others = [p for name, p in named_parameters if not name.endswith("weight")]
    return torch.optim.SGD([{"params": weights, "weight_decay": 0.5}, {"params": others}], lr=lr)


def beside(
    params: Iterable[Tensor], named_parameters: list[tuple[str, Tensor]], lr: float
) -> torch.optim.Optimizer:
    """A stranger's that takes both."""
    assert len(list(params)) == len(named_parameters)
    return torch.optim.SGD([p for _, p in named_parameters], lr=lr)


def pairs_in_params(params: Any, lr: float) -> torch.optim.Optimizer:
    """A stranger's that expects pairs, and does not say so."""
    return torch.optim.SGD([parameter for name, parameter, *_ in params if name.isidentifier()], lr=lr)


def built(*overrides: str) -> TrainState:
    return build(settings(*overrides))


def groups(state: TrainState) -> list[tuple[set[str], float]]:
    """Return each group's parameters by name, and its decay."""
    names = {p: name for name, p in state.model.named_parameters()}
    return [({names[p] for p in g["params"]}, g["weight_decay"]) for g in state.optimizer.param_groups]


@pytest.mark.parametrize("target", ["by_name", "beside"])
def test_a_target_that_takes_named_parameters_gets_them(target: str) -> None:
    """As pairs of the model's own names, in place of the parameters or beside them."""
    state = built(*SMALL, "optimizer=custom", f"optimizer._target_={__name__}.{target}")
    names = {name for name, _ in state.model.named_parameters()}
    assert set().union(*(of for of, _ in groups(state))) == names
    if target == "by_name":
        assert [decay for _, decay in groups(state)] == [0.5, 0]
        assert groups(state)[1][0] == {name for name in names if "bias" in name}


def test_biases_and_norms_go_without_decay_by_name_and_by_class() -> None:
    """A norm whose name says nothing (`features.1.weight`) is known by its class."""
    state = built(*CNN, "optimizer=adamw", NO_DECAY)
    (decayed, decay), (free, none) = groups(state)
    assert (decay, none) == (0.01, 0)
    assert decayed == {n for n, p in state.model.named_parameters() if p.ndim > 1}
    assert len(free) > 1


def test_groups_step_as_written_out_by_hand() -> None:
    """In float64, under accumulation: the same weights as a plain loop with torch's own groups."""
    overrides = (*SMALL, "optimizer=adamw", "runtime.precision=fp64", "data.global_batch_size=10")
    state = built(*overrides, "accum.steps=3", "optimizer.weight_decay=0.3",
                  "optimizer.param_groups=[{names:'*bias',weight_decay:0,lr:0.05}]")  # fmt: skip
    plain = built(*overrides).model
    named = dict(plain.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "bias" not in n]},
            {"params": [p for n, p in named.items() if "bias" in n], "weight_decay": 0, "lr": 0.05},
        ],
        lr=0.001,
        weight_decay=0.3,
    )
    for step, window in zip(range(2), state.windows_from(0), strict=False):
        inputs = torch.cat([x for x, _ in window]).double()
        targets = torch.cat([y for _, y in window])
        nn.functional.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        take_step(state, window)
        state.global_step = step + 1
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-9, atol=1e-12)


def test_muon_takes_groups_too() -> None:
    """Of its matrices and of its vectors, each with the decay that its group says."""
    state = built(*SMALL, "optimizer=muon", "optimizer.param_groups=[{names:*bias,weight_decay:0}]")
    assert [decay for _, decay in groups(state)] == [0.01, 0]
    take_step(state, next(state.windows_from(0)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "[{names:*bais,weight_decay:0}]",
            r"\[0\]\.names=\*bais: no parameter is called so, did you mean",
        ),
        ("[{names:*bias,weight_deacy:0}]", "weight_deacy: AdamW has no such option .*'weight_decay'"),
        ("[{weight_decay:0}]", r"\[0\]\.names=None: is a pattern"),
        ("{names:a}", "is a list of"),
        ("[{names:'*'},{names:*bias}]", r"\[1\]\.names=\*bias: all of these are in groups before it"),
    ],
)
def test_groups_that_mean_nothing_are_refused(given: str, said: str) -> None:
    """torch would keep a misspelt option in the group, and never read it."""
    with pytest.raises(BadInputError, match=said):
        built(*SMALL, "optimizer=adamw", f"optimizer.param_groups={given}")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "it was called with a list of 4 parameters and lr=0.001; an argument named_parameters is"),
        (("optimizer.param_groups=[{names:*bias}]",), "with a list of 2 parameter groups"),
    ],
)
def test_a_target_that_cannot_use_what_it_gets_is_told_what_it_was_given(
    more: tuple[str, ...], said: str
) -> None:
    """And how to be given something else."""
    with pytest.raises(BadInputError, match=said) as raised:
        built(*SMALL, "optimizer=custom", f"optimizer._target_={__name__}.pairs_in_params", *more)
    assert f"optimizer: _target_={__name__}.pairs_in_params" in str(raised.value)


def test_a_wrong_option_of_a_target_is_still_named() -> None:
    """A misspelt key has a line of its own, and nothing about parameters in it."""
    with pytest.raises(BadInputError, match=r"AdamW takes no 'momentun'") as raised:
        built(*SMALL, "optimizer=adamw", "+optimizer.momentun=1")
    assert "parameters" not in str(raised.value).partition("(it takes")[0]
