"""The interpreter's reports of calls: beside other profilers, while judging, and in forked processes."""

import cProfile
import multiprocessing
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from gaccum_exp import watch
from tests.audit.loops import SOUND_LOOPS
from tests.audit.support import CE, net, window

weighed = SOUND_LOOPS["weighed by size"][0]


def watching() -> tuple[watch, Any]:
    """Return a watch, and what runs one window of a sound loop."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return watch(model, CE, optimizer), lambda: weighed(model, optimizer, window(3, 2))


def test_cprofile_goes_on_after_the_block() -> None:
    """It is written in C and no function: it rests in the block, and counts what is called later."""

    def afterwards() -> None:
        pass

    block, window_runs = watching()
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        with block as audit:
            window_runs()
        afterwards()
    finally:
        profiler.disable()
    assert audit.sound, str(audit)
    assert any("afterwards" in str(entry.code) for entry in profiler.getstats())  # type: ignore[attr-defined]


def test_a_profiler_written_in_python_sees_every_call_return() -> None:
    """In the block and while a window is judged, as without a watch."""
    depth: list[int] = [0]

    def profiler(frame: FrameType, event: str, arg: Any) -> None:
        depth.append(depth[-1] + {"call": 1, "return": -1}.get(event, 0))

    block, window_runs = watching()
    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        with block as audit:
            window_runs()
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(before)
    assert audit.sound, str(audit)
    assert depth[-1] == 0
    assert len(depth) > 1000


def test_a_profiler_begun_in_the_block_is_left_on() -> None:
    """Who begins one in the block ends it, after the block if need be."""
    block, _ = watching()
    before, mine = sys.getprofile(), lambda *_: None
    try:
        with block:
            sys.setprofile(mine)
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(before)


def test_nothing_is_reported_while_a_window_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No profiler and no mode of any watch: they would slow every pass that is run again."""
    seen: list[tuple[Any, int]] = []
    judge = watch._reached

    def judging(self: watch, *args: Any) -> None:
        modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        seen.append((sys.getprofile(), len(modes)))
        judge(self, *args)

    monkeypatch.setattr(watch, "_reached", judging)
    before = sys.getprofile()
    block, window_runs = watching()
    with watching()[0], block as audit:
        window_runs()
        assert sys.getprofile() is not before
    assert audit.sound, str(audit)
    assert seen == [(before, 0)]


@pytest.mark.parametrize("first", [0, 1])
def test_watches_may_end_in_any_order(first: int) -> None:
    """As two callbacks' do; when both have ended nothing of theirs is left on."""
    pairs = [watching(), watching()]
    before = sys.getprofile()
    audits = [block.__enter__() for block, _ in pairs]
    pairs[first][0].__exit__(None, None, None)
    pairs[1 - first][1]()
    pairs[1 - first][0].__exit__(None, None, None)
    assert audits[1 - first].sound, str(audits[1 - first])
    assert sys.getprofile() is before
    assert not _get_current_function_mode_stack()  # type: ignore[no-untyped-call]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_is_not_traced() -> None:
    """A DataLoader's worker would be slowed down, and keep what it is thought to see."""
    context = multiprocessing.get_context("fork")
    read, write = context.Pipe(duplex=False)

    def worker() -> None:
        modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        write.send((sys.getprofile() is None, len(modes)))

    with watching()[0]:
        process = context.Process(target=worker)
        process.start()
        process.join()
    assert read.recv() == (True, 0)
