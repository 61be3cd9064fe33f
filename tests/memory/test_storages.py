"""What a tensor's storage is for, against torch's own tracker and a count by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model

from gaccum_exp.memory.storages import (
    ACTIVATIONS,
    CATEGORIES,
    GRADIENTS,
    INPUTS,
    PARAMETERS,
    TEMPORARIES,
    BudgetExceededError,
    StorageTracker,
    storages,
)
from gaccum_exp.models.cnn import CNN
from gaccum_exp.models.gpt import GPT
from gaccum_exp.models.mlp import MLP

CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: MLP(input_shape=(3, 64, 64), num_classes=10), IMAGES),
    "cnn": (lambda: CNN(input_shape=(3, 64, 64), num_classes=10), IMAGES),
    "gpt": (lambda: GPT(layers=2, heads=2, width=32, vocab_size=50), TOKENS),
    "resnet18": (lambda: get_model("resnet18", num_classes=10), IMAGES),
    "mobilenet_v3_small": (lambda: get_model("mobilenet_v3_small", num_classes=10), IMAGES),
}


def one_step(model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Two backward passes and an optimizer step."""
    for half in inputs.chunk(2):
        model(half).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_that_of_torchs_own_tracker(name: str) -> None:
    """To the byte, of a step in the steady state, and under its phases as well."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, inputs, optimizer)

    theirs = MemTracker()
    theirs.track_external(model, optimizer)
    with theirs:
        for half in inputs.chunk(2):
            model(half).square().mean().backward()
            theirs.reset_mod_stats()
        optimizer.step()
    optimizer.zero_grad()
    (peak,) = (s["Total"] for d, s in theirs.get_tracker_snapshot("peak").items() if d.type == "cpu")

    ours = StorageTracker(CPU)
    ours.assign([*model.parameters(), *model.buffers()], PARAMETERS)
    ours.assign((t for s in optimizer.state.values() for t in s.values()), "optimizer_state")
    with ours:
        one_step(model, inputs, optimizer)
    assert ours.peak == peak
    assert sum(ours.at_peak.values()) == ours.peak


def test_bytes_are_filed_under_what_they_are_for() -> None:
    """A linear layer's, counted by hand, at the peak of its forward and backward pass."""
    weight = torch.randn(20, 10, requires_grad=True)
    tracker = StorageTracker(CPU)
    tracker.assign([weight], PARAMETERS)
    tracker.assign([torch.zeros(3)], INPUTS)  # dies at once
    weight.register_post_accumulate_grad_hook(lambda p: tracker.assign([p.grad], GRADIENTS))  # type: ignore[list-item]
    with tracker:
        inputs = torch.ones(5, 10)
        tracker.assign([inputs], INPUTS)
        outputs = inputs @ weight.T  # (5, 20)
        assert tracker.held == dict.fromkeys(CATEGORIES, 0) | {
            PARAMETERS: 800, INPUTS: 200, ACTIVATIONS: 400,
        }  # fmt: skip
        outputs.backward(torch.ones(5, 20))
        assert tracker.held[GRADIENTS] == 800
        del outputs, inputs
    assert tracker.held == dict.fromkeys(CATEGORIES, 0) | {PARAMETERS: 800, GRADIENTS: 800}
    assert tracker.total == 1600


def test_what_checkpointing_computes_again_is_an_activation() -> None:
    """In the backward pass, where other results are temporaries."""
    tracker = StorageTracker(CPU)
    seen: list[dict[str, int]] = []

    class Watched(nn.Tanh):
        def forward(self, hidden: Tensor) -> Tensor:
            result = super().forward(hidden)
            seen.append(dict(tracker.held))
            return result

    blocks = [nn.Sequential(nn.Linear(64, 64), Watched(), nn.Linear(64, 64)) for _ in range(3)]
    with tracker:
        hidden = torch.ones(32, 64, requires_grad=True) * 1.0
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False)  # type: ignore[assignment]
        kept = dict(tracker.held)
        hidden.sum().backward()
    assert len(seen) == 6
    of_a_pass = 2 * 32 * 64 * 4  # of the first layer and its activation
    assert seen[3][ACTIVATIONS] >= kept[ACTIVATIONS] + of_a_pass
    assert seen[3][TEMPORARIES] <= 2 * 32 * 64 * 4


def test_what_a_custom_function_keeps_is_an_activation_within_a_forward_pass() -> None:
    """Its forward pass runs without gradients, as an optimizer's step does."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad

    x = torch.ones(100, requires_grad=True)
    tracker = StorageTracker(CPU)
    tracker.in_forward = True
    with tracker:
        y = Square.apply(x)
        assert tracker.held[ACTIVATIONS] == 400
        del y


def test_a_view_counts_once_and_a_sparse_tensor_by_its_parts() -> None:
    """Storages are what is counted, not tensors."""
    tracker = StorageTracker(CPU)
    with tracker:
        whole = torch.zeros(100)
        half = whole[:50]
        assert tracker.total == 400
        del whole
        assert tracker.total == 400
        del half
        assert tracker.total == 0
        sparse = torch.eye(2).to_sparse()
        assert sum(s.nbytes() for s in storages(sparse)) == 2 * 2 * 8 + 2 * 4


def test_sparse_gradients_are_counted() -> None:
    """Those of an embedding: indices and rows, not the whole table."""
    table = nn.Embedding(1000, 10, sparse=True)
    tracker = StorageTracker(CPU)
    tracker.assign(table.parameters(), PARAMETERS)
    with tracker:
        table(torch.tensor([1, 2, 3])).sum().backward()
        gradient = table.weight.grad
        assert gradient is not None
        tracker.assign([gradient], GRADIENTS)
    assert 3 * 10 * 4 <= tracker.held[GRADIENTS] <= 3 * (10 * 4 + 8) + 100


def test_beyond_the_budget_an_operator_fails_and_nothing_is_left_behind() -> None:
    """In a backward pass as in a forward pass; afterwards the same pass runs as if nothing had been."""
    model = nn.Sequential(nn.Linear(50, 400), nn.Tanh(), nn.Linear(400, 50))
    inputs = torch.ones(64, 50)
    free = StorageTracker(CPU)
    with free:
        F.mse_loss(model(inputs), inputs).backward()
    model.zero_grad()
    for budget in (free.peak - 1, free.peak // 2, 1000):
        with (
            pytest.raises(BudgetExceededError, match=f"the budget is {budget:,}"),
            StorageTracker(CPU, budget),
        ):
            F.mse_loss(model(inputs), inputs).backward()
        model.zero_grad()
    exactly = StorageTracker(CPU, free.peak)
    with exactly:
        F.mse_loss(model(inputs), inputs).backward()
    assert exactly.peak == free.peak


def test_only_one_device_is_counted() -> None:
    """What lies elsewhere is not of this device's memory."""
    tracker = StorageTracker(torch.device("meta"))
    with tracker:
        torch.zeros(100)
        there = torch.zeros(10, device="meta")
        assert tracker.total == 40
        del there
