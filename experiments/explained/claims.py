"""What *Accumulation explained* states, measured with the very loops that stand on the page.

Every function takes the namespace that the page's code leaves, and returns numbers by name. Relative
errors are ‖g − g₁‖ / ‖g₁‖ in float64; g₁ is the gradient of the large batch, in one pass.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from gaccum_exp import accumulate_gradients, noise_scale, watch
from gaccum_exp.core.reductions import Reduction, reduction_named
from gaccum_exp.memory.storages import GRADIENTS, OPTIMIZER_STATE, PARAMETERS, StorageTracker

Page = Mapping[str, Any]
"""What the page's code defines: its loops, `new_model`, `batches`, `gradient_of`, …"""
Numbers = dict[str, Any]
Batch = tuple[Tensor, Tensor]
SHORT = (8, 8, 8, 2)
EQUAL, UNEQUAL = (8, 8, 8, 8), (10, 10, 10, 2)
WINDOW = sum(EQUAL)
STEPS = 40
"""Optimizer steps to an epoch of the first 1,280 digits, in windows of 32."""
EPOCHS = 4
"""Of the trainings that are longer."""
WORTH_SAMPLES = 10_240
"""Eight epochs."""
LEAST_STEPS = WORTH_SAMPLES // 256
"""Optimizer steps of the largest batch that is compared."""


def measure(page: Page) -> Numbers:
    """Measure everything that the page states."""
    return {
        "clearing": clearing(page),
        "splits": splits(page),
        "training": training(page),
        "sum": summed(page),
        "edges": edges(page),
        "others": others(page),
        "memory": memory(page),
        "worth": worth(page),
    }


def flat(tensors: Any) -> Tensor:
    """Return all elements in one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(model: nn.Module) -> Tensor:
    """Return the gradient as a vector, and clear it."""
    found = flat(p.grad for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def windows(page: Page, count: int, sizes: Sequence[int]) -> list[list[Batch]]:
    """Return so many windows of the data, each in micro-batches of these sizes."""
    flat_list = page["batches"](*sizes * count)
    return [flat_list[k * len(sizes) : (k + 1) * len(sizes)] for k in range(count)]


# Why gradients are cleared by hand


def clearing(page: Page) -> Numbers:
    """Measure what clearing by hand makes possible, and what it costs to forget it or to be late."""
    return {**_two_losses(page), **_forgotten(page), **_moved(), "late_clearing": _late_clearing(page)}


def _two_losses(page: Page) -> Numbers:
    model, (x, y) = page["new_model"](), page["batches"](256)[0]

    def first() -> Tensor:
        return F.cross_entropy(model(x), y)

    def second() -> Tensor:
        return model(x + 0.1).square().mean()

    def together() -> None:
        (first() + second()).backward()

    def in_turn() -> None:
        first().backward()
        second().backward()

    peaks, gradients = {}, {}
    for way in (together, in_turn):
        peaks[way] = peak(model, None, way)
        gradients[way] = gradient(model)
    return {
        "two_losses_error": distance(gradients[in_turn], gradients[together]),
        "two_losses_peak": peaks[in_turn] / peaks[together],
    }


def _forgotten(page: Page) -> Numbers:
    losses = {}
    for name in ("cleared", "forgotten"):
        model = page["new_model"]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if name == "forgotten":
            optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]  # never cleared
        for _ in range(EPOCHS):
            page["plain_loop"](
                model, nn.CrossEntropyLoss(), optimizer, page["batches"](*[WINDOW] * STEPS)
            )
        losses[f"{name}_loss"] = loss_of(model, page)
    return losses


def _moved() -> Numbers:
    """Return how far a second step moves a layer that took part in the first alone, over the first."""
    moved = {}
    for name, to_none in (("none", True), ("zeros", False)):
        weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        weight.sum().backward()
        places = [weight.detach().clone()]
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            places.append(weight.detach().clone())
        first, second = (float((b - a).norm()) for a, b in pairwise(places))
        moved[f"moved_{name}"] = second / first
    return moved


def _late_clearing(page: Page) -> float:
    """The peak of the plain loop, over that of one which clears right after the step."""
    model, batch = wide_model(), page["batches"](64)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def early() -> None:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def late() -> None:
        page["plain_loop"](model, nn.CrossEntropyLoss(), optimizer, [batch])

    found = {}
    for way in (early, late):
        way()  # the second time it finds what the first has left
        found[way] = peak(model, optimizer, way)
    return found[late] / found[early]


# The reductions


def splits(page: Page) -> Numbers:
    """Return how far each loop is off on each split of the page, and what samples weigh, in 1/n."""
    found = {}
    for sizes in page["SPLITS"]:
        parts, whole = page["batches"](*sizes), page["batches"](sum(sizes))
        of, error = page["gradient_of"], page["error"]
        large = of(page["plain_loop"], "mean", whole)
        by_mean = of(page["mean_loop"], "mean", parts, len(sizes))
        summed = of(page["sum_loop"], "sum", parts, len(sizes))
        found[", ".join(map(str, sizes))] = {
            "mean": error(by_mean, large),
            "formula": error(large + page["bias"](sizes), large),
            "formula_error": error(by_mean, large + page["bias"](sizes)),
            "sum": error(summed, of(page["plain_loop"], "sum", whole)),
            "sum_scale": float(summed.norm() / large.norm()),
            "window": error(of(page["window_loop"], "sum", parts, len(sizes)), large),
            "weights": [sum(sizes) * w for w in sample_weights(sizes, reduction_named("mean"))],
        }
    return found


def sample_weights(sizes: Sequence[int], reduction: Reduction) -> list[float]:
    """Return what a sample of each micro-batch weighs: 1 over what its loss sum is divided by."""
    return [1.0 / float(reduction.divisor(size, sum(sizes), len(sizes))) for size in sizes]


def training(page: Page) -> Numbers:
    """Train on the same windows in five ways; how far each is from the large batch, step by step."""
    ways: dict[str, tuple[str, str, Sequence[int], float]] = {
        "large": ("plain_loop", "mean", (WINDOW,), 1.0),
        "mean, equal": ("mean_loop", "mean", EQUAL, 1.0),
        "mean, unequal": ("mean_loop", "mean", UNEQUAL, 1.0),
        "sum, rate / n": ("sum_loop", "sum", UNEQUAL, 1.0 / WINDOW),
        "sum / n": ("window_loop", "sum", UNEQUAL, 1.0),
    }
    curves: dict[str, list[float]] = {}
    ends, accuracies = {}, {}
    for name, (loop, reduction, sizes, factor) in ways.items():
        model = page["new_model"]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * factor, momentum=0.9)
        criterion, curves[name] = nn.CrossEntropyLoss(reduction=reduction), []
        arguments = () if loop == "plain_loop" else (len(sizes),)
        for window in windows(page, STEPS, sizes) * EPOCHS:
            page[loop](model, criterion, optimizer, window, *arguments)
            curves[name].append(loss_of(model, page))
        ends[name] = flat(model.parameters())
        accuracies[name] = held_out(model, page)[1]
    return {
        "steps": EPOCHS * STEPS,
        "ways": {
            name: {
                "sizes": list(sizes),
                "gap": [abs(a - b) for a, b in zip(curves[name], curves["large"], strict=True)],
                "weights": distance(ends[name], ends["large"]),
                "accuracy": accuracies[name],
            }
            for name, (_, _, sizes, _) in ways.items()
        },
    }


def loss_of(model: nn.Module, page: Page, begin: int = 0, end: int = WINDOW * STEPS) -> float:
    """Return the mean loss over the samples of an epoch, or from one sample to another."""
    with torch.no_grad():
        return float(F.cross_entropy(model(page["images"][begin:end]), page["targets"][begin:end]))


def held_out(model: nn.Module, page: Page) -> tuple[float, float]:
    """Return loss and accuracy on the samples that no training here is fed."""
    x, y = (page[name][WINDOW * STEPS :] for name in ("images", "targets"))
    with torch.no_grad():
        out = model(x)
        return float(F.cross_entropy(out, y)), float((out.argmax(1) == y).double().mean())


# Sums


def summed(page: Page) -> Numbers:
    """Sum against mean, over optimizers: the first step's length, and the weights after an epoch."""
    sgd, adam, adamw = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
    n = WINDOW
    ways: dict[str, tuple[Any, dict[str, float], float, float | None]] = {
        "SGD, same rate": (sgd, {"lr": 0.1}, 1, None),
        "SGD, rate / n": (sgd, {"lr": 0.1}, 1 / n, None),
        "SGD, momentum 0.9, rate / n": (sgd, {"lr": 0.1, "momentum": 0.9}, 1 / n, None),
        "SGD, weight decay 0.01, rate / n": (sgd, {"lr": 0.1, "weight_decay": 0.01}, 1 / n, None),
        "SGD, clipped at 1, rate / n": (sgd, {"lr": 0.1}, 1 / n, 1.0),
        "Adam, same rate": (adam, {"lr": 0.01}, 1, None),
        "AdamW, same rate": (adamw, {"lr": 0.01}, 1, None),
        "Adam, weight decay 0.01, same rate": (adam, {"lr": 0.01, "weight_decay": 0.01}, 1, None),
        "Adam, rate / n": (adam, {"lr": 0.01}, 1 / n, None),
    }
    return {name: _sum_against_mean(page, *way) for name, way in ways.items()}


def _sum_against_mean(
    page: Page, kind: Any, options: dict[str, float], factor: float, clip: float | None
) -> Numbers:
    firsts, ends, losses = [], [], []
    for loop, reduction, by in (("mean_loop", "mean", 1.0), ("sum_loop", "sum", factor)):
        model = page["new_model"]()
        optimizer = kind(model.parameters(), **{**options, "lr": options["lr"] * by})
        if clip is not None:
            optimizer.register_step_pre_hook(_clipping_at(clip, model))
        criterion, loader = nn.CrossEntropyLoss(reduction=reduction), page["batches"](*EQUAL * STEPS)
        start = flat(model.parameters())
        page[loop](model, criterion, optimizer, loader[:4], 4)
        firsts.append(float((flat(model.parameters()) - start).norm()))
        page[loop](model, criterion, optimizer, loader[4:], 4)
        ends.append(flat(model.parameters()))
        losses.append(loss_of(model, page))
    return {
        "first_step": firsts[1] / firsts[0],
        "weights": distance(ends[1], ends[0]),
        "loss": losses[1],
        "mean_loss": losses[0],
    }


def _clipping_at(bound: float, model: nn.Module) -> Callable[..., None]:
    def clip(*_: Any) -> None:
        clip_grad_norm_(model.parameters(), bound)

    return clip


# Edges


def edges(page: Page) -> Numbers:
    """Measure the second epoch's first gradient, and two micro-batches that are divided by four."""
    model, seen = page["new_model"](), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append(flat(p.grad for p in model.parameters())))
    loader, criterion = page["batches"](*[8] * 10), nn.CrossEntropyLoss()
    page["mean_loop"](model, criterion, optimizer, loader, 4)
    left = flat(p.grad for p in model.parameters())
    page["mean_loop"](model, criterion, optimizer, loader[:4], 4)
    rest = page["gradient_of"](page["plain_loop"], "mean", page["batches"](16))
    by_four = sum(
        page["gradient_of"](page["plain_loop"], "mean", [b]) / 4 for b in page["batches"](8, 8)
    )
    return {
        "left_error": distance(seen[-1], seen[-1] - left),
        "rest_scale": float(by_four @ rest / (rest @ rest)),
        "rest_error": distance(by_four, rest),
    }


# What else breaks the equality


def others(page: Page) -> Numbers:
    """One window of 32 in four micro-batches of 8, where samples are not independent and equal."""
    found = {
        "batch_norm": _normalized(page),
        "dropout": _dropout(page),
        "tokens": _tokens(page),
        "class_weights": _class_weights(page),
        "clipping": _clipping(page),
        "contrastive": _contrastive(page),
    }
    return found | {"precision": _precision(page)}


def _model_with(page: Page, layer: nn.Module) -> nn.Sequential:
    first, *rest = page["new_model"]()
    return nn.Sequential(first, layer.double(), *rest)


def _judged(
    page: Page,
    model: nn.Module,
    criterion: Any,
    window: Sequence[Batch],
    right: Callable[[], Any] | None = None,
) -> Numbers:
    """Compare mean_loop's gradient, and the right way's, with one pass over the window's."""
    whole = tuple(torch.cat(parts) for parts in zip(*window, strict=True))
    criterion(model(whole[0]), whole[1]).backward()
    large = gradient(model)
    found = {"off": distance(_of_mean_loop(page, model, criterion, window), large)}
    (right or (lambda: accumulate_gradients(model, criterion, window)))()
    found["right"] = distance(gradient(model), large)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, criterion, optimizer) as audit:
        page["mean_loop"](model, criterion, optimizer, window, len(window))
    return found | {"cause": audit.cause}


def _of_mean_loop(page: Page, model: nn.Module, criterion: Any, window: Sequence[Batch]) -> Tensor:
    """Return the gradient of the loop's step, which is not taken: its rate is 0."""
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(flat(p.grad for p in model.parameters())))
    page["mean_loop"](model, criterion, optimizer, window, len(window))
    return seen[-1]


def _normalized(page: Page) -> Numbers:
    """Compare BatchNorm with GroupNorm; how far running averages move in a window, over one pass."""
    window, criterion = page["batches"](*EQUAL), nn.CrossEntropyLoss()
    model = _model_with(page, nn.BatchNorm1d(32))
    found = _judged(page, model, criterion, window)
    grouped = _model_with(page, nn.GroupNorm(4, 32))
    found["right"] = _judged(page, grouped, criterion, window)["off"]
    moved = []
    for batches in (window, page["batches"](WINDOW)):
        model[1].reset_running_stats()
        _of_mean_loop(page, model, criterion, batches)
        moved.append(float(model[1].running_mean.norm()))
    return found | {"moved": moved[0] / moved[1]}


class _Masked(nn.Module):
    """Dropout with a mask that goes with the sample: the input's last columns are the mask."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.model
        hidden = first(x[:, :64]) * x[:, 64:]
        for layer in rest:
            hidden = layer(hidden)
        return hidden


def _dropout(page: Page) -> Numbers:
    window, criterion = page["batches"](*EQUAL), nn.CrossEntropyLoss()
    torch.manual_seed(0)
    found = _judged(page, _model_with(page, nn.Dropout(0.5)), criterion, window)
    masks = 2.0 * (torch.rand(WINDOW, 32, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    masked = [
        (torch.cat([x, mask], 1), y) for (x, y), mask in zip(window, masks.split(EQUAL), strict=True)
    ]
    return found | {"right": _judged(page, _Masked(page["new_model"]()), criterion, masked)["off"]}


def _tokens(page: Page) -> Numbers:
    """Labels of -100 are ignored: 8, 6, 4 and 1 of the 8 count, as with padding."""
    window = [
        (x, torch.where(torch.arange(len(y)) < counted, y, -100))
        for (x, y), counted in zip(page["batches"](*EQUAL), (8, 6, 4, 1), strict=True)
    ]
    return _judged(page, page["new_model"](), nn.CrossEntropyLoss(), window)


def _class_weights(page: Page) -> Numbers:
    weight = torch.ones(10, dtype=torch.float64)
    weight[:3] = 10.0
    return _judged(
        page, page["new_model"](), nn.CrossEntropyLoss(weight=weight), page["batches"](*EQUAL)
    )


def _clipping(page: Page) -> Numbers:
    """Clip at 0.1 after each micro-batch, or once per window; against the large batch's, clipped."""
    window, bound = page["batches"](*EQUAL), 0.1
    model, criterion = page["new_model"](), nn.CrossEntropyLoss()

    def clipped(found: Tensor) -> Tensor:
        return found * min(1.0, bound / float(found.norm()))

    def clipped_each() -> None:
        for x, y in window:
            (criterion(model(x), y) / len(window)).backward()
            clip_grad_norm_(model.parameters(), bound)

    large = clipped(_of_mean_loop(page, model, criterion, page["batches"](WINDOW)))
    clipped_each()
    off = distance(gradient(model), large)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, criterion, optimizer) as audit:
        clipped_each()
        optimizer.step()
    model.zero_grad()
    right = distance(clipped(_of_mean_loop(page, model, criterion, window)), large)
    return {"off": off, "right": right, "cause": audit.cause}


def pairs_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Return a contrastive loss: who of the others in the batch shows the same digit?

    Args:
        outputs: (B, 10).
        target: (B,).
    """
    unit = F.normalize(outputs, dim=1)
    alike = unit @ unit.T / 0.5 - 1e9 * torch.eye(len(unit), dtype=unit.dtype)
    same = (target[:, None] == target) & ~torch.eye(len(unit), dtype=torch.bool)
    return -(alike.log_softmax(1) * same).sum(1).div(same.sum(1).clamp(min=1)).mean()


def _contrastive(page: Page) -> Numbers:
    model, window = page["new_model"](), page["batches"](*EQUAL)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return len(batch[1]) * pairs_loss(model(batch[0]), batch[1]), len(batch[1])

    def right() -> None:
        accumulate_gradients(model, loss_fn, window, strategy="cached")

    return _judged(page, model, pairs_loss, window, right)


def _precision(page: Page) -> Numbers:
    """Measure eight float32 passes against one, and sums of 64 micro gradients in two types."""
    model, (x, y) = page["new_model"](), page["batches"](64)[0]
    F.cross_entropy(model(x), y).backward()
    exact = gradient(model)
    model.float()
    F.cross_entropy(model(x.float()), y).backward()
    one_pass = gradient(model)
    eight = [(a.float(), b) for a, b in page["batches"](*[8] * 8)]
    accumulated = _of_mean_loop(page, model, nn.CrossEntropyLoss(), eight)
    found = {"float32": distance(accumulated.double(), one_pass.double())}
    model.zero_grad()
    model.double()
    micro = []
    for a, b in page["batches"](*[1] * 64):
        (F.cross_entropy(model(a), b) / 64).backward()
        micro.append(gradient(model).bfloat16())
    for name, dtype in (("bfloat16_buffer", torch.bfloat16), ("float32_buffer", torch.float32)):
        total = torch.zeros_like(exact, dtype=dtype)
        for part in micro:
            total += part
        found[name] = distance(total.bfloat16().double(), exact)
    return found


# What it saves, and whether it pays


def wide_model() -> nn.Sequential:
    """Return a network whose parameters and activations both matter."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    ).double()


def peak(model: nn.Module, optimizer: torch.optim.Optimizer | None, step: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that a step holds at once, parameters and state included."""
    tracker = StorageTracker(torch.device("cpu"))
    tracker.assign(model.parameters(), PARAMETERS)
    tracker.assign((p.grad for p in model.parameters() if p.grad is not None), GRADIENTS)
    if optimizer is not None:
        state = (
            t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)
        )
        tracker.assign(state, OPTIMIZER_STATE)
    with tracker:
        tracker.reset_peak()
        step()
    return tracker.peak


def memory(page: Page) -> Numbers:
    """Return the peak of a window of 1,024 in window_loop, by N, in bytes."""
    found = {}
    for accum_steps in (1, 2, 4, 8, 16, 32, 64):
        model = wide_model()
        optimizer = torch.optim.AdamW(model.parameters())
        window = page["batches"](*[1024 // accum_steps] * accum_steps)

        def step(window: Any = window, model: Any = model, optimizer: Any = optimizer) -> None:
            page["window_loop"](
                model, nn.CrossEntropyLoss(reduction="sum"), optimizer, window, len(window)
            )

        step()  # the optimizer's state is made in the first
        found[str(accum_steps)] = peak(model, optimizer, step)
    return found


def worth(page: Page) -> Numbers:
    """Train batches of 32 to 256 at several rates on as many samples; held-out losses of three seeds."""
    rates = (0.2, 0.4, 0.8, 1.6)
    table, last = {}, page["new_model"]()
    for batch in (32, 64, 128, 256):
        runs = {rate: [_trained(page, batch, rate, seed) for seed in range(3)] for rate in rates}
        best = min(rates, key=lambda rate: statistics.fmean(end for *_, end in runs[rate]))
        last = runs[best][0][0]
        table[str(batch)] = {
            "accum_steps": batch // 32,
            "steps": WORTH_SAMPLES // batch,
            "rate": best,
            "equal_samples": _mean_and_std(end for *_, end in runs[best]),
            "equal_steps": _mean_and_std(early for _, early, _ in runs[best]),
        }
    return {"samples": WORTH_SAMPLES, "table": table} | _noise(page, last)


def _noise(page: Page, model: nn.Module) -> Numbers:
    """Return the noise scale of 32 windows of 256 at the weights of a model, with its interval."""
    generator, measured = torch.Generator().manual_seed(0), []
    for _ in range(32):
        drawn = torch.randperm(WINDOW * STEPS, generator=generator)[:256]
        window = list(
            zip(page["images"][drawn].split(32), page["targets"][drawn].split(32), strict=True)
        )
        measured.append(noise_scale(model, nn.CrossEntropyLoss(), window, earlier=measured))
        model.zero_grad()
    scale = measured[-1].scale
    return {"noise_scale": scale.value, "noise_low": scale.low, "noise_high": scale.high}


def _trained(page: Page, batch: int, rate: float, seed: int) -> tuple[nn.Module, float, float]:
    """Train in micro-batches of 32; return the held-out loss after the fewest steps, and at the end."""
    model = page["new_model"]()
    torch.manual_seed(1000 + seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    epochs = WORTH_SAMPLES // (WINDOW * STEPS)
    drawn = torch.cat([torch.randperm(WINDOW * STEPS, generator=generator) for _ in range(epochs)])
    loader = list(zip(page["images"][drawn].split(32), page["targets"][drawn].split(32), strict=True))
    criterion, first = nn.CrossEntropyLoss(reduction="sum"), LEAST_STEPS * batch // 32
    page["window_loop"](model, criterion, optimizer, loader[:first], batch // 32)
    early = held_out(model, page)[0]
    page["window_loop"](model, criterion, optimizer, loader[first:], batch // 32)
    return model, early, held_out(model, page)[0]


def _mean_and_std(values: Any) -> list[float]:
    values = list(values)
    return [statistics.fmean(values), statistics.stdev(values)]
