"""The noise scale of micro gradients, against naive formulas and populations that are known."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from gaccum_exp import accumulate_gradients, noise_scale
from gaccum_exp.core import micro_gradients
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.micro_gradients import MicroGradients
from gaccum_exp.core.noise_scale import (
    Noise,
    NoiseScale,
    Share,
    quotient_of_means,
    student_t,
    window_noise,
)
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.meter import TensorMeter
from gaccum_exp.models.cnn import CNN
from gaccum_exp.models.gpt import GPT
from gaccum_exp.models.mlp import MLP

F64 = torch.float64
SPLITS = {"equal": [4] * 8, "unequal": [1, 2, 3, 4, 5, 6, 7, 8], "one large": [30, 1, 1], "two": [3, 5]}


def textbook(sums: Sequence[Tensor], n: Sequence[float], b: Sequence[float]) -> Noise:
    """tr(Σ) = (B/n)² Σ‖∇Sᵢ − nᵢḡ‖²/bᵢ/(N − 1), and ‖ḡ‖² less what noise adds to it."""
    mean = sum(sums) / sum(n)
    gaps = sum(
        float((s - k * mean).square().sum()) / of for s, k, of in zip(sums, n, b, strict=True)
    ) / (len(sums) - 1)
    trace = (sum(b) / sum(n)) ** 2 * gaps
    return Noise(trace, float(mean.square().sum()) - trace / sum(b))


def pairwise(
    sums: Sequence[Tensor], n: Sequence[float], b: Sequence[float], v: Sequence[float]
) -> Noise:
    """The module's own formulas, with every gradient at hand."""
    gaps = expected = 0.0
    for i in range(1, len(sums)):
        before = range(i)
        total, weighed = sum(v[j] * sums[j] for j in before), sum(v[j] * n[j] for j in before)
        spread = sum(v[j] ** 2 * b[j] for j in before) / weighed**2
        weight = 1 / (b[i] + b[i] ** 2 / sum(b[:i]))
        gaps += weight * float((sums[i] - n[i] / weighed * total).square().sum())
        expected += weight * (b[i] + n[i] ** 2 * spread)
    tau = gaps / expected
    vn = sum(x * y for x, y in zip(v, n, strict=True))
    vvb = sum(x * x * y for x, y in zip(v, b, strict=True))
    mean = sum(x * s for x, s in zip(v, sums, strict=True)) / vn
    return Noise(tau * (sum(b) / sum(n)) ** 2, float(mean.square().sum()) - tau * vvb / vn**2)


def dots_of(sums: Tensor, v: Tensor) -> Tensor:
    """(…, N, P) and (N,) or (…, N) -> (…, N, 2): each share's square, and with those before it."""
    shares = sums * v[..., None]
    before = shares.cumsum(-2) - shares
    return torch.stack([shares.square().sum(-1), (shares * before).sum(-1)], -1)


def told(sums: Tensor, n: Tensor, b: Tensor, v: Tensor) -> Noise:
    """What a window tells by the two numbers that are seen of each micro gradient."""
    shares = [Share(*of) for of in zip(b.tolist(), n.tolist(), v.tolist(), strict=True)]
    found = window_noise(shares, [(x, y) for x, y in dots_of(sums, v).tolist()])
    assert found is not None
    return found


def close(one: Sequence[float], other: Sequence[float], rel: float = 1e-9) -> bool:
    return all(math.isclose(x, y, rel_tol=rel) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_two_numbers_of_each_micro_gradient_tell_what_all_gradients_tell(split: str) -> None:
    """In one pass over them, for any factors; and where all count alike, what the textbook says."""
    torch.manual_seed(0)
    b = torch.tensor(SPLITS[split], dtype=F64)
    sums = torch.randn(len(b), 30, dtype=F64) * b.sqrt()[:, None] + b[:, None] * torch.rand(30)
    tokens = b * (1 + torch.rand(len(b)))
    for n in (b, tokens):
        for v in (torch.full_like(b, 1 / float(n.sum())), 1 / (n * len(b)), torch.ones_like(b)):
            expected = pairwise(list(sums), n.tolist(), b.tolist(), v.tolist())
            assert close(told(sums, n, b, v), expected)
    v = torch.full_like(b, 0.01)
    assert close(told(sums, b, b, v), textbook(list(sums), b.tolist(), b.tolist()))


@pytest.mark.parametrize("split", ["equal", "unequal", "one large"])
@pytest.mark.parametrize("reduction", ["global_mean", "mean"])
def test_trace_and_squared_norm_are_unbiased_on_a_quadratic(split: str, reduction: str) -> None:
    """Where Σ and G are known: within 3 standard errors over 2,000 windows."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(12, generator=generator, dtype=F64) * 0.3
    spread = torch.rand(12, generator=generator, dtype=F64) + 0.5  # standard deviations of Σ
    b = torch.tensor(SPLITS[split], dtype=F64)
    v = torch.full_like(b, 1 / float(b.sum())) if reduction == "global_mean" else 1 / (b * len(b))
    noise = torch.randn(2000, len(b), 12, generator=generator, dtype=F64) * spread
    sums = b[:, None] * gradient + b.sqrt()[:, None] * noise
    found = torch.tensor([told(of, b, b, v) for of in sums], dtype=F64)
    errors = found.std(0) / math.sqrt(len(found))
    truth = torch.stack([spread.square().sum(), gradient.square().sum()])
    assert ((found.mean(0) - truth).abs() < 3 * errors).all()


@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
def test_for_token_counts_the_bias_goes_with_the_number_of_sequences(reduction: str) -> None:
    """Lognormal lengths: below 3 % with 256 sequences a window; with 16 it is there, and larger."""

    def relative_bias(per_micro_batch: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(2)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        gradient, dims = normal(6), 6
        lengths = (2.5 + 0.8 * normal(400, 8, per_micro_batch)).exp().ceil()
        own = lengths[..., None] * 0.1 * normal(*lengths.shape, dims)
        own += lengths.sqrt()[..., None] * normal(*lengths.shape, dims)
        sums = (lengths[..., None] * gradient + own).sum(2)
        n, b = lengths.sum(2), torch.full((8,), float(per_micro_batch), dtype=F64)
        v = {"global_mean": 1 / n.sum(1, keepdim=True).expand_as(n), "mean": 1 / (8 * n)}.get(
            reduction, torch.full_like(n, 0.001)
        )
        found = torch.tensor([told(s, k, b, f) for s, k, f in zip(sums, n, v, strict=True)], dtype=F64)
        # Of a lognormal length that is rounded up: by something uniform in 0 to 1, nearly.
        mean = math.exp(2.5 + 0.8**2 / 2) + 1 / 2
        of_square = math.exp(2 * 2.5 + 2 * 0.8**2) + mean - 1 / 6
        truth = dims * (0.01 * of_square + mean) / mean**2
        errors = found.std(0) / math.sqrt(len(found))
        of_norm = abs(float(found[:, 1].mean() - gradient.square().sum()) / float(errors[1]))
        assert of_norm < 3.5
        return float(found[:, 0].mean()) / truth - 1, float(errors[0]) / truth

    bias, error = relative_bias(32)
    assert abs(bias) < 0.03 + 2 * error
    few, _ = relative_bias(2)
    assert few < -0.05


def linear(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def window_of(sizes: Sequence[int], dtype: torch.dtype = F64, seed: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 5, generator=generator).to(dtype) for size in sizes]
    return [(x, x[:, :3].argmax(1)) for x in inputs]


def sums_of(model: nn.Module, window: Sequence[Any]) -> list[Tensor]:
    """The gradient of each micro-batch's loss sum, taken by itself."""
    found = []
    for x, y in window:
        loss = F.cross_entropy(model(x).double(), y, reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([g.double().flatten() for g in grads]))
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_the_passes_of_a_window_show_is_what_separate_gradients_tell(
    split: str, reduction: Any, scaled: bool
) -> None:
    """Under every reduction, split and loss scale; the gradient is that of `accumulate_gradients`."""
    model, b = linear(), SPLITS[split]
    window, other = window_of(b), copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    found = noise_scale(model, nn.CrossEntropyLoss(), window, reduction=reduction, scaler=scaler)
    factors = {"global_mean": [1 / sum(b)] * len(b), "mean": [1 / (k * len(b)) for k in b]}
    v = factors.get(reduction, [1.0] * len(b))
    assert close(found.window, pairwise(sums_of(model, window), b, b, v))
    accumulate_gradients(other, nn.CrossEntropyLoss(), window, reduction=reduction)
    by = 1024.0 if scaled else 1.0
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad / by, same.grad)


def test_a_denominator_that_is_known_late_and_unlike_the_samples_is_taken_for_what_it_is() -> None:
    """A loss function without `count`, dividing by a sum of weights; one micro-batch counts nothing."""
    model, b = linear(), [3, 2, 4, 5]
    window = window_of(b)
    weights = [torch.tensor([1.0, 2.0, 0.5]), torch.zeros(2), torch.ones(4), torch.rand(5)]

    def loss_fn(of: nn.Module, micro_batch: Any) -> tuple[Tensor, Tensor]:
        (x, y), w = micro_batch
        losses = F.cross_entropy(of(x), y, reduction="none")
        return (losses * w).sum(), w.sum()

    found = noise_scale(model, loss_fn, list(zip(window, weights, strict=True)))
    sums = []
    for (x, y), w in zip(window, weights, strict=True):
        losses = F.cross_entropy(model(x), y, reduction="none")
        grads = torch.autograd.grad((losses * w).sum(), list(model.parameters()))
        sums.append(torch.cat([g.flatten() for g in grads]))
    n = [float(w.sum()) for w in weights]
    assert close(found.window, pairwise(sums, n, b, [1.0] * 4), rel=1e-6)


def test_micro_gradients_in_half_precision_are_seen_in_float32_beside_their_buffers() -> None:
    """bfloat16 parameters, float32 buffers: the dots have float32's digits, not three."""
    model = linear(torch.bfloat16)
    window = window_of([4] * 6, torch.bfloat16)
    found = noise_scale(model, nn.CrossEntropyLoss(), window, buffer_dtype=torch.float32)
    sums = []
    for x, y in window:  # as autograd gives them, in bfloat16
        loss = F.cross_entropy(model(x).float(), y, reduction="sum") / 24
        grads = torch.autograd.grad(loss, list(model.parameters()))
        sums.append(torch.cat([g.double().flatten() for g in grads]) * 24)
    assert close(found.window, textbook(sums, [4] * 6, [4] * 6), rel=1e-4)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_in_adams_metric_it_is_that_of_gradients_multiplied_by_it(amsgrad: bool) -> None:
    """D = 1/(√v̂ + ε) before the step: √D times each gradient, by the textbook; none before a state."""
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), amsgrad=amsgrad)
    found = noise_scale(model, nn.CrossEntropyLoss(), window_of([4] * 4), optimizer=optimizer)
    assert found.adam_window is None
    assert found.adam_scale is None
    for step in range(3):
        optimizer.step()
        optimizer.zero_grad()
        window = window_of([4] * 4, seed=step)
        if step == 1:  # an element that has had no gradient gets one in the last window
            optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = 0.0
            optimizer.state[model[0].weight].get("max_exp_avg_sq", torch.empty(1, 1))[0, 0] = 0.0
        roots = []
        for parameter in model.parameters():
            state = optimizer.state[parameter]
            moment = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
            hat = moment / (1 - 0.95 ** (step + 1))
            roots.append((1 / (hat.sqrt() + 1e-8)).where(moment > 0, 0.0).sqrt().flatten())
        sums = [torch.cat(roots) * s for s in sums_of(model, window)]
        found = noise_scale(model, nn.CrossEntropyLoss(), window, optimizer=optimizer)
        assert found.adam_window is not None
        assert close(found.adam_window, textbook(sums, [4] * 4, [4] * 4), rel=1e-6)


def test_an_optimizer_of_another_kind_has_no_metric() -> None:
    """SGD with momentum has a state, and no second moments; the same, if only a part has them."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        found = noise_scale(model, nn.CrossEntropyLoss(), window_of([4] * 4), optimizer=optimizer)
        assert found.adam_window is None
        optimizer.step()
    optimizer = torch.optim.Adam(model[0].parameters())
    optimizer.step()
    model.zero_grad()
    found = noise_scale(model, nn.CrossEntropyLoss(), window_of([4] * 4), optimizer=optimizer)
    assert found.adam_window is None
    assert math.isfinite(found.window.trace)


def image_model() -> tuple[nn.Module, nn.Module, Any]:
    torch.manual_seed(5)
    batch = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    return MLP([16], input_shape=[1, 8, 8], num_classes=10), nn.CrossEntropyLoss(), batch


def convolutional() -> tuple[nn.Module, nn.Module, Any]:
    _, criterion, batch = image_model()
    return CNN("group", 4, input_shape=[1, 8, 8], num_classes=10), criterion, batch


def tokens() -> tuple[nn.Module, nn.Module, Any]:
    torch.manual_seed(6)

    class PerToken(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return super().forward(logits.flatten(0, 1), labels.flatten())

    x = torch.randint(11, (24, 6))
    return GPT(1, 2, 8, vocab_size=11), PerToken(), (x, x.roll(-1, 1))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("made", [image_model, convolutional, tokens])
def test_over_random_splits_of_one_window_it_is_what_its_samples_tell(made: Callable[[], Any]) -> None:
    """The gradients of all samples (by torch.func): their covariance, within 3 standard errors."""
    model, criterion, (x, y) = made()
    model, x = model.double(), x.double() if x.is_floating_point() else x
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(weights: Any, one: Tensor, label: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, weights, (one[None],))
        loss: Tensor = criterion(outputs, label[None])
        return loss

    each = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))(parameters, x, y)
    samples = torch.cat([g.flatten(1) for g in each.values()], 1)
    trace = float(samples.var(0).sum())
    generator, found = torch.Generator().manual_seed(7), []
    for number in range(40):
        order = torch.randperm(len(x), generator=generator)
        sizes = [len(x) // 4] * 4 if number % 2 else [1, 3, 9, len(x) - 13]
        window = list(zip(x[order].split(sizes), y[order].split(sizes), strict=True))
        model.zero_grad()
        found.append(noise_scale(model, criterion, window, samples=sizes).window)
    numbers = torch.tensor(found, dtype=F64)
    truth = torch.tensor([trace, float(samples.mean(0).square().sum()) - trace / len(x)], dtype=F64)
    errors = numbers.std(0) / math.sqrt(len(numbers))
    assert ((numbers.mean(0) - truth).abs() < 3 * errors).all()


def test_of_a_training_set_less_of_the_noise_is_in_the_gradient() -> None:
    """Windows of 24 of 30 samples without replacement: unbiased for the gradient over the 30."""
    torch.manual_seed(8)
    samples = torch.randn(30, 4, dtype=F64) + 0.2
    whole, of_population = [], []
    b = torch.full((4,), 6.0, dtype=F64)
    for _ in range(1000):
        drawn = samples[torch.randperm(30)[:24]].view(4, 6, 4).sum(1)
        shares = [Share(6, 6, 1 / 24)] * 4
        dots = [(x, y) for x, y in dots_of(drawn, b / 144).tolist()]
        for found, of in ((whole, 30), (of_population, None)):
            noise = window_noise(shares, dots, of)
            assert noise is not None
            found.append(noise.squared_norm)
    truth, numbers = float(samples.mean(0).square().sum()), torch.tensor(whole, dtype=F64)
    error = float(numbers.std()) / math.sqrt(1000)
    assert abs(float(numbers.mean()) - truth) < 3 * error
    assert sum(of_population) / 1000 < truth - 10 * error


def test_of_a_training_set_it_is_unbiased_where_micro_batches_have_unequal_factors() -> None:
    """16 of 24 samples under `mean`, in micro-batches of 2 to 7: within 3 standard errors."""
    generator = torch.Generator().manual_seed(10)
    samples = torch.randn(24, 4, generator=generator, dtype=F64) + 0.2
    sizes, found = [3, 7, 2, 4], []
    b = torch.tensor(sizes, dtype=F64)
    v = 1 / (4 * b)
    for _ in range(4000):
        drawn = samples[torch.randperm(24, generator=generator)[:16]]
        sums = torch.stack([part.sum(0) for part in drawn.split(sizes)])
        shares = [Share(k, k, f) for k, f in zip(sizes, v.tolist(), strict=True)]
        noise = window_noise(shares, [(x, y) for x, y in dots_of(sums, v).tolist()], 24)
        assert noise is not None
        found.append(noise.squared_norm)
    numbers = torch.tensor(found, dtype=F64)
    off = float(numbers.mean() - samples.mean(0).square().sum())
    assert abs(off) < 3 * float(numbers.std()) / math.sqrt(4000)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"samples": [0, 4, 4]}, r"samples=\[0, 4, 4\]: a micro-batch holds 1 at least"),
        ({"samples": [4, -1, 4]}, r"samples=\[4, -1, 4\]: a micro-batch holds 1"),
        ({"samples": [4, 4, 9]}, r"samples=\[4, 4, 9\]: the micro-batches' tensors hold \[4, 4, 4\]"),
        ({"samples": [4, 4]}, "names 2 of 3"),
        ({"training_samples": 0}, "training_samples=0: the window alone holds 12"),
        ({"training_samples": 11}, "training_samples=11: the window alone holds 12"),
    ],
)
def test_numbers_of_samples_that_cannot_be_are_refused(asked: dict[str, Any], said: str) -> None:
    """In one line, before any gradient is added."""
    model = linear()
    with pytest.raises(BadInputError, match=said) as refusal:
        noise_scale(model, nn.CrossEntropyLoss(), window_of([4, 4, 4]), **asked)
    assert "\n" not in str(refusal.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sizes", [[4, 4], [1, 1, 1]], ids=str)
def test_of_a_training_set_passes_that_draw_are_refused(sizes: list[int]) -> None:
    """What dropout adds does not vanish in a window of all samples; of the population it is measured."""
    model = nn.Sequential(*linear(), nn.Dropout(0.3))
    window = window_of(sizes)
    with pytest.raises(BadInputError, match=r"draw random .*leave training_samples out"):
        noise_scale(model, nn.CrossEntropyLoss(), window, training_samples=100)
    assert math.isfinite(noise_scale(model, nn.CrossEntropyLoss(), window).window.trace)
    model.eval().zero_grad()
    noise_scale(model, nn.CrossEntropyLoss(), window, training_samples=100)


@pytest.mark.parametrize("scale", [50.0, 1000.0])
def test_fiellers_interval_covers_what_it_says(scale: float) -> None:
    """93.5 to 96.5 % of 1,000 intervals of 64 windows of 64 samples hold the truth.

    One without an upper end holds every scale above its lower one: one in nine at a scale of 1,000.
    """
    generator, dims = torch.Generator().manual_seed(9), 100
    mean = torch.randn(1000, 64, dims, generator=generator, dtype=F64) / 8
    mean[:, :, 0] += math.sqrt(dims / scale)
    # The trace of 8 micro-batches: a chi-squared with 7 degrees of freedom per dimension, nearly normal.
    trace = dims + math.sqrt(2 * dims / 7) * torch.randn(1000, 64, generator=generator, dtype=F64)
    norm = mean.square().sum(2) - trace / 64
    found = [
        quotient_of_means([Noise(*of) for of in zip(*pair, strict=True)])
        for pair in zip(trace.tolist(), norm.tolist(), strict=True)
    ]
    held = sum(interval.low <= scale <= interval.high for interval in found)
    assert 935 <= held <= 965
    unresolved = sum(math.isinf(interval.high) for interval in found)
    assert unresolved == 0 if scale == 50.0 else 50 < unresolved < 200
    bounded = [interval for interval in found if math.isfinite(interval.high)]
    assert all(interval.low <= interval.value <= interval.high for interval in bounded)


def test_the_quotient_is_of_means_and_unbounded_where_nothing_bounds_it() -> None:
    """One window has no interval; a squared norm around 0 has no upper end, a negative one no value."""
    assert quotient_of_means([Noise(6.0, 2.0)]) == (3.0, 0.0, math.inf)
    value, low, high = quotient_of_means([Noise(6.0, 2.0), Noise(8.0, 2.0), Noise(10.0, 5.0)])
    assert value == pytest.approx(24 / 9)
    around = [Noise(5.0 + 0.01 * k, 0.1 * (-1) ** k + 0.01) for k in range(8)]
    value, low, high = quotient_of_means(around)
    assert high == math.inf
    assert 10 < low < value
    value, low, high = quotient_of_means([Noise(t, -s) for t, s in around])
    assert math.isnan(value)
    assert high == math.inf
    assert quotient_of_means([Noise(1.0, -1.0), Noise(1.1, -1.0), Noise(0.9, -1.1)])[1:] == (0, math.inf)


def test_at_the_ends_of_the_interval_the_quotient_is_just_refuted() -> None:
    """There the mean of trace − θ·squared norm is t standard errors from 0; correlation included."""
    generator = torch.Generator().manual_seed(11)
    norm = 1 + 0.3 * torch.randn(16, generator=generator, dtype=F64)
    trace = 40 + 5 * norm + 6 * torch.randn(16, generator=generator, dtype=F64)
    windows = [Noise(*pair) for pair in zip(trace.tolist(), norm.tolist(), strict=True)]
    value, *ends = quotient_of_means(windows)
    assert value == pytest.approx(float(trace.mean() / norm.mean()))
    for sign, end in zip((1, -1), ends, strict=True):
        gaps = trace - end * norm
        error = float(gaps.std()) / 4
        assert float(gaps.mean()) / error == pytest.approx(sign * student_t(0.95, 15))


def test_students_t_is_that_of_the_tables() -> None:
    """Two-sided 95 %."""
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 15: 2.13145, 63: 1.99834}
    assert all(math.isclose(student_t(0.95, k), t, rel_tol=1e-5) for k, t in table.items())


def test_windows_are_averaged_and_the_result_says_how_sure_it_is() -> None:
    """As in a loop that measures every eighth window."""
    model, measured = linear(), list[NoiseScale]()
    for seed in range(12):
        model.zero_grad()
        window = window_of([4] * 4, seed=seed)
        measured.append(noise_scale(model, nn.CrossEntropyLoss(), window, earlier=measured))
    last = measured[-1]
    assert last.windows == 12
    assert last.scale == quotient_of_means([of.window for of in measured])
    assert str(last).startswith(f"noise scale: {last.scale.value:.3g} samples (")
    assert "not resolved by a window" in str(measured[0])
    told = replace(last, adam_scale=last.scale._replace(value=7.0))
    assert str(told).startswith("noise scale, in Adam's metric: 7 samples (")


class Mixed(nn.Sequential):
    """Batch statistics in its middle."""

    def __init__(self, norm: nn.Module, last: float = 1.0) -> None:
        super().__init__(nn.Linear(5, 8), norm, nn.Tanh(), nn.Linear(8, 3))
        with torch.no_grad():
            self[3].weight *= last


class Pairs(nn.Module):
    """A loss over all pairs of a micro-batch's samples."""

    reduction = "mean"

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        scores = outputs @ outputs.T
        return F.cross_entropy(scores, torch.arange(len(outputs)), reduction=self.reduction)


def of_terms(model: nn.Module, micro_batch: Any) -> Any:
    x, _ = micro_batch
    return {"one": (model(x).square().sum(), len(x)), "two": (model(x).sum(), len(x))}


class Counting(nn.Linear):
    """Counts its passes."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


class Lookup(nn.Module):
    """Sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[:, 0] > 0).long()) + x[:, :3]


class InParts(nn.Module):
    """One layer in two checkpointed segments, each of which gives it a gradient."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Linear(5, 5), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=self.reentrant).tanh()
        return x[:, :3]


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        (Mixed(nn.BatchNorm1d(8)), nn.CrossEntropyLoss(), r'module "1" \(BatchNorm1d\) makes a sample'),
        (Mixed(nn.BatchNorm1d(8), 0.0), nn.CrossEntropyLoss(), r'1" \(BatchNorm1d\) makes'),
        (linear(torch.float32), Pairs(), "the criterion Pairs couples the samples"),
        (Counting(), of_terms, "a loss of several terms"),
        (Lookup(), nn.CrossEntropyLoss(), "is sparse: use sparse=False"),
        (InParts(True), nn.CrossEntropyLoss(), "in several parts within one micro-batch"),
    ],
)
def test_what_has_no_noise_scale_is_refused_by_name(model: nn.Module, loss: Any, said: str) -> None:
    """Before a pass of the window, and with nothing moved."""
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    reduction: Any = "sum" if isinstance(loss, Pairs) else "global_mean"
    with pytest.raises(BadInputError, match=said):
        noise_scale(model, loss, window_of([4] * 4, torch.float32), reduction=reduction)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


class Moved(nn.Linear):
    """Its passes move what its outputs depend on."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x) * self.passes


@pytest.mark.parametrize(
    "model",
    [
        Moved(),
        Mixed(nn.LayerNorm(8)),
        Mixed(nn.GroupNorm(2, 8)),
        Mixed(nn.BatchNorm1d(8).eval()),
        Mixed(nn.Dropout(0.5)),
        Mixed(nn.Identity()).to(torch.bfloat16),
        InParts(False),
    ],
)
def test_samples_that_are_independent_are_not_refused(model: nn.Module) -> None:
    """Normalisation of each sample, frozen statistics, dropout, half precision, checkpointing."""
    dtype = next(model.parameters()).dtype
    found = noise_scale(model, nn.CrossEntropyLoss(), window_of([4] * 4, dtype))
    assert found.window.trace > 0


def test_sequences_that_come_time_first_are_the_samples() -> None:
    """The second dimension counts them, as the targets say."""
    torch.manual_seed(13)
    model, criterion = Recurrent(), nn.CrossEntropyLoss()
    whole, labels = torch.randn(7, 12, 5), torch.randint(3, (12,))
    window = list(zip(whole.split([3, 5, 4], 1), labels.split([3, 5, 4]), strict=True))
    found = noise_scale(model, criterion, window)
    b = [3, 5, 4]
    assert close(found.window, textbook(sums_of(model, window), b, b), rel=1e-3)


class Recurrent(nn.Module):
    """(time, batch, 5) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][-1])


def test_a_window_that_cannot_tell_is_refused_with_what_to_do() -> None:
    """One micro-batch; gradients that are there already."""
    model = linear()
    with pytest.raises(BadInputError, match=r"split its 8 samples into 2 at least"):
        noise_scale(model, nn.CrossEntropyLoss(), window_of([8]))
    accumulate_gradients(model, nn.CrossEntropyLoss(), window_of([8]))
    with pytest.raises(BadInputError, match=r"call optimizer.zero_grad\(\) first"):
        noise_scale(model, nn.CrossEntropyLoss(), window_of([4, 4]))
    with pytest.raises(BadInputError, match="samples names 1 of 2 micro-batches"):
        noise_scale(model, nn.CrossEntropyLoss(), window_of([4, 4]), samples=[8])
    with pytest.raises(ValueError, match="no micro-batch"):
        noise_scale(model, nn.CrossEntropyLoss(), [])
    with pytest.raises(BadInputError, match="cannot be told apart"):
        noise_scale(model, lambda of, x: (of(torch.ones(2, 5).double()).sum(), x), [2.0, 3.0])


@pytest.mark.parametrize("adam", [False, True])
def test_the_peak_memory_of_a_window_is_raised_by_pieces_alone(
    monkeypatch: pytest.MonkeyPatch, adam: bool
) -> None:
    """By less than a hundredth of the gradients, whose size it holds anyway."""
    monkeypatch.setattr(micro_gradients, "CHUNK", 2**10)
    monkeypatch.setattr(micro_gradients, "KEPT", 2**10)
    torch.manual_seed(12)
    model = nn.Sequential(nn.Linear(5, 700), nn.Tanh(), nn.Linear(700, 700), nn.Linear(700, 3))
    optimizer, peaks = torch.optim.Adam(model.parameters()), []
    window, criterion = window_of([2, 2, 2], torch.float32), CriterionLoss(nn.CrossEntropyLoss())
    for measured in (False, False, True):  # the first makes the optimizer's state
        optimizer.zero_grad()
        meter = TensorMeter(model, optimizer, torch.device("cpu"))
        with meter, meter.phase("forward/backward"):
            if measured:
                found = noise_scale(model, criterion, window, optimizer=optimizer if adam else None)
                assert (found.adam_window is not None) == adam
            else:
                accumulate_gradients(model, criterion, window)
        optimizer.step()
        peak = meter.peak()
        assert peak is not None
        peaks.append(peak.bytes)
    gradients = sum(p.nbytes for p in model.parameters())
    assert peaks[2] - peaks[1] < gradients / 100


class Largest(TorchDispatchMode):
    """The largest storage that an operator has made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def storages(of: Any) -> dict[int, int]:
            held = [t.untyped_storage() for t in tree_leaves(of) if isinstance(t, Tensor)]
            return {storage.data_ptr(): storage.nbytes() for storage in held}

        given, result = storages((args, kwargs)), func(*args, **(kwargs or {}))
        made = [nbytes for at, nbytes in storages(result).items() if at not in given]
        self.bytes = max([self.bytes, *made])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_of_a_parameters_size_is_made(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, transposed: bool
) -> None:
    """A large gradient is looked at in pieces, in half precision, in another layout and by Adam too."""
    monkeypatch.setattr(micro_gradients, "CHUNK", 2**10)
    monkeypatch.setattr(micro_gradients, "KEPT", 2**10)
    torch.manual_seed(10)
    parameter = nn.Parameter(torch.randn(96, 3, 200, dtype=dtype))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    gradient = torch.randn(96, 3, 200, dtype=dtype)
    if transposed:
        gradient = torch.randn(200, 3, 96, dtype=dtype).permute(2, 1, 0)
    seen = MicroGradients([parameter], optimizer)
    with Largest() as largest:
        seen._see(parameter, gradient)
    assert 0 < largest.bytes <= 4 * 2**10
    seen.end_micro_batch(AccumulatorState([1], last_share=(1, 1)), 1)
    one, total = gradient.double(), parameter.grad.double()
    by = 1 / ((optimizer.state[parameter]["exp_avg_sq"].double() / 0.001).sqrt() + 1e-8)
    pairs = (one, one), (one, total), (one * by, one), (one * by, total)
    expected = [float((x * y).sum()) for x, y in pairs]
    assert torch.allclose(seen.rows[0].dots, torch.tensor(expected, dtype=F64), rtol=2e-3)
