"""torch.compile: the same gradient, found out beforehand, and no compilation in the middle of a run.

Most runs here stop at torch's own tracing (`aot_eager`), which makes no machine code and takes a second.
What is traced when is the same, and the planted faults are in what it traced.
"""

import copy
import random
import shutil
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

from gaccum_exp.audit.agreement import Agreement, Tolerance
from gaccum_exp.errors import BadInputError
from gaccum_exp.train import compiled
from gaccum_exp.train.audits import audit
from gaccum_exp.train.build import build
from gaccum_exp.train.compiled import CompiledCheck, check_compiled
from gaccum_exp.train.state import TrainState
from tests.audit.test_untouched import same
from tests.strangers import Net
from tests.support import STRANGER, Collected, settings, trained

COMPILE = nn.Module.compile
COMPILED = "runtime.compile=true"
POINTS = (*STRANGER, "+data.train.samples=50", "data.global_batch_size=32", "accum.steps=7")
"""Micro-batches of 5, 5, 5, 5, 4, 4, 4 samples; at the epoch's end of 3, 3, 3, 3, 2, 2, 2."""
TOKENS = (
    "model=gpt", "model.layers=1", "model.width=8", "model.heads=2", "criterion=token_cross_entropy",
    "data=ragged", "data.size=44", "data.eval_size=9", "data.mean_length=6", "data.vocab_size=8",
    "data.global_batch_size=16", "accum.steps=5", "runtime.device=cpu",
)  # fmt: skip
SMOOTH = ("model=mlp", "model.hidden=[8]", "model.activation=tanh", "data=digits", "accum.steps=7",
          "data.global_batch_size=32", "runtime.device=cpu")  # fmt: skip
Graph = Callable[..., Sequence[Any]]


def compiling(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Let models compile with this backend, from a clean slate."""
    torch._dynamo.reset()
    counters.clear()
    plain = COMPILE
    monkeypatch.setattr(nn.Module, "compile", lambda model, **_: plain(model, backend=backend))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, "aot_eager")


def graphs() -> int:
    """How many have been compiled."""
    return int(counters["stats"]["unique_graphs"])


def weights(experiment: TrainState) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in experiment.parameters])


def wrong(spoil: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
    """Return a compiler whose backward graphs give something else; the model itself is as it was."""

    def spoiled(graph: Any, inputs: Any) -> Graph:
        return make_boxed_func(lambda *values: spoil(graph(*values)))  # type: ignore[no-untyped-call]

    def sound(graph: Any, inputs: Any) -> Graph:
        return make_boxed_func(graph.forward)  # type: ignore[no-untyped-call]

    return aot_autograd(fw_compiler=sound, bw_compiler=spoiled)


class Stale:
    """Gives the first gradient again and again, as where compiled kernels share a buffer."""

    def __init__(self) -> None:
        self.first: Sequence[Any] | None = None

    def __call__(self, gradients: Sequence[Any]) -> Sequence[Any]:
        self.first = self.first or [g if g is None else g.clone() for g in gradients]
        return self.first


def scaled(gradients: Sequence[Any]) -> Sequence[Any]:
    return [g if g is None else g * 1.001 for g in gradients]


def one_missing(gradients: Sequence[Any]) -> Sequence[Any]:
    first = next(i for i, g in enumerate(gradients) if g is not None)
    return [torch.zeros_like(g) if i == first else g for i, g in enumerate(gradients)]


def not_finite(gradients: Sequence[Any]) -> Sequence[Any]:
    return [g if g is None else g * float("nan") for g in gradients]


FAULTS: dict[str, Callable[[], Callable[[Sequence[Any]], Sequence[Any]]]] = {
    "scaled": lambda: scaled,
    "one missing": lambda: one_missing,
    "stale": Stale,
    "not finite": lambda: not_finite,
}


class Stateful(Net):
    """Everything that a canary could disturb: running statistics, random draws, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2).double()
        self.passes = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        self.passes += 1
        return super().forward(self.norm(x))


def state_of(experiment: TrainState) -> list[Any]:
    model = experiment.model
    gradients = [None if p.grad is None else p.grad.clone() for p in experiment.parameters]
    draws = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
    return [
        copy.deepcopy(dict(model.state_dict())),
        gradients,
        draws,
        [m.training for m in model.modules()],
        float(getattr(model, "passes", 0)),
    ]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_wrong_compiler_is_refused_and_nothing_has_moved(
    monkeypatch: pytest.MonkeyPatch, fault: str, dropout: float
) -> None:
    """Gradients a thousandth too large, zero for one parameter, those of another micro-batch, or NaN."""
    compiling(monkeypatch, wrong(FAULTS[fault]()))
    model = "tests.train.test_compiled.Stateful" if dropout == 0 else "tests.strangers.Net"
    more = () if dropout == 0 else (f"+model.dropout={dropout}",)
    experiment = build(settings(*POINTS, COMPILED, f"model._target_={model}", *more))
    for p in experiment.parameters:
        p.grad = torch.full_like(p, 3.0)
    before = state_of(experiment)
    with pytest.raises(
        BadInputError, match=r"compiled gradient is not the eager one.*compile=false"
    ) as refused:
        check_compiled(experiment)
    assert str(refused.value).count("rounding explains 1e-10") == 3
    assert "\n" not in str(refused.value)
    assert same(state_of(experiment), before)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("model", ["tests.train.test_compiled.Stateful", "tests.strangers.Net"])
def test_a_sound_compiler_passes_and_nothing_has_moved(model: str) -> None:
    """Weights, running statistics, gradients, modes and every random state, bit for bit."""
    more = ("+model.dropout=0.5",) if model.endswith("Net") else ()
    experiment = build(settings(*POINTS, COMPILED, f"model._target_={model}", *more))
    for p in experiment.parameters:
        p.grad = torch.full_like(p, 3.0)
    before = state_of(experiment)
    found = check_compiled(experiment)
    assert found["compile/error"] <= found["compile/floor"] == 1e-10
    assert graphs() == 1  # it was compiled
    assert same(state_of(experiment), before)


@pytest.mark.parametrize(("global_step", "recorded"), [(0, 1), (3, 0)])
def test_a_run_that_goes_on_does_not_record_it_again(
    monkeypatch: pytest.MonkeyPatch, global_step: int, recorded: int
) -> None:
    """It stands at step 0 of the run's journal; whether it holds here is looked at all the same."""
    monkeypatch.setattr(compiled, "check_compiled", lambda state: {"compile/error": 0.0})
    sink = Collected()
    CompiledCheck(sink).begin(SimpleNamespace(global_step=global_step))  # type: ignore[arg-type]
    sink.flush()
    assert len(sink.points) == recorded


def test_a_canary_ends_training_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run, not only when called; without compilation the same compiler harms nobody."""
    compiling(monkeypatch, wrong(scaled))
    with pytest.raises(BadInputError, match="compiled gradient is not the eager one"):
        trained(*POINTS, COMPILED, "train.steps=1")
    trained(*POINTS, "train.steps=1")


@pytest.mark.usefixtures("traced")
def test_a_model_with_dropout_is_compared_in_evaluation_mode(caplog: pytest.LogCaptureFixture) -> None:
    """Where it draws no numbers; one that draws there as well cannot be compared, and that is said."""
    experiment = build(settings(*POINTS, COMPILED, "+model.dropout=0.5"))
    assert check_compiled(experiment)["compile/error"] <= 1e-10
    assert "in evaluation mode" in caplog.text
    noisy = build(settings(*POINTS, COMPILED, "model._target_=tests.train.test_compiled.AlwaysNoisy"))
    with pytest.raises(BadInputError, match="draws random numbers in evaluation mode too"):
        check_compiled(noisy)


class AlwaysNoisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


WHOLE = pytest.mark.whole


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (POINTS, 1),
        pytest.param((*POINTS, "audit.every_steps=1"), 1, marks=WHOLE),
        pytest.param(
            (*POINTS, "data.eval._target_=tests.strangers.Points", "+data.eval.samples=9"), 2,
            marks=WHOLE,
        ),
        ((*POINTS, "+model.dropout=0.5"), 2),
        pytest.param((*POINTS, "data.train.samples=33"), 2, marks=WHOLE),
        pytest.param((*TOKENS, "data.eval._target_=null"), 1, marks=WHOLE),
        (TOKENS, 2),
        ((*POINTS, "accum.schedule={0:1,1:2,2:7}", "accum.steps=null"), 1),
    ],
    ids=["unequal and partial", "audited", "evaluated", "dropout's canary", "a single sample",
         "ragged tokens", "ragged and evaluated", "scheduled"],
)  # fmt: skip
def test_nothing_is_compiled_anew_for_another_size(overrides: tuple[str, ...], expected: int) -> None:
    """One graph for training, one for what is not training, and one for micro-batches of one sample."""
    trained(*overrides, COMPILED, "train.epochs=3", "audit.at_start=false")
    assert graphs() == expected


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "overrides", [POINTS, (*TOKENS, "runtime.precision=fp64")], ids=["points", "tokens"]
)
def test_a_compiled_run_is_the_eager_one(overrides: tuple[str, ...]) -> None:
    """Weights, losses, verdict and memory peak of two epochs in float64."""
    common = (*overrides, "train.epochs=2")
    eager, of_eager = trained(*common)
    assert graphs() == 0
    run, sink = trained(*common, COMPILED)
    assert graphs() > 0
    assert (weights(run) - weights(eager)).norm() < 1e-12 * weights(eager).norm()
    assert sink.curve("train/loss") == pytest.approx(of_eager.curve("train/loss"), rel=1e-12)
    assert sink.last["compile/error"] <= sink.last["compile/floor"]
    assert sink.tags["verdict"] == "equivalent"
    assert sink.last["memory/peak_bytes"] == of_eager.last["memory/peak_bytes"]


def test_the_canary_is_split_as_the_schedules_largest_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training that begins with N = 1, where there is nothing to accumulate."""
    compiling(monkeypatch, wrong(Stale()))
    growing = ("data.global_batch_size=null", "data.micro_batch_size=4", "accum.steps=null",
               "accum.schedule={0:1,2:4}")  # fmt: skip
    experiment = build(settings(*POINTS[:-2], *growing, COMPILED, "train.epochs=3"))
    compare, sizes = compiled._compared, []

    def noted(state: TrainState, window: Any) -> Any:
        sizes.append([len(y) for _, y in window])
        return compare(state, window)

    monkeypatch.setattr(compiled, "_compared", noted)
    with pytest.raises(BadInputError, match="compiled gradient is not the eager one"):
        check_compiled(experiment)
    assert sizes == [[4] * 4] * 3


@pytest.mark.usefixtures("traced")
def test_a_window_on_which_rounding_explains_much_settles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither for the compiler nor against it, where another window tells."""
    experiment = build(settings(*POINTS, COMPILED, "train.epochs=3"))

    def found(*pairs: tuple[float, float]) -> dict[str, float]:
        rest = (Agreement(error, limit, Tolerance(times=1.0, least=0.0)) for error, limit in pairs)
        monkeypatch.setattr(compiled, "_compared", lambda *_: [next(rest)])
        return check_compiled(experiment)

    assert found((0.2, 0.4), (1e-8, 1e-7)) == {"compile/error": 1e-8, "compile/floor": 1e-7}
    assert found((1e-3, 1e-7), (1e-8, 1e-7)) == {"compile/error": 1e-8, "compile/floor": 1e-7}
    assert found((0.2, 0.4), (0.9, 0.4), (0.3, 0.4)) == {"compile/error": 0.2, "compile/floor": 0.4}
    with pytest.raises(BadInputError, match=r"distance 0\.001 \(rounding explains 1e-07\); use"):
        found((0.2, 0.4), (1e-3, 1e-7), (0.2, 0.4))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("amplitude", ["1", "30", "1e9"])
def test_a_canary_in_float16_overflows_no_more_than_the_scaler_lets_it(
    amplitude: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss is scaled, less where that overflows; where nothing is finite, nothing is compared."""
    loud = ("model._target_=tests.strangers.Loud", f"+model.amplitude={amplitude}")
    experiment = build(settings(*POINTS, *loud, COMPILED, "runtime.precision=fp16"))
    found = check_compiled(experiment)
    if amplitude == "1e9":
        assert found == {}
        assert "not compared: they are not finite" in caplog.text
    else:
        assert found["compile/error"] <= found["compile/floor"] < 0.02


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("overrides", "precision"), [(TOKENS, "fp32"), (SMOOTH, "bf16")], ids=["tokens", "bf16"]
)
def test_the_real_compiler_trains_as_eager_within_rounding(
    overrides: tuple[str, ...], precision: str
) -> None:
    """Inductor's kernels, against the audit's floor: another order of the samples, and float64."""
    torch._dynamo.reset()
    common = (*overrides, f"runtime.precision={precision}", "train.steps=4", "data.eval._target_=null")
    eager, _ = trained(*common)
    run, sink = trained(*common, COMPILED)
    found = audit(eager, next(eager.windows_from(0)), 0)
    assert found.floor is not None
    assert sink.last["compile/error"] <= sink.last["compile/floor"] <= 16 * found.floor
    assert (weights(run) - weights(eager)).norm() <= 16 * found.floor * weights(eager).norm()
