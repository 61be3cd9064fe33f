"""Sum up a comparison in sentences: the verdicts, then numbers and which arm is the furthest.

Repetitions that differ in the seed alone are summed up by their worst verdict and their largest values.
Whether a gap between two loss curves is rounding or a fault is said where controls show it, and nowhere
else.
"""

import math
from collections.abc import Sequence

from gaccum_exp.report.arm_limit import by_n, by_setting
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.distances import nan_last
from gaccum_exp.report.compare.swept_keys import UNKNOWN
from gaccum_exp.report.text.merged_rows import all_differ
from gaccum_exp.report.text.verdict_notes import SOUND, say_verdicts
from gaccum_exp.report.text.wording import say_controls, say_gap, say_list, say_numbers, say_ratio

_MOST_N_LISTED = 8
_NO_OTHER = "There is only the reference, and no other arm to compare with it."
_NO_REFERENCE = "No finished arm could be compared with a reference."
_REFERENCE_NAMES = {
    "own": "the one-pass arm",
    "other reduction": "the one-pass arm",
    "stored": "a stored one-pass run",
    "stand-in": "the arm that stands in for a missing one-pass reference",
}


def summary(comparison: Comparison) -> str:
    """Say what the comparison means in one or two sentences per setting or reduction, a line each."""
    if not comparison.rows:
        return "There are no runs to compare."
    if len({row.setting.repeated_label for row in comparison.rows}) == 1:
        return _say_setting(comparison.rows)
    begun = [row for row in comparison.rows if row.setting.label != UNKNOWN]
    refused = len(comparison.rows) - len(begun)
    if refused and len({row.setting.repeated_label for row in begun}) == 1:
        return f"{_say_setting(begun)} {_say_refused(refused)}"
    settings = by_setting(begun, "{reduction}, over all settings")
    labels: dict[str, list[str]] = {}
    for label, alike in settings.items():
        labels.setdefault(_say_setting(alike), []).append(label)
    said = [f"{_say_labels(of, len(settings))}: {line}" for line, of in labels.items()]
    return "\n".join([*said, _say_refused(refused)] if refused else said)


def _say_refused(arms: int) -> str:
    return f"{arms} more {'arm' if arms == 1 else 'arms'} did not begin."


def _say_labels(labels: Sequence[str], settings: int) -> str:
    """Name the settings of which the same is said."""
    if len(labels) == settings > 1:
        return "In both settings" if settings == 2 else f"In all {settings} settings"
    return "; ".join(labels) if len(labels) < 3 else f"{labels[0]} and {len(labels) - 1} more settings"


def _say_setting(rows: Sequence[ComparisonRow]) -> str:
    compared = [row for row in rows if row.finished and not row.is_reference]
    measured = [row for row in compared if row.reference_run_id is not None]
    unfinished = sum(not row.finished for row in rows)
    verdicts = say_verdicts(rows)
    if measured:
        distance = _say_distance(measured)
        if verdicts and distance:
            distance = f"{verdicts}: {distance[0].lower()}{distance[1:]}"
        parts = [distance or (verdicts and f"{verdicts}."), _say_cost(measured)]
    else:
        alone = all(row.is_reference for row in rows)
        audits = all(row.is_audit for row in rows)
        judged = any(row.verdict for row in rows) and not audits
        lead = verdicts and f"{verdicts}{', by the audit alone' if judged else ''}."
        parts = [lead, "" if audits else _NO_OTHER if alone else _NO_REFERENCE]
        if unfinished == len(rows):
            return " ".join([lead, "No arm finished."] if lead else ["No arm finished."])
    if unfinished:
        parts.append(f"{unfinished} of {len(rows)} arms did not finish.")
    return " ".join(part for part in parts if part)


def _say_distance(rows: Sequence[ComparisonRow]) -> str:
    with_gap = [row for row in rows if row.max_loss_gap is not None]
    if not with_gap:
        return ""
    every = sorted({row.accum_steps or 0 for row in with_gap})
    furthest = max(with_gap, key=lambda row: nan_last(row.max_loss_gap))
    who = say_list(every) if len(every) <= _MOST_N_LISTED else f"{every[0]} to {every[-1]}"
    sources = {row.reference_source for row in with_gap}
    reference = say_list(sorted({_REFERENCE_NAMES[source] for source in sources}))
    if "stand-in" in sources:
        reference = _REFERENCE_NAMES["stand-in"]
    counts = sorted({row.common_steps for row in with_gap})
    shared = f"each of {counts[0]} steps" if counts[0] > 1 else "the one step that both have"
    if len(counts) > 1:
        shared = f"each of the {counts[0]} to {counts[-1]} steps that both have"
    gap = say_gap(furthest.max_loss_gap)
    near = f"is that of {reference} at {shared}"
    if furthest.max_loss_gap:
        near = f"stays within {gap} of that of {reference} at {shared}"
        if not _are_near(with_gap):  # which would sound like praise
            over = shared.removeprefix("each of ")
            near = f"differs by up to {gap} from that of {reference} over {over}"
    curve = f"The train loss of N = {who} {near}"
    if not math.isfinite(furthest.max_loss_gap or 0.0):
        curve = f"The train loss of N = {furthest.accum_steps} or of its reference is not finite"
    elif len(every) > 1 and furthest.max_loss_gap:
        curve += f", N = {furthest.accum_steps} being the furthest"
    return f"{curve}{_say_control(with_gap)}{_say_weights(rows, len(every) > 1)}."


def _are_near(rows: Sequence[ComparisonRow]) -> bool:
    """Whether all arms are known to be the large batch, by audit or envelope, and none not to be.

    How large a difference is does not tell: that of a loss of 1e-3 may be far, that of one of 1e3 near.
    """
    return all(
        row.verdict in (None, *SOUND)
        and row.control in (None, "inside")
        and (row.verdict is not None or row.control is not None)
        for row in rows
    )


def _say_control(rows: Sequence[ComparisonRow]) -> str:
    """Say which N are inside the envelope of the controls; of repetitions all have to be."""
    judged = [row for row in rows if row.control is not None]
    if not judged:
        return ""
    every = sorted({row.accum_steps or 0 for row in judged})
    outside = sorted({row.accum_steps or 0 for row in judged if row.control == "outside"})
    said = [
        f"N = {say_numbers(some)} {word}" if len(every) > 1 and outside else word
        for word, some in (("inside", [n for n in every if n not in outside]), ("outside", outside))
        if some
    ]
    return f", {say_list(said)} the envelope of {say_controls(row.controls for row in judged)}"


def _say_weights(rows: Sequence[ComparisonRow], name_furthest: bool) -> str:
    with_weights = [row for row in rows if row.weight_distance is not None]
    if not with_weights:
        return ""
    furthest = max(with_weights, key=lambda row: nan_last(row.weight_distance))
    distance = furthest.weight_distance
    named = f" (N = {furthest.accum_steps})" if name_furthest and distance else ""
    if not distance:
        return "; the final weights are its"
    near = f"within {say_gap(distance)} of" if _are_near(rows) else f"up to {say_gap(distance)} from"
    return f"; the final weights are {near} its, relative to their norm{named}"


def _say_cost(rows: Sequence[ComparisonRow]) -> str:
    """Say the largest saving of memory, and the step time of the arm that makes it.

    Of times that do not differ measurably no ratio is said, and nothing of those not compared.
    """
    peaks, times = _largest_by_n(rows, "peak_ratio"), _largest_by_n(rows, "step_ratio")
    differ = [n for n in times if all_differ(by_n(rows)[n])]
    if not peaks:
        if not differ:
            return "Between step times there is no measurable difference." if times else ""
        slowest = max(differ, key=lambda n: times[n])
        apart = _say_apart(rows, slowest)
        return f"A step takes up to {say_ratio(times[slowest])} × as long (N = {slowest}){apart}."
    least = min(peaks, key=lambda n: peaks[n])
    ratio = round(peaks[least], 2)
    verb = "hardly falls: it is" if ratio < 1 else "does not fall: it is"
    if not 0.95 <= ratio <= 1.05:
        verb = "falls to" if ratio < 1 else "rises to"
    memory = f"Peak memory {verb} {say_ratio(peaks[least])} × at N = {least}"
    if least not in times:
        return f"{memory}."
    if least not in differ:
        return f"{memory}, with no measurable difference in step time."
    apart = _say_apart(rows, least)
    return f"{memory}; a step there takes {say_ratio(times[least])} × as long{apart}."


def _say_apart(rows: Sequence[ComparisonRow], n: int) -> str:
    """Say where a step time and its reference's are of different commands."""
    if not any(row.other_command for row in rows if row.accum_steps == n):
        return ""
    return ", as another command has measured it, perhaps under another load"


def _largest_by_n(rows: Sequence[ComparisonRow], ratio: str) -> dict[int, float]:
    known = {
        n: [v for v in (getattr(row, ratio) for row in repeated) if v is not None and math.isfinite(v)]
        for n, repeated in by_n(rows).items()
    }
    return {n: max(values) for n, values in known.items() if values}
