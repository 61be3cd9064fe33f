"""Small files that others may read at any time."""

import json
import os
from pathlib import Path
from typing import Any


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write a file of JSON, as `write_text` does."""
    write_text(path, json.dumps(note))


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all, in a folder that is made anew if it was removed.

    Raises:
        OSError: it cannot be written; what was there before is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
