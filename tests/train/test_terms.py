"""A loss of several terms through the program: curves, reductions, audits, evaluation, plans."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.arms import plan as planning
from gaccum_exp.core.accumulate import accumulate_gradients
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.meter import FORWARD_BACKWARD, OPTIMIZER_STEP, TensorMeter
from gaccum_exp.memory.plan_memory import plan_memory as plan
from gaccum_exp.train.build import build, load
from gaccum_exp.train.evaluation import evaluate
from gaccum_exp.train.stackable_seeds import NotStackableError, stackable
from tests import strangers
from tests.program import Program
from tests.support import settings, step_at, trained

DATA = (
    "model=custom", "model._target_=tests.strangers.TwoHeads", "data=custom",
    "data.train._target_=tests.strangers.Labelled", "data.eval._target_=tests.strangers.Labelled",
    "+data.eval.seed=1", "runtime.device=cpu", "data.global_batch_size=10", "train.epochs=1",
    "runtime.precision=fp64",
)  # fmt: skip
SEG = "+criterion.terms.seg={criterion:{_target_:torch.nn.CrossEntropyLoss,weight:[1,2,1]},output:classes,target:label}"  # noqa: E501
DEPTH = "+criterion.terms.depth={criterion:{_target_:torch.nn.L1Loss},output:number,target:number,weight:0.4}"  # noqa: E501
TERMS = (*DATA, "criterion=terms", SEG, DEPTH)
BALANCE = (*DATA, "criterion=custom", "criterion._target_=tests.strangers.expert_balance",
           "+criterion._partial_=true")  # fmt: skip


def test_terms_of_a_configuration_are_trained_and_recorded(program: Program) -> None:
    """Each has its curve in the store, their weighted total is train/loss; the sweep is equivalent."""
    ended = program("-m", *TERMS, "accum.steps=1,3")
    assert ended.status == 0, ended.plain
    runs = {run.params["accum.steps"]: run for run in program.store().sweep(program.sweep_id, CURVES)}
    assert runs["3"].tags["verdict"] == "equivalent"
    for run in runs.values():
        curves = {key: list(run.curves[key].values) for key in CURVES}
        pairs = zip(curves["train/loss/seg"], curves["train/loss/depth"], strict=True)
        assert curves["train/loss"] == pytest.approx([s + 0.4 * d for s, d in pairs], rel=1e-12)
        assert len(curves["eval/loss/seg"]) == 1


CURVES = ("train/loss", "train/loss/seg", "train/loss/depth", "eval/loss/seg")


def by_hand(of: Any, samples: Any) -> Tensor:
    x = torch.stack([s[0] for s in samples])
    label, number = (torch.stack([s[1][key] for s in samples]) for key in ("label", "number"))
    out = of.model(x)
    weight = torch.tensor([1.0, 2, 1]).double()
    return F.cross_entropy(out["classes"], label, weight=weight) + 0.4 * F.l1_loss(out["number"], number)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_loss_gradient_and_evaluation_are_the_large_batchs(steps: int) -> None:
    """Of the first window, its micro-batches of unequal size; and of the whole evaluation set."""
    state = build(settings(*TERMS, f"accum.steps={steps}"))
    data, held_out = strangers.Labelled(), strangers.Labelled(seed=1)
    expected = by_hand(state, [data[int(i)] for i in state.plan.indices(0)])
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None])
    assert evaluate(state)["eval/loss"] == pytest.approx(
        by_hand(state, list(held_out)).item(), rel=1e-12
    )
    values = step_at(state, next(state.windows_from(0)))
    assert values["train/loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert values["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "verdict", "cause"),
    [
        ((*TERMS, "accum.steps=3"), "equivalent", None),
        ((*TERMS, "accum.steps=5", "accum.reduction=sum"), "equivalent", None),
        ((*TERMS, "accum.steps=3", "accum.reduction=sum", "accum.sum_scale=none"), "equivalent", None),
        ((*TERMS, "accum.steps=5", "accum.reduction=mean"), "biased", "unequal denominators"),
        ((*BALANCE, "accum.steps=3"), "equivalent", None),
        ((*BALANCE, "accum.steps=3", "+model.p=0.4"), "stochastic", "randomness"),
        ((*TERMS, "accum.steps=3", "strategy=cached"), "equivalent", None),
        ((*BALANCE, "accum.steps=3", "strategy=cached"), "equivalent", None),
    ],
)
def test_the_audit_of_terms(overrides: tuple[str, ...], verdict: str, cause: str | None) -> None:
    """One pass against N passes: what is counted twice, and with dropout, as well."""
    _, sink = trained(*overrides)
    assert (sink.tags["verdict"], sink.tags.get("cause")) == (verdict, cause)
    if cause == "unequal denominators":
        assert "in their term 'seg': sum the loss over each micro-batch" in sink.tags["remedy"]
    else:
        assert sink.curve("audit/e64")[0] < 1e-12


def test_a_function_under_mean_is_told_from_unequal_counts() -> None:
    """Where all count alike, the function of each micro-batch's means is to blame, and is named."""
    _, sink = trained(*BALANCE, "accum.steps=2", "accum.reduction=mean", "data.global_batch_size=24",
                      "+data.train.every=25")  # fmt: skip
    assert (sink.tags["verdict"], sink.tags["cause"]) == ("biased", "loss not additive over samples")
    assert "'balance/of classes'" in sink.tags["remedy"]


def test_partial_windows_a_schedule_and_a_finer_split_train_alike() -> None:
    """24 samples in windows of 10; N that grows, or is doubled after one window; outputs cached."""
    curves = []
    hows = ("accum.steps=1",), ("accum.steps=3",), ("accum.schedule={0:1,1:4}",)
    for how in (*hows, ("accum.steps=3", "strategy=cached")):
        _, sink = trained(*BALANCE, *how, "train.epochs=2")
        curves.append(sink.curve("train/loss/balance/of classes"))
    state = build(settings(*BALANCE, "accum.steps=2", "train.epochs=2"))
    state.split_factor = 2
    curves.append([float(step_at(state, w, k)["train/loss/balance/of classes"])
                   for k, w in enumerate(state.windows_from(0))])  # fmt: skip
    assert len(curves[0]) == 6
    assert all(curve == pytest.approx(curves[0], rel=1e-12) for curve in curves)


def test_seeds_of_a_loss_with_terms_are_not_stacked() -> None:
    """They are trained one after the other, and the sentence says why."""
    for overrides in (TERMS, BALANCE):
        of_seeds = [settings(*overrides, f"seed={seed}", "accum.steps=2") for seed in (0, 1)]
        with pytest.raises(NotStackableError, match="its loss has several terms"):
            stackable(of_seeds, load(of_seeds[0]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "criterion.terms: is a mapping of names"),
        (("+criterion.terms.a={output:x}",), r"criterion.terms.a.criterion._target_ must be set"),
        (
            (SEG, "+criterion.terms.seg.wieght=2"),
            "criterion.terms.seg.wieght: no such key, did you mean",
        ),
        (
            (SEG, "+criterion.terms.seg.weight=heavy"),
            "criterion.terms.seg.weight=heavy: must be a number",
        ),
        ((SEG, "criterion.terms.seg.output=klasses"), "no output 'klasses', only classes, number"),
        (("+criterion.terms.a.criterion._target_=builtins.dict",), "gives dict, not a torch.nn.Module"),
    ],
)
def test_what_is_wrong_in_the_mapping_is_said_with_its_key(
    overrides: tuple[str, ...], said: str
) -> None:
    """Before anything is trained."""
    with pytest.raises(BadInputError, match=said):
        build(settings(*DATA, "criterion=terms", *overrides))


def test_a_plan_of_terms_is_what_is_measured() -> None:
    """Through the program, and for a function of sums: its counting pass beside the first graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 32))

    def loss_fn(of: nn.Module, micro_batch: Any) -> dict[str, Any]:
        out = of(micro_batch[0])
        mean = out.softmax(1).sum(0)
        return {
            "a": (out.square().sum(), len(out)),
            "b": (mean, len(out), 0.3, lambda m: m.square().sum()),
        }

    batch = (torch.randn(37, 64),)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for row in plan(model, loss_fn, batch, optimizer).rows:
        sizes = [len(t) for t in torch.arange(37).tensor_split(row.accum_steps)]
        window = [(t,) for t in batch[0].split(sizes)]
        for _ in range(2):
            optimizer.zero_grad()
            meter = TensorMeter(model, optimizer, torch.device("cpu"))
            with meter:
                with meter.phase(FORWARD_BACKWARD):
                    accumulate_gradients(model, meter.loss_fn(loss_fn), window)
                with meter.phase(OPTIMIZER_STEP):
                    optimizer.step()
        peak = meter.peak()
        assert peak is not None
        assert row.peak.bytes == pytest.approx(peak.bytes, rel=0.01)


def test_class_weights_of_terms_are_as_precise_as_complex_outputs() -> None:
    """Their own complex numbers as well, which a module's `to` would make real."""
    where = "output:0,target:0"
    terms = (
        f"+criterion.terms.seg={{criterion:{{_target_:torch.nn.CrossEntropyLoss,weight:[1,2,1]}},{where}}}",
        f"+criterion.terms.turned={{criterion:{{_target_:tests.strangers.Turned}},{where}}}",
    )
    spectral = ("model=custom", "model._target_=tests.strangers.Spectral", "data=custom",
                "data.train._target_=tests.strangers.Points", "+data.train.samples=20",
                "data.global_batch_size=10", "runtime.device=cpu", "train.epochs=1")  # fmt: skip
    for precision, dtype in (("fp32", torch.complex64), ("fp64", torch.complex128)):
        state = build(settings(*spectral, "criterion=terms", *terms, f"runtime.precision={precision}"))
        assert state.criterion_loss is not None
        buffers = dict(state.criterion_loss.criterion.named_buffers())
        assert buffers["turned.turn"].dtype == dtype
        assert buffers["seg.weight"].dtype == buffers["turned.turn"].real.dtype
        assert float(buffers["turned.turn"].imag) == 1.0


@pytest.mark.parametrize("strategy", ["in_place", "cached"])
@pytest.mark.parametrize("overrides", [TERMS, BALANCE], ids=["criteria", "a function of sums"])
def test_the_peak_of_a_run_with_terms_is_predicted(overrides: tuple[str, ...], strategy: str) -> None:
    """Without values, so that nothing is counted; within the sums of losses."""
    overrides = (*overrides, f"strategy={strategy}")
    for steps in (1, 3):
        call = (*overrides, f"accum.steps={steps}", "audit.at_start=false", "train.epochs=null")
        configured = settings(*call, "train.steps=3")
        predicted = planning.predicted_peak(configured, load(configured))
        _, sink = trained(*call, "train.steps=3")
        assert predicted is not None
        assert predicted.bytes == pytest.approx(sink.last["memory/peak_bytes"], abs=64)
