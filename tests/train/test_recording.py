"""Where a training with a loss that is not finite stops, and what of its curve is kept."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import NonFiniteLossError
from gaccum_exp.train import audits, evaluation
from gaccum_exp.train.build import build
from gaccum_exp.train.recording import FINITE_EVERY
from tests.support import SMALL, STRANGER, Collected, settings, train_to_end

DIVERGING = (*STRANGER, "model._target_=tests.strangers.Diverging", "audit.at_start=false")


class Eager(Collected):
    """Is always due, as beside a store that takes every point at once."""

    @property
    def due(self) -> bool:
        return True


class Reluctant(Collected):
    """Is never due, as beside a store that is slow."""

    @property
    def due(self) -> bool:
        return False


def stopped(sink: Collected, steps: int) -> tuple[int, list[float]]:
    """Train until it is refused; return the global step reached, and the curve."""
    state = build(settings(*DIVERGING, f"train.steps={steps}"))
    with pytest.raises(NonFiniteLossError, match="nan at step 4"), Progress("test", steps) as progress:
        train_to_end(state, sink, progress)
    return state.global_step, sink.curve("train/loss")


@pytest.mark.parametrize(("steps", "reached"), [(FINITE_EVERY + 9, FINITE_EVERY), (9, 9)])
def test_where_it_stops_does_not_depend_on_the_store(steps: int, reached: int) -> None:
    """At a fixed interval of global steps or at the end, with the curve up to the first NaN."""
    for sink in (Eager(), Reluctant(), Collected()):
        step, curve = stopped(sink, steps)
        assert step == reached
        assert [math.isnan(loss) for loss in curve] == [False, False, False, True]


def test_nothing_is_recorded_after_a_loss_that_is_not_finite() -> None:
    """Not the later windows', nor an evaluation's, however often it is delivered."""
    sink = Eager()
    stopped(sink, 9)
    assert max(point.global_step for point in sink.points) == 4
    sink.record(5, {"eval/loss": 1.0})
    assert sink.deliver() == []


def test_what_is_recorded_is_written_while_something_takes_long() -> None:
    """Before an audit, and in an evaluation once it is due: a training may be killed there."""
    few = ("train.steps=3", "audit.every_steps=2", "data.eval_batch_size=40")
    state, sink = build(settings(*SMALL, *few)), Eager()
    there: list[tuple[str, int]] = []

    def noted(what: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            there.append((what, len(sink.curve("train/loss"))))
            return plain(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, Progress("test", 3) as progress:
        patch.setattr(audits, "audit", noted("audit", audits.audit))
        patch.setattr(evaluation, "run_model", noted("batch", evaluation.run_model))
        train_to_end(state, sink, progress)
    assert there[:2] == [("audit", 0), ("audit", 2)]
    assert set(there[2:]) == {("batch", 3)}


def test_a_short_evaluation_writes_nothing_early() -> None:
    """Each word to the process that delivers takes time from the training."""
    state, sink = build(settings(*SMALL, "train.steps=4", "train.eval_every_steps=1")), Collected()
    sent: list[int] = []
    sink.send = sent.append  # type: ignore[method-assign, assignment]
    with Progress("test", 4) as progress:
        train_to_end(state, sink, progress)
    assert len(sent) <= 4  # before the audit, for the finite loss, at the end
