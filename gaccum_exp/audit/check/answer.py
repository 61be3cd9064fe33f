"""The answer of a check, as text: what was found, the verdict, the memory and the time of other N."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gaccum_exp.audit.check.checked_loop import CheckedLoop, Epoch, Group
from gaccum_exp.audit.check.other_windows import counts_of
from gaccum_exp.audit.result import Audit, worst
from gaccum_exp.audit.watch.watch import Watched
from gaccum_exp.memory.plan import MemoryPlan

IN_A_CONFIGURATION = re.compile(r" \(in a configuration: [\w.=]+\)|; in a configuration: [\w.=]+")
"""What a remedy says to those who have no script, but a configuration of ours."""


def answer(loop: CheckedLoop, watched: Watched, *, failed: bool = False) -> Iterator[str]:
    """Yield the lines on what was found and whether it is the large batch.

    Args:
        loop: that was watched.
        watched: what was seen of it.
        failed: whether the script has failed by itself.
    """
    groups = [group for group in loop.groups.values() if group.windows]
    if not groups:
        yield watched.worst.report()
        return
    for group in groups:
        audits = [watched.windows[place] for place in group.windows]
        yield from found(group, audits)
        yield ""
        others = _others(loop.epoch, group, audits) if loop.raised else None
        yield _said(audits, others)
        yield from [others] if others else []
        yield IN_A_CONFIGURATION.sub("", worst_of(audits).report())
        yield from _beside(group, audits)
        yield ""
    if watched.left_over and not loop.raised:
        passes = f"{watched.left_over} backward pass{'es' if watched.left_over > 1 else ''}"
        yield f"left over: {passes} after the last step: step on what is left, or zero it"
    yield not_seen(loop.epoch, groups, ended=loop.raised > 0, failed=failed)
    unread = loop.epoch is None or loop.epoch.data is None
    every = ([watched.windows[place] for place in group.windows] for group in groups)
    if loop.raised and unread and any(_counting_alike(audits) for audits in every):
        yield (
            "Nor seen: whether micro-batches count equally in all windows as they do in these, so that "
            "a mean divided by N is right: labels that are ignored, or other sizes, would change that."
        )


def found(group: Group, audits: Sequence[Audit]) -> Iterator[str]:
    """Yield what was found: model, loss, optimizer, and the windows."""
    sizes = "; ".join(dict.fromkeys(_sizes(each) for each in group.sizes if each))
    every = " and ".join(dict.fromkeys(str(audit.accum_steps) for audit in audits))
    windows = f"{windows_in_words(len(audits))} of N = {every}"
    yield f"model:     {' + '.join(group.modules)}, {group.parameters:,} parameters that are stepped"
    yield f"loss:      {' + '.join(group.losses) or 'none'}"
    yield f"optimizer: {' + '.join(group.optimizers)}"
    yield f"windows:   {windows}" + (f", micro-batches of {sizes} samples" if sizes else "")


def _sizes(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else ", ".join(map(str, sizes))


def windows_in_words(count: int) -> str:
    """Return `1 window`, `2 windows`."""
    return f"{count} window{'s' * (count != 1)}"


def not_seen(epoch: Epoch | None, groups: Sequence[Group], *, ended: bool, failed: bool = False) -> str:
    """Return a sentence on what lies beyond the windows that were judged.

    Args:
        epoch: of the data, as far as it was read.
        groups: the optimizers, with their windows.
        ended: whether we ended the script.
        failed: whether it has failed by itself.
    """
    n = max((len(sizes) for group in groups for sizes in group.sizes), default=0) or 1
    judged = max(len(group.windows) for group in groups)
    passes = max(sum(map(len, group.sizes)) for group in groups)
    if failed:
        return f"Not seen: what would have come after {windows_in_words(judged)}."
    if not ended:
        return f"Seen: the whole script, of whose windows {judged} were judged."
    if epoch is None:
        return (
            "Not seen: the end of an epoch: the data come from no DataLoader of torch's, which would "
            "tell its length."
        )
    if epoch.micro_batches is None:
        return "Not seen: the end of an epoch, as the data does not tell its length."
    if epoch.read is not None and epoch.read < passes:
        return (
            f"Not seen: the end of the epoch, of {epoch.micro_batches} batches of the data loader, each "
            f"of which makes several micro-batches."
        )
    windows, left = divmod(epoch.micro_batches, n)
    if passes >= epoch.micro_batches + (n if left else 0):
        return "Seen: an epoch to its end."
    more = f"--no-cost --windows {windows + 2 * (left > 0)}"
    if left:
        return (
            f"Not seen: the end of the epoch, whose {epoch.micro_batches} micro-batches are no multiple "
            f"of N = {n}: {left} {'are' if left > 1 else 'is'} left over. Often what is left is divided "
            f"by N all the same, or leaks into the next epoch: {more} shows what becomes of it."
        )
    if epoch.last_samples is not None:
        return (
            f"Not seen: the last micro-batch of the epoch, with {epoch.last_samples} samples where "
            f"others have {epoch.samples}: {more} shows whether its mean counts as much as theirs."
        )
    return f"Not seen: the rest of the epoch, of {windows} windows like these."


def cost(plan: MemoryPlan, group: Group, *, compiled: bool) -> Iterator[str]:
    """Yield the lines on memory and time."""
    yield f"Which N fits? Predicted for {plan.device}, a window of {plan.global_batch_size} samples."
    yield plan.fit()
    if plan.chosen_steps != 1:  # else memory asks for nothing
        yield from plan.advice_lines()
    if any(row.time for row in plan.rows):
        yield ""
        yield from plan.time_lines()
    beside = list(_not_counted(plan, group))
    if plan.notes or beside or compiled:
        yield ""
    yield from plan.notes
    if compiled:
        yield "Run without torch.compile, for memory and time."
    yield from beside


def _not_counted(plan: MemoryPlan, group: Group) -> Iterator[str]:
    if group.beside:
        yield f"Not counted: what runs beside the model ({', '.join(group.beside)})."
    modules = () if group.captured is None else group.captured.modules
    if plan.device.startswith("cpu") and any(_takes_workspace(module) for module in modules):
        yield (
            "Not counted: what a convolution takes inside itself on a CPU, in its backward pass about "
            "as much as its largest output again."
        )


def _takes_workspace(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and math.prod(module.kernel_size) > 1


def worst_of(audits: Sequence[Audit]) -> Audit:
    """Return the audit with the worst verdict, of equal ones the one that is the furthest away."""
    return worst(sorted(audits, key=lambda audit: -(audit.e or 0.0)))


def _others(epoch: Epoch | None, group: Group, audits: Sequence[Audit]) -> str | None:
    """Return a sentence on windows that count otherwise than those judged, if there are such."""
    data = None if epoch is None else epoch.data
    if data is None or not _counting_alike(audits):
        return None
    counts = counts_of(replace(data, ignored=group.ignored))
    return None if counts is None else counts.said(audits[-1].accum_steps, len(audits))


def _counting_alike(audits: Sequence[Audit]) -> bool:
    """Whether the verdict rests on micro-batches that happen to count equally."""
    told = worst_of(audits).verdict in ("identical", "equivalent", "stochastic")
    return told and all(a.reduction == "mean" and a.accum_steps > 1 for a in audits)


def _said(audits: Sequence[Audit], others: str | None = None) -> str:
    """Return the verdict as a sentence; of `others` there is another one."""
    audit = worst_of(audits)
    if others and audit.verdict != "biased":
        first = windows_in_words(len(audits))
        return f"In what was judged, the first {first}, it is the large batch's gradient."
    if audit.verdict in ("identical", "equivalent"):
        rounding = "bit for bit" if audit.verdict == "identical" else "but for rounding"
        return f"Yes: what reached the optimizer is the large batch's gradient, {rounding}."
    if audit.verdict == "biased":
        off = [a.e for a in audits if a.verdict == audit.verdict and a.e is not None]
        numbers = " and ".join(f"{e:.2g}" for e in off)
        if len(off) > 2:
            numbers = f"{min(off):.2g} to {max(off):.2g}"
        away = f": it is {numbers} × its norm away" if off else ""
        return f"No: what reached the optimizer is not the large batch's gradient{away}."
    if audit.verdict == "stochastic":
        return "Yes, but for the random numbers that are drawn: with these held, it is the same."
    return "Not known whether it is the large batch's gradient:"


def _beside(group: Group, audits: Sequence[Audit]) -> Iterator[str]:
    own, verdicts = worst_of(audits), [audit.verdict for audit in audits]
    if len(set(verdicts)) > 1:
        yield f"windows: {', '.join(verdicts)}, in this order; above the worst"
    elif len(audits) > 1 and own.verdict == "biased":
        yield f"window {audits.index(own) + 1} is shown, the one that is the furthest away"
    # What is to be done about one cause is another thing in a window of another N, as at an epoch's end.
    named = {(finding.cause, finding.culprit, own.accum_steps) for finding in own.findings}
    said = {finding.remedy for finding in own.findings}
    for number, audit in enumerate(audits, start=1):
        which = f", of window {number}"
        which += f" (N = {audit.accum_steps})" * (audit.accum_steps != own.accum_steps)
        for finding in audit.findings if audit.verdict == own.verdict == "biased" else ():
            key = finding.cause, finding.culprit, audit.accum_steps
            if key not in named and finding.remedy not in said:
                named.add(key)
                said.add(finding.remedy)
                yield IN_A_CONFIGURATION.sub("", "\n".join(finding.lines(which)))
    shown = {check.name for check in own.checks}
    others = {c.name: c for audit in audits for c in audit.checks if c.name not in shown}
    yield from (f"{check.name}: {check.finding}" for check in others.values())
    if not (own.checks or others):
        yield (
            "beside the gradient: nothing wrong was seen in schedule, memory and averages of weights "
            "(EMA); not checked: what is made of the losses for the log"
        )
