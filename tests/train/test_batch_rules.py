"""Learning rate and β₂ of another global batch, from the one that they were chosen for."""

import math

import pytest
import torch

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import metrics
from gaccum_exp.train.batch_rules import half_life
from gaccum_exp.train.build import build
from tests.support import settings, trained

MLP = (
    "model=mlp",
    "model.hidden=[4]",
    "data.global_batch_size=64",
    "runtime.device=cpu",
    "train.steps=4",
)
ADAM = ("optimizer=adamw", "optimizer.lr=0.01")


def built(*overrides: str) -> torch.optim.Optimizer:
    return build(settings(*MLP, *overrides)).optimizer


@pytest.mark.parametrize(("rule", "expected"), [("none", 0.01), ("sqrt", 0.02), ("linear", 0.04)])
def test_the_rate_follows_the_batch_from_the_one_it_was_chosen_for(rule: str, expected: float) -> None:
    """At four times that batch; a schedule begins from there, and N is no matter."""
    for more in ((), ("accum.steps=8",), ("scheduler=warmup_cosine",)):
        optimizer = built(*ADAM, f"train.lr_rule={rule}", "train.base_batch_size=16", *more)
        (group,) = optimizer.param_groups
        assert math.isclose(group.get("initial_lr", group["lr"]), expected, rel_tol=1e-12)


def test_beta2_keeps_its_half_life_in_samples() -> None:
    """So many samples of another batch leave as much of a moment."""
    (group,) = built(*ADAM, "train.beta2_rule=half_life", "train.base_batch_size=512").param_groups
    first, second = built(*ADAM).param_groups[0]["betas"]
    assert group["betas"][0] == first
    assert math.isclose(group["betas"][1] ** 8, second, rel_tol=1e-12)
    assert math.isclose(half_life(0.95, 4.0), 0.95**4)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("train.lr_rule=sqrt",), "train.lr_rule=sqrt: from which global batch"),
        ((*ADAM, "train.beta2_rule=half_life"), "train.beta2_rule=half_life: from which global batch"),
        (("train.base_batch_size=0",), "train.base_batch_size=0"),
        (("train.beta2_rule=half_life", "train.base_batch_size=16"), "SGD has none"),
        (("train.lr_rule=square", "train.base_batch_size=16"), "train.lr_rule=square"),
    ],
)
def test_a_rule_that_leads_nowhere_is_refused(overrides: tuple[str, ...], why: str) -> None:
    """In a line with key and way out."""
    with pytest.raises(BadInputError, match=why):
        built(*overrides)


@pytest.mark.parametrize("batch", [64, 100, 700])
def test_evaluations_by_samples_come_at_the_same_samples_for_every_batch(batch: int) -> None:
    """After the first window with which so many have passed, over epochs; and at the end."""
    state, sink = trained(
        "model=mlp", "model.hidden=[4]", f"data.global_batch_size={batch}", "runtime.device=cpu",
        "train.epochs=2", "train.eval_every_samples=500", "audit.at_start=false",
    )  # fmt: skip
    passed = [state.plan.position(k + 1) for k in range(state.total_steps)]
    due = {next(k for k, p in enumerate(passed, 1) if p >= at) for at in range(500, passed[-1] + 1, 500)}
    evaluated = [p.global_step for p in sink.points if metrics.EVAL_LOSS in p.values]
    assert evaluated == sorted(due | {state.total_steps})
