"""Progress fits its terminal, and elsewhere says a line now and then."""

import io
import re
import sys
from collections.abc import Callable

import pytest

from gaccum_exp.tracking import progress as of_progress
from gaccum_exp.tracking.progress import LINE_EVERY_S, Progress, say_time

LAST = {"train/loss": 0.12345678, "eval/accuracy": 0.98765}


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock that progress reads."""
    clock = [1000.0]
    monkeypatch.setattr(of_progress.time, "monotonic", lambda: clock[0])
    return lambda seconds: clock.__setitem__(0, 1000.0 + seconds)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_in_a_pipe_it_speaks_by_time_and_at_the_end(
    now_s: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the number of steps; two a minute, with what is left of arm and sweep."""
    with Progress("N=4 · 3 of 4", 1000, following_s=lambda own_s: 2 * own_s) as progress:
        for step in range(1, 1001):
            now_s(step * 0.125)
            progress.advance(step, LAST)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + int(125 // LINE_EVERY_S)
    assert lines[0] == ("N=4 · 3 of 4: 225/1000  loss 0.1235  acc 0.9877  8/s  1:37 left, sweep 5:47")
    assert lines[-1] == "N=4 · 3 of 4: 1000/1000  loss 0.1235  acc 0.9877  8/s  in 2:05"


def test_the_last_arm_does_not_say_the_same_time_twice(
    now_s: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing follows, what is left of it is what is left of the sweep."""
    with Progress("N=1", 100, following_s=lambda own_s: 0.0) as progress:
        progress.advance(1)
        now_s(40)
        progress.advance(41)
    assert capsys.readouterr().err.splitlines() == ["N=1: 41/100  1/s  0:59 left"]


def test_a_line_is_written_in_one_piece(now_s: Callable[[float], None]) -> None:
    """Arms side by side write to one pipe."""
    pieces: list[str] = []

    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", Pieces())
        with Progress("N=1", 1, alone=False) as progress:
            progress.advance(1, LAST)
    assert pieces == ["N=1: 1/1  loss 0.1235  acc 0.9877  in 0.0 s\n"]


@pytest.mark.parametrize(
    "name", ["N=4 · 3 of 4", "N=16 model=resnet18 lr=0.001 seed=3 · control 2 · 31 of 48"]
)
def test_a_bar_has_a_line_of_eighty_columns(
    name: str, now_s: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, speed and both times are whole, whatever the name, and no line is longer."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    for key, value in {"COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("CI", raising=False)
    with Progress(name, 100_000, following_s=lambda own_s: 90_000.0) as progress:
        progress.begin(0)
        progress.advance(1)
        now_s(10)
        progress.advance(12_345, LAST)
        progress._bar.refresh()
    assert isinstance(sys.stderr, Terminal)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
    lines = [line for line in re.split(r"[\r\n]", shown) if "12345" in line]
    assert lines
    for line in lines:
        assert len(line) <= 80
        assert line.rstrip().endswith("12345/100000  loss 0.1235  1234/s  1:11 left, sweep 25 h")
    assert name[:4] in lines[-1]
    assert name[-8:] in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0:00"),
        (7, "0:07"),
        (754, "12:34"),
        (10921, "3:02:01"),
        (90_000, "25 h"),
        (300_000, "3 d 11 h"),
    ],
)
def test_times_are_said_as_clocks_have_them(seconds: float, said: str) -> None:
    """With days where hours would be many."""
    assert say_time(seconds) == said
