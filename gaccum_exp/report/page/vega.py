"""Vega for the page: its script, and Vega-Lite compiled to it.

Both are made by vl-convert, which takes a second of a core for the one and half of one to compile the
first of the others. Neither depends on a sweep, so they are kept in the user's cache folder, where the
next report finds them; where there is none, or it cannot be written, they are made each time.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

_GLOBAL = "window.vegaEmbed=vegaEmbed;"


def vega_script() -> str:
    """Return the script that defines `window.vegaEmbed`, which has Vega and its interpreter in it."""

    def make() -> str:
        import vl_convert  # 88 MB, which are mapped only where something is made

        return str(vl_convert.javascript_bundle(_GLOBAL))

    return _kept(_GLOBAL, make)


def compiled(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Vega-Lite specification, which holds no data, as a Vega specification."""
    text = json.dumps(spec)

    def make() -> str:
        import vl_convert

        return json.dumps(vl_convert.vegalite_to_vega(text))

    made: dict[str, Any] = json.loads(_kept(text, make))
    return made


def _kept(what: str, make: Callable[[], str]) -> str:
    """Return what was made before by the same vl-convert, whole, or make it and keep it."""
    key = hashlib.sha256(f"{version('vl-convert-python')} {what}".encode()).hexdigest()[:24]
    folder = _cache_folder()
    if folder is None:
        return make()
    path = folder / f"vega-{key}"
    with suppress(OSError, ValueError):
        digest, _, text = path.read_bytes().decode().partition("\n")
        if digest == _digest(text):
            return text
    text = make()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, whoever else writes it; gone again where the disk is full.
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            written = Path(beside, path.name)
            written.write_bytes(f"{_digest(text)}\n{text}".encode())
            written.replace(path)
    return text


def _cache_folder() -> Path | None:
    """Return the user's cache folder; None: a user without a home has none.

    A relative one is ignored, as the XDG Base Directory Specification has it.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError):
        return (given if given.is_absolute() else Path.home() / ".cache") / "gaccum_exp"
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
