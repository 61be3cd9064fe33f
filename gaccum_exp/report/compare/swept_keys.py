"""What else was swept besides N, and how to say it in few words.

A sweep over seeds or models has config keys that differ between its arms. Some of them only follow
others (an evaluation seed interpolated from `seed`, the options of a model that was swapped); one
key of each kind is enough to tell the arms apart.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gaccum_exp.report.compare.pairing import config_of
from gaccum_exp.tracking.records import RunRecord


@dataclass(frozen=True, slots=True)
class Swept:
    """Where an arm stands in its sweep, apart from N: reduction and other swept values."""

    reduction: str | None
    values: tuple[tuple[str, str], ...] = ()
    """(short key, value), e.g. (("norm", "batch"), ("seed", "1"))."""

    @property
    def text(self) -> str:
        """The other swept values: `norm=batch, seed=1`."""
        return _say(self.values)

    @property
    def text_but_seed(self) -> str:
        """The same without the seed: arms that agree on it are repetitions of one experiment."""
        return _say(tuple(pair for pair in self.values if pair[0] != "seed"))

    @property
    def label(self) -> str:
        """Reduction and other values: `mean, norm=batch, seed=1`."""
        return ", ".join(part for part in (self.reduction or "?", self.text) if part)

    @property
    def repeated_label(self) -> str:
        """The label that all seeds share: `mean, norm=batch`."""
        return ", ".join(part for part in (self.reduction or "?", self.text_but_seed) if part)


def swept_keys(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the config keys that tell `runs` apart, dotted -> as short as is unambiguous."""
    configs = [config_of(run) for run in runs if run.params]
    names = {key for config in configs for key in config} - {"accum.reduction"}
    columns = {key: tuple(config.get(key) for config in configs) for key in names}
    varying = {key: column for key, column in columns.items() if len(set(column)) > 1}
    choices = [key for key in varying if _is_choice(key)]
    speaking: dict[tuple[str | None, ...], str] = {}
    for key in sorted(varying, key=_shortness):
        if not any(_follows(key, choice, varying) for choice in choices):
            # Equal columns are one key interpolated into another: the first speaks for both.
            speaking.setdefault(varying[key], key)
    kept = sorted(speaking.values())
    leaves = Counter(_leaf(key) for key in kept)
    return {key: _leaf(key) if leaves[_leaf(key)] == 1 else key for key in kept}


def swept_values(run: RunRecord, keys: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return (short key, value) of `run` for the keys that its config has."""
    return tuple(
        (short, _short_value(key, run.params[key])) for key, short in keys.items() if key in run.params
    )


def sort_key(setting: Swept) -> tuple[tuple[str | float, ...], ...]:
    """Order settings by reduction, then by value: seeds 2 and 10 as numbers, not as text."""
    return (_natural(setting.reduction or ""), *(_natural(value) for _, value in setting.values))


def _say(values: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values)


def _leaf(key: str) -> str:
    """`optimizer.lr` -> `lr`, and `model._target_` -> `model`."""
    return _block(key) if _is_choice(key) else key.rpartition(".")[2]


def _short_value(key: str, value: str) -> str:
    return value.rpartition(".")[2] if key.endswith("_target_") else value


def _shortness(key: str) -> tuple[bool, bool, int, str]:
    """Order keys by how well they speak: the seed, then a block's choice, then the shortest."""
    return (key != "seed", not _is_choice(key), len(key), key)


def _is_choice(key: str) -> bool:
    """Whether the key says which class or named model a block holds."""
    return key.endswith(("._target_", ".name"))


def _follows(key: str, choice: str, varying: Mapping[str, tuple[str | None, ...]]) -> bool:
    """Whether `key` is an option of `choice`'s block whose value the choice alone decides."""
    if key == choice or _block(key) != _block(choice):
        return False
    if _is_choice(key) and _shortness(key) < _shortness(choice):
        return False
    chosen = varying[choice]
    return len(set(zip(chosen, varying[key], strict=True))) == len(set(chosen))


def _block(key: str) -> str:
    return key.partition(".")[0]


def _natural(text: str) -> tuple[str | float, ...]:
    parts = re.split(r"(\d+)", text)
    return tuple(float(part) if index % 2 else part for index, part in enumerate(parts))
