"""`watch` around loops with accelerate."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from tests.integrations.small import EQUAL, PARTIAL, SHORT, adamw, loader, net, same, weights

accelerate = pytest.importorskip("accelerate", reason="the extra `peers` is not installed")
state = pytest.importorskip("accelerate.state")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """accelerate keeps its settings for the life of the process."""
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def trained(
    sizes: Sequence[int],
    watched: bool = True,
    criterion: Any = None,
    clip: bool = False,
    **settings: Any,
) -> tuple[list[Tensor], Any]:
    """Train through accelerate; return the weights and the audit."""
    state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True, **settings)
    criterion = criterion or nn.CrossEntropyLoss()
    plain = net()
    model, optimizer, data = accelerator.prepare(plain, adamw(plain), loader(sizes))
    with watch(model, criterion, optimizer) if watched else nullcontext() as audit:
        for x, y in data:
            with accelerator.accumulate(model):
                loss = criterion(model(x), y)
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
    return weights(plain), audit


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), F.cross_entropy])
def test_equal_micro_batches_under_accumulate_are_equivalent(
    criterion: Any, precision: str, clip: bool
) -> None:
    """Also under autocast to bfloat16, and where accelerate clips."""
    _, audit = trained(EQUAL, criterion=criterion, clip=clip, mixed_precision=precision)
    assert [(w.verdict, w.accum_steps) for w in audit.windows] == [("equivalent", 4)] * 2, str(audit)
    assert audit.sound


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_short_last_micro_batch_under_accumulate_is_biased(precision: str) -> None:
    """accelerate divides each mean by N, however few samples it is of."""
    _, audit = trained(SHORT, clip=True, mixed_precision=precision)
    assert (audit.verdict, audit.cause) == ("biased", "unequal denominators"), str(audit)
    assert "8, 8, 8, 3" in audit.remedy


def test_a_partial_last_window_under_accumulate_has_the_wrong_size() -> None:
    """accelerate steps at the loader's end, on two micro-batches that were divided by four."""
    _, audit = trained(PARTIAL)
    assert [w.verdict for w in audit.windows] == ["equivalent", "biased"]
    assert (audit.cause, audit.accum_steps) == ("loss scale", 2)
    assert audit.scale == pytest.approx(0.5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_with_accelerate_ends_bit_for_bit_as_without_watch(precision: str) -> None:
    """Weights after all steps, clipped, on unequal micro-batches."""
    sizes = [*SHORT, *EQUAL[:4]]
    without, _ = trained(sizes, watched=False, clip=True, mixed_precision=precision)
    under_watch, audit = trained(sizes, clip=True, mixed_precision=precision)
    assert same(without, under_watch)
    assert len(audit.windows) == 2
