"""A sweep that goes on: which one it is, which of its arms there are, and what is left at the end.

`sweep.resume` and `sweep.into` name a sweep that an earlier command has begun. Its folder, its id and
its store stay; the arms of the command line of now are matched with those that are there by what they
are, their configuration, whatever numbers the launcher gives them. One that has ended is answered from
its outcome; one that was interrupted, or whose process died, is run in the folder that it has; a new one
gets a folder below one that is named after the command, so that nothing collides.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig

from gaccum_exp.arms.context import Command, KnownArm
from gaccum_exp.arms.outcome import RUNNING, Outcome, outcomes_in_store, read_outcomes
from gaccum_exp.arms.resume import NEVER
from gaccum_exp.errors import BadInputError, StoreAwayError, complain, hide_passwords, nearest
from gaccum_exp.tracking.journal import (
    beginning,
    has_end,
    is_of_this_host,
    journals_below,
    last_owner,
)
from gaccum_exp.tracking.locks import FileLock
from gaccum_exp.tracking.notes import write_note
from gaccum_exp.tracking.read_back import Journals
from gaccum_exp.train.stopping import StoppedError

COMMAND_FILE, COMMAND_LOCK = "command.json", "command.lock"
KEYS = ("sweep.resume", "sweep.into", "sweep.rerun_failed", "sweep.extend")
"""What only the command is told, and not its arms."""
LONGEST = 5000
"""Characters of a line that a tag can hold."""
HELPER_S = 1.0
"""So long a lock may be held by who delivers a journal, or looks whether it is held."""
ENDING_S = 10.0
"""So long the arms of a command that was killed may take to notice."""


@dataclass(frozen=True, slots=True)
class SweepNote:
    """What the last command of a sweep has written to the sweep's folder."""

    sweep_id: str
    command_id: str
    begun_s: float
    """When, in seconds since 1970."""
    whole: bool = False
    """Whether it has come to its end, with every arm."""
    swept_keys: list[str] = field(default_factory=list)
    """Of all commands so far."""
    arms: list[str] = field(default_factory=list)
    """The folders, in the sweep's, of the arms that its commands have counted at their ends."""
    uncounted: bool = False
    """Whether there may be others: its launcher shares no folder with the command, which is not over."""
    stopped: tuple[str, int] | None = None
    """Why the command was asked to end, and its exit status: no other arm begins."""

    @classmethod
    def of(cls, folder: Path) -> "SweepNote | None":
        """Read what a folder has; None where it has nothing that can be read."""
        try:
            return cls(**json.loads((folder / COMMAND_FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write it.

        Raises:
            OSError: it cannot be written.
        """
        write_note(folder / COMMAND_FILE, asdict(self))


@dataclass(frozen=True, slots=True)
class Continued:
    """A sweep that this command goes on with."""

    sweep_id: str
    folder: Path
    asked: str
    """How it was named: `sweep.resume=last`."""
    swept_keys: list[str]
    uri: str | None
    """Of its store."""
    experiment_name: str | None
    outcomes: Mapping[Path, Outcome]
    """How its arms ended, by folder, which need not be here."""
    lock: FileLock | None = None
    """Held for as long as the command lives: no other one goes on with the sweep meanwhile."""

    @property
    def places(self) -> list[str]:
        """The folders of its arms, in its own."""
        return [str(arm.relative_to(self.folder)) for arm in self.outcomes]

    def known(self, *, rerun_failed: bool) -> dict[str, KnownArm]:
        """Return its arms by digest: those that have ended for good, and those that are to go on.

        One that has failed of its own fault, its input or its model, has ended unless it is asked for.
        """
        found: dict[str, KnownArm] = {}
        for folder, outcome in self.outcomes.items():
            goes_on = outcome.again or outcome.status == RUNNING
            goes_on |= rerun_failed and outcome.status == "FAILED"
            status = None if goes_on else outcome.status
            place = str(folder.relative_to(self.folder))
            arm = KnownArm(
                place, outcome.name, status, outcome.objective,
                outcome.reason, outcome.verdict, outcome.audit_asked,
            )  # fmt: skip
            other = found.get(outcome.digest or "")
            # Of two that are the same, the one that has ended answers.
            if outcome.digest and (other is None or other.status is None):
                found[outcome.digest] = arm
        return found


def asked_for(config: DictConfig, overrides: Sequence[Override], now_id: str) -> Continued | None:
    """Return the sweep that a command is to go on with; None: it begins one of its own.

    Args:
        config: as composed for the sweep, under the id that a new one would have.
        overrides: of the command line.
        now_id: that id.

    Raises:
        BadInputError: there is none, it is running, or several are named.
    """
    for override in overrides:
        if override.get_key_element().lstrip("+") in KEYS and override.is_sweep_override():
            raise BadInputError(f"{override.input_line}: one value, since a command has one sweep")
    asked = {f"sweep.{key}": getattr(config.sweep, key) for key in ("resume", "into")}
    given = [f"{key}={value}" for key, value in asked.items() if value is not None]
    if not given:
        if config.sweep.rerun_failed:
            raise BadInputError(
                "sweep.rerun_failed=true: of no sweep; sweep.resume=last, or its id, says of which"
            )
        return None
    if len(given) > 1:
        raise BadInputError(f"{given[0]} and {given[1]} both name a sweep: leave one of them out")
    ((key, name),) = ((key, str(value)) for key, value in asked.items() if value is not None)
    places = _sweeps_beside(Path(config.hydra.sweep.dir), now_id)
    if key == "sweep.resume" and name == "last":
        sweep_id = _last(places, given[0], rerun_failed=config.sweep.rerun_failed)
    elif name in places:
        sweep_id = name
    else:
        there = f" ({len(places)} there{nearest(name, places)})" if places else ""
        raise BadInputError(f"{given[0]}: no such sweep in {_place(config, now_id)}{there}")
    folder = Path(os.path.abspath(places[sweep_id]))
    lock = _lock_of(folder)
    if lock is None:
        raise BadInputError(f"{given[0]}: another command goes on with it; wait for its end, or end it")
    try:
        running = _running(folder, sweep_id)
        if running is not None:
            raise BadInputError(f"{given[0]}: {running}")
        note = SweepNote.of(folder)
        store: tuple[str | None, str | None] = Journals(folder).store() or (None, None)
        outcomes = _arms_of(folder, sweep_id, store, given[0])
    except BaseException:
        lock.release()
        raise
    swept_keys = [] if note is None else note.swept_keys
    return Continued(sweep_id, folder, given[0], swept_keys, *store, outcomes, lock)


def refuse_without_sweep(config: DictConfig) -> None:
    """Refuse a single run that is to go on with a sweep.

    Raises:
        BadInputError: it is.
    """
    for key in ("resume", "into", "rerun_failed", "extend"):
        value = config.sweep.get(key)
        if value not in (None, False):
            said = "true" if value is True else value
            raise BadInputError(
                f"sweep.{key}={said}: a single run is no sweep; add -m, with the arms that are meant "
                "(-m accum.steps=1,2,4)"
            )


def _place(config: DictConfig, now_id: str) -> Path:
    folder = Path(config.hydra.sweep.dir)
    return folder.parent if now_id in folder.name else folder


def _sweeps_beside(folder: Path, now_id: str) -> dict[str, Path]:
    """Return the folders of the sweeps that stand where a new one would, by id, the oldest first."""
    found: list[tuple[float, str, Path]] = []
    beside = folder.parent.glob("*") if now_id in folder.name else [folder]
    for place in beside:
        note = SweepNote.of(place)
        if note is not None:
            found.append((note.begun_s, note.sweep_id, place))
    return {sweep_id: place for _, sweep_id, place in sorted(found)}


def _last(places: Mapping[str, Path], asked: str, *, rerun_failed: bool) -> str:
    def has_failed(sweep_id: str) -> bool:
        return any(o.status == "FAILED" for o in read_outcomes(places[sweep_id], sweep_id).values())

    notes = {sweep_id: SweepNote.of(place) for sweep_id, place in places.items()}
    noted = {sweep_id: note for sweep_id, note in notes.items() if note is not None}
    unfinished = [i for i, note in noted.items() if not note.whole or (rerun_failed and has_failed(i))]
    if not unfinished:
        failed = any(map(has_failed, noted))
        again = "; sweep.rerun_failed=true runs the arms again that failed" if failed else ""
        raise BadInputError(f"{asked}: no sweep is unfinished ({len(places)} there{again})")
    # Where another one is running, that is not the one that is meant, unless there is no other.
    return next((i for i in reversed(unfinished) if not _held(places[i])), unfinished[-1])


def _held(folder: Path) -> bool:
    """Whether a command of a sweep is running: it holds the sweep's lock, or that of its journal."""
    return _is_locked(folder / COMMAND_LOCK) or any(map(_is_held, folder.glob("journal*.jsonl")))


def _lock_of(folder: Path) -> FileLock | None:
    """Take the lock of a sweep; None: a command that goes on with it lives."""
    until = time.monotonic() + HELPER_S
    while (lock := FileLock.take(folder / COMMAND_LOCK)) is None:
        if time.monotonic() > until:
            return None
        time.sleep(0.02)
    return lock


def _is_held(journal: Path) -> bool:
    return not has_end(journal) and _is_locked(journal.with_suffix(".lock"))


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    lock = FileLock.take(path)
    if lock is None:
        return True
    lock.release()
    return False


def _running(folder: Path, sweep_id: str) -> str | None:
    """Say what of a sweep is running; wait for arms to end whose command is gone already."""
    start = time.monotonic()
    while True:
        held = {path.parent for path in journals_below(folder) if _is_held(path)}
        held |= {arm for arm, o in read_outcomes(folder, sweep_id).items() if _lives(o)}
        if not held:
            break
        own = folder in held
        if time.monotonic() - start > (HELPER_S if own else ENDING_S):
            arms = ", ".join(sorted(str(arm.relative_to(folder)) for arm in held))
            what = "it is" if own else f"its arm in {arms} is" if len(held) == 1 else f"{arms} are"
            return f"{what} running; wait for its end, or end it"
        time.sleep(0.1)
    for path in journals_below(folder):
        _, begin = beginning(path)
        if begin and not has_end(path) and not is_of_this_host(last := last_owner(path)):
            return (
                f"{begin['name']} is of {last.get('host')}, which may still run it; if it does not: "
                f"python -m gaccum_exp deliver --end-stale {shlex.quote(os.path.relpath(folder))}"
            )
    return None


def _lives(outcome: Outcome) -> bool:
    """Whether the process that an arm was given to is alive, and still one of this program's."""
    if not outcome.runs_here:
        return False
    try:
        return b"gaccum_exp" in Path(f"/proc/{outcome.process}/cmdline").read_bytes()
    except OSError:
        return False


def _arms_of(
    folder: Path, sweep_id: str, store: tuple[str | None, str | None], asked: str
) -> dict[Path, Outcome]:
    """Return how the arms of a sweep ended, here or elsewhere.

    Raises:
        BadInputError: what became of some is not known, or one may be running.
    """
    here, (uri, experiment_name) = read_outcomes(folder, sweep_id), store
    if uri is None or experiment_name is None or (here and not lacks(folder, sweep_id, here)):
        return here
    try:
        found = with_those_elsewhere(folder, sweep_id, here, uri, experiment_name)
    except StoreAwayError as error:
        raise BadInputError(f"{asked}: arms of it may have run elsewhere, and {error}") from None
    for arm in found.keys() - here.keys():
        if found[arm].status == RUNNING:
            raise BadInputError(
                f"{asked}: {found[arm].name} left no folder here and is RUNNING in the store, on "
                f"{found[arm].host}; wait for its end; if it is dead, end it where its folder is "
                f"(python -m gaccum_exp deliver --end-stale {shlex.quote(os.path.relpath(arm))}), or "
                "delete its run in MLflow"
            )
    return found


def lacks(folder: Path, sweep_id: str, here: Iterable[Path]) -> bool:
    """Whether a sweep has arms, or may have, that are not among these, whose folders are here."""
    note = SweepNote.of(folder)
    if note is None or note.sweep_id != sweep_id:
        return False
    return note.uncounted or not {folder / place for place in note.arms} <= set(here)


def with_those_elsewhere(
    folder: Path, sweep_id: str, here: Mapping[Path, Outcome], uri: str, experiment_name: str
) -> dict[Path, Outcome]:
    """Return the arms that are here and, from the store, those that are not.

    An arm is the same where its folder is, or its configuration. One that is here counts, unless it has
    finished elsewhere alone.

    Raises:
        BadInputError: the store cannot be used.
        StoreAwayError: it does not answer.
    """
    found, digests = dict(here), {outcome.digest for outcome in here.values()}
    for place, outcome in outcomes_in_store(uri, experiment_name, sweep_id).items():
        before = here.get(folder / place)
        if before is None:
            counts = outcome.digest is None or outcome.digest not in digests
        else:
            counts = outcome.status == "FINISHED" != before.status
        if counts:
            found[folder / place] = outcome
    return found


def note_arms(
    folder: Path, command_id: str, outcomes: Mapping[Path, Outcome], planned: int | None
) -> None:
    """Note the arms that a sweep has at the end of a command, for whoever looks for them later."""
    note = SweepNote.of(folder)
    if note is None or note.command_id != command_id:
        return
    places = {str(arm.relative_to(folder)) for arm in outcomes}
    _, never = what_is_left(outcomes, command_id, planned)
    uncounted = note.uncounted and never != 0
    with suppress(OSError):
        replace(note, arms=sorted(places.union(note.arms)), uncounted=uncounted).write(folder)


def note_stopped(folder: Path, asked: StoppedError) -> None:
    """Note for launchers' workers that a command was asked to end."""
    note = SweepNote.of(folder)
    if note is not None:
        with suppress(OSError):
            replace(note, stopped=(asked.reason, asked.status)).write(folder)


def look(folder: Path | None, command_id: str) -> None:
    """Look whether a command still wants a job that is about to begin in a launcher's worker.

    Raises:
        StoppedError: it was asked to end, or the sweep goes on in another command.
    """
    note = None if folder is None else SweepNote.of(folder)
    if note is None:
        return
    if note.command_id != command_id:
        complain("the sweep goes on in another command: this one ends")
        raise StoppedError("the sweep goes on in another command", 143)
    if note.stopped is not None:
        raise StoppedError(*note.stopped)


def remove_job_folder(folder: Path, arms: Sequence[Path]) -> None:
    """Remove what Hydra has written for a job whose arms are all somewhere else."""
    if not any(arm.is_relative_to(folder) for arm in arms):
        shutil.rmtree(folder, ignore_errors=True)


def what_is_left(
    outcomes: Mapping[Path, Outcome], command_id: str, planned: int | None
) -> tuple[int, int | None]:
    """Return how many arms of a command did not come to their end, and how many never started."""
    own = [outcome for outcome in outcomes.values() if outcome.command_id == command_id]
    unfinished = sum(outcome.again or outcome.status == RUNNING for outcome in own)
    return unfinished, None if planned is None else max(0, planned - len(own))


def say_left(unfinished: int, never: int | None, planned: int | None) -> str:
    """`1 arm did not finish, 2 of 4 never started`."""
    parts = []
    if unfinished:
        parts.append(f"{unfinished} arm{'s' if unfinished > 1 else ''} did not finish")
    if never == unfinished == 0:
        parts.append("every arm has ended, and the comparison has not")
    elif never is None:
        parts.append("how many never started is not known here")
    elif never or not parts:
        parts.append(f"{never} of {planned} never started")
    return ", ".join(parts)


def command_line(command: Command, sweep_id: str) -> str:
    """Return the user's own line, for the shell or for Python, with what makes it go on with a sweep."""
    arguments, goes_on = command.arguments, f"sweep.resume={sweep_id}"
    if command.caller is not None:
        kept = going_on(_of_no_sweep(command.caller.overrides))
        return replace(command.caller, overrides=tuple(kept)).call(goes_on)
    return shlex.join([*program(arguments), *going_on(_of_no_sweep(arguments)), goes_on])


def as_asked(command: Command) -> str:
    """Return the line that asked for a command: of Python code that has handed over objects its call."""
    caller = command.caller
    if caller is None or not caller.handed_over:
        return as_typed(command.arguments)
    own = replace(caller, overrides=tuple(map(hide_passwords, _of_no_sweep(caller.overrides))))
    return line if len(line := own.call()) <= LONGEST else ""


def as_typed(arguments: Sequence[str]) -> str:
    """Return the user's own line, for the shell, as it begins a sweep; empty where no tag can hold it.

    Passwords in addresses are left out.
    """
    line = shlex.join([*program(arguments), *map(hide_passwords, _of_no_sweep(arguments))])
    return line if len(line) <= LONGEST else ""


def with_further_arms(arguments: Sequence[str], sweep_id: str, overrides: Sequence[str]) -> list[str]:
    """Return the arguments of a command that adds arms to a sweep: those of these overrides."""
    return [*going_on(_of_no_sweep(arguments)), *overrides, f"sweep.into={sweep_id}"]


def _of_no_sweep(arguments: Sequence[str]) -> list[str]:
    return [a for a in arguments if _key_and_value(a)[0] not in ("sweep.resume", "sweep.into")]


def going_on(arguments: Sequence[str]) -> list[str]:
    """Return arguments without `resume=never`, however it is spelled: with it nothing goes on."""
    return [a for a in arguments if _key_and_value(a) != ("resume", NEVER)]


def _key_and_value(argument: str) -> tuple[str, str]:
    """Return the key of an override and its value as text, both empty for anything else."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return "", ""
    value = override.value()
    text = value.text if isinstance(value, QuotedString) else str(value)
    return override.get_key_element().lstrip("+"), text


def program(arguments: Sequence[str]) -> list[str]:
    """Return how this program was called, without its arguments."""
    line: Any = sys.orig_argv
    before = line[: len(line) - len(arguments)]
    if line[len(before) :] == list(arguments) and before[-2:] == ["-m", "gaccum_exp"]:
        return list(before)
    name = Path(sys.argv[0]).name
    return [name] if name in ("gaccum_exp", "gaccum-exp") else ["python", "-m", "gaccum_exp"]
