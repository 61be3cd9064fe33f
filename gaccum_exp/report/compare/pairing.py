"""Which run is an arm compared with? The one-pass run with the same config and global batch.

Arms whose configs differ only in how the global batch is split form a group, and a group has one
reference: its finished arm with N = 1. Where the sweep holds none, these are tried in turn:

1. N = 1 of the other mean: in one pass `mean` and `global_mean` are the same gradient (`sum` is not);
2. a finished N = 1 run from the store, on the same device and data, the most recent one;
3. a stand-in: the group's finished arm with the largest micro-batch, if there are two to compare.

Controls, one-pass runs in which the order inside each window was permuted, are neither arms nor
references, whatever became of the reference. They go with every group whose reference has their config.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gaccum_exp.tracking.records import RunRecord

Config = frozenset[tuple[str, str]]

_GLOBAL_BATCH = "data.global_batch_size"
_REDUCTION = "accum.reduction"
_SCHEDULE = "accum.schedule"
# How the batch is split, where results go, and what Hydra made of it: none changes what is trained.
_SPLITTING = frozenset(
    {
        *("accum.steps", "accum.on_oom", "runtime.memory_budget_gib"),
        *("data.micro_batch_size", _GLOBAL_BATCH, "sweep_id"),
    }
)
# Nor does how it is audited, a control's seed being such a key, or what else was trained beside it.
_BOOKKEEPING = ("tracking.", "hydra.", "audit.", "sweep.")
_MOST_ASKED_FOR = 16
_SAME_AT_ONE_PASS = {"mean": "global_mean", "global_mean": "mean"}


class Source(Enum):
    """Where a group's reference came from."""

    OWN = "own"
    OTHER_REDUCTION = "other reduction"
    STORED = "stored"
    STAND_IN = "stand-in"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Group:
    """Arms that may be compared with each other, and the run they are compared with."""

    arms: tuple[RunRecord, ...]
    reference: RunRecord | None
    source: Source
    n_multiplies: bool = False
    """The micro-batch is fixed, so N multiplies the global batch and each arm is alone."""
    controls: tuple[RunRecord, ...] = ()
    """The reference trained again with other orders inside the windows, one run per order; finished
    or not. Without a one-pass reference they bound nothing, and stay here to be spoken of."""

    @property
    def usable_controls(self) -> tuple[RunRecord, ...]:
        """The controls whose curves show what rounding does to this group's reference."""
        reference = self.reference
        if reference is None or self.source is Source.STAND_IN:
            return ()
        return tuple(
            run
            for run in self.controls
            if run.status == "FINISHED"
            and steps_of(run) == 1
            and _circumstances(run) == _circumstances(reference)
        )


def whole(text: str | None) -> int | None:
    """Read a whole number from a stored parameter; None for `None`, `null`, absent or unreadable."""
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def steps_of(run: RunRecord) -> int | None:
    """N, the micro-batches per window; None when the run ended before its config was recorded.

    Of a run whose windows had to be split finer, the N that it ended with.
    """
    return whole(run.tags.get("accum.steps_used") or run.params.get("accum.steps"))


def global_batch_of(run: RunRecord) -> int | None:
    """Samples per window: as recorded, else N × micro-batch."""
    recorded = whole(run.params.get(_GLOBAL_BATCH))
    steps, micro = steps_of(run), whole(run.params.get("data.micro_batch_size"))
    if recorded is None and steps is not None and micro is not None:
        return steps * micro
    return recorded


def micro_batches_of(run: RunRecord) -> tuple[int, ...]:
    """The sizes of a full window's micro-batches, largest first; empty when unknown.

    As tagged by the run, else the global batch split as evenly as possible.
    """
    tagged = [whole(part.strip()) for part in run.tags.get("micro_batch_sizes", "").split(",")]
    sizes = [size for size in tagged if size is not None]
    steps, total = steps_of(run), global_batch_of(run)
    if not sizes and steps and total is not None:
        small, larger = divmod(total, steps)
        sizes = [small + 1] * larger + [small] * (steps - larger)
    return tuple(sorted(sizes, reverse=True))


def is_control(run: RunRecord) -> bool:
    """Whether the run shows what rounding alone does, and is no arm to be compared or compared with."""
    return run.tags.get("role") == "control" or _control_seed(run) is not None


def config_of(run: RunRecord) -> dict[str, str]:
    """The parameters that decide what is trained, without how its batch is split and bookkeeping."""
    # A schedule under which the global batch stays what it is decides no more than how it is split.
    splitting = _SPLITTING if "global_batches" in run.tags else _SPLITTING | {_SCHEDULE}
    return {
        key: value
        for key, value in run.params.items()
        if key not in splitting and not key.startswith(_BOOKKEEPING)
    }


def shared_config(runs: Iterable[RunRecord]) -> dict[str, str]:
    """Return parameters that every reference of these runs has: some of those that they agree on.

    A store finds the runs with given parameters sooner than it hands out all, but takes no more than
    some dozens of them, and short ones. The reduction is left out, since the other mean's may serve.
    """
    configs = [set(config_of(run).items()) for run in runs]
    shared = [
        (k, v) for k, v in set.intersection(*configs) if k != _REDUCTION and _can_be_asked_for(k, v)
    ]
    shared.sort(key=lambda pair: (pair[0] != "seed", not pair[0].endswith("_target_"), pair))
    return dict(shared[:_MOST_ASKED_FOR])


def group_runs(runs: Sequence[RunRecord], stored: Iterable[RunRecord] = ()) -> list[Group]:
    """Sort `runs` into groups and find each group's reference, if need be in `stored`.

    The result does not depend on the order of `runs`; the order of the groups is not specified.
    """
    members: dict[Config, list[RunRecord]] = defaultdict(list)
    controls: dict[Config, list[RunRecord]] = defaultdict(list)
    for run in runs:
        (controls if is_control(run) else members)[_key(run)].append(run)
    known = {run.run_id for run in runs}
    sweep_ones = _one_pass_runs(runs)
    stored_ones = _one_pass_runs(run for run in stored if run.run_id not in known)
    lonely = _lonely_families(members)
    groups = []
    for key, arms in members.items():
        multiplies = len(arms) == 1 and (_family(arms[0]), micro_batches_of(arms[0])[:1]) in lonely
        reference, source = _find_reference(key, arms, sweep_ones, stored_ones)
        if multiplies and steps_of(arms[0]) == 1:
            # N = 1 of such a sweep is a small batch, and nobody's reference, not even its own.
            reference, source = None, Source.NONE
        own = key if reference is None else _key(reference)
        found = controls.get(own) or controls.get(_other_mean(own), [])
        groups.append(Group(_in_order(arms), reference, source, multiplies, _one_per_order(found)))
    return groups


def _find_reference(
    key: Config,
    arms: list[RunRecord],
    sweep: Mapping[Config, list[RunRecord]],
    stored: Mapping[Config, list[RunRecord]],
) -> tuple[RunRecord | None, Source]:
    made_on = {_circumstances(arm) for arm in arms}
    other = _other_mean(key)
    if key in sweep:
        return sweep[key][-1], Source.OWN
    if other in sweep:
        return sweep[other][-1], Source.OTHER_REDUCTION
    for candidate_key in (key, other):
        alike = [run for run in stored.get(candidate_key, []) if _circumstances(run) in made_on]
        if alike:
            return alike[-1], Source.STORED
    finished = _in_order(arm for arm in arms if arm.status == "FINISHED" and steps_of(arm))
    if len(finished) >= 2:
        return finished[0], Source.STAND_IN
    return None, Source.NONE


def _can_be_asked_for(key: str, value: str) -> bool:
    return len(value) <= 200 and not {*key, *value} & {"'", '"', "`"}


def _circumstances(run: RunRecord) -> tuple[str | None, str | None]:
    """Device and data: what is no part of the config, and has to agree all the same."""
    return run.tags.get("device"), run.tags.get("data_digest")


def _key(run: RunRecord) -> Config:
    return frozenset(config_of(run).items()) | {(_GLOBAL_BATCH, str(global_batch_of(run)))}


def _other_mean(key: Config) -> Config:
    """Return the key of the same config under the other mean; the key itself for `sum`."""
    return frozenset(
        (name, _SAME_AT_ONE_PASS.get(value, value) if name == _REDUCTION else value)
        for name, value in key
    )


def _family(run: RunRecord) -> Config:
    return frozenset(config_of(run).items())


def _one_pass_runs(runs: Iterable[RunRecord]) -> dict[Config, list[RunRecord]]:
    """Finished N = 1 runs by config, the most recent last."""
    found: dict[Config, list[RunRecord]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.start_time_ms, run.run_id)):
        if run.status == "FINISHED" and steps_of(run) == 1 and not is_control(run):
            found[_key(run)].append(run)
    return dict(found)


def _control_seed(run: RunRecord) -> int | None:
    return whole(run.params.get("audit.control_seed"))


def _one_per_order(controls: Iterable[RunRecord]) -> tuple[RunRecord, ...]:
    """Return one run for each permutation, a finished one if there is: the same order is no new draw."""
    chosen: dict[int | str, RunRecord] = {}
    for run in sorted(controls, key=lambda run: (run.status != "FINISHED", *_recency(run))):
        seed = _control_seed(run)
        chosen.setdefault(run.run_id if seed is None else seed, run)
    return tuple(sorted(chosen.values(), key=lambda run: (run.name, run.run_id)))


def _recency(run: RunRecord) -> tuple[int, str]:
    return -run.start_time_ms, run.run_id


def _lonely_families(
    members: Mapping[Config, list[RunRecord]],
) -> set[tuple[Config, tuple[int, ...]]]:
    """(family, micro-batch) of arms that are alone with their global batch while N varies."""
    steps: dict[tuple[Config, tuple[int, ...]], set[int | None]] = defaultdict(set)
    for arms in members.values():
        if len(arms) == 1:
            steps[_family(arms[0]), micro_batches_of(arms[0])[:1]].add(steps_of(arms[0]))
    return {family for family, seen in steps.items() if len(seen) > 1}


def _in_order(arms: Iterable[RunRecord]) -> tuple[RunRecord, ...]:
    """By N, the most recent of equal ones first; arms without an N come last."""
    return tuple(sorted(arms, key=lambda arm: (steps_of(arm) or float("inf"), *_recency(arm))))
