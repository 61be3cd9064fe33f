"""What `same_numbers.py` runs beside the built-in parts: models, data, losses; the public functions.

`python -m experiments.same_numbers_parts` prints what the public functions return, as one line of JSON.
Numbers are written so that every bit of them is kept.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from gaccum_exp import accumulate_gradients, plan_memory, watch

Pairs = Sequence[tuple[Tensor, Tensor]]
Each = Callable[[nn.Module, Tensor, Tensor, Pairs], Tensor]
CE = nn.CrossEntropyLoss()


class Points(Dataset[tuple[Tensor, int]]):
    """Points in the plane with a label of three; every `ignored`-th label does not count."""

    def __init__(self, samples: int = 22, seed: int = 0, ignored: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 2, generator=generator)
        self.y = torch.randint(3, (samples,), generator=generator).tolist()
        if ignored is not None:
            self.y = [-100 if i % ignored == 0 else y for i, y in enumerate(self.y)]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.y[index]


class Net(nn.Module):
    """Classifies them; `middle` is a module between its two layers."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), middle or nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        logits: Tensor = self.layers(x)
        return logits


class Scarce(Net):
    """An accelerator's words for no memory where a micro-batch holds more than eight samples."""

    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        if self.training and len(x) > 8 and type(x) is Tensor and x.device.type == "cpu":
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return super().forward(x)


class Loud(nn.Module):
    """Its first scaled float16 gradients are not finite, so that windows are skipped; its loss is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        logits: Tensor = self.linear(100 * x)
        return logits


class Speaking(nn.Module):
    """A language model that computes its own loss; told the count of its window, if it `takes_count`."""

    def __init__(self, takes_count: bool = True) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)
        self.takes_count = takes_count

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None
    ) -> SimpleNamespace:
        """(batch, length) twice -> loss and logits."""
        logits = self.head(self.table(input_ids))
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        own = num_items_in_batch is None or not self.takes_count
        return SimpleNamespace(
            loss=total / ((labels != -100).sum() if own else num_items_in_batch), logits=logits
        )


class Deciding(Net):
    """Its forward pass depends on values, so that its memory has to be measured."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return super().forward(x if float(x.sum()) > 0 else -x)


def counted_late(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A loss function whose denominator is only known after the forward pass."""
    x, y = micro_batch
    return F.cross_entropy(model(x), y, reduction="sum"), (y != -100).sum()


def net(middle: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Net:
    """Return the same weights every time."""
    torch.manual_seed(0)
    return Net(middle).to(dtype)


def window(*sizes: int, dtype: torch.dtype = torch.float32, ignored: int | None = None) -> Pairs:
    """Return micro-batches of these sizes."""
    points = Points(sum(sizes), seed=1, ignored=ignored)
    pairs = zip(points.x.to(dtype).split(sizes), torch.tensor(points.y).split(sizes), strict=True)
    return list(pairs)


def accumulated() -> Iterator[tuple[str, Any]]:
    """Yield what windows add up to under every reduction, by name."""
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    bf16 = torch.bfloat16
    for reduction in ("global_mean", "mean", "sum"):
        cases: dict[str, tuple[nn.Module, Any, Any, dict[str, Any]]] = {
            "equal": (net(), CE, window(4, 4, 4), {}),
            "unequal": (net(), CE, window(5, 3, 1), {}),
            "ignored": (net(), CE, window(4, 4, 3, ignored=3), {}),
            "counted late": (net(), counted_late, window(4, 4, 3, ignored=3), {}),
            "weighted": (net(), weighted, window(5, 4), {}),
            "batch norm": (net(nn.BatchNorm1d(4)), CE, window(4, 4), {}),
            "scaled": (net(), CE, window(4, 3), {"backward": lambda x: scaler.scale(x).backward()}),
            "float64": (net(dtype=torch.float64), CE, window(5, 3, dtype=torch.float64), {}),
            "bfloat16": (net(dtype=bf16), CE, window(5, 3, 2, dtype=bf16), {}),
            "buffers": (
                net(dtype=bf16), CE, window(5, 3, 2, dtype=bf16), {"buffer_dtype": torch.float32}
            ),
        }  # fmt: skip
        if reduction == "sum":
            cases["divided"] = net(), CE, window(5, 3, 1), {"sum_divisor": 7.0}
        for name, (model, criterion, micro_batches, how) in cases.items():
            for _ in range(2):  # the second one is added to the first one's gradients
                loss = accumulate_gradients(model, criterion, micro_batches, reduction=reduction, **how)
            yield (
                f"{reduction}, {name}",
                {
                    "loss_sum": loss.loss_sum.item(),
                    "denominator": float(loss.denominator),
                    "gradients": {n: flat(p.grad) for n, p in model.named_parameters()},
                    "buffers": {n: flat(b) for n, b in model.named_buffers()},
                },
            )


def flat(tensor: Tensor | None) -> list[float] | None:
    """Return a tensor's values; float64 holds those of every type of ours."""
    return None if tensor is None else tensor.detach().double().flatten().tolist()


def count(parts: Pairs) -> int:
    """Return how many samples a window holds."""
    return sum(len(y) for _, y in parts)


def autocast(model: nn.Module, x: Tensor, y: Tensor, parts: Pairs) -> Tensor:
    """A sound share of the loss, in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return CE(model(x), y) * len(y) / count(parts)


SOUND: Each = lambda m, x, y, w: CE(m(x), y) * len(y) / count(w)  # noqa: E731  # beside its faulty kin
MEANS: Each = lambda m, x, y, w: CE(m(x), y) / len(w)  # noqa: E731  # as above
LOOPS: dict[str, tuple[Each, nn.Module | None, tuple[int, ...]]] = {
    "sound": (SOUND, None, (4, 3, 2)),
    "in bfloat16": (autocast, None, (4, 3, 2)),
    "not divided": (lambda m, x, y, w: CE(m(x), y), None, (4, 4)),
    "divided twice": (lambda m, x, y, w: CE(m(x), y) / len(w) ** 2, None, (4, 4, 4)),
    "mean of means": (MEANS, None, (5, 3, 1)),
    "mean of equal means": (MEANS, None, (4, 4)),
    "batch norm": (SOUND, nn.BatchNorm1d(4), (4, 4)),
    "dropout": (SOUND, nn.Dropout(0.3), (4, 4)),
    "coupled outputs": (lambda m, x, y, w: CE(m(x) - m(x).mean(0), y) / len(w), None, (4, 4)),
    "no criterion": (lambda m, x, y, w: m(x).square().sum().sqrt() / len(w), None, (4, 4)),
}
"""Loops as people write them: share of the loss, module in the middle, micro-batches."""


def watched() -> Iterator[tuple[str, Any]]:
    """Yield what is found in loops of two optimizer steps, with and without gradients zeroed between."""
    for name, (each, middle, sizes) in LOOPS.items():
        for zeroed in (True, False) if name == "sound" else (True,):
            model, parts = net(middle), window(*sizes)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            with watch(model, CE, optimizer) as audit:
                for _ in range(2):
                    for x, y in parts:
                        each(model, x, y, parts).backward()
                    optimizer.step()
                    if zeroed:
                        optimizer.zero_grad()
            yield (
                name if zeroed else f"{name}, never zeroed",
                {
                    "verdict": audit.verdict,
                    "sound": audit.sound,
                    "windows": [asdict(one) for one in audit.windows],
                    "checks": [asdict(check) for check in audit.checks],
                    "weights": {n: flat(p) for n, p in model.named_parameters()},
                },
            )


def planned() -> Iterator[tuple[str, Any]]:
    """Yield plans of models, optimizers and reductions."""
    batch = window(16)[0]
    wide = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    sgd, bf16 = torch.optim.SGD(wide.parameters(), lr=0.1), torch.bfloat16
    for name, plan in {
        "sgd": plan_memory(wide, CE, batch, sgd, batch_size=64, budget_bytes=70_000),
        "adamw, mean": plan_memory(
            wide, CE, batch, torch.optim.AdamW, batch_size=60, reduction="mean", budget_bytes=110_000
        ),
        "buffers": plan_memory(
            net(dtype=bf16), CE, window(16, dtype=bf16)[0], torch.optim.SGD, buffer_dtype=torch.float32
        ),
        "extrapolated": plan_memory(Deciding(), CE, batch, torch.optim.SGD, batch_size=32),
    }.items():
        yield name, {"plan": plan.as_dict(), "printed": str(plan)}


def main() -> None:
    """Print it all."""
    torch.set_num_threads(1)
    found = {"accumulate_gradients": accumulated(), "watch": watched(), "plan_memory": planned()}
    print(json.dumps({name: dict(results) for name, results in found.items()}))


if __name__ == "__main__":
    main()
