"""Rebuild this study: `python experiments/negative_controls/build.py` (about a minute on two cores)."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.negative_controls.control import Control
from experiments.negative_controls.controls import PAIRS, STYLES
from experiments.negative_controls.judge import accused, caught, watched
from experiments.notebook import provenance, write_results

PAGE = Path(__file__).resolve().parent / "README.md"


def main() -> int:
    """Judge every loop, print and write the tables; return 1 where one is misjudged."""
    start = time.monotonic()
    sound = {c.slug: watched(c.sound, c.sound_ground) for c in (*PAIRS, *STYLES)}
    faulty = {c.slug: watched(c.faulty, c.ground) for c in PAIRS if c.faulty}
    missed = [c.slug for c in PAIRS if not caught(c, faulty[c.slug])]
    wronged = [c.slug for c in (*PAIRS, *STYLES) if accused(c, sound[c.slug])]
    summary = (
        f"{len(PAIRS) - len(missed)} of {len(PAIRS)} faults caught and named; "
        f"{len(wronged)} of {len(sound)} sound loops accused."
    )
    results = f"{pairs(faulty, sound)}\n\n{styles(sound)}\n\n{summary}"
    print(results)
    write_results(PAGE, f"{results}\n\n{provenance(time.monotonic() - start)}")
    return int(bool(missed or wronged))


def pairs(faulty: dict[str, Any], sound: dict[str, Any]) -> str:
    """Return the table of faults and their sound versions."""
    lines = [
        "| planted | where seen | the faulty loop | caught? | the sound loop | accused? |",
        "|---|---|---|---|---|---|",
    ]
    for control in PAIRS:
        found, mended = faulty[control.slug], sound[control.slug]
        lines.append(
            f"| {control.title} | {control.seen} | {said(found)} | {mark(caught(control, found), 'NO')} "
            f"| {said(mended)} | {accusation(control, mended)} |"
        )
    return "\n".join(lines)


def styles(sound: dict[str, Any]) -> str:
    """Return the table of sound loops in other styles."""
    lines = ["| a sound loop | verdict | accused? |", "|---|---|---|"]
    for control in STYLES:
        audit = sound[control.slug]
        lines.append(f"| {control.title} | {said(audit)} | {accusation(control, audit)} |")
    return "\n".join(lines)


def said(audit: Any) -> str:
    """Return verdict, cause and checks in a few words."""
    cause = f": {audit.cause}" if audit.cause else ""
    checks = ", ".join(f"check *{check.name}*" for check in audit.checks)
    return f"{audit.verdict}{cause}" + (f"; {checks}" if checks else "")


def mark(right: bool, otherwise: str) -> str:
    """Return yes, or what stands out."""
    return "yes" if right else f"**{otherwise}**"


def accusation(control: Control, audit: Any) -> str:
    """Return whether the sound loop is accused; that it is stands out."""
    return "**YES**" if accused(control, audit) else "no"


if __name__ == "__main__":
    sys.exit(main())
