"""The command line as it was given, before Hydra sees it: flags, and overrides.

Hydra's own parser ends the process with a page of usage, takes any beginning of a flag for the flag,
and ignores a flag that does nothing. What is passed on to it here is spelled out and fits together.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

from gaccum_exp.errors import BadInputError, nearest

WORDS = ("check", "report", "deliver")
"""Commands beside the runner."""
_FLAGS: dict[str, tuple[str, str]] = {
    "--help": ("-h", ""),
    "--version": ("", ""),
    "--multirun": ("-m", ""),
    "--run": ("-r", ""),
    "--cfg": ("-c", "job, hydra or all"),
    "--resolve": ("", ""),
    "--package": ("-p", "a block, such as optimizer"),
    "--info": ("-i", "all, config, defaults, defaults-tree, plugins or searchpath"),
    "--hydra-help": ("", ""),
    "--config-dir": ("-cd", "a folder"),
    "--config-name": ("-cn", "a file's name"),
    "--config-path": ("-cp", "a folder"),
    "--shell-completion": ("-sc", ""),
    "--experimental-rerun": ("", "a file"),
}
"""Hydra's flags: the short form, and what value they take; none where that is empty."""
_SHORT = {short: flag for flag, (short, _) in _FLAGS.items() if short}
_DO = ("--run", "--multirun", "--cfg", "--info", "--shell-completion")
"""Of these a command is told one, and of what shows something first of all."""
_SHOW = ("--help", "--hydra-help")
_PLAIN = re.compile(r"(?!(?:null|true|false|inf|nan)$)[a-z_][\w./-]*", re.IGNORECASE | re.ASCII)
"""A text that needs no quotes."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line that fits together."""

    flags: dict[str, str | None]
    """By their long form, with their values."""
    overrides: tuple[str, ...]

    @property
    def multirun(self) -> bool:
        """Whether `-m` asks for a sweep."""
        return "--multirun" in self.flags and not any(flag in self.flags for flag in _SHOW)

    @property
    def only_shows(self) -> bool:
        """Whether nothing is to be run."""
        return any(flag in self.flags for flag in (*_SHOW, *_DO[2:], "--version"))

    @property
    def for_hydra(self) -> list[str]:
        """The same as Hydra's parser takes it."""
        given = [flag if value is None else f"{flag}={value}" for flag, value in self.flags.items()]
        return [*given, "--", *self.overrides] if self.overrides else given


def command_line(arguments: Sequence[str]) -> CommandLine:
    """Tell flags from overrides.

    Raises:
        BadInputError: a flag that there is not, that does not fit to another one, or that is refused.
    """
    flags: dict[str, str | None] = {}
    overrides: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        _check_encoding(argument)
        if argument == "--":
            overrides += left
            break
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        name, equals, value = argument.partition("=")
        flag = _SHORT.get(name, name)
        if flag not in _FLAGS:
            known = nearest(name, (*_FLAGS, *_SHORT))
            raise BadInputError(f"{argument}: no such flag{known} (--help)")
        takes = _FLAGS[flag][1]
        if equals and not takes:
            raise BadInputError(f"{argument}: {flag} takes no value")
        if takes and not equals:
            if flag == "--info" and (not left or left[0] not in _choices(flag)):
                value = "all"
            elif not left or left[0].startswith("-"):
                raise BadInputError(f"{flag}: takes {takes}, which is not given")
            else:
                value = left.pop(0)
                _check_encoding(value)
        flags[flag] = value if takes else None
    for override in overrides:
        _check_encoding(override)
    _check(flags)
    return CommandLine(flags, tuple(overrides))


def quoted(value: str) -> str:
    """Return a text as Hydra's overrides have it."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (m[2] and "\\'"), value)
    return f"'{escaped}'"


def written(value: object) -> str:
    """Return a value as an override has it: `null`, `true`, `[1,2]`, `'a text'`.

    Raises:
        TypeError: it is none that a configuration can hold.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else quoted(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(written, value))}]"
    raise TypeError(f"a configuration cannot hold {type(value).__name__}")


def _choices(flag: str) -> list[str]:
    return _FLAGS[flag][1].replace(" or ", ", ").split(", ")


def _check_encoding(argument: str) -> None:
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise BadInputError(f"{argument}: is not text in UTF-8") from None


def _check(flags: dict[str, str | None]) -> None:
    """Refuse flags that do nothing together, or do harm."""
    if "--experimental-rerun" in flags:
        raise BadInputError(
            f"--experimental-rerun={flags['--experimental-rerun']}: is refused, since it runs whatever "
            "code that file holds; give the command line again (.hydra/overrides.yaml holds it)"
        )
    told = [flag for flag in _DO if flag in flags]
    if len(told) > 1:
        raise BadInputError(f"{' and '.join(told)} are both what to do: give one of them")
    for flag, needed in (("--resolve", ("--cfg",)), ("--package", ("--cfg",))):
        if flag in flags and not any(other in flags for other in needed):
            raise BadInputError(f"{flag}: goes with {' or '.join(needed)}, which is not given")
    for flag in ("--cfg", "--info"):
        value, choices = flags.get(flag), _choices(flag)
        if value is not None and value not in choices:
            raise BadInputError(
                f"{flag}={value}: not one of {', '.join(choices)}{nearest(value, choices)}"
            )
    for flag in ("--config-dir", "--config-path"):
        folder = flags.get(flag)
        if folder is None or "://" in folder:
            continue
        if not Path(folder).is_dir():
            raise BadInputError(f"{flag}={folder}: there is no such folder")
        flags[flag] = str(Path(folder).absolute())  # Hydra would look for the second in the package
