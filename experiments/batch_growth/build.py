"""Rebuild this study: `python experiments/batch_growth/build.py` (within 15 minutes on two cores)."""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.batch_growth.recursion import SCHEDULES, Ended, final_losses
from experiments.notebook import (
    Quiet,
    asked_to_draw,
    composed,
    provenance,
    spread,
    write_results,
)
from gaccum_exp.report.figures import style
from gaccum_exp.tracking.sink import Point, Sink
from gaccum_exp.train.build import build
from gaccum_exp.train.loop import hooks_of, train

HERE = Path(__file__).resolve().parent
PROCESSES = 2
SEEDS = (0, 1, 2, 3, 4)
MARGIN = 0.02
"""Nats per character, fixed before the first run: closer than that, a held-out loss is called equal."""
T_OF_FOUR = 2.776
"""Student's t of a 95 % interval with 4 degrees of freedom, of five seeds."""
COSINE = "cosine"
ARMS = {
    COSINE: ("scheduler=cosine",),
    "growth, Adam's rule": ("scheduler=cosine", "accum.grow=auto", "accum.grow_to=32"),
    "growth, SGD's rule (wrong)": ("scheduler=cosine", "accum.grow=sgd", "accum.grow_to=32"),
    "constant rate": ("scheduler=none",),
}
GPT = (
    "model=gpt", "model.layers=2", "model.heads=2", "model.width=64", "data=text", "data.context=64",
    "criterion=token_cross_entropy", "optimizer=adamw", "optimizer.lr=0.003",
    "data.global_batch_size=null", "data.micro_batch_size=4", "accum.steps=2", "train.epochs=3",
)  # fmt: skip
QUIETLY = (
    *("runtime.device=cpu", "runtime.threads=1", "audit.at_start=false", "tracking.log_weights=false"),
    "data.eval_batch_size=128",
)
DRAWN = "drawn.json"
Told = Callable[[Mapping[str, Sequence[float]]], str]


class Curves(Sink):
    """Keeps what is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Point] = []

    def send(self, points: list[Point]) -> None:
        """Keep them."""
        self.points += points

    def describe(self, tags: Mapping[str, str]) -> None:
        """Forget them."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One arm under one seed."""

    arm: str
    seed: int
    optimizer_steps: int
    samples: int
    held_out: tuple[tuple[int, float], ...]
    """Samples and loss."""
    rates: tuple[tuple[int, float], ...]
    """Samples and learning rate."""
    batches: tuple[tuple[int, int], ...]

    @property
    def loss(self) -> float:
        """The last held-out loss, in nats per character."""
        return self.held_out[-1][1]


def trained(arm: str, seed: int, changed: Sequence[str] = ()) -> Trained:
    """Train an arm to its end."""
    state = build(composed(*GPT, *ARMS[arm], *QUIETLY, f"seed={seed}", *changed))
    sink, passed = Curves(), [0]
    for step in range(state.total_steps):
        passed.append(passed[-1] + state.plan.size(step))
    hooks, _ = hooks_of(state, sink, Quiet())
    train(state, hooks)
    sink.deliver()

    def curve(metric: str, at: int) -> tuple[tuple[int, float], ...]:
        return tuple(
            (passed[p.global_step + at], p.values[metric]) for p in sink.points if metric in p.values
        )

    batches = tuple((passed[k], state.plan.size(k)) for k in range(state.total_steps))
    ends = curve("eval/loss", 0)
    return Trained(arm, seed, state.total_steps, passed[-1], ends, curve("optim/lr", -1), batches)


def main() -> None:
    """Run the recursion and the trainings, and write answer, table and figure."""
    if asked_to_draw(HERE / DRAWN):
        kept = json.loads((HERE / DRAWN).read_text(encoding="utf-8"))
        runs = [Trained(**run) for run in kept["runs"]]
        draw(runs, [Ended(**one) for one in kept["exact"]], HERE)
        return
    start = time.monotonic()
    jobs = [(arm, seed) for seed in SEEDS for arm in ARMS]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        trainings = [pool.submit(trained, *job) for job in jobs]
        exact = final_losses()
        runs = [training.result() for training in trainings]
    write(runs, exact, time.monotonic() - start, HERE)


def write(runs: Sequence[Trained], exact: Sequence[Ended], seconds: float, folder: Path) -> None:
    """Write the figure, and on the page answer and tables."""
    kept = {"runs": [asdict(run) for run in runs], "exact": [asdict(one) for one in exact]}
    (folder / DRAWN).write_text(json.dumps(kept), encoding="utf-8")
    draw(runs, exact, folder)
    parts = [
        "### Noisy linear regression, exactly",
        exact_table(exact),
        "### A small GPT",
        gpt_table(runs),
        provenance(seconds),
    ]
    write_results(folder / "README.md", "\n\n".join(parts), f"**Answer.**\n\n{answer(runs, exact)}")


def differences(runs: Sequence[Trained], arm: str) -> list[float]:
    """Return the last held-out losses less those of the cosine, paired by seed."""
    loss = {(run.arm, run.seed): run.loss for run in runs}
    return [loss[arm, seed] - loss[COSINE, seed] for seed in sorted({run.seed for run in runs})]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of five values and its 95 % interval; of fewer, too wide a one is not given."""
    mean, deviation = spread(values)
    half = T_OF_FOUR * deviation / len(values) ** 0.5 if len(values) == 5 else float("nan")
    return mean, mean - half, mean + half


def judged(values: Sequence[float]) -> str:
    """Return what five paired differences show, against the margin."""
    _, low, high = interval(values)
    if low > -MARGIN and high < MARGIN:
        return "equal"
    if low >= MARGIN or high <= -MARGIN:
        return "worse" if low > 0 else "better"
    return "not resolved"


def answer(runs: Sequence[Trained], exact: Sequence[Ended]) -> str:
    """Return in a few sentences what was found."""
    steps = {run.arm: run.optimizer_steps for run in runs}
    said = []
    for arm in list(ARMS)[1:]:
        mean, low, high = interval(differences(runs, arm))
        said.append(
            f"*{arm}*: {judged(differences(runs, arm))}, {mean:+.4f} nats per character from the cosine "
            f"(95 % {low:+.4f} to {high:+.4f}), in {steps[arm] / steps[COSINE]:.0%} of its steps"
        )
    ratios = [one.growth / one.cosine for one in exact]
    return (
        f"**GPT with AdamW, {len(SEEDS)} seeds, margin ±{MARGIN}.** {'; '.join(said)}.\n\n"
        f"**SGD on noisy linear regression, exactly.** With SGD's rule the excess loss is "
        f"{min(ratios):.3f} to {max(ratios):.3f} × the cosine's over the rates below, in "
        f"{exact[0].windows['growth'] / exact[0].windows['cosine']:.0%} of its optimizer steps."
    )


def exact_table(exact: Sequence[Ended]) -> str:
    """Return the excess losses by learning rate."""
    head = " | ".join(f"{name}, × cosine" for name in SCHEDULES if name != "cosine")
    lines = [f"| rate / largest stable | cosine | {head} |", "|---" * (len(SCHEDULES) + 1) + "|"]
    for one in exact:
        ratios = (f"{one.losses[name] / one.cosine:.3f}" for name in SCHEDULES if name != "cosine")
        lines.append(f"| {one.share} | {one.cosine:.3e} | {' | '.join(ratios)} |")
    steps = " | ".join(str(exact[0].windows[name]) for name in SCHEDULES)
    return "\n".join([*lines, f"| optimizer steps | {steps} |"])


def gpt_table(runs: Sequence[Trained]) -> str:
    """Return the Markdown table, mean ± standard deviation over seeds."""
    lines = [
        "| arm | optimizer steps | samples | largest batch | held-out loss | less the cosine's, paired "
        "| 95 % | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        of_arm = [run for run in runs if run.arm == arm]
        loss, deviation = spread(run.loss for run in of_arm)
        largest = max(size for _, size in of_arm[0].batches)
        row = (
            f"| {arm} | {of_arm[0].optimizer_steps} | {of_arm[0].samples} | {largest} "
            f"| {loss:.4f} ± {deviation:.4f} "
        )
        if arm == COSINE:
            lines.append(f"{row}| | | |")
            continue
        mean, low, high = interval(differences(runs, arm))
        spread_of = spread(differences(runs, arm))[1]
        lines.append(
            f"{row}| {mean:+.4f} ± {spread_of:.4f} | {low:+.4f} to {high:+.4f} "
            f"| {judged(differences(runs, arm))} |"
        )
    return "\n".join(lines)


@style.styled()
def draw(runs: Sequence[Trained], exact: Sequence[Ended], folder: Path) -> None:
    """Draw the recursion's losses by rate, and loss, rate and batch of the GPT by samples."""
    figure = Figure(figsize=(style.width(), 5.6), layout="constrained")
    (of_exact, of_loss), (of_rate, of_batch) = figure.subplots(2, 2)
    for index, name in enumerate(SCHEDULES):
        points = [(one.share, one.losses[name]) for one in exact]
        look = style.look(index, len(SCHEDULES))
        of_exact.plot(*zip(*points, strict=True), label=name, **look)
    of_exact.set(xscale="log", yscale="log", xlabel="learning rate / largest stable one",
                 title="noisy linear regression: excess loss")  # fmt: skip
    for index, arm in enumerate(ARMS):
        of_arm = [run for run in runs if run.arm == arm]
        first, look = of_arm[0], style.look(index, len(ARMS))
        places = [samples for samples, _ in first.held_out]
        losses = [
            spread(loss for run in of_arm for at, loss in run.held_out if at == place)
            for place in places
        ]
        means, deviations = zip(*losses, strict=True)
        of_loss.errorbar(places, means, yerr=deviations, label=arm, **look)
        for axes, values in ((of_rate, first.rates), (of_batch, first.batches)):
            axes.step(
                *zip(*values, strict=True), where="post", linestyle=look["linestyle"],
                color=look["color"],
            )  # fmt: skip
    mean = statistics.fmean(run.loss for run in runs if run.arm == COSINE)
    band = {"color": style.GREY, "alpha": 0.25, "linewidth": 0}
    of_loss.axhspan(mean - MARGIN, mean + MARGIN, label="margin", **band)
    of_loss.set(xlabel="samples", title="GPT: held-out loss, nats per character")
    of_rate.set(xlabel="samples", title="GPT: learning rate")
    of_batch.set(xlabel="samples", title="GPT: global batch", yscale="log")
    for axes in (of_exact, of_loss):
        axes.legend()
    for axes in (of_exact, of_loss, of_rate, of_batch):
        axes.grid(axis="y")
    style.save(figure, folder, "batch_growth", ("png",))


if __name__ == "__main__":
    main()
