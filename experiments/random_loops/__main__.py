"""Judge random loops: `python -m experiments.random_loops --count 500`; read one: `--show faulty 17`."""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.notebook import provenance, write_results
from experiments.random_loops.judge import (
    ROUNDING,
    Outcome,
    accumulated_error,
    faulty_loop,
    judged,
    sound_loop,
)
from experiments.random_loops.plan import FAULTS, Plan
from experiments.random_loops.source import text_of

PAGE = Path(__file__).resolve().parent / "README.md"
SOUND = ("sound", "accused", "another N", "inconclusive")
FAULTY = ("caught", "missed", "wrong cause", "inconclusive")
ALLOWED = ("sound", "caught", "inconclusive")


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge and print; return 1 where a loop is misjudged or accumulated wrongly."""
    parser = argparse.ArgumentParser(prog="python -m experiments.random_loops")
    parser.add_argument("--count", type=int, default=500, help="of sound loops, and of faulty ones")
    parser.add_argument("--show", nargs=2, metavar=("KIND", "SEED"), help="print one loop and its audit")
    parser.add_argument("--write", action="store_true", help="rewrite the results in README.md")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.show:
        plan = loop(*asked.show)
        print(f"{text_of(plan)}\n{plan}\n\n{(outcome := judged(plan)).said}: {outcome.audit}")
        return int(outcome.said not in ALLOWED)
    start = time.monotonic()
    sound = [(seed, judged(loop("sound", seed))) for seed in range(asked.count)]
    faulty = [(seed, judged(loop("faulty", seed))) for seed in range(asked.count)]
    errors = [e for _, outcome in sound if (e := accumulated_error(outcome.plan)) is not None]
    wrong = sum(error > ROUNDING for error in errors)
    results = "\n\n".join(
        [
            f"{tally('sound', SOUND, sound)} {tally('faulty', FAULTY, faulty)}",
            f"accumulate_gradients, on {len(errors)} of the sound windows: {wrong} off by more than "
            f"{ROUNDING:g}; the largest error is {max(errors, default=0):.1e}.",
            table("sound loops by form and division", SOUND, sound, lambda p: f"{p.form}, {p.how}"),
            table("sound loops with", SOUND, sound, lambda p: features(p)),
            table("faulty loops by fault", FAULTY, faulty, lambda p: str(p.fault)),
        ]
    )
    print(results)
    misjudged = [("sound", *each) for each in sound] + [("faulty", *each) for each in faulty]
    for kind, seed, outcome in misjudged:
        if outcome.said not in ("sound", "caught"):
            print(line(kind, seed, outcome))
    if asked.write:
        answer, _, rest = results.partition("\n\n")
        told = provenance(time.monotonic() - start)
        write_results(PAGE, f"{rest}\n\n{told}", f"**Answer.** {answer}")
    return int(bool(wrong) or any(outcome.said not in ALLOWED for _, _, outcome in misjudged))


def loop(kind: str, seed: int | str) -> Plan:
    """Return the loop of a seed; the faults take turns."""
    rng = random.Random(f"{kind} {seed}")
    if kind == "sound":
        return sound_loop(rng)
    return faulty_loop(rng, list(FAULTS)[int(seed) % len(FAULTS)])


def tally(kind: str, columns: Sequence[str], judgements: Sequence[tuple[int, Outcome]]) -> str:
    """Return the counts in a sentence."""
    said = Counter(outcome.said for _, outcome in judgements)
    return f"Of {len(judgements)} {kind} loops: " + ", ".join(f"{said[c]} {c}" for c in columns) + "."


def table(
    title: str,
    columns: Sequence[str],
    judgements: Sequence[tuple[int, Outcome]],
    rows_of: Callable[[Plan], str | list[str]],
) -> str:
    """Return what was said of the loops, in rows by what `rows_of` calls them."""
    rows: dict[str, Counter[str]] = {}
    for _, outcome in judgements:
        names = rows_of(outcome.plan)
        for name in [names] if isinstance(names, str) else names:
            rows.setdefault(name, Counter())[outcome.said] += 1
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(str(rows[name][c]) for c in columns)} |" for name in sorted(rows)]
    return "\n".join(lines)


def features(plan: Plan) -> list[str]:
    """Return what is special about a loop."""
    return [
        f"{len(plan.terms)} term{'s' if len(plan.terms) > 1 else ''}",
        *(["a second call of the model"] if plan.further else []),
        *(["a backward pass for each term"] if plan.apart else []),
        *(["an empty micro-batch"] if plan.empty else []),
        *(["a sum among means"] if any(t.summed for t in plan.terms) else []),
        *(["sequences"] if plan.tokens else []),
        *(["a teacher"] if any(t.kind == "teacher" for t in plan.terms) else []),
        *(["a centre"] if plan.terms[0].kind == "centred" else []),
        *(["few parameters"] if plan.middle == "few" else []),
        *(["clipping"] if plan.clipped else []),
        *(["float32"] if plan.single else []),
    ]


def line(kind: str, seed: int, outcome: Outcome) -> str:
    """Return a misjudged loop in a line."""
    plan, audit = outcome.plan, outcome.audit
    terms = " ".join(f"{t.kind}{'(sum)' if t.summed else ''}" for t in plan.terms)
    what = [f"N = {plan.accum_steps}", plan.form, plan.how, terms, *features(plan)[1:]]
    checks = [check.name for check in audit.checks]
    said = f"{audit.verdict}, {audit.cause}, {checks}, {(audit.remedy or audit.detail or '')[:70]}"
    named = f"{plan.fault}: " if plan.fault else ""
    return f"{kind} {seed} {outcome.said}: {named}{'; '.join(what)} -> {said}"


if __name__ == "__main__":
    sys.exit(main())
