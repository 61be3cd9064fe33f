"""What happens to a micro-batch between host and model."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.losses.placement import Placed, Placement, on_device, placed

META = torch.device("meta")
"""A device that is nowhere: shapes and types only, on any machine."""


def nested() -> Any:
    return {
        "x": torch.tensor([1.0, 2.5]),
        "more": [(torch.tensor([3, 4]), "text"), {"mask": torch.tensor([True, False]), "n": 7}],
        "half": torch.tensor([0.5]).half(),
    }


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)


def window(sizes: tuple[int, ...] = (5, 3, 2)) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 5, generator=generator)
    y = torch.randint(4, (sum(sizes),), generator=generator)
    y[0] = -100
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("placement", "nothing"),
    [
        (Placement(None), True),
        (Placement(torch.device("cpu")), True),
        (Placement(META), False),
        (Placement(None, dtype=torch.float64), False),
        (Placement(torch.device("cpu"), autocast=torch.bfloat16), False),
        (Placement(None, compiled=True), False),
    ],
)
def test_a_loss_function_is_wrapped_only_where_something_is_to_be_done(
    placement: Placement, nothing: bool
) -> None:
    """Micro-batches from the host, in the precision they come in, need no placing on the CPU."""
    loss_fn = CriterionLoss(nn.CrossEntropyLoss())
    assert (placed(loss_fn, placement) is loss_fn) == nothing
    assert placement.changes_nothing == nothing


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_floating_point_tensors_are_cast_and_nothing_else(dtype: torch.dtype | None) -> None:
    """At any depth; labels and masks keep their types, what is no tensor stays itself."""
    before, after = nested(), Placement(None, dtype=dtype).place(nested())
    assert after["x"].dtype == (dtype or torch.float32)
    assert after["half"].dtype == (dtype or torch.float16)
    assert torch.equal(after["x"].double(), before["x"].double())
    (labels, text), inner = after["more"]
    assert (labels.dtype, inner["mask"].dtype) == (torch.int64, torch.bool)
    assert (text, inner["n"]) == ("text", 7)


def test_every_tensor_is_moved() -> None:
    """At any depth, of any type."""
    after = Placement(META).place(nested())
    (labels, _), inner = after["more"]
    tensors = (after["x"], after["half"], labels, inner["mask"])
    assert all(t.device == META for t in tensors)
    assert labels.dtype == torch.int64


def test_what_needs_no_placing_is_not_copied() -> None:
    """The tensors themselves come back."""
    before = nested()
    assert Placement(torch.device("cpu")).place(before)["x"] is before["x"]


def test_autocast_is_on_around_the_forward_pass_and_off_outside_of_it() -> None:
    """While the window is counted and gone back through it is not."""
    seen = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(("forward", torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return x.sum(1, keepdim=True).expand(-1, 4) * self.scale

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    def backward(share: Tensor) -> None:
        seen.append(("backward", torch.is_autocast_enabled("cpu"), None))
        share.backward()

    placement = Placement(None, autocast=torch.bfloat16)
    for _ in range(2):
        seen.clear()
        loss_fn = placed(CriterionLoss(nn.CrossEntropyLoss()), placement)
        accumulate_gradients(Watching(), loss_fn, window(), backward=backward)
        assert seen == [("forward", True, torch.bfloat16), ("backward", False, None)] * 3
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("placement", "dtype"),
    [
        (Placement(None, dtype=torch.float64), torch.float64),
        (Placement(None, dtype=torch.bfloat16), torch.bfloat16),
        (Placement(None, autocast=torch.bfloat16), torch.float32),
    ],
)
@pytest.mark.parametrize("counted", [True, False])
def test_the_gradient_is_that_of_a_loop_that_casts_by_hand(
    placement: Placement, dtype: torch.dtype, counted: bool
) -> None:
    """Bit for bit: in double, with bfloat16 weights, under autocast; counted early or late."""
    by_hand = net(dtype)
    for x, y in window():
        x = x if placement.dtype is None else x.to(placement.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=placement.autocast is not None):
            outputs = by_hand(x)
        wide = outputs if dtype == torch.float64 else outputs.float()
        loss = nn.functional.cross_entropy(wide, y, reduction="sum")
        (loss / (9 if counted else 1)).backward()
    model, criterion = net(dtype), CriterionLoss(nn.CrossEntropyLoss())
    loss_fn = criterion if counted else lambda m, micro_batch: criterion(m, micro_batch)
    reduction: Any = "global_mean" if counted else "sum"
    accumulate_gradients(model, placed(loss_fn, placement), window(), reduction=reduction)
    pairs = zip(gradients(model), gradients(by_hand), strict=True)
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in pairs)


def test_micro_batches_are_counted_on_the_host_and_placed_one_at_a_time() -> None:
    """Counted as they come, before the first is placed; of those placed only one is alive."""
    events: list[str] = []
    alive: list[weakref.ref[Tensor]] = []

    class Loss:
        def count(self, micro_batch: Any) -> float:
            events.append(f"count {micro_batch[0].dtype}")
            return float(len(micro_batch[1]))

        def __call__(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, float]:
            alive.append(weakref.ref(micro_batch[0]))
            events.append(f"pass {micro_batch[0].dtype} {sum(ref() is not None for ref in alive)}")
            return model(micro_batch[0]).sum(), float(len(micro_batch[1]))

    loss_fn = placed(Loss(), Placement(None, dtype=torch.float64))
    loss = accumulate_gradients(net(torch.float64), loss_fn, window())
    assert events == ["count torch.float32"] * 3 + ["pass torch.float64 1"] * 3
    assert loss.denominator == 10


def test_a_placed_loss_function_keeps_what_it_is_asked_for() -> None:
    """Its criterion, whose parameters get gradients too; and that it may not be able to count."""
    criterion = CriterionLoss(nn.CrossEntropyLoss())
    wrapped: Any = placed(criterion, Placement(None, dtype=torch.float64))
    assert wrapped.criterion is criterion.criterion
    bare: Any = placed(lambda model, m: (model(m[0]).sum(), 1), Placement(None, dtype=torch.float64))
    assert bare.criterion is None
    assert bare.count(window()[0]) is None


def test_on_device_it_casts_and_computes_alike_and_moves_nothing() -> None:
    """For micro-batches that are with the model already, wherever that is."""
    placement = Placement(META, dtype=torch.bfloat16, autocast=torch.float16, compiled=True)
    wrapped: Any = Placed(CriterionLoss(nn.CrossEntropyLoss()), placement)
    seen: list[Any] = []

    def model(x: Tensor) -> Tensor:
        seen.append((x.device.type, x.dtype, torch.get_autocast_dtype("cpu")))
        return torch.zeros(len(x), 4)

    with torch.autocast("cpu", enabled=False):
        on_device(wrapped)(model, window()[0])
    assert seen == [("cpu", torch.bfloat16, torch.float16)]
    assert placement.device == META


def test_a_compiled_model_is_told_which_sizes_vary() -> None:
    """The batch of every tensor, and the length of tokens, which are integers (batch, length)."""
    micro_batch = {
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "features": torch.zeros(2, 3),
        "image": torch.zeros(2, 3, 4, 4),
        "scalar": torch.tensor(1.0),
    }
    after = Placement(None, compiled=True).place(copy.deepcopy(micro_batch))
    marked = {k: getattr(t, "_dynamo_weak_dynamic_indices", set()) for k, t in after.items()}
    assert marked == {"tokens": {0, 1}, "features": {0}, "image": {0}, "scalar": set()}
    untold = Placement(None).place(copy.deepcopy(micro_batch))
    assert not any(hasattr(t, "_dynamo_weak_dynamic_indices") for t in untold.values())
