"""What is listed of sweeps says what they vary, and how their arms were judged."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from gaccum_exp.report.text.listing import list_runs, say_when
from gaccum_exp.tracking.records import RunRecord

Arm = Callable[..., RunRecord]


def of(sweep_id: str, place: int, run: RunRecord, start: int, **tags: str) -> RunRecord:
    """Return an arm as a sweep has it, at a place of its own."""
    own = {"sweep_id": sweep_id, "arm": str(place), "kind": "arm", "choice.model": "cnn", **tags}
    return replace(run, run_id=f"{sweep_id}-{start}", start_time_ms=start, tags={**run.tags, **own})


def test_the_newest_sweep_is_first_and_says_what_it_varied(arm: Arm, control: Arm) -> None:
    """Controls, plans and the sound verdict of one pass are left out; the worst verdict leads."""
    rates = [(n, lr) for n in (1, 2, 16) for lr in ("0.1", "0.2")]
    arms = [arm(n, params={"optimizer.lr": lr}) for n, lr in rates]
    verdicts = ("identical", "identical", "equivalent", "equivalent", "biased", "equivalent")
    every = [
        of("old", i, run, 1000 + i, verdict=verdict)
        for i, (run, verdict) in enumerate(zip(arms, verdicts, strict=True))
    ]
    every += [of("old", 9, control(arms[0], 1, 0.0), 1001), of("plan", 0, arm(1), 5000, kind="plan")]
    every += [
        of("new", 0, arm(1), 2000),
        of("new", 1, arm(8, status="FAILED"), 2001),
        of("new", 1, arm(8, status="KILLED"), 2002, **{"choice.model": "gpt"}),  # begun again
    ]
    new, old = list_runs(every)
    assert (new.sweep_id, new.model, new.swept) == ("new", "cnn, gpt", "N=1,8")
    assert new.verdicts == "1 interrupted"
    assert (old.sweep_id, old.begun_s, old.model) == ("old", 1.0, "cnn")
    assert old.swept == "N=1,2,16 lr=0.1,0.2"
    assert old.verdicts == "1 biased, 3 equivalent"


def test_many_values_are_shortened(arm: Arm) -> None:
    """The first two and the last, and how many there are."""
    (listed,) = list_runs(of("s", n, arm(n), 1) for n in (1, 2, 4, 8, 16, 32))
    assert listed.swept == "N=1,2,…,32 (6)"


def test_what_was_refused_was_varied_too(arm: Arm) -> None:
    """Of an arm that never had a configuration, its overrides tell."""
    rates = [of("s", n, arm(n, params={"optimizer.lr": lr}), 1) for n, lr in ((1, "0.1"), (2, "0.2"))]
    refused = replace(of("s", 3, arm(1, status="FAILED"), 2), params={}, metrics={}, curves={})
    refused = replace(refused, tags={**refused.tags, "overrides": "accum.steps=100 optimizer.lr=7"})
    (listed,) = list_runs([refused, *rates])
    assert listed.swept == "N=1,2,100 lr=0.1,0.2,7"


def test_a_date_of_another_year_has_the_year() -> None:
    """And one of this year the time."""
    now = datetime.now()
    assert say_when(datetime(now.year, 3, 4, 5, 6).timestamp()) == "04 Mar 05:06"
    assert say_when(datetime(2001, 3, 4, 5, 6).timestamp()) == "04 Mar 2001"
