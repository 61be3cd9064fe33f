"""When checkpoints are taken, what they cost, and what is said where they cannot be."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gaccum_exp.errors import BadInputError
from gaccum_exp.train.checkpoint import files, hook
from gaccum_exp.train.checkpoint.hook import Checkpoints
from gaccum_exp.train.hooks import Hook
from gaccum_exp.train.stopping import StoppedError
from tests.strangers import Net
from tests.support import STRANGER, settings
from tests.train.checkpoint.resumes import AskAt, Training, gone_on

HERE = "tests.train.checkpoint.test_hook"
POINTS = (
    *STRANGER,
    "audit.at_start=false",
    "data.global_batch_size=8",
    "accum.steps=4",
    "train.steps=9",
)
EVERY_2 = (*POINTS, "checkpoint.every_steps=2", "checkpoint.every_minutes=null")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


class Noted(Hook):
    """Notes which checkpoints there are after every window, once they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[list[str]]()

    def before(self, state: Any, window: Any) -> None:
        for thread in threading.enumerate():
            if thread.name == hook.FOLDER:
                thread.join()
        self.seen.append(names(self.folder))


def test_they_are_taken_every_so_many_steps_and_the_newest_are_kept(tmp_path: Path) -> None:
    """At steps 2, 4, 6, 8 of 9; two of them are there at a time."""
    noted = Noted(tmp_path)
    Training(*EVERY_2, folder=tmp_path).train(noted)
    assert noted.seen[2] == ["step-00000002"]
    assert noted.seen[5] == ["step-00000002", "step-00000004"]
    assert noted.seen[8] == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("model", ["strangers.Net", "train.checkpoint.test_snapshot.Moody"])
def test_the_end_of_a_window_is_gone_on_from(tmp_path: Path, model: str) -> None:
    """As after a kill -9: bit for bit, whatever state the model keeps."""
    of = (*EVERY_2, f"model._target_=tests.{model}")
    whole = Training(*of).train()
    training = Training(*of, folder=tmp_path)

    class Killed(Hook):
        def before(self, state: Any, window: Any) -> None:
            if state.global_step == 5:
                raise MemoryError("killed")

    with pytest.raises(MemoryError):
        training.train(Killed())
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    again, _ = gone_on(tmp_path, *of)
    assert torch.equal(again.weights, whole.weights)
    assert {**training.curves, **again.curves} == whole.curves


def test_they_are_taken_after_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a window, the time since the last one having passed."""
    now = clock(monkeypatch)

    class Passing(Hook):
        def before(self, state: Any, window: Any) -> None:
            now[0] += 25.0

    noted = Noted(tmp_path)
    of = (*POINTS, "checkpoint.every_minutes=1", "checkpoint.keep=9")
    Training(*of, folder=tmp_path).train(Passing(), noted)
    assert noted.seen[-1] == ["step-00000003", "step-00000006"]


def test_a_long_window_has_them_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch takes 50 s: a minute is over after the second one, and after the last."""
    now = clock(monkeypatch)

    class Passing(Hook):
        def after_micro_batch(self, state: Any, accumulator: Any) -> None:
            now[0] += 50.0

    of = (*POINTS, "checkpoint.every_minutes=1", "checkpoint.keep=99", "train.steps=2")
    Training(*of, folder=tmp_path).train(Passing())
    assert names(tmp_path) == [
        "step-00000000+2",
        "step-00000000+4",
        "step-00000001+2",
        "step-00000001+4",
    ]


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the hook's time be this number."""
    now = [1000.0]

    class Time:
        monotonic = staticmethod(lambda: now[0])
        thread_time = staticmethod(time.thread_time)

    monkeypatch.setattr(hook, "time", Time)
    return now


@pytest.mark.parametrize("nothing", ["checkpoint.every_minutes=null", "checkpoint.every_minutes=10"])
def test_a_short_training_writes_none_and_without_intervals_there_are_none(
    tmp_path: Path, nothing: str
) -> None:
    """Where both intervals are null, not at a stop either."""
    training = Training(*POINTS, nothing, folder=tmp_path).train()
    assert names(tmp_path) == []
    assert any(isinstance(h, Checkpoints) for h in training.hooks) == ("null" not in nothing)
    stopped = Training(*POINTS, nothing, folder=tmp_path)
    with pytest.raises(StoppedError):
        stopped.train(AskAt(stopped.stop, 3, 2))
    assert names(tmp_path) == ([] if "null" in nothing else ["step-00000003+2"])


class Locked(Net):
    """Keeps what is neither tensor nor plain."""

    def get_extra_state(self) -> Any:
        return {"lock": threading.Lock()}


def test_a_training_that_cannot_be_kept_says_so_once_before_it_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the name of what is in the way; and is trained."""
    training = Training(*EVERY_2, f"model._target_={HERE}.Locked", folder=tmp_path).train()
    assert training.state.done
    (said,) = [m for m in caplog.messages if "checkpoint" in m]
    assert said == (
        "no checkpoints: an interrupted training would begin again, since moving.extra.model.lock is a "
        "lock, neither tensor nor plain value"
    )
    assert names(tmp_path) == []


def test_a_full_disk_is_a_warning_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once, and once more when there is room again."""
    write, tries = files.write, [0]

    def full(*arguments: Any) -> Path:
        tries[0] += 1
        if tries[0] in (2, 3):
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(files, "write", full)
    Training(*EVERY_2, "accum.steps=1", folder=tmp_path).train()
    said = [m for m in caplog.messages if "checkpoint" in m and "take" not in m]
    assert said == [
        "checkpoint step-00000004 cannot be written ([Errno 28] No space left on device): the training "
        "goes on",
        f"checkpoints can be written again: {tmp_path / 'step-00000008'}",
    ]
    assert names(tmp_path) == ["step-00000002", "step-00000008"]


def test_a_loss_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    """There is nothing to go on from: the last one is that of a finite loss."""
    of = (*POINTS, "model._target_=tests.strangers.Diverging", "checkpoint.every_steps=1")
    with pytest.raises(RuntimeError, match="train/loss is nan at step 1"):
        Training(*of, folder=tmp_path).train()
    assert names(tmp_path) == []


def test_a_cost_above_a_twentieth_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the figure, and the key to change."""
    monkeypatch.setattr(hook, "WORTH", 0.0)
    Training(*EVERY_2, "checkpoint.every_steps=1", folder=tmp_path).train()
    (said,) = [m for m in caplog.messages if "checkpoints take" in m]
    assert "% of the training's time" in said
    assert said.endswith("a larger checkpoint.every_steps costs less")
    caplog.clear()
    monkeypatch.setattr(hook, "WORTH", 1e9)
    Training(*EVERY_2, "checkpoint.every_steps=1", folder=tmp_path / "other").train()
    assert not [m for m in caplog.messages if "checkpoints take" in m]


def test_what_was_recorded_is_flushed_before(tmp_path: Path) -> None:
    """A checkpoint has every point up to it in the journal."""
    training = Training(*EVERY_2, folder=tmp_path)
    flushed: list[tuple[int, int]] = []
    take = Checkpoints._write

    def noted(self: Checkpoints, name: str, *rest: Any) -> None:
        last = max(point.global_step for point in training.sink.points)
        flushed.append((int(name.removeprefix("step-")), last))
        take(self, name, *rest)

    training.hook(Checkpoints)._write = noted.__get__(training.hook(Checkpoints))
    training.train()
    assert flushed == [(2, 2), (4, 4), (6, 6), (8, 8)]


@pytest.mark.parametrize(
    ("key", "said"),
    [("every_steps=0", "at least 1"), ("keep=0", "at least 1"),
     ("every_minutes=0", "above 0, and finite"),
     ("every_minutes=inf", "above 0, and finite"),
     ("every_minutes=-3", "above 0, and finite")],
)  # fmt: skip
def test_an_interval_that_is_none_is_refused(key: str, said: str) -> None:
    """In a line, with the key."""
    with pytest.raises(BadInputError, match=rf"^checkpoint\.{key.split('=')[0]}=.*must be {said}"):
        settings(*POINTS, f"checkpoint.{key}")
