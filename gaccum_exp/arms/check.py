"""`gaccum_exp check train.py --its --arguments`: is this script's accumulation the large batch?

Runs the script as it is in this process, finds its model, loss and optimizer by what steps, judges the
first windows, ends it there, and prints one answer: the verdict, the smallest N that fits, and what
each N costs.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from gaccum_exp.arms.outcome import INTERRUPTED, OK, RUN_FAILED, VERDICT_STATUS
from gaccum_exp.errors import Arguments, BadInputError, complain, first_line, number_of_gib

if TYPE_CHECKING:
    from gaccum_exp.audit.check.checked_loop import Group
    from gaccum_exp.audit.watch.watch import Watched

WINDOWS, NOISE_WINDOWS = 2, 16
"""How many are judged if nothing is said; for a noise scale more are needed."""
CHILDREN_S = 0.5
"""From here on the script's own processes have done more than a look around."""
PATIENCE_S = 5.0
"""After so long it is said how far a check is."""
STATUS = (
    "exit status: 0 it is the large batch; 1 the script failed; 2 bad usage; 3 biased; 4 stochastic; "
    "5 inconclusive; a status of the script's own is passed on"
)


def main(arguments: Sequence[str]) -> int:
    """Run `gaccum_exp check` with these arguments and return its exit status.

    Raises:
        BadInputError: there is no such script, or it runs in several processes.
        SystemExit: the script ends by itself with a status of its own.
    """
    given = _parsed(arguments)
    _refuse_several_processes()
    from gaccum_exp.audit.check import script

    with script.as_main(given.target, given.arguments, module=given.module):
        script.require(given.target, module=given.module)
        return _Check(given).run()


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Arguments(
        prog="gaccum_exp check", description=__doc__, epilog=STATUS, allow_abbrev=False,
        usage="gaccum_exp check [options] script.py [its arguments]\n"
        "       gaccum_exp check [options] -m package.module [its arguments]",
    )  # fmt: skip
    windows = f"optimizer steps to judge ({WINDOWS}; {NOISE_WINDOWS} with --noise)"
    parser.add_argument("--windows", type=int, help=windows)
    worth = "measure the gradient noise scale, too: is so large a batch worth it?"
    parser.add_argument("--noise", action="store_true", help=worth)
    gib = "that the tensors of a window may take (what the device has free)"
    parser.add_argument("--memory-budget-gib", type=_gib, metavar="GIB", help=gib)
    dim = "dimension of the model's inputs that counts samples (what the shapes agree on)"
    parser.add_argument("--batch-dim", type=int, metavar="DIM", help=dim)
    parser.add_argument("--no-cost", action="store_true", help="judge alone: no memory, no time")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m")
    parser.add_argument("target", metavar="script.py", help="the script, with all that follows")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.windows is None:
        given.windows = NOISE_WINDOWS if given.noise else WINDOWS
    if given.windows < 1:
        raise BadInputError(f"--windows {given.windows}: must be 1 or more")
    if given.memory_budget_gib is not None and not given.memory_budget_gib > 0:
        raise BadInputError(f"--memory-budget-gib {given.memory_budget_gib}: must be more than 0")
    return given


def _gib(text: str) -> float:
    amount = number_of_gib(text)
    if amount is not None:
        raise argparse.ArgumentTypeError(f"{text}: is a number of GiB ({amount})")
    return float(text)


_gib.__name__ = "number"  # as argparse calls what it cannot read


def _refuse_several_processes() -> None:
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks not in ("", "1"):
        raise BadInputError(
            f"WORLD_SIZE={ranks}: a window would be the micro-batches of all processes, and this one "
            "sees its own alone; check the script in one process, without torchrun (unset WORLD_SIZE)"
        )


class _Check:
    """One check of a script."""

    def __init__(self, given: argparse.Namespace) -> None:
        from gaccum_exp.audit.check.checked_loop import CheckedLoop

        self._given, self._process = given, os.getpid()
        self._loop: CheckedLoop = CheckedLoop(
            given.windows, given.batch_dim, self._end_on_the_spot, self._say_progress, noise=given.noise
        )
        self._began_s = self._said_s = time.monotonic()
        self._took_s = 0.0
        """Seconds that the script ran, watched."""
        self._unsaid: list[str] = []
        """On windows that were judged since something was said."""
        self._of_children_s = _of_children_s()
        self._watched: Watched

    def run(self) -> int:
        """Run the script, then answer; return the exit status."""
        from gaccum_exp.audit.check import script
        from gaccum_exp.audit.check.checked_loop import CheckEndedError

        run: Callable[[str], None] = script.run_module if self._given.module else script.run_file
        status, how = OK, "ended by itself"
        try:
            with self._loop as self._watched:
                run(self._given.target)
        except CheckEndedError:
            pass
        except SystemExit as end:
            self._let_children_go(end)
            if not self._watched.windows and end.code:
                raise
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else RUN_FAILED if end.code else OK
            how = f"ended by itself with status {status}" if status else how
        except BaseException as error:
            self._let_children_go(error)
            error = error.with_traceback(script.of_the_script(error.__traceback__))
            sys.excepthook(type(error), error, error.__traceback__)
            status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else RUN_FAILED
            how = "was interrupted" if status == INTERRUPTED else "FAILED by itself"
            if not self._watched.windows:
                complain(f"{self._name} {how}, before a step was judged")
                return status
        self._took_s = time.monotonic() - self._began_s
        _flush()
        answered = self._answered(how, status)
        return status or answered

    @property
    def _name(self) -> str:
        return f"-m {self._given.target}" if self._given.module else str(self._given.target)

    def _let_children_go(self, error: BaseException) -> None:
        """Pass on what ends a process that was forked from this one."""
        if os.getpid() != self._process:
            raise error

    def _answered(self, how: str = "", status: int = OK) -> int:
        """Print the answer; return its exit status.

        Args:
            how: the script ended, where we did not end it.
            status: with which it did.
        """
        from gaccum_exp.audit.check.answer import answer, windows_in_words

        loop, watched = self._loop, self._watched
        judged = len(watched.windows)
        if loop.raised:
            each = " of each optimizer" if len(loop.groups) > 1 else ""
            asked = f"as --windows {self._given.windows}{each} asks"
            how = f"was ended after {windows_in_words(judged)}, {asked}"
        elif status:
            how += f", after {windows_in_words(judged)} of {self._given.windows}"
        print(f"\ngaccum_exp check: {self._name} {how}.\n")
        print("\n".join(answer(loop, watched, failed=bool(status))))
        if not watched.windows:
            print(self._why_nothing())
        elif not self._given.no_cost and status != INTERRUPTED:
            _flush()
            self._print_cost()
        if watched.windows and (self._given.noise or not self._given.no_cost):
            print(f"\nIs so large a batch worth it? {self._worth()}")
        return VERDICT_STATUS.get(watched.worst.verdict, OK)

    def _why_nothing(self) -> str:
        if self._loop.steps:
            return (
                "Optimizer steps were taken, but none after a call of a module in this thread: put "
                "`with gaccum_exp.watch(model, criterion, optimizer):` around the training step."
            )
        if _of_children_s() - self._of_children_s > CHILDREN_S:
            return (
                "It has run processes of its own, in which nothing is seen: let it train in one, or "
                "put `with gaccum_exp.watch():` around the training step there."
            )
        return (
            "Only steps of torch.optim.Optimizer, and of classes with step, zero_grad and param_groups, "
            "are seen, in the main thread: put the update into one, or accumulate by "
            "gaccum_exp.accumulate_gradients."
        )

    def _group(self) -> "Group":
        """Return the optimizers with the most parameters, whose windows stand for all."""
        judged = [group for group in self._loop.groups.values() if group.windows]
        return max(judged, key=lambda group: group.parameters)

    def _print_cost(self) -> None:
        from gaccum_exp.audit.check.answer import cost
        from gaccum_exp.audit.check.cost import cost_of

        every = [group for group in self._loop.groups.values() if group.windows]
        group = self._group()
        print()
        if group.captured is None:
            print(f"Memory and time: not known, {group.not_captured or 'as no window could be kept'}.")
            return
        if len(every) > 1:
            print(f"Of {' + '.join(group.optimizers)} for {' + '.join(group.modules)} alone:")
        audits = [self._watched.windows[place] for place in group.windows]
        try:
            plan = cost_of(
                group.captured,
                self._given.memory_budget_gib,
                equal_parts=audits[-1].reduction == "mean",
            )
        except Exception as error:  # the verdict stands all the same
            why = f"{type(error).__name__}: {first_line(error)}"
            print(f"Memory and time: not known, the window could not be run at another N ({why}).")
            return
        print("\n".join(cost(plan, group, compiled=self._loop.compiled)))

    def _worth(self) -> str:
        """Return on which side of the noise scale the script's windows are; else what would tell."""
        from gaccum_exp.audit.check.answer import windows_in_words
        from gaccum_exp.report.text.noise_notes import say_worth

        elsewhere = (
            "Train the script at several batches, with equal samples and a rate of its own for each "
            "(docs/howto/compare_batches.md says what to look at)"
        )
        if not self._given.noise:
            return f"`gaccum_exp check --noise {self._name}` measures the noise scale."
        told = self._watched.adam_noise_scale or self._watched.noise_scale
        if told is None:
            why = self._watched.noise_said.removeprefix("noise scale: not measured: ")
            return f"No noise scale tells: {why}. {elsewhere}."
        batches = [sum(sizes) for sizes in self._group().sizes if sizes]
        if not batches:  # how many samples there are is not known
            return f"{self._watched.noise_said}."
        of_adam = self._watched.adam_noise_scale is not None
        windows = len(self._watched.adam_noise) if of_adam else self._watched.noise_windows
        over = windows_in_words(windows) + ", in Adam's metric" * of_adam
        value = None if math.isnan(told.value) else told.value
        batch, more = round(statistics.fmean(batches)), 4 * self._given.windows
        minutes = math.ceil(self._took_s / len(self._watched.windows) * more / 60)
        takes = f"some {minutes} minutes, as these went" if minutes > 1 else "a minute"
        settling = f"--windows {more} ({takes}), or smaller micro-batches,"
        this = f"the script's batch of {batch}{' on average' * (len(set(batches)) > 1)}"
        return say_worth((value, told.low, told.high), batch, this, over, settling)

    def _say_progress(self, judged: int, verdict: str, whose: str) -> None:
        """Say now and then how far it is, where that takes long: all windows since it was last said."""
        self._unsaid.append(
            f"window {judged} of {self._given.windows}{whose and f' of {whose}'} is {verdict}"
        )
        if time.monotonic() - self._said_s > PATIENCE_S:
            self._said_s = time.monotonic()
            print("gaccum_exp check:", ", ".join(self._unsaid), file=sys.stderr, flush=True)
            self._unsaid.clear()

    def _end_on_the_spot(self) -> NoReturn:
        """End a script that goes on though it was ended."""
        self._watched.left_over = 0
        status = self._answered()
        print("The script swallows its end (a bare `except`): the process is ended in its midst.")
        _flush()
        os._exit(status)


def _of_children_s() -> float:
    """Return the processor's seconds that processes of this one have taken which have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
