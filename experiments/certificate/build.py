"""Rebuild this study: `python experiments/certificate/build.py [model ...]` (hours on two cores).

Audits what `results.csv` does not hold yet, cheap models first, and appends to it; so it can be stopped
and continued. Delete `results.csv` (or a model's rows) to measure again. Then the page is written anew.
"""

import gc
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.certificate.expected import EXPECTED, FAMILIES, LEFT_OUT, Family
from experiments.notebook import append_row, asked_to_draw, provenance, read_rows, write_results
from gaccum_exp.arms.provenance import git_commit
from gaccum_exp.audit.agreement import ROUNDING64
from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.audit.result import Audit, Culprit
from gaccum_exp.core.window import split_sizes
from gaccum_exp.models.torchvision import TorchvisionModel
from gaccum_exp.report.figures import style

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.csv"
STEPS = (2, 3, 4)
SHAPE, CLASSES = (3, 64, 64), 10
COLUMNS = (
    *("model", "steps", "samples", "verdict_expected", "verdict", "culprits_expected", "culprits"),
    *("right", "e64", "e", "floor", "seconds", "commit", "detail"),
)
VERDICTS = ("equivalent", "stochastic", "biased")
"""Of those that have an error; rounding that happened to agree is drawn as equivalent."""
SMALLEST = 1e-17
"""Where an error of zero stands on the log axis."""


def main() -> None:
    """Audit what is missing, then write figure and page."""
    if asked_to_draw(RESULTS):
        draw(read_rows(RESULTS))
        return
    commit = git_commit()  # remembered: the commit that is measured, not one that is made meanwhile
    done = {(row["model"], int(row["steps"])) for row in read_rows(RESULTS)}
    for name in sys.argv[1:] or sorted(set(EXPECTED) - set(LEFT_OUT), key=lambda n: (cost(n), n)):
        for steps in STEPS:
            if (name, steps) not in done:
                append_row(RESULTS, COLUMNS, judge(name, steps) | {"commit": commit})
    rows = sorted(read_rows(RESULTS), key=lambda row: (row["model"], int(row["steps"])))
    draw(rows)
    write_results(HERE / "README.md", results(rows), f"**Answer.** {summary(rows)}")


def cost(name: str) -> float:
    """Return the published operations of a forward pass, to begin with what is cheap."""
    known = models.get_model_weights(name.removeprefix("quantized_"))
    return float(min(weights.meta["_ops"] for weights in known))


def window(samples: int, steps: int, shape: tuple[int, ...] = SHAPE) -> list[tuple[Tensor, Tensor]]:
    """Return the micro-batches of a window of random images and labels, always the same ones."""
    generator = torch.Generator().manual_seed(samples)
    images = torch.randn(samples, *shape, generator=generator)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    sizes = split_sizes(samples, steps)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def named(name: str, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """Build a model with random weights, always the same ones."""
    torch.manual_seed(0)
    return TorchvisionModel(name, shape, CLASSES, image_size=EXPECTED[name].image_size)


def audit(model: nn.Module, micro_batches: list[tuple[Tensor, Tensor]]) -> Audit:
    """Audit a model on a window of random images."""
    return audit_window(model, nn.CrossEntropyLoss(), micro_batches)


def is_right(found: Audit, family: Family) -> bool:
    """Whether verdict, first culprit and the first culprit of each cause are the expected ones.

    `identical` is as good as `equivalent`: rounding happened to agree.
    """
    verdict = "equivalent" if found.verdict == "identical" else found.verdict
    first = (found.culprit, found.culprit_type)
    expected = (family.culprits[0].name, family.culprits[0].type) if family.culprits else (None, None)
    return (
        verdict == family.verdict
        and first == expected
        and first_of_each_cause(found.culprits) == family.culprits
    )


def first_of_each_cause(culprits: tuple[Culprit, ...]) -> tuple[Culprit, ...]:
    """Return those that come before all others with the same cause."""
    return tuple({culprit.cause: culprit for culprit in reversed(culprits)}.values())[::-1]


def judge(name: str, steps: int) -> dict[str, object]:
    """Audit and compare with the list."""
    family = EXPECTED[name]
    start = time.monotonic()
    found = audit(named(name), window(family.samples(steps), steps))
    seconds = time.monotonic() - start
    gc.collect()
    row: dict[str, object] = {
        "model": name,
        "steps": steps,
        "samples": family.samples(steps),
        "verdict_expected": family.verdict,
        "verdict": found.verdict,
        "culprits_expected": written(family.culprits),
        "culprits": written(first_of_each_cause(found.culprits)),
        "right": "yes" if is_right(found, family) else "no",
        "e64": found.e64,
        "e": found.e,
        "floor": found.floor,
        "seconds": round(seconds, 1),
        "detail": found.detail,
    }
    print(" ".join(f"{key}={value}" for key, value in row.items() if key != "detail"), flush=True)
    return row


def written(culprits: tuple[Culprit, ...]) -> str:
    """Return names and classes in a line."""
    return "; ".join(f"{c.name} ({c.type})" for c in culprits)


def summary(rows: list[dict[str, str]]) -> str:
    """Say how many audits are right, and which models are left out."""
    right = sum(row["right"] == "yes" for row in rows)
    audited = len({row["model"] for row in rows})
    said = (
        f"**{right} of {len(rows)} audits right** in verdict and in culprits, on {audited} of "
        f"torchvision's {len(EXPECTED)} classification models."
    )
    missing = set(EXPECTED) - set(LEFT_OUT) - {row["model"] for row in rows}
    if missing:
        said += f" Not run yet ({len(missing)}): {', '.join(sorted(missing))}."
    left = "; ".join(f"`{name}` ({why})" for name, why in LEFT_OUT.items())
    return f"{said} Left out: {left}."


def results(rows: list[dict[str, str]]) -> str:
    """Return table and provenance as Markdown."""
    commits = sorted({row["commit"] for row in rows})
    where = provenance(sum(float(row["seconds"]) for row in rows))
    measured = f"The rows were measured at: {', '.join(commits)}."
    return f"{table(rows)}\n\n{measured} Page: {where}"


def table(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table; where found and expected agree, it is said once."""
    lines = [
        "| model | N | samples | verdict | culprits | e64 | e | floor | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict, culprits = (agreed(row[c], row[f"{c}_expected"]) for c in ("verdict", "culprits"))
        errors = " | ".join(f"{float(row[c]):.0e}" if row[c] else "" for c in ("e64", "e", "floor"))
        lines.append(
            f"| {row['model']} | {row['steps']} | {row['samples']} | {verdict} | {culprits} "
            f"| {errors} | {row['seconds']} |"
        )
    return "\n".join(lines)


def agreed(found: str, expected: str) -> str:
    """Return what was found, and what was expected if it is something else."""
    if found == expected or (found, expected) == ("identical", "equivalent"):
        return found or "none"
    return f"**{found or 'none'}**, expected {expected or 'none'}"


@style.styled()
def draw(rows: list[dict[str, str]]) -> None:
    """Draw e64 of every audit, a line for each of torchvision's files."""
    audited = {EXPECTED[row["model"]].source for row in rows}
    every = dict.fromkeys(family.source for family in FAMILIES)
    sources = [source for source in every if source in audited][::-1]
    figure = Figure(figsize=(style.width(), 5.2), layout="constrained")
    axes = figure.subplots()
    for index, verdict in enumerate(VERDICTS):
        alike = ("equivalent", "identical") if verdict == "equivalent" else (verdict,)
        chosen = [row for row in rows if row["verdict"] in alike and row["e64"]]
        axes.plot(
            [max(float(row["e64"]), SMALLEST) for row in chosen],
            [sources.index(EXPECTED[row["model"]].source) for row in chosen],
            label=f"{verdict} ({len(chosen)})",
            **style.look(index, len(VERDICTS)) | {"linestyle": "", "markersize": 5},
        )
    for value, line, label in (
        (torch.finfo(torch.float64).eps, ":", "rounding unit of float64"),
        (ROUNDING64, "--", "where the audit sees bias"),
    ):
        axes.axvline(value, color="black", linewidth=0.8, linestyle=line, label=label)
    axes.set(xscale="log", xlabel="e64 = ‖g_N − g_1‖ / ‖g_1‖ in float64, random draws held")
    axes.set_yticks(range(len(sources)), [source.removesuffix(".py") for source in sources])
    axes.set_ylim(-0.7, len(sources) - 0.3)
    axes.grid()
    figure.legend(loc="outside lower center", ncols=5, columnspacing=1.0, handlelength=2.0)
    figure.suptitle("torchvision's classification models, N = 2, 3, 4, global mean, 64 px")
    style.save(figure, HERE, "certificate", ("png",))


if __name__ == "__main__":
    main()
