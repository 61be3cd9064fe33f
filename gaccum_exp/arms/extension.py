"""Values that a sweep tries besides: of a key whose best value is an end of those that were tried.

`sweep.extend=optimizer.lr` doubles or halves the learning rate, in each setting of what else is swept,
until its best value lies between two others. A best value at the end of a grid says nothing of the best.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    """Arms that are to be trained besides."""

    overrides: list[str]
    said: str


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
    if key not in swept_keys:
        varied = ", ".join(swept_keys) or "nothing"
        raise BadInputError(
            f"sweep.extend={key}: the sweep varies {varied}; give {key} some values to begin with "
            f"({key}=0.01,0.02,0.04)"
        )
    for value in values.get(key, ()):
        _number(key, str(value))


def further(runs: Iterable[RunRecord], key: str, swept_keys: Sequence[str]) -> Further | None:
    """Return the arms to be trained next; None where every best value lies between two others.

    Args:
        runs: of the sweep.
        key: whose values are to be extended.
        swept_keys: of the sweep.

    Raises:
        BadInputError: the key has a value that is no number above 0.
    """
    losses: dict[Setting, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    others = [other for other in swept_keys if other not in (key, "seed")]
    for run in runs:
        if not run.is_control and run.params:
            setting = tuple((other, _value(run, other)) for other in others)
            losses[setting][_number(key, run.params.get(key, ""))].append(_loss(run))
    asked: dict[float, list[Setting]] = defaultdict(list)
    for setting, of_values in losses.items():
        value = _next(of_values)
        if value is not None:
            asked[value].append(setting)
    if not asked:
        return None
    value, settings = next(iter(asked.items()))
    together = settings if _is_product(settings) else settings[:1]
    varied = {k: dict.fromkeys(dict(setting)[k] for setting in together) for k in others}
    named = ", ".join(f"{k}={','.join(values)}" for k, values in varied.items())
    return Further(
        [
            *(f"{k}={','.join(map(_quoted, values))}" for k, values in varied.items()),
            f"{key}={value:.8g}",
        ],
        f"sweep.extend={key}: the best value is an end of those tried{named and f' at {named}'}: "
        f"{value:.8g} is tried too",
    )


def _next(losses: dict[float, list[float]]) -> float | None:
    """Return the value to be tried next; None: the best lies inside, or nothing can be said of it."""
    means = {value: sum(of) / len(of) for value, of in losses.items()}
    best = min(means, key=lambda value: (means[value], value))
    if not math.isfinite(means[best]) or len(means) >= MOST_VALUES:
        return None
    if best == max(means):
        return best * FACTOR
    return best / FACTOR if best == min(means) else None


def _loss(run: RunRecord) -> float:
    """Return the loss at the end of a run; infinite where it diverged or failed."""
    value = run.last(metrics.EVAL_LOSS)
    value = run.last(metrics.TRAIN_LOSS) if value is None else value
    return value if run.finished and value is not None and math.isfinite(value) else math.inf


def _is_product(settings: Sequence[Setting]) -> bool:
    """Whether one command line, which varies each key by itself, names these settings and no other."""
    values = [list(dict.fromkeys(column)) for column in zip(*settings, strict=True)]
    return len(settings) == len(list(product(*values)))


def _value(run: RunRecord, key: str) -> str:
    return run.params.get(key) or run.tags.get(f"choice.{key}", "")


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise BadInputError(f"sweep.extend={key}: {text or 'null'} is no number above 0")
    return number


def _quoted(value: str) -> str:
    """Return a value as an override has it; numbers and plain words as they are."""
    plain = value.replace(".", "").replace("_", "").replace("-", "").isalnum()
    return value if plain else "'" + value.replace("'", "\\'") + "'"
