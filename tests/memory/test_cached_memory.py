"""The memory of a window whose loss is of all its outputs: predicted, and measured."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients, plan_memory
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.meter import FORWARD_BACKWARD, OPTIMIZER_STEP, TensorMeter

SAMPLES = 27


class Encoder(nn.Module):
    """Embeds 32 features in 16; the loss reads a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                                    nn.Linear(128, 16))  # fmt: skip
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.layers(x)
        return embedding


def contrastive(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    one, other = model(micro_batch[0]), model(micro_batch[1])
    logits = F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T * model.temperature.exp()
    own = torch.arange(len(one), device=one.device)
    return F.cross_entropy(logits, own, reduction="sum"), len(one)


def test_the_predicted_peak_is_the_measured_one() -> None:
    """For every N, with its parts, within 2 %: outputs and loss of the whole window are in it."""
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(SAMPLES, 32), torch.randn(SAMPLES, 32)
    plan = plan_memory(model, contrastive, batch, optimizer, strategy="cached")
    for accum_steps in (1, 2, 4, 27):
        sizes = split_sizes(SAMPLES, accum_steps)
        window = list(zip(*(t.split(sizes) for t in batch), strict=True))
        for _ in range(2):  # in the second there is optimizer state
            optimizer.zero_grad()
            meter = TensorMeter(model, optimizer, torch.device("cpu"))
            with meter:
                with meter.phase(FORWARD_BACKWARD):
                    accumulate_gradients(model, meter.loss_fn(contrastive), window, strategy="cached")
                with meter.phase(OPTIMIZER_STEP):
                    optimizer.step()
        peak, predicted = meter.peak(), plan.row(accum_steps).peak
        assert peak is not None
        assert peak.bytes == pytest.approx(predicted.bytes, rel=0.02)
        assert peak.phase == predicted.phase
        for part, size in predicted.parts.items():
            assert peak.parts[part] == pytest.approx(size, rel=0.05, abs=512)
    assert "outputs of the whole window" in str(plan)


def test_what_depends_on_values_is_not_extrapolated() -> None:
    """Small windows do not tell what the loss of a large one holds."""

    def branching(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
        loss, n = contrastive(model, micro_batch)
        return (loss if float(loss.detach()) > 0 else -loss), n

    model = Encoder()
    batch = torch.randn(8, 32), torch.randn(8, 32)
    with pytest.raises(BadInputError, match="plan without strategy=cached"):
        plan_memory(model, branching, batch, torch.optim.SGD, strategy="cached")  # type: ignore[arg-type]
