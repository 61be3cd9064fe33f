"""The gradient noise scale tr(Σ) / ‖G‖², in samples: the batch beyond which averaging buys little.

G is the gradient of the mean loss, Σ the covariance of one sample's share in it (McCandlish et al. 2018,
arXiv 1812.06162). A window's N micro gradients at the same weights tell both, without a further pass.

Micro-batch i of bᵢ independent units (samples, or sequences) has the loss sum Sᵢ and the denominator nᵢ,
and what is back-propagated is vᵢSᵢ: v = 1/n, 1/(N·nᵢ) or a constant, by the reduction. ∇Sᵢ has the mean
nᵢG and the covariance bᵢτ. Before it is added, `.grad` holds A = Σ_{j<i} vⱼ∇Sⱼ, and

    r = ∇Sᵢ − c·A,  c = nᵢ/Σvⱼnⱼ    has the mean 0 and    E‖r‖² = tr(τ)·(bᵢ + nᵢ²·Σvⱼ²bⱼ/(Σvⱼnⱼ)²)

whatever the split. ‖r‖² takes two numbers of a micro gradient, ‖∇Sᵢ‖² and ∇Sᵢ·A, and none is kept. With
B = Σbᵢ and n = Σnᵢ

    tr(Σ) = tr(τ)·(B/n)²          ‖G‖² = ‖A/Σvᵢnᵢ‖² − tr(τ)·Σvᵢ²bᵢ/(Σvᵢnᵢ)²

Both are unbiased where n counts the units, and under `global_mean` then equal to the textbook's
tr(Σ) = (Σbᵢ‖gᵢ‖² − B‖ḡ‖²)/(N − 1). Where n counts tokens they are consistent, with a bias of order 1/B.
Their quotient is only to be taken of means over many windows: a mean of quotients is badly biased.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.accumulate import accumulate, strategy_named
from gaccum_exp.core.joined_samples import SampleLayout
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.losses.protocol import LossFn, criterion_of
from gaccum_exp.core.micro_gradients import (
    OF_DRAWS,
    MicroGradients,
    Seen,
    coarsest_type,
    require_independent,
    samples_in,
)
from gaccum_exp.core.reductions import ReductionName, reduction_named
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.core.window_loss import WindowLoss
from gaccum_exp.errors import BadInputError

TRAILING = 64
"""Measured windows that a training's noise scale is the quotient of means of."""


class Noise(NamedTuple):
    """What one window tells; without bias, so that the squared norm may come out negative."""

    trace: float
    """tr(Σ)."""
    squared_norm: float
    """‖G‖²."""


class Quotient(NamedTuple):
    """A quotient of means, and its confidence interval."""

    value: float
    """NaN where the denominator's mean is not positive."""
    low: float
    """0 where the interval does not begin above it."""
    high: float
    """Infinite where nothing bounds it."""


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """The noise scale, as a window and those before it tell it."""

    loss: WindowLoss
    """Of the window, as `accumulate_gradients` returns it."""
    window: Noise
    """What this window tells by itself."""
    adam_window: Noise | None
    """The same in Adam's metric: tr(DΣ) and GᵀDG, D = 1/(√v̂ + ε); None: the optimizer has none yet."""
    scale: Quotient
    """tr(Σ)/‖G‖², in samples, over all windows, with its 95 % interval."""
    adam_scale: Quotient | None
    """The same in Adam's metric."""
    windows: int
    """How many there are."""

    def __str__(self) -> str:
        scale = self.scale if self.adam_scale is None else self.adam_scale
        return scale_said(scale, self.windows, in_adam_metric=self.adam_scale is not None)


def noise_scale(
    model: nn.Module,
    loss_fn: LossFn | nn.Module,
    window: Iterable[Any],
    *,
    reduction: ReductionName = "global_mean",
    sum_divisor: float = 1.0,
    buffer_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    samples: Sequence[int] | None = None,
    training_samples: int | None = None,
    earlier: Sequence[NoiseScale] = (),
) -> NoiseScale:
    """Add the window's gradient to every `.grad`, as `accumulate_gradients` does, and measure its noise.

        measured = []
        for k, window in enumerate(windows):
            optimizer.zero_grad()
            if k % 8 == 0:
                measured.append(noise_scale(model, criterion, window, earlier=measured[-63:]))
            else:
                accumulate_gradients(model, criterion, window)
            optimizer.step()

    No gradient is kept and no pass repeated; beforehand a few samples pass four times, to see that they
    are independent.

    Args:
        model: as for `accumulate_gradients`; so are `loss_fn`, `window`, `reduction`, `sum_divisor` and
            `buffer_dtype`. The micro-batches are parts of the window at random, not sorted.
        scaler: scales the loss.
        optimizer: where it is Adam-like, the scale in its metric is measured too.
        samples: how many each micro-batch holds; None: as its tensors' shapes tell.
        training_samples: D, where G is to be the gradient over a training set of which the window holds
            samples drawn without replacement, as they are; None: the gradient over their population.
        earlier: what earlier windows told, to be averaged with.

    Raises:
        BadInputError: there is no noise scale, and why: a window of one micro-batch, gradients of an
            earlier window, samples that a layer or the loss couples, a loss of several terms, gradients
            that are sparse or come in parts, numbers of samples that cannot be, passes that draw random
            numbers where a training set is asked for.
    """
    parts = window if isinstance(window, Sequence) else list(window)
    loss_fn = as_loss_fn(loss_fn, reduction)
    modules = nn.ModuleList([m for m in (model, criterion_of(loss_fn)) if m is not None])
    parameters = [p for p in modules.parameters() if p.requires_grad]
    layout = _require_comparable(parts, parameters, samples)
    sizes = layout.sizes if samples is None else list(samples)
    if training_samples is not None and training_samples < sum(sizes):
        raise BadInputError(
            f"noise_scale: training_samples={training_samples}: the window alone holds {sum(sizes)}, "
            "drawn without replacement"
        )
    draws = require_independent(model, loss_fn, parts[0], layout, parameters, coarsest_type(parameters))
    if draws and training_samples is not None:
        raise BadInputError(f"noise_scale: {OF_DRAWS}: leave training_samples out")
    seen = MicroGradients(parameters, optimizer)
    loss_scale = 1.0 if scaler is None else float(scaler.get_scale())

    def after(state: AccumulatorState) -> None:
        seen.end_micro_batch(state, sizes[state.passes_done - 1])

    def backward(share: Tensor) -> None:
        torch.autograd.backward(share if scaler is None else scaler.scale(share))

    with seen.watching():
        loss = accumulate(
            model,
            loss_fn,
            parts,
            reduction_named(reduction, sum_divisor),
            strategy_named("in_place", buffer_dtype),
            backward=backward,
            after=after,
        )
    if seen.unfit is not None:
        raise BadInputError(f"noise_scale: {seen.unfit}")
    plain, in_adam = noise_of(seen.rows, loss_scale, training_samples)
    if plain is None:
        raise BadInputError("noise_scale: in fewer than 2 micro-batches of the window anything counts")
    every = [*(other.window for other in earlier), plain]
    of_adam = [other.adam_window for other in earlier if other.adam_window] + [in_adam] * bool(in_adam)
    return NoiseScale(
        loss=loss,
        window=plain,
        adam_window=in_adam,
        scale=quotient_of_means(every),
        adam_scale=quotient_of_means([n for n in of_adam if n is not None]) if of_adam else None,
        windows=len(every),
    )


def scale_said(scale: Quotient, windows: int, *, in_adam_metric: bool = False) -> str:
    """Return a noise scale in words, measured in so many windows."""
    value, low, high = scale
    metric = ", in Adam's metric" if in_adam_metric else ""
    if not math.isfinite(high):
        some = "a window" if windows == 1 else f"{windows} windows"
        return f"noise scale{metric}: not resolved by {some} (above {low:.3g} samples)"
    return f"noise scale{metric}: {value:.3g} samples ({low:.3g} to {high:.3g}, {windows} windows)"


def noise_of(
    rows: Sequence[Seen], loss_scale: float = 1.0, training_samples: int | None = None
) -> tuple[Noise | None, Noise | None]:
    """Return a window's noise, and the same in Adam's metric; None: it cannot be told.

    The host reads the numbers here, which waits for the device.

    Args:
        rows: what was seen of its micro-batches, in order.
        loss_scale: what a GradScaler has multiplied the loss by.
        training_samples: D, as `noise_scale` has it.
    """
    if not rows:
        return None, None
    dots = torch.stack([row.dots for row in rows]).tolist()
    shares = [
        Share(
            row.samples, float(row.denominator), loss_scale / by if (by := float(row.divisor)) else 0.0
        )
        for row in rows
    ]
    found = []
    for column in range(0, len(dots[0]), 2):
        noise = window_noise(shares, [(of[column], of[column + 1]) for of in dots], training_samples)
        found.append(noise if noise is not None and all(map(math.isfinite, noise)) else None)
    return found[0], found[1] if len(found) > 1 else None


class Share(NamedTuple):
    """What a micro-batch has in its window's gradient."""

    samples: float
    """bᵢ, its independent units."""
    denominator: float
    """nᵢ."""
    factor: float
    """vᵢ, what its loss sum was multiplied by; 0: nothing in it counts, or it had no pass."""


def window_noise(
    shares: Sequence[Share],
    dots: Sequence[tuple[float, float]],
    training_samples: int | None = None,
) -> Noise | None:
    """Return what a window tells of its noise; None where less than two micro-batches count.

    Args:
        shares: of its micro-batches, in the order of their passes.
        dots: of each gradient s = vᵢ∇Sᵢ the squares (s·s, s·A), A the sum of those before it.
        training_samples: D: the gradient is that over a training set of so many samples, from which the
            window's are drawn without replacement. Then ‖A‖² has less noise in it, tr(τ)(Σvᵢ²bᵢ −
            (Σvᵢbᵢ)²/D): of equal factors 1 − B/D as much (Cochran, Sampling Techniques, theorem 2.2).
    """
    b_sum = n_sum = vn = vb = vvb = 0.0
    norm = of_gaps = expected = 0.0
    for (b, n, v), (squared, along) in zip(shares, dots, strict=True):
        if vn > 0:
            c, spread = n / vn, vvb / vn**2
            # ‖∇S − cA‖², of which ∇S = s/v; where nothing counts both are zero.
            gap = squared / v**2 - 2 * c * along / v + c**2 * norm if v else c**2 * norm
            weight = 1 / (b + b**2 / b_sum)
            of_gaps += weight * gap
            expected += weight * (b + n**2 * spread)
        norm += squared + 2 * along
        b_sum, n_sum, vn, vb, vvb = b_sum + b, n_sum + n, vn + v * n, vb + v * b, vvb + v**2 * b
    if not expected or not n_sum:
        return None
    tau = of_gaps / expected
    left = vvb if training_samples is None else max(0.0, vvb - vb**2 / training_samples)
    return Noise(tau * (b_sum / n_sum) ** 2, (norm - tau * left) / vn**2)


def quotient_of_means(windows: Sequence[Noise], level: float = 0.95) -> Quotient:
    """Return mean trace over mean squared norm, with Fieller's interval.

    It holds every quotient θ for which the mean of trace − θ·squared norm is not significantly other
    than 0, by Student's t; ends below 0 are cut off. It is unbounded above where the squared norm itself
    is not significantly positive, which is an answer: so large a scale needs more windows, or larger
    ones. (Fieller 1954. Jackknife and delta method cover 81 and 86 % in place of 95 % at a scale of
    1,000, 64 windows of 64 samples.)
    """
    m = len(windows)
    xs, ys = zip(*windows, strict=True)
    x, y = sum(xs) / m, sum(ys) / m
    value = x / y if y > 0 else math.nan
    if m < 2:
        return Quotient(value, 0.0, math.inf)
    dx, dy = [value - x for value in xs], [value - y for value in ys]
    t2 = student_t(level, m - 1) ** 2 / (m - 1) / m  # of variances of the means
    a = y * y - t2 * sum(map(mul, dy, dy))
    b = x * y - t2 * sum(map(mul, dx, dy))
    c = x * x - t2 * sum(map(mul, dx, dx))
    # The interval is where aθ² − 2bθ + c ≤ 0.
    inside = b * b - a * c
    if a == 0 or inside < 0:
        return Quotient(value, 0.0, math.inf)
    low, high = sorted(((b - math.sqrt(inside)) / a, (b + math.sqrt(inside)) / a))
    if a > 0:
        return Quotient(value, max(low, 0.0), high) if y > 0 else Quotient(value, 0.0, math.inf)
    # Outside of the two roots: of the positive θ those above the larger one, if 0 is not among them.
    return Quotient(value, high if c > 0 and high > 0 else 0.0, math.inf)


@cache
def student_t(level: float, freedom: int) -> float:
    """Return the t that Student's distribution exceeds in size with probability 1 − level.

    By bisection of its closed form for integer degrees of freedom (Abramowitz & Stegun 26.7.3 and 4).
    """

    def within(angle: float) -> float:
        cos2, odd = math.cos(angle) ** 2, freedom % 2
        term = total = math.cos(angle) if odd else 1.0
        for k in range(2 + odd, freedom - 1, 2):
            term *= cos2 * (k - 1) / k
            total += term
        inner = math.sin(angle) * total if freedom > 1 else 0.0
        return 2 / math.pi * (angle + inner) if odd else inner

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(high)


def _require_comparable(
    window: Sequence[Any], parameters: Sequence[nn.Parameter], samples: Sequence[int] | None
) -> SampleLayout:
    """Return where a window's samples are; raise an error where no micro gradients could be compared."""
    if not parameters:
        raise BadInputError("noise_scale: the model has no parameter that requires a gradient")
    ranks = torch.distributed
    if ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1:
        raise BadInputError(
            f"noise_scale: of {ranks.get_world_size()} ranks it is not measured: use it in one process"
        )
    if samples is not None and len(samples) != len(window):
        raise BadInputError(f"noise_scale: samples names {len(samples)} of {len(window)} micro-batches")
    if not window:
        raise ValueError("the window holds no micro-batch")
    if samples is not None and min(samples) < 1:
        raise BadInputError(f"noise_scale: samples={list(samples)}: a micro-batch holds 1 at least")
    layout = samples_in(window, sizes=samples)
    if samples is not None and any(n > rows for n, rows in zip(samples, layout.sizes, strict=True)):
        raise BadInputError(
            f"noise_scale: samples={list(samples)}: the micro-batches' tensors hold {layout.sizes}"
        )
    if len(window) < 2:
        raise BadInputError(
            "noise_scale: a window of one micro-batch has no micro gradients to compare: split its "
            f"{layout.sizes[0]} samples into 2 at least, 8 tell more"
        )
    if any(p.grad is not None for p in parameters):
        raise BadInputError(
            "noise_scale: `.grad` holds gradients already, which would count as this window's: call "
            "optimizer.zero_grad() first"
        )
    return layout
