"""Write a comparison as one page of HTML: what it says in words first, then figures and tables.

To be imported when a page is written: the template's language takes a while to come.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gaccum_exp.report.arm_limit import by_setting
from gaccum_exp.report.compare.batches import BatchComparison
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison, csv_table
from gaccum_exp.report.figures.panels import subject
from gaccum_exp.report.page.arms import arm_section, commands
from gaccum_exp.report.page.colors import looks
from gaccum_exp.report.page.costs import memory_section, tradeoff_section
from gaccum_exp.report.page.curves import curve_section
from gaccum_exp.report.page.rich_tables import as_table
from gaccum_exp.report.page.specs import vega_specs
from gaccum_exp.report.page.vega import vega_script
from gaccum_exp.report.page.windows import WindowOf, window_section
from gaccum_exp.report.page.worth import batch_sections, noise_section
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.table import render, say_worth
from gaccum_exp.report.text.verdict_notes import SOUND, rank, say_verdicts
from gaccum_exp.report.whole_files import whole
from gaccum_exp.tracking.records import RunRecord

_FOLDER = Path(__file__).parent
_FIGURES = ("curves", "memory", "tradeoff", "windows", "noise", "batches")
"""The sections whose data the page's script draws."""
_MOST_REASONS = 4
_MORE_REASONS = "The reasons of the others stand beside each arm, below."


def write_page(
    comparison: Comparison,
    runs: Sequence[RunRecord],
    folder: Path,
    batches: Sequence[BatchComparison] = (),
    window_of: WindowOf = lambda run_id: None,
) -> Path:
    """Write `report.html` and return it: the same comparison gives the same bytes.

    Args:
        comparison: of the runs.
        runs: arms and controls, with their curves.
        folder: where it is written.
        batches: what the sweep shows of several global batches.
        window_of: gives what a run keeps of one window.
    """
    records = {run.run_id: run for run in (*comparison.stored_runs, *runs)}
    sections: dict[str, Any] = {
        "curves": curve_section(comparison, records),
        "memory": memory_section(comparison, records),
        "tradeoff": tradeoff_section(comparison),
        "windows": window_section(comparison, window_of),
        "noise": noise_section(comparison),
        **_top(comparison, runs, batches),
    }
    page = _template("page.html").render(
        looks=looks(len(sections["curves"]["groups"]) if sections["curves"] else 0),
        arms=arm_section(comparison, records),
        commands=commands(runs),
        every=_every_number(comparison),
        data=_script_data({name: sections[name] for name in _FIGURES} | {"specs": vega_specs()}),
        draws=any(sections[name] for name in _FIGURES),
        vega=Markup(re.sub("</(?=script)", r"<\/", vega_script(), flags=re.IGNORECASE)),
        script=Markup((_FOLDER / "page.js").read_text(encoding="utf-8")),
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        **sections,
    )
    path = folder / "report.html"
    with whole(path) as beside:
        beside.write_text(page, encoding="utf-8", newline="\n")
    return path


def page_top(
    comparison: Comparison, runs: Sequence[RunRecord], batches: Sequence[BatchComparison] = ()
) -> str:
    """Return the top of the page as a piece of another one: verdict and answers in words, and the table.

    Arguments as of `write_page`.
    """
    style = Markup((_FOLDER / "notebook.css").read_text(encoding="utf-8"))
    return str(_template("notebook.html").render(style=style, **_top(comparison, runs, batches)))


def _top(
    comparison: Comparison, runs: Sequence[RunRecord], batches: Sequence[BatchComparison]
) -> dict[str, Any]:
    """Return what the page begins with."""
    records = {run.run_id: run for run in (*comparison.stored_runs, *runs)}
    table = as_table(render(comparison))
    return {
        "title": subject(comparison, records),
        "sweep_ids": list(dict.fromkeys(run.tags.get("sweep_id", "") for run in runs)),
        "facts": _facts(comparison, records),
        "worst": _worst(comparison.rows),
        "answers": list(_answers(comparison)),
        "failures": _failures(comparison.rows),
        "worth": say_worth(comparison, batches).splitlines(),
        "to_mend": comparison.verdict_notes,
        "table_of_arms": table,
        "notes": [note for note in table["notes"] if note not in comparison.verdict_notes],
        "batches": batch_sections(batches),
    }


def _template(name: str) -> Any:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    return environment.get_template(name)


def _unbroken(text: str) -> str:
    """Keep `N = 8` and `0.23 ×` on one line."""
    return text.replace("N = ", "N\u00a0=\u00a0").replace(" ×", "\u00a0×")


def _script_data(data: Mapping[str, Any]) -> Markup:
    """Return data as JSON that no text in it can end: `<` is written as an escape."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _facts(comparison: Comparison, records: Mapping[str, RunRecord]) -> list[str]:
    """Say in a line how many arms there are and what they ran on."""
    rows = comparison.rows
    finished = sum(row.finished for row in rows)
    arms = f"{len(rows)} arm{'s' * (len(rows) != 1)}"
    machines = sorted({f"{row.device}, threads: {row.threads}" for row in rows if row.device})
    return [arms + (f", {finished} finished" if finished < len(rows) else ""), *machines[:3]]


def _worst(rows: Sequence[ComparisonRow]) -> str:
    """Return `sound`, `biased`, `open` or `none`: the looks of the verdict."""
    verdicts = [
        row.verdict
        for row in rows
        if row.verdict and not (row.accum_steps == 1 and row.verdict in SOUND)
    ]
    if not verdicts:
        return "none"
    worst = min(verdicts, key=rank)
    return "sound" if worst in SOUND else "biased" if worst == "biased" else "open"


def _answers(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    """Yield the summary's lines: looks of its verdicts, what is before them, they, the rest."""
    looks_of = {
        lead: _worst(rows)
        for rows in by_setting(comparison.rows, "{reduction}").values()
        if (lead := say_verdicts(rows))
    }
    for line in summary(comparison).splitlines():
        lead = max((lead for lead in looks_of if lead in line), key=len, default="")
        yield (looks_of[lead], *line.partition(lead)) if lead else ("none", "", "", line)


def _failures(rows: Sequence[ComparisonRow]) -> list[str]:
    """Say why, where no arm finished: each reason once, those of most arms first."""
    named: dict[str, list[str]] = {}
    for row in rows:
        if row.failure and not any(row.finished for row in rows):
            named.setdefault(row.failure.removeprefix(f"{row.name}: "), []).append(row.name)
    said = []
    for reason, names in sorted(named.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        who = "Every arm" if len(names) == len(rows) > 1 else f"{names[0]}{more}"
        said.append(f"{who}: {reason}")
    return said if len(said) <= _MOST_REASONS else [*said[:_MOST_REASONS], _MORE_REASONS]


def _every_number(comparison: Comparison) -> dict[str, Any]:
    """Return the table of `comparison.csv`, in the same digits."""
    head, rows = csv_table(comparison)
    said = [["" if value is None else str(value) for value in row] for row in rows]
    return {"title": "comparison.csv", "head": head, "rows": said}
