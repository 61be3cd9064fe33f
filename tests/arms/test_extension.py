"""A swept key is doubled or halved until its best value lies between two others."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from gaccum_exp.arms.extension import MOST_VALUES, further, require_swept
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.records import RunRecord
from tests.program import Program
from tests.report.conftest import make_arm

pytestmark = pytest.mark.usefixtures("undrawn")

SWEPT = ("data.global_batch_size", "optimizer.lr", "seed")


def run(rate: float, loss: float, *, batch: int = 64, seed: int = 0) -> RunRecord:
    """A run that has ended with this loss at this rate; NaN: it has diverged."""
    arm = make_arm(
        1, run_id=f"{rate} {batch} {seed}", global_batch=batch, seed=seed,
        status="FINISHED" if loss == loss else "FAILED", params={"optimizer.lr": str(rate)},
        losses=None if loss == loss else [2.3, math.nan],
    )  # fmt: skip
    return replace(arm, metrics={**arm.metrics, "eval/loss": loss})


def asked(losses: Mapping[float, float], **of: int) -> list[str] | None:
    found = further([run(rate, loss, **of) for rate, loss in losses.items()], "optimizer.lr", SWEPT)
    return None if found is None else found.overrides or None


def left(arm: RunRecord, status: str, failure: str = "") -> RunRecord:
    """The same run where it was interrupted, or has failed of its own fault."""
    return replace(arm, status=status, tags={**arm.tags, "failure": failure})


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({0.1: 1.0, 0.2: 0.5}, "0.4"),
        ({0.1: 0.5, 0.2: 1.0}, "0.05"),
        ({0.1: 1.0, 0.2: 0.5, 0.4: 0.7}, None),
        ({0.1: 1.0, 0.2: 0.5, 0.4: math.nan}, None),
        ({0.1: math.nan, 0.2: math.nan}, "0.05"),
        ({0.1: 0.5}, "0.2"),
    ],
)
def test_the_best_of_a_setting_has_neighbours_on_either_side(
    losses: dict[float, float], rate: str | None
) -> None:
    """A rate at which training fails is worse than any other; where all do, lower ones may train."""
    expected = None if rate is None else ["data.global_batch_size=64", f"optimizer.lr={rate}"]
    assert asked(losses) == expected


def test_settings_that_lack_the_same_value_are_asked_for_together_and_seeds_are_averaged() -> None:
    """And the others by the command after it, which finds what is there by then."""
    runs = [
        run(rate, loss + seed * (0.3 if rate == 0.1 else 0.0), batch=batch, seed=seed)
        for batch in (32, 64, 128)
        for seed in (0, 1)
        for rate, loss in ((0.1, 0.5), (0.2, 0.6 if batch < 128 else 0.9))
    ]
    found = further(runs, "optimizer.lr", SWEPT)
    assert found is not None
    assert found.overrides == ["data.global_batch_size=32,64", "optimizer.lr=0.4"]
    rest = [r for r in runs if r.global_batch_size == 128]
    assert further(rest, "optimizer.lr", SWEPT).overrides[-1] == "optimizer.lr=0.05"  # type: ignore[union-attr]


def test_it_ends_though_every_value_is_better_than_the_last() -> None:
    """After so many values of one setting, and then it is said, as where all of them diverged."""
    losses = {0.1: 100.0}
    while (more := asked(losses)) is not None:
        losses[float(more[-1].partition("=")[2])] = 100.0 - len(losses)
    assert len(losses) == MOST_VALUES
    for loss, said in ((None, "12 values were tried"), (math.nan, "12 values were tried, all diverged")):
        runs = [run(rate, old if loss is None else loss) for rate, old in losses.items()]
        found = further(runs, "optimizer.lr", SWEPT)
        assert found is not None
        assert found.said.endswith(f"at an end of those tried at data.global_batch_size=64: {said}")


def test_what_is_asked_for_in_vain_is_not_asked_for_again() -> None:
    """A refused arm has no parameters, and no value to be known by; other settings go on without it."""
    refused = replace(left(run(0.4, math.nan), "FAILED", "not so large"), params={})
    runs = [run(0.1, 0.9), run(0.2, 0.5), refused]
    first = further(runs, "optimizer.lr", SWEPT)
    assert first is not None
    arguments = ["-m", "optimizer.lr=0.1,0.2", *first.overrides, "sweep.into=s1"]
    again = further(runs, "optimizer.lr", SWEPT, arguments)
    assert again is not None
    assert again.overrides == []
    assert again.said.endswith("=64: 0.4 was asked for, and was not trained to its end")
    others = [run(0.1, 0.5, batch=128), run(0.2, 0.9, batch=128)]
    found = further([*runs, *others], "optimizer.lr", SWEPT, arguments)
    assert found is not None
    assert found.overrides == ["data.global_batch_size=128", "optimizer.lr=0.05"]


def test_an_interrupted_value_is_asked_for_again_and_a_failed_one_is_said() -> None:
    """Neither has diverged; nor is a value better by a seed alone."""
    runs = [run(0.1, 0.9), run(0.2, 0.5)]
    for status in ("KILLED", "RUNNING"):
        found = further([*runs, left(run(0.4, 0.4), status)], "optimizer.lr", SWEPT)
        assert found is not None
        assert found.overrides[-1] == "optimizer.lr=0.4"
    failed = further([*runs, left(run(0.4, 0.4), "FAILED", "out of memory")], "optimizer.lr", SWEPT)
    assert failed is not None
    assert failed.overrides == []
    assert failed.said.endswith("0.4 has failed (out of memory)")
    with_seed = [*runs, run(0.4, 0.3), left(run(0.4, 0.4, seed=1), "KILLED")]
    found = further(with_seed, "optimizer.lr", SWEPT)
    assert found is not None
    assert found.overrides[-1] == "optimizer.lr=0.4"


@pytest.mark.parametrize(
    ("recorded", "override"),
    [
        ({"accum.max_grad_norm": "None"}, "null"),
        ({"accum.max_grad_norm": "[0.9, 0.95]"}, "[0.9, 0.95]"),
        ({"accum.max_grad_norm.0": "1", "accum.max_grad_norm.1": "None"}, "{0:1,1:null}"),
        ({"accum.max_grad_norm": "it's so"}, r"'it\'s so'"),
        ({"accum.max_grad_norm": "1e-05"}, "1e-05"),
    ],
)
def test_values_of_other_swept_keys_are_given_again_as_what_they_are(
    recorded: dict[str, str], override: str
) -> None:
    """Null, lists and mappings are no strings, as Hydra reads them."""
    runs = [replace(of, params={**of.params, **recorded}) for of in (run(0.1, 0.9), run(0.2, 0.5))]
    found = further(runs, "optimizer.lr", ("accum.max_grad_norm", "optimizer.lr"))
    assert found is not None
    assert found.overrides == [f"accum.max_grad_norm={override}", "optimizer.lr=0.4"]


def test_whole_numbers_stay_whole() -> None:
    """Half of 1 is no number of micro-batches; a rate that is written as 1.0 goes on."""
    for text, said in (("1", "the key has whole numbers, and 0.5 is none"), ("1.0", "0.5 is tried too")):
        runs = [run(1, 0.1), run(2, 0.5)]
        runs[0] = replace(runs[0], params={**runs[0].params, "optimizer.lr": text})
        found = further(runs, "optimizer.lr", SWEPT)
        assert found is not None
        assert said in found.said


def test_a_key_that_cannot_be_extended_is_refused() -> None:
    """In one line: one that the sweep does not vary, before anything runs, and one without numbers."""
    require_swept(None, ("data.kind",), {})
    require_swept("data.kind", ("data.kind",), {"data.kind": (1, 0.5)})
    with pytest.raises(BadInputError, match=r"sweep\.extend=model\.width: the sweep varies data\.kind"):
        require_swept("model.width", ("data.kind",), {})
    with pytest.raises(BadInputError, match=r"sweep\.extend=seed: no seed is better than another"):
        require_swept("seed", ("seed",), {"seed": (0, 1)})
    with pytest.raises(BadInputError, match=r"sweep\.extend=data\.kind: odd is no number above 0"):
        require_swept("data.kind", ("data.kind",), {"data.kind": ("1", "odd")})
    with pytest.raises(BadInputError, match=r"sweep\.extend=data\.kind: odd is no number above 0"):
        further([make_arm(1, params={"data.kind": "odd"})], "data.kind", ("data.kind",))


@pytest.mark.slow
def test_a_sweep_goes_on_until_the_best_lies_inside_and_is_compared_once(program: Program) -> None:
    """Under one id; weights that decay fast keep the best rate low."""
    result = program(
        "-m", "model=mlp", "model.hidden=[]", "data.global_batch_size=700", "train.steps=3",
        "optimizer.lr=0.004,0.008", "audit.at_start=false", "sweep.extend=optimizer.lr",
        "optimizer.weight_decay=30",
    )  # fmt: skip
    assert result.status == 0
    rates = sorted(float(run.params["optimizer.lr"]) for run in program.arms())
    losses = {float(run.params["optimizer.lr"]): run.metrics["eval/loss"] for run in program.arms()}
    assert rates[0] < min(losses, key=lambda rate: losses[rate]) < rates[-1]
    assert len({run.tags["sweep_id"] for run in program.arms()}) == 1
    assert result.plain.count("Every arm against its reference") == 1
