"""Micro gradients added up in a wider type than the parameters', against a loop that does it by hand."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.strategies import AccumulatorState, Buffered

HALVES = (torch.bfloat16, torch.float16)
REDUCTIONS = ("global_mean", "mean", "sum")


class Odd(nn.Module):
    """A parameter used twice, one used in every other micro-batch, a frozen one, and one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(2, 2)
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        x = self.again(self.first(x).tanh())
        return self.sometimes(x) if branch else x


def model(dtype: torch.dtype = torch.bfloat16) -> Odd:
    torch.manual_seed(0)
    return Odd().to(dtype)


def window(sizes: list[int], dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    micro_batches = []
    for i, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=generator).to(dtype)
        labels = torch.randint(6, (size,), generator=generator)
        micro_batches.append({"x": x, "branch": i % 2 == 1, "labels": labels})
    return micro_batches


def summed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float(), labels, reduction="sum")


def late(of: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
    """A loss function whose denominator is known only after the forward pass."""
    outputs = of(micro_batch["x"], micro_batch["branch"])
    return summed(outputs, micro_batch["labels"]), torch.tensor(float(len(outputs)))


def micro_gradients(of: Odd, parts: list[Any], divisors: list[float]) -> list[dict[str, Tensor]]:
    """Return every micro-batch's gradient by itself, in the parameters' type."""
    found = []
    for part, divisor in zip(parts, divisors, strict=True):
        alone = copy.deepcopy(of)
        alone.zero_grad()
        (summed(alone(part["x"], part["branch"]), part["labels"]) / divisor).backward()
        found.append({n: p.grad for n, p in alone.named_parameters() if p.grad is not None})
    return found


def added(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return their sum in float32."""
    total: dict[str, Tensor] = {}
    for gradient in gradients:
        for name, grad in gradient.items():
            total[name] = total[name] + grad.float() if name in total else grad.float()
    return total


def divisors_of(parts: list[Any], reduction: str) -> list[float]:
    sizes = [len(part["labels"]) for part in parts]
    by = {"global_mean": lambda n: sum(sizes), "mean": lambda n: len(sizes) * n, "sum": lambda n: 1}
    return [by[reduction](n) for n in sizes]


def put_earlier(of: Odd) -> dict[str, Tensor]:
    """Give the parameters gradients, the one that is never used and the frozen one as well."""
    generator = torch.Generator().manual_seed(2)
    for p in of.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}


def assert_gradients(of: nn.Module, expected: dict[str, Tensor]) -> None:
    got = {n: p.grad for n, p in of.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert grad.dtype == of.get_parameter(name).dtype
        assert torch.equal(grad, expected[name].to(grad.dtype)), name


def hooks_on(of: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in of.parameters())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_micro_gradients_are_added_up_in_float32_and_rounded_once(
    dtype: torch.dtype, reduction: Any, sizes: list[int]
) -> None:
    """Bit for bit the loop's; a shared, a frozen, a sometimes and a never used parameter among them."""
    of, parts = model(dtype), window(sizes, dtype)
    expected = added(micro_gradients(of, parts, divisors_of(parts, reduction)))
    criterion = nn.CrossEntropyLoss()
    accumulate_gradients(of, criterion, parts, reduction=reduction, buffer_dtype=torch.float32)
    assert_gradients(of, expected)
    assert hooks_on(of) == 0


def test_a_bfloat16_sum_loses_what_a_float32_buffer_keeps() -> None:
    """512 micro-batches: five times nearer to the gradient of the same weights in float64."""
    parts = window([1] * 512)
    exact = model().double()
    for part in parts:
        outputs = exact(part["x"].double(), part["branch"])
        (F.cross_entropy(outputs, part["labels"], reduction="sum") / 512).backward()
    distances = []
    for buffer_dtype in (None, torch.float32):
        of = model()
        accumulate_gradients(of, nn.CrossEntropyLoss(), parts, buffer_dtype=buffer_dtype)
        pairs = zip(of.parameters(), exact.parameters(), strict=True)
        errors = [(a.grad - b.grad).norm() for a, b in pairs if a.grad is not None]
        distances.append(float(torch.stack(errors).norm()))
    assert distances[1] < distances[0] / 5, distances


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_earlier_gradients_are_kept_and_added_before_the_rounding(reduction: Any) -> None:
    """Earlier ones and the window's are added in float32, where nothing is rounded in between."""
    of, parts = model(), window([3, 1, 4, 2])
    gradients = micro_gradients(of, parts, divisors_of(parts, reduction))
    earlier = put_earlier(of)
    total = added(gradients)
    expected = {n: earlier[n].float() + total[n] if n in total else earlier[n] for n in earlier}
    criterion = nn.CrossEntropyLoss()
    accumulate_gradients(of, criterion, parts, reduction=reduction, buffer_dtype=torch.float32)
    assert_gradients(of, expected)


def test_a_gradient_that_was_there_stays_the_same_tensor() -> None:
    """As autograd accumulates: in place, so that a view into a flat buffer stays one."""
    for loss_fn in (nn.CrossEntropyLoss(), late):
        of = model()
        put_earlier(of)
        before = {n: p.grad for n, p in of.named_parameters()}
        accumulate_gradients(of, loss_fn, window([2, 3]), buffer_dtype=torch.float32)
        assert all(p.grad is before[n] for n, p in of.named_parameters())


@pytest.mark.parametrize("keep", [False, True])
def test_a_window_counted_late_is_added_up_and_rescaled_in_float32(keep: bool) -> None:
    """The sum, its rescaling and the earlier gradients are rounded together, once."""
    of, parts = model(), window([3, 1, 4, 2])
    stand_in = 4 * 3.0
    total = added(micro_gradients(of, parts, [stand_in] * 4))
    earlier = put_earlier(of) if keep else {}
    expected = {n: t * (stand_in / 10) for n, t in total.items()}
    expected = earlier | {n: earlier[n].float() + t if keep else t for n, t in expected.items()}
    accumulate_gradients(of, late, parts, buffer_dtype=torch.float32)
    assert_gradients(of, expected)
    assert hooks_on(of) == 0


def test_a_late_window_in_which_nothing_counts_leaves_earlier_gradients_alone() -> None:
    """Nothing is added to them, and where there were none there are none."""

    def nothing(of: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
        return late(of, micro_batch)[0], torch.tensor(0.0)

    for buffer_dtype in (None, torch.float32):
        of = model()
        loss = accumulate_gradients(of, nothing, window([2, 3]), buffer_dtype=buffer_dtype)
        assert loss.denominator == 0
        assert_gradients(of, {})
        earlier = put_earlier(of)
        accumulate_gradients(of, nothing, window([2, 3]), buffer_dtype=buffer_dtype)
        assert_gradients(of, earlier)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        raise RuntimeError("out of memory, say")


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_mid_window_leaves_no_hook_and_no_gradient_lost(counted: bool, where: str) -> None:
    """In the third micro-batch: the gradients of two are there, beside the earlier ones."""
    of, parts = model(), window([2, 2, 2, 2])
    calls = 0

    def failing(m: nn.Module, micro_batch: Any) -> tuple[Tensor, Any]:
        nonlocal calls
        calls += 1
        if calls == 3 and where == "forward":
            raise RuntimeError("out of memory, say")
        loss, n = late(m, micro_batch)
        return (FailsBackward.apply(loss) if calls == 3 else loss), n

    if counted:
        failing.count = lambda micro_batch: len(micro_batch["labels"])  # type: ignore[attr-defined]
    total = added(micro_gradients(of, parts[:2], [8, 8]))
    earlier = put_earlier(of)
    expected = {n: g.float() + total[n] if n in total else g for n, g in earlier.items()}
    with pytest.raises(RuntimeError, match="say"):
        accumulate_gradients(of, failing, parts, buffer_dtype=torch.float32)
    assert hooks_on(of) == 0
    assert_gradients(of, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_a_buffer_it_is_plain_autograd_bit_for_bit(dtype: torch.dtype, reduction: Any) -> None:
    """`.grad` itself is the buffer, and earlier gradients are rounded into it as ever."""
    parts = window([3, 1, 4, 2], dtype)
    ends = []
    for by_hand in (True, False):
        of = model(dtype)
        put_earlier(of)
        if by_hand:
            for part, divisor in zip(parts, divisors_of(parts, reduction), strict=True):
                (summed(of(part["x"], part["branch"]), part["labels"]) / divisor).backward()
        else:
            accumulate_gradients(of, nn.CrossEntropyLoss(), parts, reduction=reduction)
        ends.append({n: p.grad for n, p in of.named_parameters() if p.grad is not None})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("dtype", "buffer_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), late])
def test_a_buffer_no_wider_than_the_parameters_changes_nothing(
    dtype: torch.dtype, buffer_dtype: torch.dtype, loss_fn: Any
) -> None:
    """Bit for bit as without one."""
    ends = []
    for chosen in (None, buffer_dtype):
        of = model(dtype)
        put_earlier(of)
        accumulate_gradients(of, loss_fn, window([3, 1, 4], dtype), buffer_dtype=chosen)
        ends.append({n: p.grad for n, p in of.named_parameters() if p.grad is not None})
    assert_gradients(of, ends[0])


def test_only_narrower_parameters_get_a_buffer() -> None:
    """A model of two precisions: its float32 part is added up by autograd, its bfloat16 part is not."""
    of = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16())
    parameters, state = list(of.parameters()), AccumulatorState([1])
    with Buffered(torch.float32).collecting(state, parameters, rescaled=False):
        assert [len(p._post_accumulate_grad_hooks or ()) for p in of.parameters()] == [0, 0, 1, 1]
    assert hooks_on(of) == 0


def test_every_row_of_a_sparse_gradient_is_rounded_once() -> None:
    """An embedding's, which may list a row twice: bit for bit the float32 sum, earlier ones included."""
    torch.manual_seed(0)
    of = nn.Embedding(7, 3, sparse=True).bfloat16()
    parts = [torch.tensor(rows) for rows in 8 * ([0, 1, 1], [1, 6, 6, 6], [2])]

    def loss_fn(m: nn.Module, micro_batch: Tensor) -> tuple[Tensor, int]:
        return m(micro_batch).float().square().sum(), len(micro_batch)

    def micro_gradient(micro_batch: Tensor) -> Tensor:
        of.weight.grad = None
        loss_fn(of, micro_batch)[0].backward()
        assert of.weight.grad is not None
        return of.weight.grad

    expected = torch.zeros(7, 3)
    for part in parts:
        expected += micro_gradient(part).float().to_dense()
    earlier = micro_gradient(torch.tensor([1, 2, 1]))
    for before in (None, earlier):
        of.weight.grad = before
        accumulate_gradients(of, loss_fn, parts, reduction="sum", buffer_dtype=torch.float32)
        got = of.weight.grad
        assert got is not None
        assert got.is_sparse
        assert got.dtype == torch.bfloat16
        total = expected if before is None else expected + before.float().to_dense()
        assert torch.equal(got.to_dense(), total.bfloat16())


def test_gradients_of_a_criterion_are_buffered_as_the_models_are() -> None:
    """A criterion with parameters of its own, in bfloat16."""

    class Scaled(nn.CrossEntropyLoss):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16))

        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return super().forward(outputs * self.scale, labels)

        def denominator(self, outputs: Tensor, labels: Tensor) -> int:
            return len(labels)

    torch.manual_seed(0)
    of, criterion = nn.Linear(6, 6).bfloat16(), Scaled()
    parts = [(part["x"], part["labels"]) for part in window([2] * 30)]
    grads = []
    for x, y in parts:
        alone = copy.deepcopy(criterion)
        (F.cross_entropy(of(x).float() * alone.scale, y, reduction="sum") / 60).backward()
        grads.append(alone.scale.grad)
    of.zero_grad()
    accumulate_gradients(of, criterion, parts, buffer_dtype=torch.float32)
    expected = sum(g.float() for g in grads if g is not None)
    assert criterion.scale.grad is not None
    assert torch.equal(criterion.scale.grad, expected.bfloat16())
    assert hooks_on(criterion) == 0
