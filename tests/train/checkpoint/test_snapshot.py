"""A training that is stopped and goes on is the one that was never stopped."""

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.errors import BadInputError
from gaccum_exp.train.checkpoint import hook
from gaccum_exp.train.checkpoint.files import UnusableCheckpointError, newest
from gaccum_exp.train.checkpoint.snapshot import restore
from gaccum_exp.train.evaluation import Evaluation
from gaccum_exp.train.stopping import StoppedError
from tests.strangers import Net
from tests.support import SMALL, STRANGER
from tests.train.checkpoint.resumes import AskAt, Training, gone_on, stopped_at

HERE = "tests.train.checkpoint.test_snapshot"
QUIET = ("audit.at_start=false", "accum.steps=4", "train.steps=5")
POINTS = (*STRANGER, *QUIET, "data.global_batch_size=8", "optimizer=adamw", "train.eval_every_steps=2",
          "+data.eval={_target_:tests.strangers.Points,seed:2}")  # fmt: skip
MLP = (*SMALL, *QUIET, "data.global_batch_size=32", "train.eval_every_steps=2")
DROPOUT = "+model.dropout=0.3"
LATE = (
    "criterion=custom",
    "criterion._target_=tests.strangers.count_labels",
    "+criterion._partial_=true",
)
SCARCE = f"model._target_={HERE}.Scarce"
GPT = ("model=gpt", "model.layers=1", "model.heads=2", "model.width=8", "data=ragged", "data.size=22",
       "data.eval_size=9", "data.mean_length=6", "data.vocab_size=8", "criterion=token_cross_entropy",
       "runtime.device=cpu", "optimizer=adamw", "data.global_batch_size=6", *QUIET)  # fmt: skip


class Moody(Net):
    """Moves all that no parameter is: buffers, attributes, generators, and a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64), persistent=False)
        self.register_buffer("last", None)
        self.passes, self.drawn = 0, torch.Generator().manual_seed(3)
        self.notes: list[int] = []
        self.own = {"heat": 1.0}
        self._hidden = Hidden()

    def get_extra_state(self) -> dict[str, float]:
        return {"heat": self._hidden.heat}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self._hidden.heat = state["heat"]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        if self.training:
            self.passes += 1
            self.notes.append(len(x))
            self.own["heat"] *= 0.9
            self._hidden.heat *= 0.9
            self.mean += x.mean(0)
            self.last = x[0].clone()
        draws = random.random() + np.random.rand() + torch.rand((), generator=self.drawn).item()
        moved = self.mean.sum() + self.passes + len(self.notes) + self.own["heat"] + self._hidden.heat
        last = 0.0 if self.last is None else self.last.sum()
        return super().forward(x) * (1 + 0.01 * (draws + moved + last))


class Unbuffered(Moody):
    """The same without buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers.clear()
        self.mean, self.last = torch.zeros(2, dtype=torch.float64), None  # type: ignore[assignment]


class Scarce(Net):
    """An accelerator's words for no memory where a micro-batch holds more than eight samples."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        if self.training and len(x) > 8:
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return super().forward(x)


class Running(Net):
    """Counts what passes through it, and runs out of memory at a pass, once in a process."""

    fails_at: ClassVar[int | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)
        self.passes, self.samples = [0], 0

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        if self.training and self.passes[0] == Running.fails_at:
            Running.fails_at = None
            raise torch.OutOfMemoryError("no room")
        if self.training:
            self.passes[0] += 1
            self.samples += len(x)
        return super().forward(x + self.norm.running_mean) + 0 * self.norm(x).sum()


class Hidden:
    """No attribute that can be seen to be a value."""

    heat = 1.0


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    """Return trainings that were never stopped, each made once."""
    made: dict[tuple[str, ...], Training] = {}

    def of(*overrides: str) -> Training:
        if overrides not in made:
            made[overrides] = Training(*overrides).train()
        return made[overrides]

    return of


def assert_the_same(folder: Path, at: tuple[int, int], whole: Training, *overrides: str) -> None:
    stopped = stopped_at(folder, at, *overrides)
    again, said = gone_on(folder, *overrides)
    assert said is None
    assert torch.equal(again.weights, whole.weights)
    assert stopped.curves.items() <= whole.curves.items()
    assert again.curves.items() <= whole.curves.items()
    assert {**stopped.curves, **again.curves} == whole.curves


@pytest.mark.parametrize("at", [(step, passes) for step in (0, 3) for passes in (1, 2, 3, 4)])
def test_a_window_goes_on_at_every_micro_batch(
    tmp_path: Path, undisturbed: Any, at: tuple[int, int]
) -> None:
    """With dropout, in float64: weights and curves are those of an undisturbed run, bit for bit."""
    assert_the_same(tmp_path, at, undisturbed(*POINTS, DROPOUT), *POINTS, DROPOUT)


@pytest.mark.parametrize(
    "overrides",
    [
        (*MLP, "optimizer=sgd", "scheduler=cosine", "model.dropout=0.3"),
        (*MLP, "optimizer=muon", "scheduler=warmup_cosine",
         "optimizer.param_groups=[{names:*bias,weight_decay:0}]"),
        (*MLP, "runtime.precision=fp16", "optimizer.lr=1e-3"),
        (*MLP, "runtime.precision=bf16", "runtime.weight_dtype=same", "accum.buffer_dtype=float32"),
        (*MLP, "accum.reduction=mean", "scheduler=multistep"),
        (*MLP, "accum.max_grad_norm=0.5", "optimizer=custom", "optimizer._target_=torch.optim.Adadelta"),
        ("model=cnn", "model.width=4", "model.norm=batch", "runtime.device=cpu", *QUIET,
         "data.global_batch_size=12", "accum.reduction=mean"),
        (*GPT, "model.dropout=0.1"),
        (*POINTS, *LATE, "data.train._target_=tests.strangers.Ignored"),
        (*POINTS, "data.global_batch_size=11", "accum.partial_window=carry", "+data.train.noise=0.1"),
        (*POINTS, "data.train._target_=tests.strangers.Ignored", "data.global_batch_size=1",
         "accum.steps=1", "train.steps=9"),
        (*POINTS, SCARCE, "data.global_batch_size=22", "accum.steps=1", "accum.on_oom=increase_steps"),
        (*POINTS, "'accum.schedule={0:1,2:2,4:4}'", "accum.schedule_by=step", "accum.steps=1",
         "data.global_batch_size=null", "data.micro_batch_size=2", "accum.schedule_lr=linear"),
        (*POINTS, "accum.grow=auto", "scheduler=cosine", "optimizer=adamw", "accum.steps=2",
         "train.epochs=null", "train.steps=12", "optimizer.param_groups=[{names:*bias,weight_decay:0}]"),
        (*POINTS, f"model._target_={HERE}.Moody"),
    ],
    ids=lambda overrides: " ".join(overrides[-2:])[-50:],
)  # fmt: skip
def test_what_a_training_is_made_of_comes_back(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Optimizers, schedules, scalers, buffers, generators: stopped in the fourth window, bit for bit."""
    overrides = tuple(line.strip("'") for line in overrides)
    whole = Training(*overrides).train()
    assert_the_same(tmp_path, (3, 1), whole, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=custom", "optimizer._target_=torch.optim.LBFGS", "optimizer.lr=0.1"),
        ("strategy=cached",),
    ],
    ids=["closure", "cached"],
)
def test_a_window_that_cannot_go_on_begins_again(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Stopped in its middle it is kept as it began, and then comes out bit for bit."""
    of = (*POINTS, *overrides, f"model._target_={HERE}.Counting")
    whole = Training(*of).train()
    assert_the_same(tmp_path, (3, 2), whole, *of)
    assert newest(tmp_path) == tmp_path / "step-00000003"


class Counting(Net):
    """Its passes with a graph move a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        self.passes += self.training and torch.is_grad_enabled()
        return super().forward(x)


@pytest.mark.parametrize("n", [2, 16, 1])
@pytest.mark.parametrize(
    "overrides", [(), ("accum.reduction=sum",), (*LATE, "data.train._target_=tests.strangers.Ignored")],
    ids=["global mean", "sum", "counted late"],
)  # fmt: skip
def test_a_begun_window_goes_on_at_another_n(
    tmp_path: Path, undisturbed: Any, overrides: tuple[str, ...], n: int
) -> None:
    """Stopped at N = 8 after three micro-batches: equal to the undisturbed run within 1e-12."""
    of = (*POINTS, "data.global_batch_size=16", "accum.steps=8", *overrides)
    whole = undisturbed(*of)
    stopped_at(tmp_path, (2, 3), *of)
    again, said = gone_on(tmp_path, *of, f"accum.steps={n}")
    assert said is None
    torch.testing.assert_close(again.weights, whole.weights, rtol=1e-12, atol=1e-13)
    assert again.state.accum_steps(4) == n


def test_the_mean_of_means_begins_its_window_again_at_another_n(
    tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 1/N is spent: the run says so, and ends where it does under that N from the window's start."""
    monkeypatch.setattr(hook, "COPIED", math.inf)
    of = (*POINTS, "accum.reduction=mean")
    stopped_at(tmp_path, (2, 3), *of)
    again, said = gone_on(tmp_path, *of, "accum.steps=2")
    assert said is not None
    assert "step 3 begins again: 3 of its 4 micro-batches" in said
    torch.testing.assert_close(again.weights, undisturbed(*of).weights, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [2, 16])
def test_the_mean_of_means_ends_a_short_window_as_it_was_split(
    tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Whose start would cost too much to keep: its passes are those that it was begun with."""
    monkeypatch.setattr(hook, "COPIED", 0.0)
    of = (*POINTS, f"model._target_={HERE}.Counting", "accum.reduction=mean",
          "data.global_batch_size=16", "accum.steps=4", "train.steps=3")  # fmt: skip
    stopped_at(tmp_path, (2, 3), *of)
    again, said = gone_on(tmp_path, *of, f"accum.steps={n}")
    assert said is None
    assert again.state.model.passes == 12
    torch.testing.assert_close(again.weights, undisturbed(*of).weights, rtol=1e-12, atol=1e-13)


def test_a_window_that_begins_again_finds_what_passes_move_as_it_was_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attributes, a state of its own and every generator: as from the checkpoint before the window."""
    monkeypatch.setattr(hook, "COPIED", math.inf)
    of = (*POINTS, "accum.reduction=mean", f"model._target_={HERE}.Unbuffered",
          "checkpoint.every_steps=2")  # fmt: skip
    stopped_at(tmp_path / "inside", (2, 3), *of)
    shutil.copytree(tmp_path / "inside", tmp_path / "before")
    shutil.rmtree(tmp_path / "before" / "step-00000002+3")
    again, said = gone_on(tmp_path / "inside", *of, "accum.steps=2")
    expected, nothing = gone_on(tmp_path / "before", *of, "accum.steps=2")
    assert (said is None, nothing) == (False, None)
    assert torch.equal(again.weights, expected.weights)


def test_memory_that_runs_out_in_a_window_that_goes_on_repeats_it_from_its_start(
    tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after three of four passes, out of memory in the fourth: no pass is counted twice."""
    of = (*POINTS, f"model._target_={HERE}.Running", "accum.on_oom=increase_steps",
          "data.global_batch_size=16", "train.steps=3")  # fmt: skip
    monkeypatch.setattr(Running, "fails_at", 11)
    whole = Training(*of).train()
    assert Running.fails_at is None
    stopped_at(tmp_path, (2, 3), *of)
    monkeypatch.setattr(Running, "fails_at", 11)
    again, _ = gone_on(tmp_path, *of)
    assert Running.fails_at is None
    model, expected = again.state.model, whole.state.model
    assert (model.passes, model.samples) == (expected.passes, expected.samples)
    assert torch.equal(again.weights, whole.weights)


def test_memory_that_runs_out_in_a_window_whose_start_was_not_kept_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was taken without accum.on_oom=increase_steps: in a line, with what goes on with it."""
    of = (*POINTS, f"model._target_={HERE}.Running")
    stopped_at(tmp_path, (2, 3), *of)
    monkeypatch.setattr(Running, "fails_at", 11)
    with pytest.raises(BadInputError, match=r"accum\.on_oom=raise .* accum\.steps=8 goes on with it$"):
        gone_on(tmp_path, *of, "accum.on_oom=increase_steps")


def test_a_checkpoint_of_another_training_is_refused_and_nothing_is_moved(tmp_path: Path) -> None:
    """Another shape, another optimizer: in one line, with the parameter."""
    stopped_at(tmp_path, (2, 3), *POINTS)
    path = newest(tmp_path)
    assert path is not None
    for other, said in (
        ("+model.hidden=5", r"model\.layers\.0\.weight is \(6, 2\), torch.float64 in it, and \(5, 2\)"),
        ("scheduler=cosine", "another optimizer, schedule or precision"),
    ):
        training = Training(*POINTS, other)
        before = training.weights
        with pytest.raises(UnusableCheckpointError, match=said) as found:
            restore(path, training.state, training.hooks)
        assert isinstance(found.value, BadInputError)
        assert torch.equal(training.weights, before)
        assert training.state.global_step == 0


def test_an_evaluation_that_was_stopped_is_had_again(tmp_path: Path, undisturbed: Any) -> None:
    """The checkpoint is of the step that it belongs to, and the evaluation comes first."""
    training = Training(*POINTS, folder=tmp_path)
    evaluation = training.hook(Evaluation)

    def stopped() -> None:
        training.stop.asked = StoppedError("enough", 143)
        training.stop.look()

    evaluation._before_batch = stopped
    with pytest.raises(StoppedError):
        training.train()
    assert newest(tmp_path) == tmp_path / "step-00000002"
    again, _ = gone_on(tmp_path, *POINTS)
    whole = undisturbed(*POINTS)
    assert {**training.curves, **again.curves} == whole.curves
    assert torch.equal(again.weights, whole.weights)


def test_a_training_stopped_in_an_audit_is_kept_as_it_was_before(
    tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An audit may be ended anywhere: what it has moved by then is no part of the checkpoint."""
    from gaccum_exp.train import audits

    of = (*POINTS, "audit.every_steps=3")
    training = Training(*of, folder=tmp_path)

    def torn(state: Any, window: Any, global_step: int) -> Any:
        if global_step == 3:
            with torch.no_grad():
                next(state.model.parameters()).add_(1.0)
            raise StoppedError("enough", 143)
        return judged(state, window, global_step)

    judged = audits.audit
    monkeypatch.setattr(audits, "audit", torn)
    with pytest.raises(StoppedError):
        training.train()
    monkeypatch.undo()
    assert newest(tmp_path) == tmp_path / "step-00000003"
    again, _ = gone_on(tmp_path, *of)
    whole = undisturbed(*of)
    assert torch.equal(again.weights, whole.weights)
    assert {**training.curves, **again.curves} == whole.curves
    assert again.audits.worst is not None
    assert whole.audits.worst is not None
    # What it knew of its window is in the run's folder, and in no checkpoint.
    assert again.audits.worst == replace(whole.audits.worst, window=None)


def test_what_was_counted_and_measured_before_belongs_to_the_run(
    tmp_path: Path, undisturbed: Any
) -> None:
    """Empty windows, the peak of memory, the times of windows: said at the end as ever."""
    of = (*POINTS, "data.train._target_=tests.strangers.Ignored", "data.global_batch_size=1",
          "accum.steps=1", "train.steps=20")  # fmt: skip
    whole = undisturbed(*of)
    stopped_at(tmp_path, (15, 1), *of)
    again, _ = gone_on(tmp_path, *of)
    last, expected = again.sink.last, whole.sink.last
    assert last["train/empty_windows"] == expected["train/empty_windows"] > 0
    for key in ("memory/peak_bytes", "memory/activations_bytes"):
        assert last[key] == expected[key]
    assert last["time/step_s"] > 0
    assert last.keys() == expected.keys()


def test_a_training_that_ends_again_before_it_moves_leaves_its_checkpoint(tmp_path: Path) -> None:
    """Stopped twice at one place: the checkpoint stays, and goes on from there."""
    stopped_at(tmp_path, (2, 3), *POINTS)
    path = newest(tmp_path)
    assert path is not None
    training = Training(*POINTS, folder=tmp_path)
    restore(path, training.state, training.hooks)
    training.stop.asked = StoppedError("enough", 143)
    with pytest.raises(StoppedError):
        training.train()
    assert newest(tmp_path) == path
    stopped_again = Training(*POINTS, folder=tmp_path)
    restore(path, stopped_again.state, stopped_again.hooks)
    with pytest.raises(StoppedError):
        stopped_again.train(AskAt(stopped_again.stop, 2, 4))
    assert newest(tmp_path) == tmp_path / "step-00000002+4"


def test_the_names_of_a_compiled_model_are_the_plain_ones(tmp_path: Path) -> None:
    """A model that is wrapped as a whole goes on from a checkpoint of the plain one."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

        def forward(self, *inputs: Any) -> Any:
            return self._orig_mod(*inputs)

    stopped_at(tmp_path, (2, 3), *POINTS)
    path = newest(tmp_path)
    assert path is not None
    training = Training(*POINTS)
    training.state.model = Wrapper(training.state.model)
    restore(path, training.state, training.hooks)
    assert training.state.global_step == 2


def test_looking_on_changes_nothing(tmp_path: Path, undisturbed: Any) -> None:
    """With a checkpoint after every step: the same weights and curves, bit for bit."""
    of = (*POINTS, DROPOUT)
    watched = Training(*of, "checkpoint.every_steps=1", folder=tmp_path).train()
    assert torch.equal(watched.weights, undisturbed(*of).weights)
    assert watched.curves == undisturbed(*of).curves
