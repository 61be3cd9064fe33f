"""A window's gradient on its way to the optimizer: added up in what type, and clipped once."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.audit.configured_window import ConfiguredWindow
from gaccum_exp.audit.rerun.passes import ONE_PASS, ONE_PASS64, RECORDING, Rerun
from gaccum_exp.core.gradient import distance
from gaccum_exp.core.reductions import GLOBAL_MEAN
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.storages import CATEGORIES
from gaccum_exp.train.audits import audit
from gaccum_exp.train.build import build
from gaccum_exp.train.state import TrainState
from tests.support import STRANGER, settings, step_at, trained

UNEVEN = (*STRANGER, "+data.train.samples=23", "data.global_batch_size=7", "train.epochs=3")
PURE = ("runtime.precision=bf16", "runtime.weight_dtype=same")
MANY = (*STRANGER, *PURE, "model._target_=tests.strangers.Loud", "+data.train.samples=256",
        "data.global_batch_size=256")  # fmt: skip


def weights(experiment: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in experiment.parameters])


def by_hand(experiment: TrainState, limit: float, *, each: bool) -> tuple[Tensor, list[float]]:
    """Train with torch's own clipping: of the large batch, or of every micro-batch's share."""
    optimizer, parameters = experiment.optimizer, experiment.parameters
    norms = []
    for window in experiment.windows_from(0):
        total = [torch.zeros_like(p) for p in parameters]
        samples = sum(len(y) for _, y in window)
        for x, y in window if each else [joined(window)]:
            optimizer.zero_grad()
            (nn.functional.cross_entropy(experiment.model(x), y, reduction="sum") / samples).backward()
            norms.append(float(nn.utils.clip_grad_norm_(parameters, limit)))
            for sum_, p in zip(total, parameters, strict=True):
                assert p.grad is not None
                sum_ += p.grad
        for sum_, p in zip(total, parameters, strict=True):
            p.grad = sum_
        optimizer.step()
    return weights(experiment), norms


def joined(window: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*window, strict=True)
    return torch.cat(x), torch.cat(y)


@pytest.mark.parametrize("n", [1, 3])
def test_the_windows_gradient_is_clipped_as_the_large_batchs(n: int) -> None:
    """Once, whatever N; what is logged is its norm before that."""
    clipped = (*UNEVEN, "accum.max_grad_norm=0.45", f"accum.steps={n}")
    experiment, sink = trained(*clipped)
    expected, norms = by_hand(build(settings(*clipped)), 0.45, each=False)
    assert torch.allclose(weights(experiment), expected, rtol=1e-12, atol=1e-13)
    assert sink.curve("optim/grad_norm") == pytest.approx(norms, rel=1e-12)
    assert min(norms) < 0.45 < max(norms)  # some windows are clipped, and others not


def test_clipping_every_micro_batch_is_another_training() -> None:
    """The negative control of the test above."""
    clipped = (*UNEVEN, "accum.max_grad_norm=0.45", "accum.steps=3")
    wrong, _ = by_hand(build(settings(*clipped)), 0.45, each=True)
    right = weights(trained(*clipped)[0])
    assert (wrong - right).norm() > 1e-3 * right.norm()


def test_a_norm_that_is_never_reached_changes_no_bit() -> None:
    """Clipping at 1000 is no clipping."""
    plain, clipped = (
        weights(trained(*UNEVEN, "accum.steps=3", *c)[0]) for c in ((), ("accum.max_grad_norm=1e3",))
    )
    assert torch.equal(plain, clipped)


def test_what_is_clipped_is_what_the_optimizer_gets() -> None:
    """Of the literal sum, whose norm is n times as large: logged so, and cut to the same."""
    summed = (
        *UNEVEN,
        "accum.steps=3",
        "accum.reduction=sum",
        "accum.sum_scale=none",
        "accum.max_grad_norm=0.1",
    )
    experiment = build(settings(*summed))
    mean = build(settings(*UNEVEN, "accum.max_grad_norm=0.1"))
    norms = [
        float(step_at(e, next(e.windows_from(0)), 0)["optim/grad_norm"]) for e in (experiment, mean)
    ]
    assert norms[0] == pytest.approx(7 * norms[1], rel=1e-12)
    for e in (experiment, mean):
        cut = math.hypot(*(float(p.grad.norm()) for p in e.parameters if p.grad is not None))
        assert cut == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_norm_that_leaves_no_gradient_is_refused(value: str) -> None:
    """By its key, and with what switches clipping off."""
    with pytest.raises(BadInputError, match=rf"max_grad_norm={float(value)}: must be above 0; null: no"):
        settings(f"accum.max_grad_norm={value}")


def error_of(buffer_dtype: str, n: int) -> tuple[float, float]:
    """Return how far the gradients of N passes and of one lie from float64."""
    experiment = build(settings(*MANY, f"accum.buffer_dtype={buffer_dtype}", f"accum.steps={n}"))
    how = GLOBAL_MEAN, experiment.strategy
    window = next(experiment.windows_from(0))
    rerun = Rerun(ConfiguredWindow(experiment.model, experiment.loss_fn, window, *how))
    accumulated, exact = rerun.gradient(RECORDING), rerun.gradient(ONE_PASS64)
    assert {g.dtype for g in accumulated.values()} == {torch.bfloat16}
    return distance(accumulated, exact), distance(rerun.gradient(ONE_PASS), exact)


def test_in_bfloat16_the_error_of_a_sum_grows_with_n_and_in_float32_buffers_it_does_not() -> None:
    """N = 4, 16, 64 against the gradient in float64."""
    same = [error_of("same", n)[0] for n in (4, 16, 64)]
    buffered = [error_of("float32", n)[0] for n in (4, 16, 64)]
    one_pass = error_of("same", 4)[1]
    assert same[0] < same[1] < same[2]
    assert same[2] > 2 * same[0]
    assert max(buffered) < 1.5 * max(one_pass, 2**-9)
    assert buffered[2] < 0.5 * same[2]


def test_the_audit_tells_a_sum_in_bfloat16_from_one_in_float32() -> None:
    """Of 64 micro-batches: the one biased by its low precision, the other equivalent."""
    verdicts = {}
    for buffer_dtype in ("same", "float32"):
        overrides = (*MANY, f"accum.buffer_dtype={buffer_dtype}", "accum.steps=64")
        experiment = build(settings(*overrides))
        found = audit(experiment, next(experiment.windows_from(0)), 0)
        verdicts[buffer_dtype] = (found.sound, found.verdict, found.cause)
        assert found.e64 is not None
        assert found.e64 < 1e-12
    assert verdicts["same"] == (False, "biased", "low-precision accumulation")
    assert verdicts["float32"][0]


def test_buffers_show_in_the_peak() -> None:
    """Four bytes a parameter more, less the two that `.grad` no longer takes; they are gradients."""
    peaks = {}
    for buffer_dtype in ("same", "float32"):
        experiment, sink = trained(
            "model=mlp", "model.hidden=[256,256]", "data.global_batch_size=32", "runtime.device=cpu",
            "accum.steps=4", "train.steps=4", "optimizer.momentum=0", "audit.at_start=false", *PURE,
            f"accum.buffer_dtype={buffer_dtype}",
        )  # fmt: skip
        peaks[buffer_dtype] = sink.last
        parts = {part: sink.last[f"memory/{part}_bytes"] for part in CATEGORIES}
        assert sum(parts.values()) == sink.last["memory/peak_bytes"]
    size = sum(p.numel() for p in experiment.parameters)
    more = peaks["float32"]["memory/peak_bytes"] - peaks["same"]["memory/peak_bytes"]
    assert more == pytest.approx((4 - 2) * size, rel=0.01)
    assert peaks["float32"]["memory/gradients_bytes"] >= 4 * size
    assert peaks["same"]["memory/gradients_bytes"] == 2 * size


def test_buffers_are_none_where_weights_are_as_wide() -> None:
    """float32 buffers of float64 weights would lose digits: the sum is bit for bit the same."""
    plain, buffered = (
        weights(trained(*UNEVEN, "accum.steps=3", f"accum.buffer_dtype={dtype}")[0])
        for dtype in ("same", "float32")
    )
    assert torch.equal(plain, buffered)
