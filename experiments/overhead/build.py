"""Rebuild this study, or some parts of it: `python experiments/overhead/build.py [part ...]`.

What is measured is kept in `measured.json`, part by part, with where it was measured, and the page is
written from that. Nothing else may run on the machine meanwhile.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import provenance, write_results
from experiments.overhead import commands, many, one_run, seeds
from gaccum_exp.arms.provenance import git_commit

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "measured.json"
PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "windows": ("One window", one_run.windows),
    "delivery": ("What is recorded", lambda: one_run.deliveries(7)),
    "pieces": ("What a window consists of", lambda: one_run.pieces(25)),
    "start": ("From the command to the first window", lambda: commands.start(7)),
    "sweep": ("A sweep of four arms", lambda: commands.sweep(5)),
    "arm": ("What an arm costs beside its windows", lambda: commands.stages(3)),
    "arms": ("A sweep of 200 tiny arms", lambda: commands.many_arms(3)),
    "many": ("A report over many stored runs", lambda: many.main(repeats=5)),
    "seeds": ("The seeds of an arm as one training", lambda: seeds.main(5)),
    "side-by-side": ("Arms side by side", lambda: commands.side_by_side(5)),
}


def main(names: list[str]) -> None:
    """Measure these parts, all if none is named, and write the page."""
    unknown = set(names) - PARTS.keys()
    if unknown:
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))} (there are {', '.join(PARTS)})")
    git_commit()  # remembered: the commit that is measured, not one that is made meanwhile
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    for name in names or PARTS:
        start = time.monotonic()
        table = PARTS[name][1]()
        measured[name] = {"table": table, "from": provenance(time.monotonic() - start)}
        print(f"{table}\n", flush=True)
        MEASURED.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = [
        f"### {title}\n\n{measured[name]['table']}\n\n{measured[name]['from']}"
        for name, (title, _) in PARTS.items()
        if name in measured
    ]
    write_results(HERE / "README.md", "\n\n".join(text))


if __name__ == "__main__":
    main(sys.argv[1:])
