"""Learning rate and β₂ of another global batch, from the one that they were chosen for."""

import math

import pytest
import torch

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import metrics
from gaccum_exp.train.batch_rules import half_life
from gaccum_exp.train.build import build, load
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


TORCHS = "torch.optim.lr_scheduler"
COSINE = (f"scheduler._target_={TORCHS}.CosineAnnealingLR", "+scheduler.T_max=4")


@pytest.mark.parametrize(
    ("scheduler", "followed"),
    [
        ((f"scheduler._target_={TORCHS}.OneCycleLR", "+scheduler.max_lr=0.1"), False),
        (
            (
                f"scheduler._target_={TORCHS}.CyclicLR",
                *("+scheduler.base_lr=0.01", "+scheduler.max_lr=0.1", "+scheduler.step_size_up=2"),
            ),
            False,
        ),
        ((*COSINE, "+scheduler.eta_min=0.01"), False),
        (COSINE, True),
        ((f"scheduler._target_={TORCHS}.StepLR", "+scheduler.step_size=2"), True),
        (("scheduler=warmup_cosine",), True),
    ],
)  # fmt: skip
def test_a_schedule_with_rates_of_its_own_is_refused_at_another_batch(
    scheduler: tuple[str, ...], followed: bool
) -> None:
    """At the base batch, and where the schedule multiplies the optimizer's rate, it is taken."""
    asked = (*ADAM, "train.lr_rule=linear", *scheduler)
    built(*asked, "train.base_batch_size=64")
    if followed:
        built(*asked, "train.base_batch_size=16")
        return
    with pytest.raises(
        BadInputError, match=r"train\.lr_rule=linear: .* do not follow .* 4 ×"
    ) as refused:
        built(*asked, "train.base_batch_size=16")
    assert "\n" not in str(refused.value)


INVARIANT = (*ADAM, "strategy=batch_size_invariant_adam", "data.micro_batch_size=16")
CARRY = "accum.partial_window=carry"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train.steps=23",), r"partial_window=exact: window 23 holds 34 samples of 64"),
        (("data.global_batch_size=2048",), "window 1 holds 1442 samples of 2048"),
        (
            (CARRY, "train.lr_rule=sqrt", "train.base_batch_size=16"),
            "train.lr_rule=sqrt follows the batch",
        ),
        (
            (CARRY, "train.beta2_rule=half_life", "train.base_batch_size=16"),
            "train.beta2_rule=half_life",
        ),
        ((CARRY, "accum.grow=adam", "scheduler=cosine"), "accum.grow=adam follows the batch"),
        (
            (
                "accum.schedule={0:1,1:4}",
                "data.global_batch_size=null",
                "accum.schedule_lr=linear",
                CARRY,
            ),
            "accum.schedule_lr=linear follows the batch",
        ),
        (
            ("accum.schedule={0:1,1:4}", "data.micro_batch_size=null", CARRY),
            r"accum.schedule=\{0:1,1:4\}: .* micro-batches of one size",
        ),
    ],
)
def test_a_strategy_that_scales_by_n_meets_no_other_scaling_and_no_smaller_micro_batch(
    overrides: tuple[str, ...], said: str
) -> None:
    """Else rate and moments would be scaled twice, or for micro-batches that are not whole."""
    n = () if any("schedule=" in one for one in overrides) else ("accum.steps=null",)
    if any("grow" in one for one in overrides):
        n = ("accum.steps=4",)
    with pytest.raises(BadInputError, match=said) as refused:
        built(*INVARIANT, *n, *overrides)
    assert "\n" not in str(refused.value)


def test_a_strategy_that_scales_by_n_takes_what_is_not_scaled() -> None:
    """Whole windows, those of one pass, and a fixed global batch whose N is the base."""
    built(*INVARIANT, "accum.steps=null", "train.steps=22")
    built(*INVARIANT, "accum.steps=null", "train.steps=30", CARRY)
    at_base = (
        "data.micro_batch_size=null",
        "train.steps=30",
        "train.lr_rule=sqrt",
        "train.base_batch_size=8",
    )
    built(*INVARIANT, *at_base, "accum.steps=1")
    built(*INVARIANT, *at_base, "accum.steps=4", "strategy.base_steps=4")


def test_beta2_is_of_one_batch_where_the_batch_changes(caplog: pytest.LogCaptureFixture) -> None:
    """Which is said; of one that stays there is nothing to say."""
    rule = ("optimizer=adamw", "train.beta2_rule=half_life", "train.base_batch_size=16")
    micro = ("data.global_batch_size=null", "data.micro_batch_size=16")
    load(settings(*MLP, *rule))
    assert not caplog.messages
    load(settings(*MLP, *rule, *micro, "accum.schedule={0:1,1:4}"))
    load(
        settings(
            *MLP,
            *rule,
            *micro,
            "accum.steps=1",
            "accum.grow=auto",
            "scheduler=cosine",
            "accum.grow_to=4",
        )
    )
    assert [m for m in caplog.messages if "β₂" in m] == [
        f"{rule[1]}: β₂ is that of a global batch of {batch}, and does not follow the batch"
        for batch in (64, 16)
    ]


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
