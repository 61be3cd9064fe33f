"""Read the tables that terminals are shown, so that the page shows the same."""

from typing import Any

from rich.table import Table
from rich.text import Text


def as_table(table: Table) -> dict[str, Any]:
    """Return title, head, rows, and the caption's lines: notes, and what explains the columns."""
    columns = [[_plain(cell).strip() for cell in column.cells] for column in table.columns]
    caption = _plain(table.caption).splitlines()
    return {
        "title": _plain(table.title),
        "head": _heads([_plain(column.header) for column in table.columns]),
        "sides": [column.justify for column in table.columns],
        "rows": [list(cells) for cells in zip(*columns, strict=True)],
        "styles": [str(row.style or "") for row in table.rows],
        "ends": [row.end_section for row in table.rows],
        "explained": [line for line in caption if not line.startswith("- ")],
        "notes": [line.removeprefix("- ") for line in caption if line.startswith("- ")],
    }


def _heads(headers: list[str]) -> list[str]:
    """Join the lines of each header; a bare × belongs to the one before it."""
    found: list[str] = []
    before = ""
    for header in headers:
        text = " ".join(header.split())
        found.append(f"{before} ×" if text == "×" else text)
        before = header.split("\n")[0] if text != "×" else before
    return found


def _plain(text: object) -> str:
    return text.plain if isinstance(text, Text) else str(text or "")
