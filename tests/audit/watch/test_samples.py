"""What one sample is in a watched loop: found from what agrees, never guessed from the first tensor."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from gaccum_exp.audit.result import Audit
from tests.audit.support import large_batch, relative, taken
from tests.boxes import Detector, Record, Scenes

SOUND = ("equivalent", "identical")
D = torch.float64
T, FEATURES, CLASSES = 4, 5, 3


def judged(
    model: nn.Module,
    criterion: Any,
    losses: list[Callable[[], Tensor]],
    large: Callable[[Any], Tensor] | None = None,
    **how: Any,
) -> tuple[Audit, float]:
    """Return the audit of one window, of these micro-batches' losses, and how far its gradient is off.

    Off the large batch's, that is: of the loss `large(model)` of the whole window, in float64.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, found = large_batch(model, large) if large else None, taken(model, optimizer)
    with watch(model, criterion, optimizer, **how) as audit:
        for loss in losses:
            loss().backward()
        optimizer.step()
    return audit.worst, relative(found[0], expected) if expected else float("nan")


class Recurrent(nn.Module):
    """(T, B, F) -> (T, B, classes)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = {
            "lstm": lambda: nn.LSTM(FEATURES, 6),
            "gru": lambda: nn.GRU(FEATURES, 6),
            "attention": lambda: nn.TransformerEncoderLayer(FEATURES, 5, 6, dropout=0.0),
        }[kind]()
        self.out = nn.Linear(FEATURES if kind == "attention" else 6, CLASSES)
        self.positions = nn.Parameter(torch.randn(9, 1, FEATURES))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x + self.positions[: len(x)])
        return self.out(found if isinstance(found, Tensor) else found[0])


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize(
    ("kind", "sizes"), [("lstm", (2, 2, 2)), ("gru", (2, 1)), ("attention", (2, 2))]
)
def test_sequences_with_time_first_are_judged_along_their_batch(
    sizes: tuple[int, ...], kind: str, sound: bool
) -> None:
    """Without being told: a sound loop is not accused, and an unsound one not missed."""
    ce, model, n = nn.CrossEntropyLoss(), Recurrent(kind), sum(sizes)
    x, y = torch.randn(T, n, FEATURES, dtype=D), torch.randint(CLASSES, (T, n))

    def each(x: Tensor, y: Tensor) -> Tensor:
        weight = len(x[0]) / n if sound else 0.5 * (1 + len(x[0]))
        return ce(model(x).flatten(0, 1), y.flatten()) * weight

    parts = zip(x.split(sizes, 1), y.split(sizes, 1), strict=True)
    found, gap = judged(
        model,
        ce,
        [partial(each, *part) for part in parts],
        lambda m: ce(m(x).flatten(0, 1), y.flatten()),
    )
    assert (gap < 1e-12) == sound
    assert (found.verdict in SOUND) == sound, found.report()
    assert sound or found.verdict == "biased", found.report()


@pytest.mark.parametrize(("sizes", "sound"), [((2, 2), True), ((3, 2, 1), True), ((2, 1), False)])
def test_ctc_is_joined_along_the_dimension_that_its_targets_and_lengths_have(
    sizes: tuple[int, ...], sound: bool
) -> None:
    """(T, B, C) log-probabilities with targets (B, S) and lengths (B,), summed."""
    ctc, model, n = nn.CTCLoss(reduction="sum"), Recurrent("lstm"), sum(sizes)

    x, lengths = torch.randn(T, n, FEATURES, dtype=D), torch.randint(3, T + 1, (n,))
    targets, target_lengths = torch.randint(1, CLASSES, (n, 1)), torch.full((n,), 1)

    def loss(model: Any, x: Tensor, *rest: Tensor) -> Tensor:
        targets, lengths, target_lengths = rest
        total: Tensor = ctc(model(x).log_softmax(-1), targets, lengths, target_lengths)
        return total / n

    def each(i: int, *part: Tensor) -> Tensor:
        return loss(model, *part) * (1 if sound else 1 + i)

    rest = [t.split(sizes) for t in (targets, lengths, target_lengths)]
    parts = zip(range(len(sizes)), x.split(sizes, 1), *rest, strict=True)
    found, gap = judged(
        model,
        ctc,
        [partial(each, *part) for part in parts],
        lambda m: loss(m, x, targets, lengths, target_lengths),
    )
    assert (gap < 1e-12) == sound
    assert (found.verdict in SOUND) == sound, found.report()
    assert sound or (found.verdict, found.cause) != ("biased", "batch statistics")


def test_batch_first_mixing_over_the_batch_is_not_taken_for_time_first() -> None:
    """A layer that mixes the first dimension alone might be read either way: the audit asks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(T), nn.Tanh(), nn.Linear(6, 1)).double()
    mse = nn.MSELoss()

    def each() -> Tensor:
        return mse(model(torch.randn(4, T, FEATURES, dtype=D)), torch.randn(4, T, 1, dtype=D)) / 3

    found, _ = judged(model, mse, [each] * 3)
    assert found.verdict not in SOUND, found.report()
    model.zero_grad()
    told, _ = judged(model, mse, [each] * 3, batch_dim=0)
    assert (told.verdict, told.culprit_type) == ("biased", "BatchNorm1d"), told.report()


@pytest.mark.parametrize(
    ("counts", "sound"), [((1, 2, 3), True), ((1, 2, 2, 1), False), ((2, 2), False), ((5, 1), True)]
)
def test_lists_of_images_and_of_target_dictionaries_are_a_micro_batch(
    counts: tuple[int, ...], sound: bool
) -> None:
    """As torchvision's detectors take them; the model computes its loss itself."""

    class Own(Detector):
        def forward(self, images: list[Tensor], targets: list[Record]) -> Any:
            found = super().forward(images)
            boxes = [t["boxes"] for t in targets]
            total = sum((found[k] - each).abs().sum() for k, each in enumerate(boxes))
            return {"loss": total / sum(map(len, boxes))}

    torch.manual_seed(0)
    model, scenes = Own(), Scenes(12, counts=counts)
    parts = [[scenes[i] for i in range(start, start + 3)] for start in (0, 3, 7)]
    of = [sum(len(r["boxes"]) for r in part) for part in parts]

    def loss(model: Any, part: list[Record]) -> Tensor:
        targets = [{"boxes": r["boxes"]} for r in part]
        found: Tensor = model([r["image"] for r in part], targets)["loss"]
        return found

    weights = [n / sum(of) if sound else 1 / 3 for n in of]
    found, gap = judged(
        model,
        None,
        [lambda p=p, w=w: loss(model, p) * w for p, w in zip(parts, weights, strict=True)],  # type: ignore[misc]
        lambda m: loss(m, [r for part in parts for r in part]),
    )
    equal = gap < 1e-12
    assert equal == (sound or len(set(of)) == 1)
    assert found.verdict in (SOUND if equal else ("biased",)), found.report()
    assert equal or found.cause == "unequal denominators"


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["i", "epoch_fraction", "stage"])
def test_an_argument_that_counts_up_is_tried_out(name: str, used: bool) -> None:
    """Under any name: harmless where the gradient does not depend on it, else its name is said."""
    torch.manual_seed(0)
    model, values = nn.Linear(FEATURES, 3).double(), {"i": [0, 1, 2], "epoch_fraction": [0.1, 0.2, 0.3]}

    def compute_loss(out: Tensor, y: Tensor, **extra: Any) -> Tensor:
        value = extra[name]
        by = 1.0 + (len(value) if isinstance(value, str) else value) if used else 1.0
        return F.cross_entropy(out, y) * by

    def each(i: int) -> Tensor:
        extra = {name: values.get(name, ["a", "bb", "cccc"])[i]}
        y = torch.randint(3, (4,))
        return compute_loss(model(torch.randn(4, FEATURES, dtype=D)), y, **extra) / 3

    found, _ = judged(model, compute_loss, [partial(each, i) for i in range(3)])
    assert found.verdict in (("inconclusive",) if used else SOUND), found.report()
    assert not used or name in str(found.detail)


def test_no_message_holds_the_values_of_a_tensor() -> None:
    """A tensor without samples that differs: shapes and names alone are said, and what to give."""
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, 3).double()

    def compute_loss(out: Tensor, y: Tensor, prior: Tensor) -> Tensor:
        return F.cross_entropy(out * prior.sum(), y)

    def each(prior: Tensor) -> Tensor:
        out = model(torch.randn(4, FEATURES, dtype=D))
        return compute_loss(out, torch.randint(3, (4,)), prior) / 2

    for shape in ((), (2, 3)):
        model.zero_grad()
        priors = [torch.full(shape, 0.8125 + i, dtype=D) for i in range(2)]
        found, _ = judged(model, compute_loss, [partial(each, p) for p in priors])
        if shape:
            assert found.verdict == "inconclusive", found.report()
            assert "(2, 3), (2, 3)" in str(found.detail)
        assert "0.81" not in str(found)
        assert "1.81" not in str(found)
