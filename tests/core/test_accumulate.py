"""The gradient of a window, against the arithmetic written out."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.criteria import TokenCrossEntropy
from gaccum_exp.core.window import split_sizes
from gaccum_exp.models.gpt import GPT

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


VOCABULARY = 11


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=1, heads=2, width=8, vocab_size=VOCABULARY).double()


def sequences(lengths: list[int], silent: list[bool]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of samples, some labels ignored; of a silent sample, all."""
    generator = torch.Generator().manual_seed(sum(lengths))
    samples = []
    for length, all_ignored in zip(lengths, silent, strict=False):
        tokens = torch.randint(VOCABULARY, (length + 1,), generator=generator)
        labels = tokens[1:].clone()
        labels[torch.rand(length, generator=generator) < (2 if all_ignored else 0.3)] = -100
        samples.append((tokens[:-1], labels))
    return samples


def padded(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A micro-batch padded to its own longest sequence."""
    longest = max(len(tokens) for tokens, _ in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for i, (of_input, wanted) in enumerate(samples):
        tokens[i, : len(of_input)] = of_input
        labels[i, : len(wanted)] = wanted
    return {"input_ids": tokens, "labels": labels}


def token_gradient(micro_batch: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    """One pass over all samples, the loss written out; zeros where nothing counts."""
    model, labels = gpt(), micro_batch["labels"]
    logits = model(micro_batch["input_ids"])
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    total = -(chosen * (labels != -100)).sum()
    (total / max(1, int((labels != -100).sum())) if reduction == "mean" else total).backward()
    return gradient(model)


ragged = given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.integers(1, 10),
)


@settings(max_examples=60)
@ragged
def test_global_mean_over_ragged_tokens_is_one_padded_batch(
    lengths: list[int], silent: list[bool], steps: int
) -> None:
    """Micro-batches padded by themselves, some without a label, windows of fewer samples than N."""
    samples = sequences(lengths, silent)
    parts = [samples[i : i + size] for i, size in starts(split_sizes(len(samples), steps))]
    window, whole = [padded(part) for part in parts], padded(samples)
    counted = int((whole["labels"] != -100).sum())
    for reduction in ("global_mean", "sum"):
        model = gpt()
        loss = accumulate_gradients(model, TokenCrossEntropy(), window, reduction=reduction)  # type: ignore[arg-type]
        assert loss.denominator == counted
        if counted == 0:
            assert all(p.grad is None for p in model.parameters())
            continue
        expected = token_gradient(whole, "sum" if reduction == "sum" else "mean")
        assert relative(gradient(model), expected) < TIGHT
        mean = nn.functional.cross_entropy(gpt()(whole["input_ids"]).transpose(1, 2), whole["labels"])
        assert abs(loss.loss_sum / counted - mean) < TIGHT * mean


def starts(sizes: list[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


@settings(max_examples=60)
@ragged
def test_mean_over_ragged_tokens_is_biased_by_the_formula(
    lengths: list[int], silent: list[bool], steps: int
) -> None:
    """Σ (1/N − nᵢ/n) ∇(Sᵢ/nᵢ), nothing for a micro-batch without a label; zero if all nᵢ are n/N."""
    samples = sequences(lengths, silent)
    sizes = split_sizes(len(samples), steps)
    window = [padded(samples[i : i + size]) for i, size in starts(sizes)]
    counts = [int((part["labels"] != -100).sum()) for part in window]
    n = sum(counts)
    if n == 0:
        return
    model = gpt()
    accumulate_gradients(model, TokenCrossEntropy(), window, reduction="mean")
    exact = token_gradient(padded(samples))
    bias = torch.zeros_like(exact)
    for count, part in zip(counts, window, strict=True):
        bias += (1 / len(window) - count / n) * token_gradient(part)
    assert torch.allclose(gradient(model) - exact, bias, rtol=0, atol=1e-12 * float(exact.norm()))
    if all(count * len(window) == n for count in counts):
        assert relative(gradient(model), exact) < TIGHT


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), late_counting])
def test_backward_gets_the_share_of_every_micro_batch_once(criterion: Any, reduction: str) -> None:
    """Four shares in the window's order, and whoever takes them does the rest."""
    window = split(batch(11), [5, 3, 2, 1])
    shares: list[Tensor] = []

    def backward(share: Tensor) -> None:
        shares.append(share.detach())
        (share * 2).backward()

    doubled = accumulated(criterion, window, reduction=reduction, backward=backward)
    assert relative(doubled, 2 * accumulated(criterion, window, reduction=reduction)) < TIGHT
    sums = [nn.functional.cross_entropy(net()(x), y, reduction="sum").detach() for x, y in window]
    late = criterion is late_counting
    by = {"global_mean": [4 * 5 if late else 11] * 4, "mean": [20, 12, 8, 4], "sum": [1] * 4}[reduction]
    assert torch.allclose(torch.stack(shares), torch.stack(sums) / torch.tensor(by), rtol=TIGHT)


def test_a_micro_batch_in_which_nothing_counts_has_no_share_or_one_of_zero() -> None:
    """Zero under global_mean and sum, whose divisors are not its own; under mean it is passed over."""
    x, y = batch(8)
    y[4:] = -100
    for reduction, expected in (("global_mean", [0.0]), ("sum", [0.0]), ("mean", [])):
        shares: list[Tensor] = []
        window = split((x, y), [4, 4])
        how: Any = {"reduction": reduction, "backward": shares.append}
        accumulate_gradients(net(), nn.CrossEntropyLoss(), window, **how)
        assert [float(share.detach()) for share in shares[1:]] == expected


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), late_counting])
def test_a_grad_scaler_gives_the_gradient_that_there_is_without_one(
    criterion: Any, reduction: str
) -> None:
    """Scaled by 2^13 in every backward pass and unscaled at the end, in float32: the same bits."""
    x, y = batch(11)
    window = split((x.float(), y), [5, 3, 2, 1])
    ends = []
    for scaled in (False, True):
        model = net().float()
        optimizer = torch.optim.SGD(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, enabled=scaled)
        accumulate_gradients(
            model,
            criterion,
            window,
            reduction=reduction,  # type: ignore[arg-type]
            backward=lambda loss, by=scaler: by.scale(loss).backward(),  # type: ignore[misc]
        )
        if scaled:
            assert gradient(model).abs().max() > 100
        scaler.unscale_(optimizer)
        ends.append(gradient(model))
    assert torch.equal(ends[0], ends[1])
