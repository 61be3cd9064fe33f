"""What is said of sweeps that failed, of biased arms, and of blocks that were chosen by file."""

from collections.abc import Callable

import pytest

from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.report.text.summary import summary
from gaccum_exp.tracking.records import Curve, RunRecord

Arm = Callable[..., RunRecord]


@pytest.mark.parametrize("drop", [(), ("accum.steps", "micro_batch_sizes")])
def test_a_reason_that_all_arms_share_is_said_once(arm: Arm, drop: tuple[str, ...]) -> None:
    """Also of arms that were refused before their N was known; no N = 1 arm is called missing."""
    why = {"failure": "criterion._target_ must be set"}
    runs = [arm(n, status="FAILED", losses=[], tags=why, drop=drop) for n in (1, 2, 4)]
    comparison = compare(runs)
    assert comparison.notes == ("Every arm failed (criterion._target_ must be set).",)
    assert summary(comparison) == "No arm finished."


def test_arms_that_share_a_reason_share_a_sentence(arm: Arm) -> None:
    """What was refused is named after what it was given."""
    ctrl_c = {"failure": "interrupted (SIGINT)"}
    full, why = {"failure": "out of memory"}, {"failure": "accum.steps=0: must be at least 1"}
    runs = [
        arm(1),
        arm(2),
        *(arm(n, status="FAILED", losses=[], tags=full) for n in (4, 8)),
        *(arm(n, status="KILLED", losses=[1.0], tags=ctrl_c) for n in (16, 32)),
        RunRecord("r", "1", "accum.steps=0", "FAILED", 0, {}, why, {}),
    ]
    comparison = compare(runs)
    assert comparison.notes == (
        "Run 'accum.steps=0' failed (must be at least 1).",
        "mean: N = 4 and 8 failed (out of memory).",
        "mean: N = 16 and 32 were interrupted (SIGINT).",
    )
    said = summary(comparison)
    assert said.startswith("N = 2 is not audited: the train loss of N = 2 differs by up to ")
    assert said.endswith("4 of 6 arms did not finish. 1 more arm did not begin.")


def test_arms_that_failed_for_reasons_of_their_own_are_each_named(arm: Arm) -> None:
    """Two reasons, two sentences."""
    runs = [arm(n, status="FAILED", losses=[], tags={"failure": f"{n} GiB"}) for n in (1, 2)]
    notes = compare(runs).notes
    assert "N = 1 failed (1 GiB)." in notes
    assert "N = 2 failed (2 GiB)." in notes


def test_a_gap_of_a_biased_arm_does_not_read_as_praise(arm: Arm, audited: Arm) -> None:
    """A loss that is 1.49 away stays within nothing."""
    runs = [arm(1, losses=[2.0, 1.0]), arm(2, losses=[2.0, 2.49])]
    said = summary(compare([runs[0], audited(runs[1], "biased", cause="loss scale")]))
    assert "the train loss of N = 2 differs by up to 1.49 from that of the one-pass arm" in said
    assert "stays within" not in said


def test_memory_that_hardly_falls_is_said_to_do_so(arm: Arm) -> None:
    """0.98 × is no saving."""
    runs = [arm(1), arm(2)]
    for run, peak in zip(runs, (100.0, 98.0), strict=True):
        dict.__setitem__(run.metrics, "memory/peak_bytes", peak)  # type: ignore[arg-type]  # it is one
    assert "Peak memory hardly falls: it is 0.98 × at N = 2" in summary(compare(runs))


def test_a_block_is_said_by_the_file_that_was_typed(arm: Arm) -> None:
    """And a class that was typed, by its name."""
    key, path = "strategy._target_", "gaccum_exp.core"
    typed = [
        arm(1, run_id="a", params={key: f"{path}.cached.Cached"}, tags={"overrides": "strategy=cached"}),
        arm(1, run_id="b", params={key: f"{path}.strategies.InPlace"}, tags={"overrides": f"{key}=x"}),
    ]
    assert [row.differs for row in compare(typed).rows] == ["strategy=InPlace", "strategy=cached"]


def test_a_table_of_language_models_shows_perplexity(arm: Arm) -> None:
    """In the place of an accuracy that no arm has."""
    from tests.report.text.test_table import show

    run = arm(1, drop=("eval/accuracy",))
    run.curves["eval/perplexity"] = Curve((1,), (13.5,))  # type: ignore[index]  # it is a dict
    shown = show(compare([run, arm(2, drop=("eval/accuracy",))]))
    assert "ppl." in shown
    assert "13.5000" in shown
    assert "acc." not in shown
