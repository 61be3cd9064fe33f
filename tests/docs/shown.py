"""What a page shows: its blocks in their order, and the marks that stand above some of them.

A mark is a comment that no reader sees, on the line above its block:

    <!-- file: NAME -->         the reader's own file of that name holds it
    <!-- not run: REASON -->    it is left out where all others are run, for this reason
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted(p for p in ROOT.glob("docs/**/*.md") if "_build" not in p.parts)]
_BLOCK = re.compile(
    r"(?m)^(?:<!-- (?P<mark>file|not run): (?P<said>[^\n]*) -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>(?:(?!```)[^\n]*\n)*)```$"
)


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    line: int
    language: str
    text: str
    mark: str | None
    said: str | None

    @property
    def commands(self) -> list[str]:
        """The lines of a block for the shell, continued ones on one."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks, but for those that the site fills in (`{generated}` and the like)."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            str(page.relative_to(ROOT)), text.count("\n", 0, found.start("language")) + 1,
            found["language"], found["text"], found["mark"], found["said"],
        )
        for found in _BLOCK.finditer(text)
    ]  # fmt: skip
