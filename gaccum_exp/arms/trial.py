"""Try ways to a global batch: audit the first window of each, and time full windows of all in turn.

In rounds, since what else a machine does would slow down one way, and the next one not. A way is built
anew in every round: held all at once, they would not fit the memory that each of them fits.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from gaccum_exp.config.schema import Settings
from gaccum_exp.core.step_times import time_of
from gaccum_exp.errors import BadInputError, first_line
from gaccum_exp.memory.available import out_of_memory
from gaccum_exp.report.compare.ways import Way
from gaccum_exp.train.audits import audit
from gaccum_exp.train.build import TrainingData, build
from gaccum_exp.train.step import take_step
from gaccum_exp.train.stopping import Stop

ROUNDS = 3
WARMUP_WINDOWS, ROUND_WINDOWS, ROUND_S = 2, 4, 0.2
"""Of a way in a round: untimed ones first, then so many for so long at least."""
LONGEST_ROUND_S, LONGEST_S = 4.0, 20.0
"""A way's round ends after so long, and no further round of a way begins after so long in all."""


DataOf = Callable[[Settings], TrainingData]


def tried(ways: Sequence[tuple[Settings, Way]], data_of: DataOf, stop: Stop) -> list[Way]:
    """Return the ways, of which those that fit have been audited and timed.

    Args:
        ways: with the settings of each.
        data_of: gives the data for settings of another global batch.
        stop: looked at before every window.
    """
    found = [_attempted(way, partial(_audited, own, way, data_of, stop)) for own, way in ways]
    seconds: dict[int, list[float]] = defaultdict(list)
    begun_s = time.perf_counter()
    for number in range(ROUNDS):
        for place, (own, _) in enumerate(ways):
            if number and time.perf_counter() - begun_s > LONGEST_S:
                break

            more = partial(_timed, own, found[place], data_of, stop, seconds[place])
            found[place] = _attempted(found[place], more)
    return [_with_time(way, seconds[place]) for place, way in enumerate(found)]


def _attempted(way: Way, attempt: Callable[[], Way]) -> Way:
    """Try a way that fits; return it with the reason where it fails."""
    if not way.fits or way.failure is not None:
        return way
    try:
        return attempt()
    except BadInputError as error:
        return replace(way, failure=first_line(error))
    except Exception as error:
        if not out_of_memory(error):
            raise
    gc.collect()  # here, where no traceback holds the window any more
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return replace(way, failure="it ran out of memory when it was tried")


def _audited(settings: Settings, way: Way, data_of: DataOf, stop: Stop) -> Way:
    """Audit a way's first window where it has several micro-batches."""
    if settings.accum_steps == 1:
        return way
    stop.look()
    state = build(settings, data_of(settings))
    with stop.at_once():
        return replace(way, verdict=audit(state, next(state.windows_from(0)), 0).verdict)


def _timed(settings: Settings, way: Way, data_of: DataOf, stop: Stop, seconds: list[float]) -> Way:
    """Add seconds per sample of some full windows; none where the training is too short."""
    state = build(settings, data_of(settings))
    round_s: list[float] = []
    begun_s = time.perf_counter()
    windows = state.windows_from(0)
    for global_step in range(state.total_steps):
        stop.look()
        start_s = time.perf_counter()
        take_step(state, next(windows))
        state.global_step += 1
        if state.device.type != "cpu":
            torch.accelerator.synchronize()
        end_s = time.perf_counter()
        if global_step >= WARMUP_WINDOWS and state.plan.is_largest(global_step):
            round_s.append(end_s - start_s)
            seconds.append(round_s[-1] / state.plan.size(global_step))
        enough = len(round_s) >= ROUND_WINDOWS and sum(round_s) >= ROUND_S
        if enough or (round_s and end_s - begun_s > LONGEST_ROUND_S):
            break
    return way


def _with_time(way: Way, seconds: Sequence[float]) -> Way:
    if not way.fits or way.failure is not None:
        return way
    if not seconds:
        return replace(way, failure="the training is too short to be timed")
    return replace(way, sample=time_of(seconds))
