"""The gradient of a window, against the arithmetic written out."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.window import split_sizes

TIGHT = 1e-12


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 4)).double()


def batch(samples: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (samples,), generator=generator)


def split(data: tuple[Tensor, Tensor], sizes: list[int]) -> list[Any]:
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def large_batch_gradient(criterion: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    model = net()
    criterion(model(data[0]), data[1]).backward()
    return gradient(model)


def accumulated(criterion: Any, window: list[Any], **how: Any) -> Tensor:
    model = net()
    accumulate_gradients(model, criterion, window, **how)
    return gradient(model)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(-1, 3))
def test_global_mean_is_the_large_batch_whatever_the_split(
    samples: int, steps: int, ignore_index: int
) -> None:
    """Sizes that do not divide, and labels that do not count, in float64."""
    data = batch(samples)
    if (data[1] == ignore_index).all():
        return
    criterion = nn.CrossEntropyLoss(ignore_index=ignore_index)
    window = split(data, split_sizes(samples, steps))
    got = accumulated(criterion, window, reduction="global_mean")
    assert relative(got, large_batch_gradient(criterion, data)) < TIGHT


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_sum_is_the_large_batchs_sum_whatever_the_split(sizes: list[int]) -> None:
    """Any sizes at all; and sum_divisor divides it once."""
    data = batch(sum(sizes))
    expected = large_batch_gradient(nn.CrossEntropyLoss(reduction="sum"), data)
    window = split(data, sizes)
    assert relative(accumulated(nn.CrossEntropyLoss(), window, reduction="sum"), expected) < TIGHT
    halved = accumulated(nn.CrossEntropyLoss(), window, reduction="sum", sum_divisor=2.0)
    assert relative(halved, expected / 2) < TIGHT


def test_mean_of_means_is_biased_on_unequal_micro_batches_by_the_formula() -> None:
    """g_mean − g_global = Σ (1/N − nᵢ/n) ∇(Sᵢ/nᵢ), and it vanishes on equal ones."""
    criterion, data = nn.CrossEntropyLoss(), batch(12)
    for sizes in ([4, 4, 4], [7, 4, 1]):
        window = split(data, sizes)
        got = accumulated(criterion, window, reduction="mean")
        exact = large_batch_gradient(criterion, data)
        bias = sum(
            (1 / len(sizes) - len(part[1]) / 12) * large_batch_gradient(criterion, part)
            for part in window
        )
        assert torch.allclose(got - exact, bias, rtol=0, atol=1e-14)
        assert (relative(got, exact) < TIGHT) == (len(set(sizes)) == 1)


def test_mean_is_the_plain_loop_divided_by_n() -> None:
    """The loop of the docstring, on equal and unequal micro-batches."""
    criterion, window = nn.CrossEntropyLoss(), split(batch(11), [5, 5, 1])
    model = net()
    for x, y in window:
        (criterion(model(x), y) / len(window)).backward()
    assert relative(accumulated(criterion, window, reduction="mean"), gradient(model)) < TIGHT


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
def test_earlier_gradients_are_added_to_and_not_rescaled(reduction: str) -> None:
    """As autograd accumulates: counted before the first pass or only after it."""
    window = split(batch(7), [3, 4])
    for criterion in (nn.CrossEntropyLoss(), late_counting):
        fresh = accumulated(criterion, window, reduction=reduction)
        model = net()
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0)
        accumulate_gradients(model, criterion, window, reduction=reduction)  # type: ignore[arg-type]
        assert torch.allclose(gradient(model), fresh + 3.0, rtol=0, atol=1e-13)


def late_counting(model: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
    """A loss function whose denominator is known only after the forward pass."""
    x, y = micro_batch
    return nn.functional.cross_entropy(model(x), y, reduction="sum"), torch.tensor(float(len(y)))


@pytest.mark.parametrize("sizes", [[6], [5, 1], [1, 2, 3]])
def test_a_denominator_known_after_the_forward_pass_gives_the_same_gradient(sizes: list[int]) -> None:
    """Divided late, and equal to the large batch."""
    data = batch(6)
    got = accumulated(late_counting, split(data, sizes), reduction="global_mean")
    assert relative(got, large_batch_gradient(nn.CrossEntropyLoss(), data)) < TIGHT


def test_the_returned_loss_is_over_all_that_counts_for_every_reduction() -> None:
    """loss_sum / denominator is the large batch's mean loss, not the mean of means."""
    x, y = batch(10)
    y[:4] = -100
    expected = nn.CrossEntropyLoss()(net()(x), y)
    for reduction in ("global_mean", "mean", "sum"):
        loss = accumulate_gradients(
            net(),
            nn.CrossEntropyLoss(),
            split((x, y), [6, 4]),
            reduction=reduction,  # type: ignore[arg-type]
        )
        assert loss.denominator == 6
        assert abs(loss.loss_sum / loss.denominator - expected) < 1e-14


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
@pytest.mark.parametrize("counted_late", [False, True])
def test_a_window_in_which_nothing_counts_gives_no_gradient_and_says_so(
    reduction: str, counted_late: bool
) -> None:
    """All labels ignored: denominator 0 and no NaN anywhere."""

    def late(model: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
        x, y = micro_batch
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        return loss, (y != -100).sum()

    x, y = batch(6)
    y[:] = -100
    model = net()
    criterion: Any = late if counted_late else nn.CrossEntropyLoss()
    loss = accumulate_gradients(model, criterion, split((x, y), [3, 3]), reduction=reduction)  # type: ignore[arg-type]
    assert loss.denominator == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("reduction", ["global_mean", "mean"])
def test_a_micro_batch_in_which_nothing_counts_is_harmless(reduction: str) -> None:
    """Where the plain loop would divide zero by zero."""
    x, y = batch(8)
    y[4:] = -100
    got = accumulated(nn.CrossEntropyLoss(), split((x, y), [4, 4]), reduction=reduction)
    exact = large_batch_gradient(nn.CrossEntropyLoss(), (x, y))
    factor = {"global_mean": 1.0, "mean": 0.5}[reduction]
    assert relative(got, factor * exact) < TIGHT


def test_nothing_of_a_micro_batch_outlives_its_pass() -> None:
    """Of the outputs of four micro-batches never more than one is alive."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def loss_fn(model: nn.Module, micro_batch: Any) -> tuple[Tensor, float]:
        nonlocal most
        outputs = model(micro_batch[0])
        alive.append(weakref.ref(outputs))
        most = max(most, sum(ref() is not None for ref in alive))
        return nn.functional.cross_entropy(outputs, micro_batch[1], reduction="sum"), len(outputs)

    accumulate_gradients(net(), loss_fn, split(batch(8), [2, 2, 2, 2]), reduction="sum")
    assert most == 1


def test_shared_frozen_and_unused_parameters_are_left_right() -> None:
    """Weight tying counts twice, frozen and unused parameters get no gradient."""
    torch.manual_seed(0)
    first = nn.Linear(5, 5).double()
    model = nn.ModuleDict({"a": first, "b": first, "unused": nn.Linear(2, 2).double()})
    model["a"].bias.requires_grad_(False)

    def loss_fn(m: Any, micro_batch: Any) -> tuple[Tensor, float]:
        return m["b"](m["a"](micro_batch[0]).tanh()).square().sum(), micro_batch[0].shape[0]

    reference = copy.deepcopy(model)
    x = batch(9)[0]
    (loss_fn(reference, (x,))[0] / 9).backward()
    accumulate_gradients(model, loss_fn, [(part,) for part in x.split([4, 5])], reduction="global_mean")
    assert torch.allclose(first.weight.grad, reference["a"].weight.grad, rtol=1e-12)
    assert first.bias.grad is None
    assert model["unused"].weight.grad is None


def test_a_window_may_be_any_iterable_and_not_an_empty_one() -> None:
    """A generator is read once; an empty window and an unknown reduction are errors."""
    window = split(batch(6), [2, 4])
    from_list = accumulated(nn.CrossEntropyLoss(), window)
    from_generator = accumulated(nn.CrossEntropyLoss(), iter(window))  # type: ignore[arg-type]
    assert torch.equal(from_list, from_generator)
    with pytest.raises(ValueError, match="no micro-batch"):
        accumulated(nn.CrossEntropyLoss(), [])
    with pytest.raises(ValueError, match="men"):
        accumulated(nn.CrossEntropyLoss(), window, reduction="men")


def test_earlier_gradients_survive_an_error_in_mid_window() -> None:
    """Also where they were set aside, because the window is divided late."""
    calls = 0

    def failing(model: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory, say")
        return late_counting(model, micro_batch)

    model = net()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    with pytest.raises(RuntimeError, match="say"):
        accumulate_gradients(model, failing, split(batch(6), [3, 3]), reduction="global_mean")
    assert all(p.grad is not None and p.grad.abs().max() > 1 for p in model.parameters())


def test_the_reported_loss_of_a_bfloat16_model_does_not_depend_on_n() -> None:
    """2,048 samples: a bfloat16 running sum would stop growing."""
    model = nn.Linear(5, 4).bfloat16()
    x, y = batch(2048)
    data = (x.bfloat16(), y)
    losses = []
    for steps in (1, 512):
        window = split(data, split_sizes(2048, steps))
        loss = accumulate_gradients(model, nn.CrossEntropyLoss(), window, reduction="global_mean")
        losses.append(float(loss.loss_sum / loss.denominator))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_cannot_be_meant_is_refused() -> None:
    """A micro-batch in place of a window, and a divisor of a sum that is none."""
    x, y = batch(4)
    with pytest.raises(ValueError, match=r"\(input, target\).*, and this one is Tensor"):
        accumulate_gradients(net(), nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(ValueError, match="sum_divisor"):
        accumulated(nn.CrossEntropyLoss(), [(x, y)], reduction="mean", sum_divisor=2.0)
    with pytest.raises(ValueError, match=r"keys x, y has none of labels.*loss_fn"):
        accumulated(nn.CrossEntropyLoss(), [{"x": x, "y": y}])


def test_a_micro_batch_is_whatever_the_loss_function_takes() -> None:
    """A bare tensor, a dictionary, a nested structure."""
    x, _ = batch(6)

    def energy(read: Any) -> Any:
        return lambda model, m: (model(read(m)).square().sum(), len(read(m)))

    expected = accumulated(energy(lambda m: m), [x])
    shapes = [lambda t: t, lambda t: {"x": t}, lambda t: (({"x": [t]},),)]
    readers = [lambda m: m, lambda m: m["x"], lambda m: m[0][0]["x"][0]]
    for shape, read in zip(shapes, readers, strict=True):
        window = [shape(part) for part in x.split([4, 2])]  # type: ignore[no-untyped-call]
        assert relative(accumulated(energy(read), window), expected) < TIGHT
