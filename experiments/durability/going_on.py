"""kill -9, then the same command: the run that goes on against one that nobody has disturbed."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.durability.command import Folders, Running, complaints, kill
from experiments.durability.kills import await_growth, await_moment
from experiments.durability.ledger import FILES, Findings, Stored, stored
from experiments.durability.tries import Options, Result, Tried, many, result
from gaccum_exp.tracking.delivered import Delivered
from gaccum_exp.tracking.journal import end_of
from gaccum_exp.tracking.metrics import EVAL_LOSS, TRAIN_LOSS

HERE = "experiments.durability.going_on"
PHASE = "phase"
"""The file that says whether the model trains or is evaluated."""
EXACT = ("train/", "optim/", "eval/")
"""Beginnings of the metrics that are equal bit for bit."""
STEPS = 900
WHEN = ("anywhere", "anywhere", "anywhere", "checkpoint", "checkpoint", "evaluation", "delivery")
"""What a kill is aimed at, drawn anew for each."""
ROUNDING = 1e-12
"""How far losses and weights at another N may lie apart in float64, relative to the largest."""
SPLIT_STEPS = 60
TOOK_S: dict[str, float] = {}
"""How long an undisturbed command takes."""
_measuring = threading.Lock()
_undisturbed: dict[str, tuple[Stored, dict[str, Tensor]]] = {}


class Net(nn.Module):
    """A classifier of digits that draws random numbers and keeps statistics, and says what it is in.

    Args:
        phase: the file that it writes to.
        pause_s: how long a pass takes at least.
        plain: without what makes N matter: in float64, and no random numbers or statistics.
    """

    def __init__(self, phase: str, pause_s: float = 0.0, plain: bool = False) -> None:
        super().__init__()
        self.phase, self.pause_s, self.said = phase, pause_s, ""
        first, last = nn.Linear(64, 16), nn.Linear(16, 10)
        between = [nn.Tanh()] if plain else [nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2)]
        self.layers = nn.Sequential(nn.Flatten(), first, *between, last)
        if plain:
            self.layers.double()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) -> (batch, 10)."""
        if type(x) is Tensor:
            now = "training" if self.training else "evaluation"
            if now != self.said:
                Path(self.phase).write_text(now)
                self.said = now
            time.sleep(self.pause_s)
        return self.layers(x)


def arguments(folder: Path, *more: str) -> list[str]:
    """Return the command line of a training that goes on."""
    return [
        "model=custom", f"model._target_={HERE}.Net", "+model.phase=phase", "data=digits",
        "data.global_batch_size=32", "accum.partial_window=carry", "accum.steps=2",
        "runtime.device=cpu", "runtime.threads=1",
        f"train.steps={STEPS}", "train.eval_every_steps=40", "optimizer.momentum=0.9",
        "scheduler=cosine", "checkpoint.every_steps=25", *more,
    ]  # fmt: skip


def undisturbed(places: Folders, name: str, *more: str) -> tuple[Stored, dict[str, Tensor]]:
    """Return the run and the weights of such a command that nobody disturbs."""
    with _measuring:
        if name not in _undisturbed:
            folder = places.new(f"undisturbed {name}")
            running = Running(folder, *arguments(folder, *more))
            if running.ended() != 0:
                raise RuntimeError(f"an undisturbed command fails: {running.text}")
            TOOK_S[name] = time.time() - running.start_s
            running.settled()
            _undisturbed[name] = the_run(folder)[0], weights_in(folder)
        return _undisturbed[name]


def the_run(folder: Path) -> list[Stored]:
    """Return the runs of a folder's store."""
    return stored(f"sqlite:///{folder / 'mlflow.db'}")


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return the final weights of the one run in a folder."""
    (path,) = folder.glob("outputs/*/weights.pt")
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def journals(folder: Path) -> list[Path]:
    """Return the journals of the runs in a folder that have begun."""
    return [p for p in folder.glob("outputs/*/journal.jsonl") if b'{"kind":"begin"' in p.read_bytes()]


def finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return any(end_of(path).get("status") == "FINISHED" for path in journals(folder))


def await_aim(running: Running, aim: str, draw: random.Random) -> bool:
    """Wait for what a kill is aimed at; False: the command ends before."""
    if aim == "anywhere":
        return await_moment(running, draw.uniform(0.0, TOOK_S["resume"]))
    if not await_growth(running, draw.randint(1, 3)):
        return False
    if aim == "delivery":
        return running.alive

    def there() -> bool:
        if aim == "checkpoint":
            return any(running.folder.glob("outputs/*/checkpoints/*.partial"))
        path = running.folder / PHASE
        return path.exists() and path.read_text() == "evaluation"

    skipped = draw.randint(0, 5)
    while running.alive:
        if there():
            if not skipped:
                return True
            skipped -= 1
            while there() and running.alive:
                time.sleep(0.0002)
        time.sleep(0.0002)
    return False


def hit(folder: Path, began: bool) -> str:
    """Say what a command was doing that was killed."""
    if not began:
        return "start"
    if any(folder.glob("outputs/*/checkpoints/*.partial")):
        return "checkpoint"
    path = folder / PHASE
    return path.read_text() if path.exists() else "start"


def resume(options: Options) -> Result:
    """Kill trainings once or more, and hold the run that goes on against one that was let alone."""
    tries = many("resume", 100, _kill_and_go_on, options)
    kills, steps = (sum(tried.notes.get(what, 0.0) for tried in tries) for what in ("kills", "equal"))
    extra = (
        f"{kills:.0f} kills: aimed at a checkpoint, an evaluation, the moment that a journal grows, or "
        f"at nothing, over the life of a command ({TOOK_S.get('resume', 0.0):.1f} s). "
        f"{steps:,.0f} steps were taken again and compared "
        "by the program itself. Every point and the weights are compared bit for bit with a run that "
        "was not disturbed (dropout, batch statistics, momentum, a schedule)."
    )
    return result(tries, extra)


def _kill_and_go_on(draw: random.Random, places: Folders, number: int) -> Tried | None:
    truth, weights = undisturbed(places, "resume")
    folder = places.new(f"resume {number}")
    tried, command = Tried("kill -9"), arguments(folder)
    for kills in range(1, draw.choice((1, 1, 2, 3)) + 1):
        aim, both, at_once = draw.choice(WHEN), draw.random() < 0.3, draw.random() < 0.5
        running = Running(folder, *command)
        alive = await_aim(running, aim, draw)
        began = bool(journals(folder))
        victims = running.processes() if both else running.trainings()[:1]
        if not alive or not victims:
            running.ended()
        kill(victims)
        running.process.wait()
        if finished(folder):
            break
        tried.when = hit(folder, began)
        tried.notes["kills"] = kills
        if not at_once:
            running.settled()
    if "kills" not in tried.notes:
        places.done(folder, keep=False)
        return None
    tried.what = f"kill -9, {tried.notes['kills']:.0f} ×"
    if not finished(folder):
        running = Running(folder, *command)
        running.ended()
        tried.problems += complaints(running, 0, "the command that goes on")
        said = [line for line in running.err.read_text().splitlines() if "taken again" in line]
        tried.notes["equal"] = sum(int(line.split()[0]) for line in said)
    tried.notes.setdefault("equal", 0.0)
    tried.problems += [f"left running: {line}" for line in running.settled()]
    if len(journals(folder)) != 1:
        tried.problems.append(f"{len(journals(folder))} runs were begun")
    tried.found = held_against(truth, the_run(folder))
    if len(journals(folder)) == 1 and not equal(weights, weights_in(folder)):
        tried.problems.append("the weights are not those of an undisturbed run")
    places.done(folder, keep=not tried.sound)
    return tried


def equal(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether weights are equal bit for bit."""
    return ones.keys() == others.keys() and all(torch.equal(ones[k], others[k]) for k in ones)


def held_against(truth: Stored, runs: list[Stored]) -> Findings:
    """Hold the runs of a store against the one that should be there."""
    found = Findings()
    for run in runs:
        found.statuses[run.status] += 1
        if run.status == "RUNNING":
            found.say("running", run.name)
        if run.status == "FINISHED" and not run.files >= FILES:
            found.say("lost", f"files: {', '.join(sorted(FILES - run.files))}")
    if len(runs) != 1:
        found.say("runs_doubled", f"{len(runs)} runs", abs(len(runs) - 1))
    there = runs[0].points if runs else {}
    for (name, step), values in truth.points.items():
        if not name.startswith(EXACT):
            continue
        found.points += 1
        now = there.get((name, step), [])
        if not now:
            found.say("lost", f"{name} at step {step}")
        elif now[0][0] != values[0][0]:
            found.say("wrong", f"{name} at step {step}: {now[0][0]!r}, not {values[0][0]!r}")
    for (name, step), values in there.items():
        if len(values) > 1:
            found.say("doubled", f"{name} at step {step}: {values}", len(values) - 1)
        if name.startswith(EXACT) and (name, step) not in truth.points:
            found.say("wrong", f"{name} at step {step}, which was never taken")
    return found


def resume_n(options: Options) -> Result:
    """Kill trainings at N = 8 inside a window, and go on with them at another N."""
    tries = many("resume_n", 24, _go_on_at_another_n, options)
    farthest = max((tried.notes.get("apart", 0.0) for tried in tries), default=0.0)
    inside = Counter(tried.when for tried in tries)
    extra = (
        f"In float64, against the run at N = 8 that was not disturbed: at most {farthest:.1e} apart "
        f"(of the largest loss, and of the norm of the weights); allowed are {ROUNDING:.0e}. "
        f"{inside['inside a window']} were resumed inside a window, {inside['begins again']} began it "
        "again (`mean`)."
    )
    return result(tries, extra, ("N and reduction", "went on"))


def _go_on_at_another_n(draw: random.Random, places: Folders, number: int) -> Tried | None:
    n, reduction = (4, 16, 1)[number % 3], ("global_mean", "sum", "global_mean", "mean")[number // 3 % 4]
    more = [
        "+model.plain=true", "+model.pause_s=0.01", "runtime.precision=fp64", "optimizer.lr=0.05",
        f"accum.reduction={reduction}", f"train.steps={SPLIT_STEPS}", "checkpoint.every_steps=null",
        "audit.at_start=false",
    ]  # fmt: skip
    truth, weights = undisturbed(places, reduction, *more, "accum.steps=8")
    folder = places.new(f"resume_n {number}")
    # A checkpoint inside a window comes with a signal, or where one takes longer than this.
    by_signal = draw.random() < 0.5
    minutes = "checkpoint.every_minutes=10" if by_signal else "checkpoint.every_minutes=0.0002"
    common = [*arguments(folder, *more), minutes]
    running = Running(folder, *common, "accum.steps=8")

    def inside() -> bool:
        return any(
            "+" in p.name for p in folder.glob("outputs/*/checkpoints/step-*") if "." not in p.name
        )

    ready = _await(running, lambda: bool(journals(folder)) and (folder / PHASE).exists())
    if ready:
        time.sleep(draw.uniform(0.1, 3.0))
        if not by_signal:
            ready = _await(running, inside)
    kill(running.trainings()[:1], signal.SIGTERM if by_signal else signal.SIGKILL)
    running.process.wait()
    running.settled()
    if not ready or finished(folder) or not inside():
        places.done(folder, keep=False)
        return None
    (journal,) = journals(folder)
    named = draw.choice([os.path.relpath(journal.parent, folder), journal.parent.name])
    if draw.random() < 0.3 and Delivered.of(journal).run_id is not None:
        named = str(Delivered.of(journal).run_id)
    after = Running(folder, *common, f"accum.steps={n}", f"resume={named}")
    after.ended()
    tried = Tried(f"8 to {n}, {reduction}")
    tried.problems += complaints(after, 0, "the command that goes on")
    tried.problems += [f"left running: {line}" for line in after.settled()]
    again = "begins again" in after.text
    tried.when = "begins again" if again else "inside a window"
    if again != (reduction == "mean"):
        tried.problems.append(f"under {reduction}: {tried.when}")
    (run,) = the_run(folder)
    tried.notes["apart"] = apart(truth, run, weights, weights_in(folder))
    tried.found.points = len(truth.points)
    if run.status != "FINISHED" or tried.notes["apart"] > ROUNDING:
        tried.found.say("wrong", f"{run.status}, {tried.notes['apart']:.1e} apart")
    places.done(folder, keep=not tried.sound)
    return tried


def _await(running: Running, over: Callable[[], bool]) -> bool:
    while running.alive and not over():
        time.sleep(0.005)
    return running.alive


def apart(truth: Stored, run: Stored, weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the largest distance of losses, over the largest, and of weights, over their norm."""
    farthest = 0.0
    for metric in (TRAIN_LOSS, EVAL_LOSS):
        curve = {step: values[0][0] for (name, step), values in truth.points.items() if name == metric}
        largest = max(map(abs, curve.values()))
        for step, value in curve.items():
            found = run.points.get((metric, step), [(float("inf"), 0)])
            farthest = max(farthest, *(abs(v - value) / largest for v, _ in found))
    between = torch.cat([(weights[k] - others[k]).flatten() for k in weights]).norm()
    norm = torch.cat([weights[k].flatten() for k in weights]).norm()
    return max(farthest, float(between / norm))
