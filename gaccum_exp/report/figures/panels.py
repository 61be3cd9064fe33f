"""Sort arms into the panels of a figure, and name them in titles and legends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gaccum_exp.report.arm_limit import MOST_ARMS, by_n, by_setting, spread
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.text.verdict_notes import SOUND
from gaccum_exp.report.text.wording import say_list
from gaccum_exp.tracking.records import RunRecord

PANELS_PER_ROW = 3
_MOST_GROUPS = 12


@dataclass(frozen=True)
class Panel:
    """The arms that are drawn into one panel; those that differ in the seed alone share it."""

    title: str
    rows: tuple[ComparisonRow, ...]

    @cached_property
    def by_n(self) -> dict[int, list[ComparisonRow]]:
        """Its arms by N, ascending."""
        return by_n(self.rows)


def panels_of(comparison: Comparison) -> list[Panel]:
    """Sort arms and stored references into panels: one per setting, or per reduction if too many.

    Panels are in the order of the table.
    """
    rows = [row for row in comparison.shown if row.accum_steps is not None]
    settings = by_setting(rows, "{reduction}, {settings} settings")
    panels = [Panel(title, tuple(members)) for title, members in settings.items()]
    return sorted(panels, key=lambda panel: min(row.setting.order for row in panel.rows))


def thinned(panels: Sequence[Panel], most: int = MOST_ARMS) -> tuple[list[Panel], tuple[str, ...]]:
    """Return panels that hold about so many N side by side, references' among them, and a note of it."""
    each = most // max(1, min(len(panels), PANELS_PER_ROW))
    thinner, notes = [], []
    for panel in panels:
        every = list(panel.by_n)
        if len(every) > each:
            kept = set(spread(every, each))
            kept |= {n for n, rows in panel.by_n.items() if any(row.is_reference for row in rows)}
            notes.append(f"Of {len(every)} N, {len(kept)} are drawn; comparison.csv has all of them.")
            panel = Panel(panel.title, tuple(row for row in panel.rows if row.accum_steps in kept))
        thinner.append(panel)
    return thinner, tuple(dict.fromkeys(notes))


def is_crowded(panels: Sequence[Panel]) -> bool:
    """Whether the arms are too many for a curve each, or the N for a legend."""
    every = {n for panel in panels for n in panel.by_n}
    return len(every) > MOST_ARMS or any(len(panel.rows) > MOST_ARMS for panel in panels)


def groups_of(panels: Sequence[Panel]) -> list[tuple[int, ...]]:
    """Return which N are drawn alike, ascending: each by itself, unless they are crowded and many."""
    every = sorted({n for panel in panels for n in panel.by_n})
    if len(every) <= _MOST_GROUPS or not is_crowded(panels):
        return [(n,) for n in every]
    # The least is the reference, as a rule, and stays by itself.
    others = np.array_split(np.array(every[1:]), _MOST_GROUPS - 1)
    return [(every[0],), *(tuple(part.tolist()) for part in others)]


def rows_of(group: Sequence[int], panels: Sequence[Panel]) -> list[ComparisonRow]:
    """Return the arms with one of these N, over all panels."""
    return [row for panel in panels for n in group for row in panel.by_n.get(n, [])]


def label_of(group: Sequence[int], panels: Sequence[Panel]) -> str:
    """Say for a legend what the arms with this N, or these, are: `N = 2 (stand-in reference)`."""
    rows = rows_of(group, panels)
    said = []
    for role in dict.fromkeys(row.role for row in rows if row.is_reference):
        everywhere = all(row.role == role for row in rows)
        named = "stand-in reference" if role == "stand-in" else role
        said.append(named + ("" if everywhere else " of some"))
    for verdict in dict.fromkeys(row.verdict for row in rows if row.verdict not in (None, *SOUND)):
        concerned = sum(row.verdict == verdict for row in rows)
        said.append(f"{verdict}{'' if concerned == len(rows) else f' in {concerned} of {len(rows)}'}")
    unfinished = [row for row in rows if not row.finished]
    if len(unfinished) == len(rows) == 1:
        said.append(unfinished[0].status)
    elif unfinished:
        said.append(f"{len(unfinished)} of {len(rows)} did not finish")
    name = f"N = {group[0]}" if len(group) == 1 else f"N = {group[0]} to {group[-1]}"
    return name + (f" ({', '.join(said)})" if said else "")


def subject(comparison: Comparison, runs: Mapping[str, RunRecord]) -> str:
    """Say what was trained: `CNN on Digits, global batch 256`."""
    trained = [run for run in runs.values() if run.micro_batch_sizes]
    model = _named(trained, "model.name", "model._target_") or "model"
    of_data = ("data.name", "data.train.name", "data.train._target_", "data._target_")
    data = _named(trained, *of_data) or "data"
    batches = sorted({size for row in comparison.shown if (size := row.global_batch_size)})
    varied = say_list(batches) if len(batches) <= 6 else "varied"
    return f"{model} on {data}" + (f", global batch {varied}" if batches else "")


def _named(runs: Sequence[RunRecord], *keys: str) -> str:
    values = (next(filter(None, map(run.params.get, keys)), "") for run in runs)
    found = {value.rpartition(".")[2] for value in values} - {""}
    return say_list(sorted(found)) if len(found) <= 3 else f"{len(found)} kinds"
