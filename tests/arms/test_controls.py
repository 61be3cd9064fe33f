"""Controls: the reference trained again with only rounding changed."""

import pytest
import torch

from gaccum_exp.train.build import build
from tests.support import SMALL, settings
from tests.train.test_loop import weights


@pytest.mark.parametrize(
    ("precision", "asked"), [("fp32", None), ("fp64", None), ("bf16", "fp32"), ("fp16", "fp32")]
)
def test_the_control_of_a_run_in_half_precision_computes_in_float32(
    precision: str, asked: str | None
) -> None:
    """Another order moves next to nothing there; what is recorded as the run's precision stays."""
    control = settings(*SMALL, f"runtime.precision={precision}").as_control(2)
    assert (control.audit.control_seed, control.audit.control_precision) == (2, asked)
    assert control.flat()["audit.control_precision"] == asked
    assert control.flat()["runtime.precision"] == control.runtime.precision == precision
    assert control.precision == (asked or precision)
    experiment = build(control)
    assert experiment.placement.autocast is None
    assert experiment.scaler is None


def test_the_control_of_bfloat16_weights_begins_at_those_weights() -> None:
    """In float32, with the digits that bfloat16 has: else it would begin with another loss."""
    pure = settings(*SMALL, "runtime.precision=bf16", "runtime.weight_dtype=same")
    reference, control = build(pure), build(pure.as_control(1))
    assert weights(reference).dtype == torch.bfloat16
    assert weights(control).dtype == torch.float32
    assert torch.equal(weights(control), weights(reference).float())
