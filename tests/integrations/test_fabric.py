"""`watch` around loops with Lightning Fabric."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from tests.integrations.small import EQUAL, SHORT, adamw, loader, net, same, weights

fabric_module = pytest.importorskip("lightning.fabric", reason="the extra `peers` is not installed")


def trained(
    sizes: Sequence[int],
    watched: bool = True,
    criterion: Any = F.cross_entropy,
    precision: str = "32-true",
    divided_by: int = 4,
) -> tuple[list[Tensor], Any]:
    """Train through Fabric, clipped; return the weights and the audit."""
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
    plain = net()
    model, optimizer = fabric.setup(plain, adamw(plain))
    with watch(model, criterion, optimizer) if watched else nullcontext() as audit:
        for i, (x, y) in enumerate(loader(sizes)):
            accumulating = (i + 1) % 4 != 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                fabric.backward(criterion(model(x), y) / divided_by)
            if not accumulating:
                fabric.clip_gradients(model, optimizer, max_norm=0.05)
                optimizer.step()
                optimizer.zero_grad()
    return weights(plain), audit


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), F.cross_entropy])
def test_equal_micro_batches_under_fabric_are_equivalent(criterion: Any, precision: str) -> None:
    """Model and optimizer as `setup` returns them."""
    _, audit = trained(EQUAL, criterion=criterion, precision=precision)
    assert [(w.verdict, w.accum_steps) for w in audit.windows] == [("equivalent", 4)] * 2, str(audit)
    assert audit.sound


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_short_last_micro_batch_under_fabric_is_biased(precision: str) -> None:
    """Three samples weigh as much as eight."""
    _, audit = trained(SHORT, precision=precision)
    assert (audit.verdict, audit.cause) == ("biased", "unequal denominators"), str(audit)


def test_a_loss_that_is_not_divided_under_fabric_has_the_wrong_size() -> None:
    """Four times the large batch's gradient, and the remedy says so."""
    _, audit = trained(EQUAL, divided_by=1)
    assert (audit.verdict, audit.cause) == ("biased", "loss scale")
    assert audit.scale == pytest.approx(4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_loop_with_fabric_ends_bit_for_bit_as_without_watch(precision: str) -> None:
    """Weights after all steps, clipped, on unequal micro-batches."""
    sizes = [*SHORT, *EQUAL[:4]]
    without, _ = trained(sizes, watched=False, precision=precision)
    under_watch, audit = trained(sizes, precision=precision)
    assert same(without, under_watch)
    assert len(audit.windows) == 2
