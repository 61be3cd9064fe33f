"""Pair every arm with its reference: the one-pass run with the same config and global batch.

Arms whose configs differ only in how the global batch is split form a group, and a group has one
reference: its finished arm with N = 1. Where the sweep holds none, these are tried in turn:

1. N = 1 of the other mean: in one pass `mean` and `global_mean` are the same gradient (`sum` is not);
2. a finished N = 1 run from the store, on the same device and data, the most recent one;
3. a stand-in: the group's finished arm with the largest micro-batch, if there are two to compare.

Controls, one-pass runs in which the order inside each window was permuted, are neither arms nor
references, whether the reference finished or not. They go with every group whose reference has their
config.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gaccum_exp.report.compare.swept_keys import Setting, swept_keys, swept_values
from gaccum_exp.tracking.records import RunRecord

Config = frozenset[tuple[str, str]]

_GLOBAL_BATCH = "data.global_batch_size"
_REDUCTION = "accum.reduction"
_MOST_ASKED_FOR = 16
_SAME_AT_ONE_PASS = {"mean": "global_mean", "global_mean": "mean"}


class Source(Enum):
    """Where a group's reference came from."""

    OWN = "own"
    OTHER_REDUCTION = "other reduction"
    STORED = "stored"
    STAND_IN = "stand-in"
    AUDIT = "audit"
    """None is needed: an audit takes its window in one pass itself."""
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Group:
    """Arms that may be compared with each other, and the run they are compared with."""

    arms: tuple[RunRecord, ...]
    reference: RunRecord | None
    source: Source
    n_multiplies: bool
    """The micro-batch is fixed, so N multiplies the global batch and each arm is alone."""
    controls: tuple[RunRecord, ...]
    """The reference trained again with other orders inside the windows, one run per order; finished
    or not. Without a one-pass reference they bound nothing, and stay here to be spoken of."""
    setting: Setting
    """What sets the group apart in its sweep."""

    @property
    def usable_controls(self) -> tuple[RunRecord, ...]:
        """The controls whose curves show what rounding does to this group's reference."""
        reference = self.reference
        if reference is None or self.source is Source.STAND_IN:
            return ()
        made_on = _circumstances(reference)
        finished = (run for run in self.controls if run.finished and run.accum_steps == 1)
        return tuple(run for run in finished if _circumstances(run) == made_on)


def shared_config(runs: Iterable[RunRecord]) -> dict[str, str]:
    """Return parameters that every reference of these runs has: some of those that they agree on."""
    shared = [
        (key, value)
        for key, value in set.intersection(*(set(run.training_config.items()) for run in runs))
        # The other mean's one-pass arm may serve, and neither long nor quoted values can be asked for.
        if key != _REDUCTION and len(value) <= 200 and not {*key, *value} & {"'", '"', "`"}
    ]
    shared.sort(key=lambda pair: (pair[0] != "seed", not pair[0].endswith("_target_"), pair))
    # A store finds the runs with given parameters sooner than it hands out all, but takes some dozens.
    return dict(shared[:_MOST_ASKED_FOR])


def group_runs(runs: Sequence[RunRecord], stored: Iterable[RunRecord] = ()) -> list[Group]:
    """Sort `runs` into groups, ordered by setting, and find their references, if need be in `stored`."""
    members: dict[Config, list[RunRecord]] = defaultdict(list)
    controls: dict[Config, list[RunRecord]] = defaultdict(list)
    for run in runs:
        (controls if run.is_control else members)[_key(run)].append(run)
    known = {run.run_id for run in runs}
    sweep_ones = _one_pass_runs(runs)
    stored_ones = _one_pass_runs(run for run in stored if run.run_id not in known)
    families: dict[object, set[int | None]] = defaultdict(set)  # N of arms alone with their batch
    for alike in members.values():
        if len(alike) == 1:
            families[_family(alike[0])].add(alike[0].accum_steps)
    n_multiplies = any(len(every) > 1 for every in families.values())
    batches = {alike[0].global_batch_size for alike in members.values()} - {None}  # of a refused arm
    keys = swept_keys(runs)
    groups = []
    for key, alike in members.items():
        arms = _in_order(alike)
        multiplies = len(arms) == 1 and len(families[_family(arms[0])]) > 1
        reference, source = _find_reference(key, arms, sweep_ones, stored_ones)
        if arms[0].params.get("task") == "audit":
            reference, source, multiplies = None, Source.AUDIT, False
        if multiplies and arms[0].accum_steps == 1:
            # N = 1 of such a sweep is a small batch, and nobody's reference, not even its own.
            reference, source = None, Source.NONE
        own = key if reference is None else _key(reference)
        orders = _one_per_order(controls.get(own) or controls.get(_other_mean(own), []))
        values = swept_values(arms[0], keys)
        if len(batches) > 1 and not n_multiplies:
            values += (("global batch", str(arms[0].global_batch_size)),)
        setting = Setting(arms[0].params.get(_REDUCTION), values)
        groups.append(Group(arms, reference, source, multiplies, orders, setting))
    # The id of the first arm settles ties, so that the order of the input never shows.
    return sorted(
        groups, key=lambda g: (g.setting.order, g.arms[0].global_batch_size or 0, g.arms[0].run_id)
    )


def _find_reference(
    key: Config,
    arms: Sequence[RunRecord],
    sweep: Mapping[Config, list[RunRecord]],
    stored: Mapping[Config, list[RunRecord]],
) -> tuple[RunRecord | None, Source]:
    other = _other_mean(key)
    if key in sweep:
        return sweep[key][-1], Source.OWN
    if other in sweep:
        return sweep[other][-1], Source.OTHER_REDUCTION
    made_on = {_circumstances(arm) for arm in arms}
    for candidate_key in (key, other):
        alike = [run for run in stored.get(candidate_key, []) if _circumstances(run) in made_on]
        if alike:
            return alike[-1], Source.STORED
    finished = [arm for arm in arms if arm.finished and arm.accum_steps]
    return (finished[0], Source.STAND_IN) if len(finished) >= 2 else (None, Source.NONE)


def _circumstances(run: RunRecord) -> tuple[str | None, str | None]:
    # What is no part of the config, and has to agree all the same.
    return run.tags.get("device"), run.tags.get("data_digest")


def _key(run: RunRecord) -> Config:
    return frozenset(run.training_config.items()) | {(_GLOBAL_BATCH, str(run.global_batch_size))}


def _other_mean(key: Config) -> Config:
    # `sum` has no other: its key is itself.
    return frozenset(
        (name, _SAME_AT_ONE_PASS.get(value, value) if name == _REDUCTION else value)
        for name, value in key
    )


def _one_pass_runs(runs: Iterable[RunRecord]) -> dict[Config, list[RunRecord]]:
    # Those that finished, by config, the most recent last.
    found: dict[Config, list[RunRecord]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.start_time_ms, run.run_id)):
        if run.finished and run.accum_steps == 1 and not run.is_control:
            found[_key(run)].append(run)
    return found


def _one_per_order(controls: Iterable[RunRecord]) -> tuple[RunRecord, ...]:
    # One run for each permutation, a finished one if there is: the same order is no new draw.
    chosen: dict[int | str, RunRecord] = {}
    for run in sorted(controls, key=lambda run: (not run.finished, *_recency(run))):
        chosen.setdefault(run.run_id if run.control_seed is None else run.control_seed, run)
    return tuple(sorted(chosen.values(), key=lambda run: (run.name, run.run_id)))


def _recency(run: RunRecord) -> tuple[int, str]:
    return -run.start_time_ms, run.run_id


def _family(run: RunRecord) -> tuple[Config, tuple[int, ...]]:
    # What arms share that differ in N at a fixed micro-batch.
    return frozenset(run.training_config.items()), run.micro_batch_sizes[:1]


def _in_order(arms: Iterable[RunRecord]) -> tuple[RunRecord, ...]:
    # By N, the most recent of equal ones first; arms without an N come last.
    return tuple(sorted(arms, key=lambda arm: (arm.accum_steps or float("inf"), *_recency(arm))))
