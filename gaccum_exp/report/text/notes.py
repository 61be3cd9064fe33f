"""Say what the numbers alone do not: references borrowed, splits, what was not compared, failed arms.

The same sentence about several settings is said once, with the settings in front.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from gaccum_exp.report.compare.pairing import Group, Source
from gaccum_exp.report.text.wording import MOST_NUMBERS, say_numbers
from gaccum_exp.tracking.metrics import SKIPPED_WINDOWS
from gaccum_exp.tracking.records import RunRecord

_MOST_SIZES_SPELT_OUT = 12
_MOST_SPLITS_SPELT_OUT = 4
_MOST_SETTINGS_NAMED = 3


def reference_notes(groups: Sequence[Group]) -> tuple[str, ...]:
    """Say for every group whose reference is not its own N = 1 arm what it is compared with."""
    notes = _merged(((_about_reference(group), group) for group in groups), len(groups))
    multiplied = (group.arms[0].global_batch_size for group in groups if group.n_multiplies)
    batches = sorted({batch for batch in multiplied if batch})
    if batches:
        notes.append(
            f"The micro-batch is fixed, so N multiplies the global batch ({_list(batches)} "
            "samples): N = 1 is a small batch there and no reference for the other arms."
        )
    return tuple(notes)


def other_notes(groups: Sequence[Group]) -> tuple[str, ...]:
    """Say which splits are uneven, which numbers were not compared, and which arms did not finish."""
    arms = [(group, arm) for group in groups for arm in group.arms]
    notes = _uneven_splits([arm for _, arm in arms])
    for about in (
        *(_about_data, _about_memory_source, _about_step_time),
        *(_about_growth, _about_chosen_n, _about_finer_splits, _about_skipped, _about_vectorized),
        _about_status,
    ):
        notes += _merged(((about(group, arm), group) for group, arm in arms), len(groups))
    return tuple(notes)


def describe_end(run: RunRecord) -> str:
    """Say how an unfinished run ended: `failed (out of memory)`."""
    words = {"FAILED": "failed", "KILLED": "was interrupted", "RUNNING": "is still running"}
    reason = run.tags.get("failure")
    ended = words.get(run.status, f"is {run.status}")
    return f"{ended} ({reason})" if reason else ended


def _about_reference(group: Group) -> str | None:
    reference = group.reference
    if group.source is Source.STORED and reference is not None:
        day = datetime.fromtimestamp(reference.start_time_ms / 1000, tz=UTC).date()
        return (
            f"the one-pass reference is the stored run {reference.name!r} of {day} "
            f"({reference.run_id}), because {_why_no_reference(group)}."
        )
    if group.source is Source.OTHER_REDUCTION and reference is not None:
        ours, theirs = group.arms[0].params["accum.reduction"], reference.params["accum.reduction"]
        return (
            f"the reference is the one-pass arm of {theirs}, because {_why_no_reference(group)} "
            f"for {ours}; in one pass the two are the same gradient."
        )
    if group.source is Source.STAND_IN and reference is not None:
        return (
            f"N = {reference.accum_steps}, the arm with the largest micro-batch, stands in for the "
            f"one-pass reference, because {_why_no_reference(group)} and the store holds none."
        )
    if group.source is Source.NONE and not group.n_multiplies:
        return (
            f"nothing is compared, because {_why_no_reference(group)}, the store holds none, and "
            "no second finished arm can stand in."
        )
    return None


def _why_no_reference(group: Group) -> str:
    ends = sorted({describe_end(arm) for arm in group.arms if arm.accum_steps == 1})
    return f"N = 1 {' and '.join(ends)}" if ends else "the sweep has no N = 1 arm"


def _uneven_splits(arms: Sequence[RunRecord]) -> list[str]:
    """Say how global batches that N does not divide are split; only which N, if there are many."""
    splits: dict[tuple[int, int], tuple[int, ...]] = {}
    weighs_unequally = False
    for arm in arms:
        n, total, sizes = arm.accum_steps, arm.global_batch_size, arm.micro_batch_sizes
        if n is not None and total is not None and len(set(sizes)) > 1:
            splits[total, n] = sizes
            weighs_unequally |= arm.params.get("accum.reduction") == "mean"
    if len(splits) <= _MOST_SPLITS_SPELT_OUT:
        notes = [
            f"N = {n} splits {total} samples into {_spell(sizes)}."
            for (total, n), sizes in sorted(splits.items())
        ]
    else:
        notes = [
            f"{total} samples are split unevenly, into micro-batches that differ by one sample, "
            f"by N = {_list(sorted(n for batch, n in splits if batch == total))}."
            for total in sorted({total for total, _ in splits})
        ]
    if weighs_unequally:
        notes.append("On unequal micro-batches mean weighs the samples of the smaller ones more.")
    return notes


def _spell(sizes: tuple[int, ...]) -> str:
    if len(sizes) <= _MOST_SIZES_SPELT_OUT:
        return ", ".join(map(str, sizes))
    counts = {size: sizes.count(size) for size in sizes}
    return " and ".join(f"{count} × {size}" for size, count in counts.items())


def _about_memory_source(group: Group, arm: RunRecord) -> str | None:
    ours, theirs = _tags(group, arm, "memory.source")
    if ours is None or theirs is None or ours == theirs:
        return None
    return (
        f"the peak memory of N = {arm.accum_steps} is from the {ours}, its reference's from the "
        f"{theirs}: they have no ratio."
    )


def _about_chosen_n(group: Group, arm: RunRecord) -> str | None:
    why = arm.tags.get("accum.auto")
    return None if why is None else f"the choice of accum.steps=auto: {why}."


def _about_finer_splits(group: Group, arm: RunRecord) -> str | None:
    """Say where memory ran out, and what N the arm began with."""
    events = [arm.tags[f"oom.{i}"] for i in range(1, 100) if f"oom.{i}" in arm.tags]
    if not events:
        return None
    more = f", and {len(events) - 1} times more" if len(events) > 1 else ""
    return (
        f"N = {arm.accum_steps} began with N = {arm.params['accum.steps']} ({events[0]}{more}); the "
        "samples of its windows are the same."
    )


def _about_data(group: Group, arm: RunRecord) -> str | None:
    ours, theirs = _tags(group, arm, "data_digest")
    if ours is None or theirs is None or ours == theirs:
        return None
    return f"N = {arm.accum_steps} was fed other data than its reference: their curves are no pair."


def _about_step_time(group: Group, arm: RunRecord) -> str | None:
    ours, theirs = zip(_tags(group, arm, "device"), _tags(group, arm, "threads"), strict=True)
    if None in (*ours, *theirs) or ours == theirs:
        return None
    return (
        f"N = {arm.accum_steps} ran on {_machine(ours)}, its reference on {_machine(theirs)}: "
        "their step times have no ratio."
    )


def _about_growth(_: Group, arm: RunRecord) -> str | None:
    batches = arm.tags.get("global_batches")
    if batches is None:
        return None
    return (
        f"the global batch of N = {arm.accum_steps} changes with its schedule ({batches} samples): its "
        "audits compare each stage with one pass over the same batch."
    )


def _about_skipped(_: Group, arm: RunRecord) -> str | None:
    skipped = arm.metrics.get(SKIPPED_WINDOWS)
    if not skipped:
        return None
    return (
        f"N = {arm.accum_steps} took no step on {skipped:.0f} windows, whose float16 gradient was not "
        "finite at the loss scale of the time."
    )


def _about_vectorized(_: Group, arm: RunRecord) -> str | None:
    together = arm.tags.get("vectorized")
    if together is None:
        return None
    return (
        f"{together} were trained as one (sweep.vectorize=seed): what each alone takes in memory and "
        "time was not measured."
    )


def _about_status(_: Group, arm: RunRecord) -> str | None:
    who = f"run {arm.name!r}" if arm.accum_steps is None else f"N = {arm.accum_steps}"
    return None if arm.finished else f"{who} {describe_end(arm)}."


def _machine(device_and_threads: tuple[str | None, ...]) -> str:
    device, threads = device_and_threads
    return f"{device} with {threads} thread{'' if threads == '1' else 's'}"


def _tags(group: Group, arm: RunRecord, tag: str) -> tuple[str | None, str | None]:
    reference = group.reference
    return arm.tags.get(tag), reference.tags.get(tag) if reference else None


def _merged(sentences: Iterable[tuple[str | None, Group]], n_groups: int) -> list[str]:
    """Say equal sentences once; settings are named only where there are several groups."""
    settings: dict[str, list[str]] = {}
    for sentence, group in sentences:
        if sentence is not None:
            settings.setdefault(sentence, []).append(group.setting.label)
    return list(with_settings(settings, n_groups))


def with_settings(settings: Mapping[str, Sequence[str]], n_groups: int) -> Iterator[str]:
    """Yield each sentence with the settings that it is about in front, three of them at most."""
    for sentence, repeated in settings.items():
        labels = list(dict.fromkeys(repeated))
        named = "; ".join(labels[:_MOST_SETTINGS_NAMED])
        more = len(labels) - _MOST_SETTINGS_NAMED
        if n_groups == 1:
            yield sentence[0].upper() + sentence[1:]
        elif len(labels) == n_groups:
            yield f"In every setting {sentence}"
        else:
            yield f"{named}{f' and {more} more settings' if more > 0 else ''}: {sentence}"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= MOST_NUMBERS else say_numbers(numbers)
