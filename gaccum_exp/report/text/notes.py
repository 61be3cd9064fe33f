"""Say what the numbers alone do not: references borrowed, splits, what was not compared, failed arms.

The same sentence about several settings is said once, with the settings in front.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice, pairwise
from operator import itemgetter

from gaccum_exp.report.compare.pairing import Group, Source
from gaccum_exp.report.compare.swept_keys import UNKNOWN
from gaccum_exp.report.text.wording import MOST_NUMBERS, say_numbers
from gaccum_exp.tracking.metrics import SKIPPED_WINDOWS, TRAIN_LOSS
from gaccum_exp.tracking.records import RunRecord

_MOST_SIZES_SPELT_OUT = 12
_MOST_SPLITS_SPELT_OUT = 4
_MOST_SETTINGS_NAMED = 3


def reference_notes(groups: Sequence[Group]) -> tuple[str, ...]:
    """Say for every group whose reference is not its own N = 1 arm what it is compared with."""
    said = ((_about_reference(group), group.setting.label) for group in groups)
    notes = with_settings(said, len(groups))
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
    arms = [(arm, group) for group in groups for arm in group.arms]
    reasons = {arm.tags.get("failure") for arm, _ in arms if arm.status == "FAILED"}
    if len(arms) > 1 and all(arm.status == "FAILED" for arm, _ in arms) and len(reasons) == 1:
        return (f"Every arm {_end_of(arms[0][0])}.",)
    found = [
        (place, sentence, group.setting.label)
        for arm, group in arms
        for place, sentence in _about_arm(arm, group).items()
    ]
    # The same kind of note is said of all arms before the next kind is.
    found.sort(key=itemgetter(0))
    every = [arm for arm, _ in arms]
    notes = (*_uneven_splits(every), *_unequal_steps(every))
    sentences = [note[1:] for note in found]
    for group in groups:
        sentences += [(sentence, group.setting.label) for sentence in _unfinished(group.arms)]
    return (*notes, *with_settings(sentences, len(groups)))


def _about_reference(group: Group) -> str | None:
    reference, source = group.reference, group.source
    ends = sorted({_end_of(arm) for arm in group.arms if arm.accum_steps == 1})
    why = f"N = 1 {' and '.join(ends)}" if ends else "the sweep has no N = 1 arm that finished"
    if reference is None and (
        source is Source.AUDIT or group.n_multiplies or not any(arm.finished for arm in group.arms)
    ):
        return None  # that no arm finished the summary says
    if reference is None:
        return (
            f"nothing is compared, because {why}, the store holds none, and no second finished arm can "
            "stand in."
        )
    if source is Source.STORED:
        day = datetime.fromtimestamp(reference.start_time_ms / 1000, tz=UTC).date()
        return (
            f"the one-pass reference is the stored run {reference.name!r} of {day} "
            f"({reference.run_id}), because {why}."
        )
    if source is Source.OTHER_REDUCTION:
        ours, theirs = group.arms[0].params["accum.reduction"], reference.params["accum.reduction"]
        return (
            f"the reference is the one-pass arm of {theirs}, because {why} for {ours}; in one pass the "
            "two are the same gradient."
        )
    if source is Source.STAND_IN:
        return (
            f"N = {reference.accum_steps}, the arm with the largest micro-batch, stands in for the "
            f"one-pass reference, because {why} and the store holds none."
        )
    return None


def _about_arm(arm: RunRecord, group: Group) -> dict[int, str]:
    """Return sentences about an arm by their place among all notes."""
    said: dict[int, str] = {}
    n, ours = f"N = {arm.accum_steps}", arm.tags
    theirs = group.reference.tags if group.reference else {}

    def differ(*tags: str) -> bool:
        known = all(of.get(tag) is not None for of in (ours, theirs) for tag in tags)
        return known and any(ours[tag] != theirs[tag] for tag in tags)

    if differ("data_digest"):
        said[0] = f"{n} was fed other data than its reference: their curves are no pair."
    if differ("memory.source"):
        said[1] = (
            f"the peak memory of {n} is from the {ours['memory.source']}, its reference's from the "
            f"{theirs['memory.source']}: they have no ratio."
        )
    if differ("device", "threads"):
        said[2] = (
            f"{n} ran on {_machine(ours)}, its reference on {_machine(theirs)}: their step times have "
            "no ratio."
        )
    if "global_batches" in ours:
        said[3] = (
            f"the global batch of {n} changes in training ({ours['global_batches']} samples): its "
            "audits compare windows with one pass over the same batch."
        )
    if "accum.auto" in ours:
        said[4] = f"the choice of accum.steps=auto: {ours['accum.auto']}."
    events = [ours[f"oom.{i}"] for i in range(1, 100) if f"oom.{i}" in ours]
    if events:
        more = f", and {len(events) - 1} times more" if len(events) > 1 else ""
        said[5] = (
            f"{n} began with N = {arm.params['accum.steps']} ({events[0]}{more}); the samples of its "
            "windows are the same."
        )
    skipped = arm.metrics.get(SKIPPED_WINDOWS)
    if skipped:
        said[6] = (
            f"{n} took no step on {skipped:.0f} windows, whose float16 gradient was not finite at the "
            "loss scale of the time."
        )
    if "vectorized" in ours:
        said[7] = (
            f"{ours['vectorized']} were trained as one (sweep.vectorize=seed): what each alone takes in "
            "memory and time was not measured."
        )
    return said


def _unfinished(arms: Iterable[RunRecord]) -> list[str]:
    """Say which arms did not finish, a reason that several share once."""
    of_end: dict[str, list[int]] = {}
    names_of: dict[str, list[str]] = {}
    for arm in arms:
        if arm.finished:
            continue
        if arm.accum_steps is None:  # it was refused, and its reason may begin with its name
            reason = arm.tags.get("failure", "").removeprefix(f"{arm.name}: ")
            names_of.setdefault(_end_of(arm, reason), []).append(repr(arm.name))
        else:
            of_end.setdefault(_end_of(arm), []).append(arm.accum_steps)
    said = []
    for end, names in names_of.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        said.append(f"run {names[0]}{more} {end}.")
    for end, every in of_end.items():
        if len(every) > 1:
            end = re.sub("^was", "were", re.sub("^is", "are", end))
        said.append(f"N = {say_numbers(sorted(set(every)))} {end}.")
    return said


def _end_of(run: RunRecord, reason: str | None = None) -> str:
    words = {"FAILED": "failed", "KILLED": "was interrupted", "RUNNING": "is still running"}
    reason = run.tags.get("failure") if reason is None else reason
    if run.status == "KILLED":  # `interrupted (SIGINT)`
        reason = (reason or "").removeprefix("interrupted").strip(" ()")
    return words.get(run.status, f"is {run.status}") + (f" ({reason})" if reason else "")


def _machine(tags: Mapping[str, str]) -> str:
    threads = tags["threads"]
    return f"{tags['device']} with {threads} thread{'' if threads == '1' else 's'}"


def _uneven_splits(arms: Sequence[RunRecord]) -> list[str]:
    # Of many only which N they are of.
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


def _unequal_steps(arms: Sequence[RunRecord]) -> list[str]:
    """Name the trap of equal epochs: a larger global batch has fewer optimizer steps there."""
    steps: dict[int, int] = {}
    for arm in arms:
        curve, batch = arm.curves.get(TRAIN_LOSS), arm.global_batch_size
        if arm.finished and curve and curve.global_steps and batch and "global_batches" not in arm.tags:
            steps[batch] = max(steps.get(batch, 0), curve.global_steps[-1])
    if len(set(steps.values())) < 2 or any(
        steps[small] < steps[large] for small, large in pairwise(sorted(steps))
    ):
        return []
    least, most = min(steps), max(steps)
    return [
        f"A global batch of {least} had {steps[least]} optimizer steps, one of {most} had {steps[most]}:"
        " a loss that is higher there may be that of fewer steps, and no fault of accumulation. "
        "The table of global batches, below, compares them at equal samples, steps and seconds."
    ]


def _spell(sizes: Sequence[int]) -> str:
    if len(sizes) <= _MOST_SIZES_SPELT_OUT:
        return ", ".join(map(str, sizes))
    return " and ".join(f"{count} × {size}" for size, count in Counter(sizes).items())


def with_settings(said: Iterable[tuple[str | None, str]], n_groups: int) -> list[str]:
    """Return each of the sentences once, after the labels of its settings where groups are several."""
    labels_of: dict[str, dict[str, None]] = {}
    for sentence, label in said:
        if sentence is not None:
            labels_of.setdefault(sentence, {})[label] = None
    notes = []
    for sentence, labels in labels_of.items():
        named = "; ".join(islice(labels, _MOST_SETTINGS_NAMED))
        more = len(labels) - _MOST_SETTINGS_NAMED
        if n_groups == 1 or named == UNKNOWN:
            notes.append(sentence[0].upper() + sentence[1:])
        elif len(labels) == n_groups:
            notes.append(f"In every setting {sentence}")
        else:
            notes.append(f"{named}{f' and {more} more settings' if more > 0 else ''}: {sentence}")
    return notes


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= MOST_NUMBERS else say_numbers(numbers)
