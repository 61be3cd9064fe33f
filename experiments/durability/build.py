"""Rebuild this study, or some parts of it: `python experiments/durability/build.py [part ...]`.

Every part attacks whole commands at random moments, and holds what is stored against what was trained.
What is found is kept in `measured.json`, part by part, with its seed and where it was measured, and the
page is written from that. The status is 1 where anything was lost, doubled or otherwise wrong.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.durability import (
    checkpoint_cost,
    checkpoints,
    command_lines,
    disk,
    going_on,
    kills,
    long_run,
    misbehaviour,
    network,
    sweeps,
    torn,
    writers,
)
from experiments.durability.tries import Options, Result
from experiments.notebook import provenance, write_results
from gaccum_exp.arms.provenance import git_commit

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "measured.json"
PARTS: dict[str, tuple[str, Callable[[Options], Result]]] = {
    "training": ("kill -9 of the training", kills.training),
    "helper": ("kill -9 of the helper, of both, of the server", kills.helper),
    "resume": ("kill -9, then the same command", going_on.resume),
    "resume_n": ("killed inside a window at N = 8, continued at N = 4, 16, 1", going_on.resume_n),
    "proxy": ("a proxy that delays, drops, cuts, answers 429, 500, 503", network.network),
    "disk": ("disk full, folders removed", disk.disk),
    "torn": ("journals torn at every byte, bits flipped", torn.torn),
    "writers": ("many writers on one store", writers.writers),
    "models": ("models and workers that exit, crash, hang; signals", misbehaviour.models),
    "checkpoints": (
        "checkpoints torn at every file, bits flipped, code planted",
        checkpoints.checkpoints,
    ),
    "checkpoint_cost": ("what checkpoints cost", checkpoint_cost.checkpoint_cost),
    "sweeps": ("sweeps ended at random moments, continued, arms added", sweeps.sweeps),
    "command_lines": (
        "command lines generated from the schema, hostile by kind",
        command_lines.command_lines,
    ),
    "windows": ("a million windows of a tiny model", long_run.windows),
}


def main(arguments: list[str]) -> int:
    """Run these parts, all if none is named, and write the page; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--tries", type=int, help="of a part: tries, requests, points or journals")
    parser.add_argument("--minutes", type=float, help="begin no new try of a part after these")
    parser.add_argument("--windows", type=int, help="of the long run (1,000,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="make this try alone, and write nothing down")
    parser.add_argument("--keep", type=Path, help="where the folders of tries stay")
    given = parser.parse_args(arguments)
    unknown = set(given.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))} (there are {', '.join(PARTS)})")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    keep = None if given.keep is None else given.keep.absolute()
    options = Options(given.tries, given.minutes, given.seed, given.only, keep, given.windows)
    git_commit()  # remembered: the commit that is measured, not one that is made meanwhile
    sound = True
    for name in given.parts or PARTS:
        start = time.monotonic()
        row = PARTS[name][1](options)
        sound = sound and row.sound
        print(f"| {PARTS[name][0]} | {row.tried} | {row.wrong} |\n\n{row.details}\n", flush=True)
        if given.only is not None:
            continue
        measured = read_measured()  # another part may have been measured meanwhile
        measured[name] = {
            "tried": row.tried, "wrong": row.wrong, "details": row.details, "sound": row.sound,
            "found": {of: getattr(row.found, of) for of in FOUND}, "seed": options.seed,
            "from": provenance(time.monotonic() - start),
        }  # fmt: skip
        MEASURED.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_results(HERE / "README.md", page(read_measured()), answer(read_measured()))
    return 0 if sound else 1


FOUND = ("points", "lost", "doubled", "wrong", "untimely", "running", "runs_doubled")
"""What is added up over the parts."""


def read_measured() -> dict[str, dict[str, Any]]:
    """Return what has been measured so far, by part."""
    found: dict[str, dict[str, Any]] = (
        json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    )
    return found


def answer(measured: dict[str, dict[str, Any]]) -> str:
    """Say what all parts together have lost, doubled and got wrong."""
    sums = {name: sum(part["found"][name] for part in measured.values()) for name in FOUND}
    beside = [PARTS[name][0] for name, part in measured.items() if not part["sound"]]
    return (
        f"**Answer.** Of {sums['points']:,} points that had to be there {sums['lost']} are lost, "
        f"{sums['doubled']} doubled and {sums['wrong']} wrong; {sums['untimely']} have another time "
        f"than their step; {sums['running']} runs are RUNNING and {sums['runs_doubled']} there twice. "
        + (f"Something else is wrong: {'; '.join(beside)}." if beside else "All ended as they should.")
    )


def page(measured: dict[str, dict[str, Any]]) -> str:
    """Return the table of all parts that were measured, and what stands below it."""
    lines = ["| attack | tried | lost, doubled or wrong |", "|---|---|---|"]
    lines += [
        f"| {title} | {measured[name]['tried']} | {measured[name]['wrong']} |"
        for name, (title, _) in PARTS.items()
        if name in measured
    ]
    for name, (title, _) in PARTS.items():
        if name in measured:
            part = measured[name]
            head = f"### {title[0].upper()}{title[1:]}"
            lines += ["", head, "", str(part["details"]), "", f"Seed {part['seed']}. {part['from']}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
