"""The pages of *Accumulation explained*: their code is run, and what is measured is filled in.

A page holds fenced `python` blocks, which share one namespace and run from top to bottom, and places
that are filled: what stands between `<!-- name -->` and `<!-- / -->`, in a line of text, or on lines of
its own where the mark begins a line (Markdown takes the whole of such a line for HTML).
"""

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "en": ROOT / "docs" / "explanation" / "accumulation.md",
    "zh": ROOT / "docs" / "zh" / "accumulation.md",
}
"""By language."""
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"(<!-- (\w+) -->)(.*?)(<!-- / -->)", re.DOTALL)


def blocks(page: str) -> list[str]:
    """Return the code of a page, block by block."""
    return _BLOCK.findall(page)


def run(page: str) -> tuple[dict[str, Any], list[str]]:
    """Run the code of a page as written; return its namespace, and what each block prints."""
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = []
    for number, block in enumerate(blocks(page), 1):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, f"block {number}", "exec"), namespace)
        printed.append(out.getvalue())
    return namespace, printed


def places(page: str) -> dict[str, str]:
    """Return what stands in the places of a page, by name."""
    return {name: text.strip() for _, name, text, _ in _PLACE.findall(page)}


def filled(page: str, said: Mapping[str, str]) -> str:
    """Return the page with its places filled; a place that nothing is said of is an error (KeyError)."""

    def fill(place: re.Match[str]) -> str:
        begin, name, _, end = place.groups()
        begins_line = page[: place.start()].endswith("\n")
        return f"{begin}\n{said[name]}\n{end}" if begins_line else f"{begin}{said[name]}{end}"

    return _PLACE.sub(fill, page)
