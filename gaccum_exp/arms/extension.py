"""Values that a sweep tries besides: of a key whose best value is an end of those that were tried.

`sweep.extend=optimizer.lr` doubles or halves the learning rate, in each setting of what else is swept,
until its best value lies between two others. A best value at the end of a grid says nothing of the best.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.records import RunRecord

FACTOR = 2.0
MOST_VALUES = 12
"""Of the key, in a setting: then its end is left as it is, and said."""
Setting = tuple[tuple[str, str], ...]
"""Values of the other swept keys."""


@dataclass(frozen=True, slots=True)
class Further:
    """Arms that are to be trained besides, or why none are though a best value is an end."""

    overrides: list[str]
    """Of their command; empty: nothing is to follow."""
    said: str


@dataclass(slots=True)
class _Tried:
    """The values of the key in one setting."""

    losses: dict[float, list[float]] = field(default_factory=dict)
    """A run's each; infinite where it diverged."""
    unfinished: dict[float, str | None] = field(default_factory=dict)
    """Values of which a run did not come to its end, and why; None: it is to go on."""


def require_swept(
    key: str | None, swept_keys: Sequence[str], values: Mapping[str, Iterable[object]]
) -> None:
    """Refuse to extend a key that a sweep does not vary, or that has values which are no numbers.

    Args:
        key: to be extended; None: none.
        swept_keys: of the sweep.
        values: that the command line gives to keys.

    Raises:
        BadInputError: it does not, or has.
    """
    if key is None:
        return
    if key == "seed":
        raise BadInputError(
            "sweep.extend=seed: no seed is better than another; name a key with a best value"
        )
    if key not in swept_keys:
        varied = ", ".join(swept_keys) or "nothing"
        raise BadInputError(
            f"sweep.extend={key}: the sweep varies {varied}; give {key} some values to begin with "
            f"({key}=0.01,0.02,0.04)"
        )
    for value in values.get(key, ()):
        _number(key, str(value))


def further(
    runs: Iterable[RunRecord], key: str, swept_keys: Sequence[str], arguments: Sequence[str] = ()
) -> Further | None:
    """Return the arms to be trained next; None where every best value lies between two others.

    Args:
        runs: of the sweep.
        key: whose values are to be extended.
        swept_keys: of the sweep.
        arguments: of the command that has ended, with all that was asked for since the user's own.

    Raises:
        BadInputError: the key has a value that is no number above 0.
    """
    others = [other for other in swept_keys if other not in (key, "seed")]
    tried, whole = _tried(runs, key, others)
    asked: dict[float, list[Setting]] = defaultdict(list)
    stopped: dict[str, list[Setting]] = defaultdict(list)
    for setting, of_values in tried.items():
        value = _next(of_values, whole=whole)
        if isinstance(value, str):
            stopped[value].append(setting)
        elif value is not None:
            asked[value].append(setting)
    for value, settings in asked.items():
        together = settings if _is_product(settings) else settings[:1]
        varied, named = _named(others, together)
        overrides = [*varied, f"{key}={value:.8g}"]
        if not _holds(arguments, overrides):
            said = f"the best value is an end of those tried{named}: {value:.8g} is tried too"
            return Further(overrides, f"sweep.extend={key}: {said}")
        stopped[f"{value:.8g} was asked for, and was not trained to its end"] += together
    lines = [
        f"sweep.extend={key}: ends with a best value at an end of those tried"
        f"{_named(others, [setting])[1]}: {why}"
        for why, settings in stopped.items()
        for setting in settings
    ]
    return Further([], "\n".join(lines)) if lines else None


def _tried(
    runs: Iterable[RunRecord], key: str, others: Sequence[str]
) -> tuple[dict[Setting, _Tried], bool]:
    """Return what was tried in each setting, and whether the key has been given whole numbers only."""
    tried: dict[Setting, _Tried] = defaultdict(_Tried)
    texts = set()
    for run in runs:
        if run.is_control or not run.params:  # without: its configuration was refused
            continue
        text = run.params.get(key, "")
        value, loss = _number(key, text), _loss(run)
        texts.add(text)
        of = tried[tuple((other, _value(run, other)) for other in others)]
        if loss is not None:
            of.losses.setdefault(value, []).append(loss)
        else:
            why = run.tags.get("failure", "it failed") if run.status == "FAILED" else None
            of.unfinished[value] = of.unfinished.get(value) or why
    return tried, all(text.isdigit() for text in texts)


def _next(tried: _Tried, *, whole: bool) -> float | str | None:
    """Return the value to be tried next, or why there is none; None: the best lies inside."""
    # A value some of whose seeds are missing has no mean that could be held against another's.
    means = {v: sum(of) / len(of) for v, of in tried.losses.items() if v not in tried.unfinished}
    if not means:
        return "none has been trained to its end"
    best = min(means, key=lambda value: (means[value], value))
    if not math.isfinite(means[best]):
        value = min(means) / FACTOR
    elif best == max(means):
        value = best * FACTOR
    elif best == min(means):
        value = best / FACTOR
    else:
        return None
    for other, why in tried.unfinished.items():
        if why is not None and math.isclose(other, value):
            return f"{other:.8g} has failed ({why})"
    if len(means) >= MOST_VALUES:
        return f"{len(means)} values were tried" + (
            "" if math.isfinite(means[best]) else ", all diverged"
        )
    if whole and value != int(value):
        return f"the key has whole numbers, and {value:.8g} is none"
    return value


def _loss(run: RunRecord) -> float | None:
    """Return the loss at the end of a run; infinite where it diverged, None where it has no end."""
    if run.diverged:
        return math.inf
    if not run.finished:
        return None
    value = run.last(metrics.EVAL_LOSS)
    value = run.last(metrics.TRAIN_LOSS) if value is None else value
    return value if value is not None and abs(value) < metrics.INFINITE else math.inf


def _named(others: Sequence[str], settings: Sequence[Setting]) -> tuple[list[str], str]:
    """Return what varies the other keys over these settings, as overrides and as ` at k=1,2, l=a`."""
    columns = {key: dict.fromkeys(dict(setting)[key] for setting in settings) for key in others}
    overrides = [f"{key}={','.join(map(_as_override, values))}" for key, values in columns.items()]
    return overrides, f" at {', '.join(overrides)}" if overrides else ""


def _holds(arguments: Sequence[str], overrides: Sequence[str]) -> bool:
    """Whether a command has asked for these overrides, which stand there one after the other."""
    count = len(overrides)
    starts = range(len(arguments) - count + 1)
    return any(list(arguments[i : i + count]) == list(overrides) for i in starts)


def _is_product(settings: Sequence[Setting]) -> bool:
    """Whether one command line, which varies each key by itself, names these settings and no other."""
    values = [list(dict.fromkeys(column)) for column in zip(*settings, strict=True)]
    return len(settings) == len(list(product(*values)))


def _value(run: RunRecord, key: str) -> str:
    """Return a swept key's value as it is recorded; a mapping's as `{0:1,1:4}`."""
    found = run.params.get(key) or run.tags.get(f"choice.{key}")
    if found is not None:
        return found
    inside = {k.removeprefix(f"{key}."): v for k, v in run.params.items() if k.startswith(f"{key}.")}
    return "{" + ",".join(f"{k}:{_as_override(v)}" for k, v in inside.items()) + "}" if inside else ""


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise BadInputError(f"sweep.extend={key}: {text or 'null'} is no number above 0")
    return number


def _as_override(text: str) -> str:
    """Return a recorded value as the command line has it: lists, mappings and plain words unquoted."""
    if text == "None":
        return "null"
    plain = text.replace(".", "").replace("_", "").replace("-", "").isalnum()
    if plain or (text[:1] + text[-1:] in ("[]", "{}")):
        return text
    return "'" + text.replace("'", "\\'") + "'"
