"""strategy=cached against the large batch: losses of a whole window's outputs, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.accumulate import accumulate
from gaccum_exp.core.cached import Cached
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.losses.model_loss import ModelLoss
from gaccum_exp.core.losses.protocol import at_least
from gaccum_exp.core.reductions import GLOBAL_MEAN
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.errors import BadInputError

SIZES = ([11], [6, 5], [4, 4, 3], [3, 2, 2, 2, 2], [1] * 11)
"""Micro-batches of eleven samples."""


class Towers(nn.Module):
    """Two towers with a temperature that only the loss reads; float64."""

    def __init__(self, dropout: float = 0.0, norm: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(5, 8), norm(), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)
        )
        self.text = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.double()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)

    def encoded(self, image: Tensor) -> Tensor:
        return F.normalize(self.image(image), dim=-1)


def info_nce(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * temperature.exp()
    own = torch.arange(len(a))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def contrastive(model: Any, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    loss = info_nce(*model(*micro_batch), model.temperature)
    return loss * len(micro_batch[0]), len(micro_batch[0])


def pairs(count: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    double = {"generator": generator, "dtype": torch.float64}
    return torch.randn(count, 5, **double), torch.randn(count, 3, **double)  # type: ignore[call-overload]


def split(batch: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(list(sizes)) for t in batch), strict=True))


def towers(**options: Any) -> Towers:
    torch.manual_seed(0)
    return Towers(**options)


def taken(model: nn.Module, *others: nn.Module) -> Tensor:
    """Take the gradient off, as one vector; where there is none it is zero."""
    found = []
    for parameter in nn.ModuleList([model, *others]).parameters():
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return torch.cat([g.flatten() for g in found])


def apart(one: Tensor, reference: Tensor) -> float:
    return float((one - reference).norm() / reference.norm())


@pytest.mark.parametrize("sizes", [*SIZES, [1, 0, 10], [0, 0, 1, 10]])
def test_a_contrastive_loss_has_the_large_batchs_gradient(sizes: list[int]) -> None:
    """The temperature's as well; and in place the gradient of every split is another."""
    model, batch = towers(), pairs()
    info_nce(*model(*batch), model.temperature).backward()
    expected = taken(model)
    loss = accumulate_gradients(model, contrastive, split(batch, sizes), strategy="cached")
    assert apart(taken(model), expected) < 1e-12
    assert float(loss.mean) == pytest.approx(
        float(info_nce(*model(*batch), model.temperature).detach()), rel=1e-12
    )
    accumulate_gradients(model, contrastive, split(batch, sizes))
    assert (apart(taken(model), expected) > 0.1) == (len(sizes) > 1)


@pytest.mark.parametrize("sizes", SIZES)
def test_terms_are_of_the_windows_outputs(sizes: list[int]) -> None:
    """Coupled samples, a mean over what counts, a clamped one, and a function of sums; a learned weight.

    Each as the large batch has it, with a graph over all samples.
    """
    model, batch = towers(), (*pairs(), torch.arange(11) % 4 - 2)

    def terms(model: Any, micro_batch: Any) -> dict[str, Any]:
        image, text, label = micro_batch
        a, b = model(image, text)
        of_labels = F.cross_entropy(a, label.clamp(min=-1), ignore_index=-1, reduction="sum")
        none = (a * 0).sum()
        return {
            "pairs": (info_nce(a, b, model.temperature) * len(a), len(a)),
            "labels": (of_labels, (label >= 0).sum(), (-model.temperature).exp()),
            "clamped": (b.square().sum(), at_least(len(b), 20.0), 0.3),
            "balance": (a.softmax(1).sum(0), len(a), 0.5, lambda mean: mean.square().sum()),
            "empty": (none, 0),
        }

    a, b = model(*batch[:2])
    of_labels = F.cross_entropy(a, batch[2].clamp(min=-1), ignore_index=-1)
    total = (
        info_nce(a, b, model.temperature)
        + (-model.temperature).exp() * of_labels
        + 0.3 * b.square().sum() / 20
        + 0.5 * a.softmax(1).mean(0).square().sum()
    )
    total.backward()
    expected = taken(model)
    loss = accumulate_gradients(model, terms, split(batch, sizes), strategy="cached")
    assert apart(taken(model), expected) < 1e-13
    assert float(loss.mean) == pytest.approx(float(total.detach()), rel=1e-13)
    assert float(loss.terms["labels"].mean) == pytest.approx(float(of_labels.detach()), rel=1e-13)
    assert set(loss.terms) == {"pairs", "labels", "clamped", "balance"}


def test_a_window_in_which_no_term_counts_has_no_gradient() -> None:
    """And says so by its denominator."""
    model = towers()

    def nothing(model: Any, micro_batch: Any) -> dict[str, Any]:
        a, _ = model(*micro_batch)
        return {"none": (a.sum() * 0, 0)}

    loss = accumulate_gradients(model, nothing, split(pairs(), [6, 5]), strategy="cached")
    assert (loss.denominator, loss.terms) == (0, {})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sizes", SIZES)
def test_dropout_draws_the_same_in_both_passes(sizes: list[int]) -> None:
    """The gradient is that of all micro-batches' graphs kept at once, after the same seed."""
    model, window = towers(dropout=0.4), split(pairs(), sizes)
    torch.manual_seed(7)
    a, b = zip(*(model(*micro_batch) for micro_batch in window), strict=True)
    info_nce(torch.cat(a), torch.cat(b), model.temperature).backward()
    after, expected = torch.rand(1), taken(model)
    torch.manual_seed(7)
    accumulate_gradients(model, contrastive, window, strategy="cached")
    assert apart(taken(model), expected) < 1e-12
    assert torch.equal(torch.rand(1), after)  # the generator stands where a pass leaves it


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_gets_no_gradient(frozen: str) -> None:
    """And the other one the large batch's."""
    model, batch = towers(), pairs()
    getattr(model, frozen).requires_grad_(requires_grad=False)
    info_nce(*model(*batch), model.temperature).backward()
    expected = taken(model)
    accumulate_gradients(model, contrastive, split(batch, [4, 4, 3]), strategy="cached")
    assert all(p.grad is None for p in getattr(model, frozen).parameters())
    assert apart(taken(model), expected) < 1e-12


def by_towers(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    a, b = model.image(micro_batch[0]), model.text(micro_batch[1])
    return info_nce(a, b, model.temperature) * len(a), len(a)


def by_a_method(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    a, b = model.encoded(micro_batch[0]), model.text(micro_batch[1])
    return info_nce(a, b, model.temperature) * len(a), len(a)


def by_layers(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    hidden = micro_batch[0]
    for layer in model.image:
        hidden = layer(hidden)
    b = model.text[2](model.text[1](model.text[0](micro_batch[1])))
    return info_nce(hidden, b, model.temperature) * len(b), len(b)


def writing(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    a, b = model(*micro_batch)
    a /= a.detach().norm(dim=-1, keepdim=True)
    return info_nce(a, b, model.temperature) * len(a), len(a)


def with_a_target(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    with torch.no_grad():
        target = model.image(micro_batch[0])
    a, b = model(*micro_batch)
    return info_nce(a, b - target.detach(), model.temperature) * len(a), len(a)


@pytest.mark.parametrize("loss_fn", [by_towers, by_a_method, by_layers, writing, with_a_target])
def test_a_loss_function_may_call_the_model_as_it_likes(loss_fn: Any) -> None:
    """Submodules, methods, one after the other, without gradients; and write to what it is given."""
    model, batch = towers(), pairs()
    accumulate_gradients(model, loss_fn, [batch])
    expected = taken(model)
    accumulate_gradients(model, loss_fn, split(batch, [4, 4, 3]), strategy="cached")
    assert apart(taken(model), expected) < 1e-12


class Frames(nn.Module):
    """(batch, length, features) -> log-probabilities (length, batch, symbols), as CTC wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).log_softmax(-1).transpose(0, 1)


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(-1)


class Dice(nn.Module):
    """One minus the overlap of the whole batch; no `reduction`."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        p = logits.sigmoid()
        return 1 - 2 * (p * target).sum() / (p.sum() + target.sum())


class PairRanking(nn.Module):
    """Hinge over all pairs of the batch that the target orders, in the mean; a learned margin."""

    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        above = target[:, :1] > target[:, :1].T
        gaps = self.margin.exp() - (scores[:, :1] - scores[:, :1].T)
        return gaps.clamp(min=0)[above].mean()


class Reducible(PairRanking):
    """The same with a `reduction` that its mean is no ratio under."""

    reduction = "mean"

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        mean = super().forward(scores, target)
        return mean if self.reduction == "mean" else mean.square()


def frames(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(1, 5, (count, 3), generator=generator)
    lengths = torch.tensor([1, 2, 1, 2, 2, 1, 1, 2, 1, 2, 1])[:count]
    return x, labels, torch.full((count,), 4), lengths


def masks(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 3, generator=generator, dtype=torch.float64)
    return x, (torch.rand(count, 4, generator=generator) < 0.2).double()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("made", "criterion", "data"),
    [
        (Frames, nn.CTCLoss(), frames),
        (Segmenter, Dice(), masks),
        (Segmenter, PairRanking(), masks),
        (Segmenter, Reducible(), masks),
    ],
)
def test_a_criterion_has_its_own_mean_over_the_window(
    made: Any, criterion: nn.Module, data: Any, sizes: list[int]
) -> None:
    """CTC over time-first outputs, as many frames as samples; dice; a ranking and its own parameter."""
    torch.manual_seed(0)
    model, (x, *targets) = made(), data(11)
    outputs = model(x)
    expected_loss = criterion(outputs, *targets)
    expected_loss.backward()
    expected = taken(model, criterion)
    window = split((x, *targets), sizes)
    loss = accumulate_gradients(model, criterion, window, strategy="cached")
    assert apart(taken(model, criterion), expected) < 1e-12
    assert float(loss.mean) == pytest.approx(float(expected_loss.detach()), rel=1e-12)


def test_a_plain_criterion_is_the_large_batchs_too() -> None:
    """Its mean and its sum; with class weights, and a window of which nothing counts."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3).double(), pairs()[0]
    y = torch.tensor([0, 1, 2, -100, 1, 0, 2, 2, -100, 1, 0])
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    for reduction in ("global_mean", "sum"):
        window = split((x, y), [4, 4, 3])
        accumulate_gradients(model, criterion, window, reduction=reduction)  # type: ignore[arg-type]
        expected = taken(model)
        accumulate_gradients(model, criterion, window, reduction=reduction, strategy="cached")  # type: ignore[arg-type]
        assert apart(taken(model), expected) < 1e-12
    nothing = split((x, torch.full_like(y, -100)), [4, 4, 3])
    assert accumulate_gradients(model, criterion, nothing, strategy="cached").denominator == 0
    assert model.weight.grad is None


def test_calls_may_follow_one_another() -> None:
    """A decoder gets what an encoder puts out, and the loss reads both."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(4, 5)
            self.scale = nn.Parameter(torch.ones(4))
            self.double()

    def loss_fn(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
        x = micro_batch[0]
        hidden = model.encoder(x)
        again = model.decoder(hidden * model.scale)
        covariance = (hidden.T @ hidden / len(x)).square().sum()
        return ((again - x).square().mean() + covariance) * len(x), len(x)

    torch.manual_seed(0)
    model, batch = Pair(), pairs()
    accumulate_gradients(model, loss_fn, [batch])
    expected = taken(model)
    accumulate_gradients(model, loss_fn, split(batch, [4, 4, 3]), strategy="cached")
    assert apart(taken(model), expected) < 1e-12


def test_an_output_without_samples_gets_its_gradient_once() -> None:
    """A model that puts out its temperature beside the embeddings, in a mapping."""

    class Clip(Towers):
        def forward(self, image: Tensor, text: Tensor) -> Any:  # type: ignore[override]
            a, b = super().forward(image, text)
            return {
                "embeddings": [a, b],
                "scale": self.temperature.sin(),
                "dim": a.shape[-1],
                "n": len(a),
            }

    def loss_fn(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
        found = model(*micro_batch)
        assert found["dim"] == 4
        return info_nce(*found["embeddings"], found["scale"]) * found["n"], found["n"]

    torch.manual_seed(0)
    model, batch = Clip(), pairs()
    accumulate_gradients(model, loss_fn, [batch])
    expected = taken(model)
    accumulate_gradients(model, loss_fn, split(batch, [4, 4, 3]), strategy="cached")
    assert apart(taken(model), expected) < 1e-12


def test_state_moves_once_per_micro_batch_in_the_model_and_once_per_window_in_the_loss() -> None:
    """Buffers, counters, lists and generators of a module; a criterion's moving average."""

    class Moving(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
            self.calls, self.seen = 0, [0]
            self.generator = torch.Generator().manual_seed(5)

        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            noise = torch.randn(len(image), 5, generator=self.generator, dtype=torch.float64)
            if self.training:
                self.calls += 1
                self.seen.append(len(image))
                self.mean.lerp_(image.mean(), 0.5)  # type: ignore[operator]
            return self.image(image + noise), self.text(text)

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(4, dtype=torch.float64))

        def forward(self, a: Tensor, b: Tensor, target: Tensor) -> Tensor:
            loss = ((a - self.centre) @ b.T).logsumexp(-1).mean()
            self.centre.lerp_(a.detach().mean(0), 0.5)  # type: ignore[operator]
            return loss

    class OfPairs(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: tuple[Tensor, Tensor]) -> Any:
            return self.inner(*x)

    window = split(pairs(), [4, 4, 3])
    torch.manual_seed(0)
    expected, of_loss = Moving(), Centred()
    a, b = zip(*(expected(*micro_batch) for micro_batch in window), strict=True)
    of_loss(torch.cat(a), torch.cat(b), torch.zeros(11)).backward()
    torch.manual_seed(0)
    model, criterion = Moving(), Centred()
    as_pairs = [(micro_batch, torch.zeros(len(micro_batch[0]))) for micro_batch in window]
    accumulate_gradients(OfPairs(model), criterion, as_pairs, strategy="cached")
    assert apart(taken(model), taken(expected)) < 1e-12
    assert (model.calls, model.seen) == (3, [0, 4, 4, 3])
    assert torch.equal(model.mean, expected.mean)  # type: ignore[arg-type]
    assert torch.equal(model.generator.get_state(), expected.generator.get_state())
    assert torch.allclose(criterion.centre, of_loss.centre, rtol=1e-12)  # type: ignore[arg-type]


class Negatives:
    """A loss function that draws negatives once the outputs are there, and keeps a running mean."""

    def __init__(self) -> None:
        self.mean = nn.BatchNorm1d(4, affine=False).double()

    def __call__(self, model: Any, micro_batch: Any) -> tuple[Tensor, int]:
        return self.of_outputs(*model(*micro_batch)), len(micro_batch[0])

    def of_outputs(self, a: Tensor, b: Tensor) -> Tensor:
        self.mean(a.detach())
        logits = a @ b[torch.randperm(len(b))].T
        return logits.logsumexp(-1).sum()


def test_what_the_loss_draws_and_moves_is_of_the_window() -> None:
    """Its draws follow those of all micro-batches, as in one pass, and its state moves once."""
    model, window = towers(dropout=0.3), split(pairs(), [4, 4, 3])
    expected, loss_fn, found = Negatives(), Negatives(), []
    torch.manual_seed(7)
    for micro_batch in window:
        found.append(model(*micro_batch))
        torch.randperm(len(micro_batch[0]))  # for a loss that nobody needs
    a, b = (torch.cat(column) for column in zip(*found, strict=True))
    (expected.of_outputs(a, b) / 11).backward()
    after, gradient = torch.rand(1), taken(model)
    strategy = Cached()
    strategy.inspect(model, loss_fn, window)
    torch.manual_seed(7)
    accumulate_gradients(model, loss_fn, window, strategy=strategy)
    assert apart(taken(model), gradient) < 1e-12
    assert torch.equal(torch.rand(1), after)
    for mine, other in zip(loss_fn.mean.buffers(), expected.mean.buffers(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-12)


def test_earlier_gradients_backward_and_buffers_are_as_in_place() -> None:
    """Gradients are added to what is there, the loss is scaled once, bfloat16 is summed in float32."""
    model, batch = towers(), pairs()
    info_nce(*model(*batch), model.temperature).backward()
    expected = taken(model)
    for _ in range(2):
        accumulate_gradients(
            model, contrastive, split(batch, [4, 4, 3]), strategy="cached",
            backward=lambda loss: (8 * loss).backward(),  # type: ignore[no-untyped-call]
        )  # fmt: skip
    assert apart(taken(model), 16 * expected) < 1e-12
    half = model.bfloat16()
    coarse = [tuple(t.bfloat16() for t in micro_batch) for micro_batch in split(batch, [1] * 11)]
    rounded = {}
    for dtype in (None, torch.float32):
        accumulate_gradients(half, contrastive, coarse, strategy="cached", buffer_dtype=dtype)
        rounded[dtype] = apart(taken(half).double(), expected)
    assert rounded[torch.float32] < 0.05
    assert rounded[torch.float32] < rounded[None]


def test_autocast_around_the_window_loses_no_gradient() -> None:
    """Weights that the first pass has cast without a graph are cast again."""
    model, batch = towers().float(), [t.float() for t in pairs()]
    info_nce(*model(*batch), model.temperature).backward()
    expected = taken(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulate_gradients(model, contrastive, split(batch, [4, 4, 3]), strategy="cached")
    assert apart(taken(model), expected) < 0.05


class Centring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Balanced(Towers):
    """Puts out a part of the loss, as models with experts do."""

    def forward(self, image: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return (*super().forward(image, text), image.mean())


class Unseen(Towers):
    """Draws from where no one looks."""

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(image + float.fromhex("0x1p-3") * next(DRAWS), text)


DRAWS = iter(range(1000))


def noisy(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    noise = torch.randn_like(micro_batch[0])
    a, b = model(micro_batch[0] + noise, micro_batch[1])
    return info_nce(a, b, model.temperature), len(a)


def with_three(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    a, b, aux = model(*micro_batch)
    return info_nce(a, b, model.temperature) + aux, len(a)


def twice_if_large(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    a, b = model(*micro_batch)
    if len(a) > 6:
        a, b = model(*micro_batch)
    return info_nce(a, b, model.temperature), len(a)


def of_windows(model: Any, micro_batch: Any) -> tuple[Tensor, int]:
    a, b = model(*micro_batch)
    return info_nce(a, b, model.temperature), len(a)


@pytest.mark.parametrize(
    ("made", "options", "loss_fn", "said"),
    [
        (Towers, {"norm": lambda: nn.BatchNorm1d(8)}, of_windows, r"image\.1. \(BatchNorm1d\)"),
        (Towers, {"norm": Centring, "dropout": 0.5}, of_windows, r"image\.1. \(Centring\)"),
        (Balanced, {}, with_three, "has no samples depends on them"),
        (Unseen, {}, of_windows, "gives other outputs"),
        (Towers, {}, noisy, "draws random numbers before it calls the model"),
        (Towers, {}, twice_if_large, "calls the model where it does not for a micro-batch"),
    ],
)
def test_what_cannot_be_exact_is_refused(made: Any, options: Any, loss_fn: Any, said: str) -> None:
    """With the module that mixes samples, or what else is in the way; nothing is added to a gradient."""
    torch.manual_seed(0)
    model = made(**options)
    with pytest.raises(BadInputError, match=f"strategy=cached is refused.*{said}"):
        accumulate_gradients(model, loss_fn, split(pairs(), [4, 4, 3]), strategy=Cached())
    assert all(p.grad is None for p in model.image.parameters())


def test_a_loss_inside_the_model_is_refused() -> None:
    """Its outputs are losses of micro-batches, from which the window's cannot be told."""

    class OfItself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.layer(x), labels)}

    x, labels = pairs()[0], torch.arange(11) % 3
    window = [{"x": a, "labels": b} for a, b in split((x, labels), [4, 4, 3])]
    with pytest.raises(BadInputError, match="OfItself takes its loss itself"):
        accumulate_gradients(OfItself(), ModelLoss(), window, strategy=Cached())


def test_frozen_statistics_are_not_refused() -> None:
    """BatchNorm in evaluation mode is a function of one sample; in training mode it is found at once."""
    model, batch = towers(norm=lambda: nn.BatchNorm1d(8)), pairs()
    strategy = Cached()
    model.eval()
    accumulate_gradients(model, contrastive, [batch])
    expected = taken(model)
    accumulate_gradients(model, contrastive, split(batch, [4, 4, 3]), strategy=strategy)
    assert apart(taken(model), expected) < 1e-12
    model.train()
    with pytest.raises(BadInputError, match="BatchNorm1d"):
        accumulate_gradients(model, contrastive, split(batch, [4, 4, 3]), strategy=strategy)


def test_what_has_no_meaning_is_refused() -> None:
    """The mean of means, an unknown name, and a window that is to go on in its middle."""
    model, window = towers(), split(pairs(), [4, 4, 3])
    with pytest.raises(
        BadInputError, match=r"accum\.reduction=mean has no meaning under strategy=cached"
    ):
        accumulate_gradients(model, contrastive, window, reduction="mean", strategy="cached")
    with pytest.raises(ValueError, match="not one of in_place, cached"):
        accumulate_gradients(model, contrastive, window, strategy="chached")  # type: ignore[arg-type]
    begun = AccumulatorState([None] * 3, passes_done=1)
    with pytest.raises(ValueError, match="begin it again"):
        accumulate(model, contrastive, window, GLOBAL_MEAN, Cached(), begun=begun)


def test_without_the_strategy_the_criterion_is_refused_as_ever() -> None:
    """CTC's mean is refused under global_mean, and the message names the strategy."""
    with pytest.raises(BadInputError, match=r"strategy=cached"):
        CriterionLoss(nn.CTCLoss())
    with pytest.raises(BadInputError, match="no attribute `reduction`"):
        CriterionLoss(Dice())
