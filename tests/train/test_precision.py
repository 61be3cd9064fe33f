"""What passes compute in, what weights are kept in, and what rounding then does to a run."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.audit.configured_window import ConfiguredWindow
from gaccum_exp.audit.rerun.passes import ONE_PASS, ONE_PASS64, RECORDING, Rerun
from gaccum_exp.config.schema import RuntimeConfig
from gaccum_exp.core.gradient import distance
from gaccum_exp.core.reductions import GLOBAL_MEAN
from gaccum_exp.errors import BadInputError
from gaccum_exp.report.compare.rounding_envelope import envelope_of, stand
from gaccum_exp.tracking.records import Curve, RunRecord
from gaccum_exp.train.build import build
from gaccum_exp.train.evaluation import evaluate
from gaccum_exp.train.state import TrainState
from tests.support import SMALL, STRANGER, settings, step_at, trained

BF16, FP16, FP64 = (f"runtime.precision={p}" for p in ("bf16", "fp16", "fp64"))
PURE = (BF16, "runtime.weight_dtype=same")
DIGITS = ("data=digits", "data.global_batch_size=32", "runtime.device=cpu")
SMOOTH = ("model=mlp", "model.hidden=[16]", "model.activation=tanh", *DIGITS)
CONVOLUTIONS = ("model=cnn", "model.width=2", *DIGITS)


def weights(experiment: TrainState) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in experiment.parameters])


@dataclass
class Seen:
    """What the layers of a model met, one entry a call."""

    inputs: list[torch.dtype] = field(default_factory=list)
    outputs: list[torch.dtype] = field(default_factory=list)
    autocast: list[bool] = field(default_factory=list)

    def note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(inputs[0].dtype)
        self.outputs.append(output.dtype)
        self.autocast.append(torch.is_autocast_enabled("cpu"))


def spied(experiment: TrainState) -> tuple[Seen, Seen]:
    """Return what will be seen of the whole model, and of its linear layers."""
    whole, layers = Seen(), Seen()
    experiment.model.register_forward_hook(whole.note)
    for module in experiment.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(layers.note)
    return whole, layers


@pytest.mark.parametrize(
    ("overrides", "inputs", "outputs", "kept", "autocast"),
    [
        ((), torch.float32, torch.float32, torch.float32, False),
        ((FP64,), torch.float64, torch.float64, torch.float64, False),
        ((BF16,), torch.float32, torch.bfloat16, torch.float32, True),
        ((FP16,), torch.float32, torch.float16, torch.float32, True),
        (PURE, torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
    ],
    ids=["fp32", "fp64", "bf16", "fp16", "pure bf16"],
)
@pytest.mark.parametrize("task", ["training", "evaluation"])
def test_passes_compute_in_what_was_asked_and_weights_are_kept_in_what_was_asked(
    overrides: tuple[str, ...],
    inputs: torch.dtype,
    outputs: torch.dtype,
    kept: torch.dtype,
    autocast: bool,
    task: str,
) -> None:
    """Inputs of the model, outputs of its layers, weights and gradients, as a spy in it sees them."""
    experiment = build(settings(*SMALL, *DIGITS, *overrides, "accum.steps=3"))
    whole, layers = spied(experiment)
    if task == "training":
        step_at(experiment, next(experiment.windows_from(0)), 0)
        assert {p.grad.dtype for p in experiment.parameters if p.grad is not None} == {kept}
    else:
        assert evaluate(experiment)["eval/loss"].dtype == torch.promote_types(kept, torch.float32)  # type: ignore[union-attr]
    assert set(whole.inputs) == {inputs}
    assert set(layers.outputs) == {outputs}
    assert set(layers.autocast) == {autocast}
    assert {p.dtype for p in experiment.parameters} == {kept}


def test_in_float64_arms_agree_to_its_rounding() -> None:
    """N = 3 and 4 of 100 samples, over an epoch's end, from data in float32."""
    common = (*SMALL, *DIGITS, FP64, "data.global_batch_size=100", "train.steps=16")
    reference = weights(trained(*common)[0])
    for steps in (3, 4):
        arm = weights(trained(*common, f"accum.steps={steps}")[0])
        assert (arm - reference).norm() < 1e-12 * reference.norm()


def test_float32_arms_do_not_agree_to_that() -> None:
    """The negative control of the test above."""
    common = (*SMALL, *DIGITS, "data.global_batch_size=100", "train.steps=16")
    reference, arm = (weights(trained(*common, f"accum.steps={n}")[0]) for n in (1, 3))
    assert (arm - reference).norm() > 1e-9 * reference.norm()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            (FP16, "runtime.weight_dtype=same"),
            r"weight_dtype=same with runtime\.precision=fp16: .*bf16$",
        ),
        (
            (FP16, "optimizer=custom", "optimizer._target_=torch.optim.LBFGS"),
            r"precision=fp16: LBFGS evaluates a window several times .*use bf16 or fp32$",
        ),
        (("runtime.precision=fp8",), r"runtime\.precision=fp8: not one of fp32, fp64, bf16, fp16"),
        (("runtime.weight_dtype=float16",), r"runtime\.weight_dtype=float16: not one of float32, same"),
        (("runtime.matmul_precision=low",), r"matmul_precision=low: not one of highest, high, medium"),
    ],
)
def test_a_precision_that_cannot_be_trained_in_is_refused(overrides: tuple[str, ...], said: str) -> None:
    """In one sentence that says what to use."""
    with pytest.raises(BadInputError, match=said) as refused:
        build(settings(*SMALL, *DIGITS, *overrides))
    assert "\n" not in str(refused.value)


def test_precision_of_products_is_set_for_a_run_and_set_back_by_the_next() -> None:
    """Whatever an arm before it asked for; both are recorded."""
    asked = settings(*SMALL, *DIGITS, "runtime.matmul_precision=medium", "runtime.tf32=true")
    assert asked.flat()["runtime.matmul_precision"] == "medium"
    assert asked.flat()["runtime.tf32"] is True
    try:
        build(asked)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        build(settings(*SMALL, *DIGITS))
    assert torch.get_float32_matmul_precision() == RuntimeConfig().matmul_precision == "highest"
    assert not torch.backends.cudnn.allow_tf32


CONTROL = ("control_seed", "control_precision")


class HalfLoss:
    """A stranger's loss function that sums in the precision of the model's output."""

    def __call__(self, model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        x, y = micro_batch
        return nn.functional.cross_entropy(model(x), y, reduction="sum"), len(y)


def test_evaluation_adds_its_batches_up_in_float32() -> None:
    """Of bfloat16 losses, 45 batches of them: in bfloat16 a sum of 512 swallows what is below 2."""
    overrides = (*SMALL, *DIGITS, *PURE, "criterion=custom", "data.eval_batch_size=8",
                 "criterion._target_=tests.train.test_precision.HalfLoss")  # fmt: skip
    experiment = build(settings(*overrides))
    losses = []
    loss_fn = experiment.loss_fn

    def noting(model: nn.Module, micro_batch: Any) -> Any:
        losses.append(loss_fn(model, micro_batch))
        return losses[-1]

    values = evaluate(replace(experiment, loss_fn=noting))
    assert {loss.dtype for loss, _ in losses} == {torch.bfloat16}
    expected = sum(float(loss) for loss, _ in losses) / sum(n for _, n in losses)
    assert float(values["eval/loss"]) == pytest.approx(expected, rel=1e-6)


def gradients(experiment: TrainState, order: Tensor | None = None) -> tuple[Any, Any, Any]:
    """Return the first window's gradient in N passes, in one pass (in this order), and in float64."""
    window = next(experiment.windows_from(0))
    how = GLOBAL_MEAN, experiment.strategy
    rerun = Rerun(ConfiguredWindow(experiment.model, experiment.loss_fn, window, *how))
    accumulated = rerun.gradient(RECORDING)
    one_pass = rerun.gradient(replace(ONE_PASS, order=order))
    return accumulated, one_pass, rerun.gradient(ONE_PASS64)


@pytest.mark.parametrize("overrides", [(BF16,), PURE], ids=["bf16", "pure bf16"])
def test_in_bfloat16_order_and_split_move_a_gradient_by_no_more_than_rounding_does(
    overrides: tuple[str, ...],
) -> None:
    """Both stay as near to float64 as rounding to bfloat16 is: the audit's floor holds that distance.

    How much the order alone moves is the processor's affair: where its kernels sum a batch in float32
    and round once, next to nothing, and so controls of a loss curve cannot be reorderings alone.
    """
    experiment = build(settings(*CONVOLUTIONS, *overrides, "accum.steps=4"))
    split, whole, exact = gradients(experiment)
    reordered = gradients(experiment, torch.randperm(32, generator=torch.Generator().manual_seed(1)))[1]
    by_order, by_split = distance(reordered, whole), distance(split, whole)
    assert 0 < by_split < 2 * distance(whole, exact)
    assert by_order < 2 * distance(whole, exact)


def curve(name: str, *overrides: str) -> RunRecord:
    """Train; return the loss curve as a report reads it."""
    common = ("optimizer.lr=0.05", "train.steps=8", "audit.at_start=false", "data.eval._target_=null")
    _, sink = trained(*common, *overrides)
    losses = tuple(sink.curve("train/loss"))
    curves = {"train/loss": Curve(tuple(range(1, len(losses) + 1)), losses)}
    return RunRecord(name, "0", name, "FINISHED", 0, {}, {}, {}, curves)


@pytest.mark.parametrize(
    "overrides",
    [(*CONVOLUTIONS, BF16), (*SMOOTH, BF16), (*SMOOTH, FP16), (*SMOOTH, *PURE)],
    ids=["convolutions, bf16", "bf16", "fp16", "pure bf16"],
)
def test_a_sound_curve_in_half_precision_is_inside_its_controls_and_a_biased_one_is_not(
    overrides: tuple[str, ...],
) -> None:
    """N = 4 on a smooth model; the controls are of the run's own making."""
    reference = curve("reference", *overrides)
    seeds = [settings(*overrides).as_control(number).audit for number in (1, 2, 3)]
    controls = [
        curve("control", *overrides, *(f"audit.{key}={getattr(seed, key)}" for key in CONTROL))
        for seed in seeds
    ]
    envelope = envelope_of(reference, controls)
    assert envelope is not None
    assert stand(curve("4", *overrides, "accum.steps=4"), reference, envelope).word == "inside"
    biased = curve("biased", *overrides, "accum.steps=4", "accum.reduction=sum", "accum.sum_scale=none")
    assert stand(biased, reference, envelope).word == "outside"


def test_a_strangers_float64_model_stays_what_it_is() -> None:
    """fp32 is the default, and converts nothing."""
    experiment = build(settings(*STRANGER))
    assert {p.dtype for p in experiment.parameters} == {torch.float64}


SPECTRAL = (
    "model=custom", "model._target_=tests.strangers.Spectral", "data=custom",
    "data.train._target_=tests.strangers.Points", "runtime.device=cpu", "data.global_batch_size=8",
    "accum.steps=3", "train.steps=2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "complex_type", "real_type"),
    [
        ((), torch.complex64, torch.float32),
        ((FP64,), torch.complex128, torch.float64),
    ],
    ids=["fp32", "fp64"],
)
def test_complex_weights_are_as_precise_as_the_real_ones(
    overrides: tuple[str, ...], complex_type: torch.dtype, real_type: torch.dtype
) -> None:
    """Both parts of them train, and the norm that clips them counts both."""
    state, sink = trained(*SPECTRAL, *overrides, "accum.max_grad_norm=1e-3", "optimizer.lr=1")
    assert {p.dtype for p in state.parameters} == {complex_type, real_type}
    begun = build(settings(*SPECTRAL, *overrides))
    before, after = (dict(s.model.named_parameters())["filter"].detach() for s in (begun, state))
    assert (after.imag - before.imag).abs().max() > 0
    length = sum(
        float(p.grad.abs().double().square().sum()) for p in state.parameters if p.grad is not None
    )
    assert length**0.5 == pytest.approx(1e-3, rel=1e-4)
    assert min(sink.curve("optim/grad_norm")) > 1e-3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (PURE, r"weight_dtype=same: filter is complex.*complex64"),
        ((FP16,), r"precision=fp16: 1 parameters are complex, the first of shape \(5,\)"),
    ],
    ids=["pure bf16", "fp16"],
)
def test_half_precision_that_has_no_complex_numbers_is_refused(
    overrides: tuple[str, ...], said: str
) -> None:
    """By name, before the first pass."""
    with pytest.raises(BadInputError, match=said):
        build(settings(*SPECTRAL, *overrides))
