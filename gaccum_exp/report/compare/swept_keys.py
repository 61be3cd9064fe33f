"""Find the config keys that a sweep varies besides N, and name them in few words.

Some only follow others (an evaluation seed interpolated from `seed`, the options of a model that was
swapped); one key of each kind tells the arms apart.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gaccum_exp.tracking.records import RunRecord

UNKNOWN = "?"
"""The reduction of an arm that ended before its configuration was recorded."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where an arm stands in its sweep, apart from N: reduction and other swept values."""

    reduction: str | None
    values: tuple[tuple[str, str], ...] = ()
    """(short key, value), e.g. (("norm", "batch"), ("seed", "1"))."""

    @property
    def text(self) -> str:
        """The other swept values: `norm=batch, seed=1`."""
        return ", ".join(f"{key}={value}" for key, value in self.values)

    @property
    def label(self) -> str:
        """Reduction and other values: `mean, norm=batch, seed=1`."""
        return ", ".join(part for part in (self.reduction or UNKNOWN, self.text) if part)

    @property
    def repeated_label(self) -> str:
        """The label that all seeds share: those that differ in it alone repeat one experiment."""
        return replace(self, values=tuple(pair for pair in self.values if pair[0] != "seed")).label

    @property
    def order(self) -> tuple[tuple[str | float, ...], ...]:
        """A sort key: reduction, then values, 2 and 10, 1e-05 and 0.1 as numbers, not as text."""
        texts = (self.reduction or "", *(value for _, value in self.values))
        split = (enumerate(re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)) for text in texts)
        return tuple(tuple(float(part) if i % 2 else part for i, part in parts) for parts in split)


def swept_keys(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the config keys that tell `runs` apart, dotted -> as short as is unambiguous."""
    configs = [run.training_config for run in runs if run.params]
    names = {key for config in configs for key in config} - {"accum.reduction"}
    values = {key: tuple(config.get(key) for config in configs) for key in names}
    varying = {key: column for key, column in values.items() if len(set(column)) > 1}
    selectors = [key for key in varying if _is_selector(key)]
    named: dict[tuple[str | None, ...], str] = {}
    for key in sorted(varying, key=_shortness):
        if not any(_follows(key, selector, varying) for selector in selectors):
            # Equal values are one key interpolated into another: the first stands for both.
            named.setdefault(varying[key], key)
    kept = sorted(named.values())
    leaves = Counter(_leaf(key) for key in kept)
    return {key: _leaf(key) if leaves[_leaf(key)] == 1 else key for key in kept}


def swept_values(run: RunRecord, keys: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return (short key, value) of `run` for the keys that its config has.

    A block is said by the file that was chosen, a class that was chosen by itself by its bare name.
    """
    typed = dict(line.split("=", 1) for line in run.overrides if "=" in line)

    def said(key: str) -> str:
        if not key.endswith("._target_"):
            return run.params[key]
        by_file = typed.get(_block(key)) if key not in typed else None
        return by_file or run.params[key].rpartition(".")[2]

    return tuple((short, said(key)) for key, short in keys.items() if key in run.params)


def _leaf(key: str) -> str:
    # `optimizer.lr` -> `lr`, and `model._target_` -> `model`.
    return _block(key) if _is_selector(key) else key.rpartition(".")[2]


def _shortness(key: str) -> tuple[bool, bool, int, str]:
    # The seed tells most, then a block's selector, then the shortest key.
    return (key != "seed", not _is_selector(key), len(key), key)


def _is_selector(key: str) -> bool:
    # It says which class or named model a block holds.
    return key.endswith(("._target_", ".name"))


def _follows(key: str, selector: str, varying: Mapping[str, tuple[str | None, ...]]) -> bool:
    """Whether `key` is an option of `selector`'s block whose value the selector alone decides."""
    leads = _is_selector(key) and _shortness(key) < _shortness(selector)
    if key == selector or leads or _block(key) != _block(selector):
        return False
    selected = varying[selector]
    return len(set(zip(selected, varying[key], strict=True))) == len(set(selected))


def _block(key: str) -> str:
    return key.partition(".")[0]
