"""Print an audit on a terminal, with its numbers and remedy."""

import math

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gaccum_exp.audit.result import Audit, Finding
from gaccum_exp.report.text.terminal import LOOK, console
from gaccum_exp.report.text.wording import say_gap, say_ratio

SHOWN_PARAMETERS = 10
_STYLES = {"identical": "green", "equivalent": "green", "biased": "red"}
_OPEN = "yellow"


def print_audit(name: str, audit: Audit) -> None:
    """Print one audit: verdict and numbers, then the parameters with the largest errors."""
    out = console()
    out.print(Text(f"\n{name}", style="bold"))
    out.print(Padding(block(audit), (0, 0, 0, 2), expand=False))
    if audit.parameters:
        out.print(Padding(parameter_table(audit), (1, 0, 0, 2), expand=False))


def block(audit: Audit) -> RenderableType:
    """Return verdict, numbers and remedy, a line each, as far as they are known."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    grid.add_row("verdict", Text(audit.verdict, style=f"bold {_STYLES.get(audit.verdict, _OPEN)}"))
    open_question = audit.verdict == "inconclusive"  # whose numbers would read like a result
    if open_question and audit.detail:
        grid.add_row("reason", Text(audit.detail))
    for label, number, say, meaning in (
        ("e64", audit.e64, say_gap, "relative error of the accumulated gradient, in float64"),
        ("e", audit.e, say_gap, "the same in the run's own precision"),
        ("floor", audit.floor, say_gap, "how far rounding alone moves the one-pass gradient there"),
        ("scale", audit.scale, say_ratio, "× the large batch's mean gradient"),
    ):
        if number is not None and not open_question:
            grid.add_row(label, Text(f"{say(number):<9}{meaning}"))
    for label, words in (
        ("cause", audit.cause),
        ("culprit", _culprit(audit)),
        ("weights", _weights(audit)),
        ("remedy", audit.remedy),
        ("detail", None if open_question else audit.detail),
        *(pair for other in audit.besides for pair in _besides(other)),
        *((check.name, check.finding) for check in audit.checks),
    ):
        if words:
            grid.add_row(label, Text(words))
    return grid


def _besides(other: Finding) -> list[tuple[str, str | None]]:
    """Return a further cause as lines of the same kind."""
    return [("cause", other.where), ("remedy", other.remedy), ("detail", other.detail)]


def parameter_table(audit: Audit) -> Table:
    """Return the parameters with the largest errors, worst first."""
    left = len(audit.parameters) - SHOWN_PARAMETERS
    table = Table(caption=f"and {left} more" if left > 0 else None, **LOOK)
    table.add_column("parameter", overflow="fold")
    for header in ("error", "share", "norm"):
        table.add_column(f"  {header}", justify="right", no_wrap=True)
    for p in audit.parameters[:SHOWN_PARAMETERS]:
        table.add_row(Text(p.name), say_gap(p.error), say_gap(p.share), say_gap(p.norm))
    return table


def _weights(audit: Audit) -> str | None:
    """Say which micro-batches weigh least and most, and where the largest part of the error lies."""
    window = audit.window
    if window is None or audit.verdict != "biased" or window.no_shares is not None:
        return None
    ratios = {
        m.index: m.weight / m.one_pass_weight
        for m in window.micro_batches
        if m.weight is not None and m.one_pass_weight is not None
    }
    parts = [
        ((part or 0.0) * (layer.norm or 0.0), m.index, layer.name)
        for layer in window.layers
        for m, part in zip(window.micro_batches, layer.by_micro_batch or (), strict=False)
    ]
    if not ratios or not parts:
        return None
    least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    if math.isclose(ratios[least], ratios[most]):  # a factor, which the remedy tells
        return None
    _, index, layer_name = max(parts)
    return (
        f"a {window.unit.removesuffix('s')} weighs {say_ratio(ratios[least])} (micro-batch {least + 1}) "
        f"to {say_ratio(ratios[most])} (micro-batch {most + 1}) × what it does in one pass; the largest "
        f"part of the error is micro-batch {index + 1}'s, at {layer_name}"
    )


def _culprit(audit: Audit) -> str | None:
    if audit.culprit is None:
        return None
    name = audit.culprit or "the model itself"
    named = name if audit.culprit_type is None else f"{name} ({audit.culprit_type})"
    others = len(audit.culprits) - 1
    return f"{named}, and {others} more" if others > 0 else named
