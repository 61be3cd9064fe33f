"""The terms of a loss: how a loop writes each, what its micro-batches hold, and its value by hand.

`Kind.by_hand` is written without torch's losses, for a reference must not share what it is to judge.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 3
IGNORED = -100
CLASS_WEIGHTS = (0.2, 1.0, 3.0)


def _label_losses(out: Tensor, target: Tensor) -> Tensor:
    """Return −log p of each label, 0 where it is ignored: (...,) of logits (..., classes)."""
    kept = target != IGNORED
    picked = out.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return -picked * kept


def _cross_entropy(out: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return _label_losses(out, target).sum(), (target != IGNORED).sum()


def _weighted(out: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.tensor(CLASS_WEIGHTS, dtype=out.dtype)[target]
    return (_label_losses(out, target) * weight).sum(), weight.sum()


def _squares(out: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return (out - target).square().sum(), torch.tensor(out.numel())


def _masked(out: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return ((out - target).square() * keep).sum(), keep.sum()


def _focal(out: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    p = 1 / (1 + (-out).exp())
    entropy = -(target * p.log() + (1 - target) * (1 - p).log())
    return ((target - p).square() * entropy).sum(), target.sum().clamp(min=1)


def _centred(out: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    # The centre is zero where a window begins.
    return -((target / 0.5).softmax(-1) * out.log_softmax(-1)).sum(), torch.tensor(len(out))


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of term."""

    call: str
    """The function's name in a loop that calls it; of torch.nn.functional, or the loop's own."""
    criterion: str
    """The torch.nn criterion that computes it, or the empty string."""
    width: int
    """Outputs per sample that it reads."""
    count: str
    """The denominator of a micro-batch `m`, as a loop writes it; {t} is the term's name."""
    by_hand: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """Loss sum and denominator of outputs, targets and mask."""
    extra: str = ""
    """Further arguments of the call."""
    can_be_empty: bool = False
    """Whether a micro-batch may hold nothing that counts."""
    clamped: bool = False
    """Whether the mean of nothing is 0 and no NaN."""


KINDS: dict[str, Kind] = {
    "ce": Kind("F.cross_entropy", "nn.CrossEntropyLoss", CLASSES, 'm["{t}"].numel()', _cross_entropy),
    "ignored": Kind(
        "F.cross_entropy", "nn.CrossEntropyLoss", CLASSES, '(m["{t}"] != -100).sum()', _cross_entropy,
        can_be_empty=True,
    ),
    "weighted": Kind(
        "F.cross_entropy", "nn.CrossEntropyLoss", CLASSES, 'WEIGHT[m["{t}"]].sum()', _weighted,
        extra=", weight=WEIGHT",
    ),
    "mse": Kind("F.mse_loss", "nn.MSELoss", 2, 'm["{t}"].numel()', _squares),
    "masked": Kind(
        "masked", "", 2, 'm["{t}_keep"].sum()', _masked, extra=', m["{t}_keep"]', can_be_empty=True
    ),
    "focal": Kind("focal", "", 2, 'm["{t}"].sum()', _focal, can_be_empty=True, clamped=True),
    "teacher": Kind("F.mse_loss", "", 2, "taught[{h}].numel()", _squares),
    "centred": Kind("criterion", "Centred", CLASSES, 'len(m["{t}"])', _centred),
}  # fmt: skip
LABELLED = ("ce", "ignored", "weighted")
OWN = ("masked", "focal")


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a loop's loss."""

    name: str
    kind: str
    weight: float
    head: int
    """Which of the model's outputs it reads."""
    call: int = 0
    """Which of the micro-batch's two calls of the model: 0, or 1 on further samples."""
    summed: bool = False
    """Whether it is a sum in the large batch as well, and divided by nothing."""

    @property
    def of(self) -> Kind:
        """The kind itself."""
        return KINDS[self.kind]


def drawn_target(
    term: Term, shape: tuple[int, ...], kept: int, width: int, draw: torch.Generator
) -> dict[str, Tensor]:
    """Return a term's entries of a micro-batch whose outputs are (*shape, width).

    Args:
        kept: how many of its samples or elements count, where the kind leaves some out.
    """
    name, elements = term.name, (*shape, width)
    if term.kind == "teacher":
        return {}
    if term.kind in LABELLED:
        labels = torch.randint(CLASSES, shape, generator=draw)
        if term.kind == "weighted":  # the same classes in every micro-batch of equal size, in any order
            some = torch.arange(labels.numel()) % CLASSES
            labels = labels if kept < 0 else some[torch.randperm(len(some), generator=draw)].view(shape)
        if term.kind == "ignored":
            labels = labels.masked_fill(~_chosen(shape, kept, draw), IGNORED)
        return {name: labels}
    chosen = _chosen(elements, kept, draw).double()
    if term.kind == "focal":
        return {name: chosen}
    target = torch.randn(elements, generator=draw, dtype=torch.float64)
    return {name: target, f"{name}_keep": chosen} if term.kind == "masked" else {name: target}


def _chosen(shape: tuple[int, ...], kept: int, draw: torch.Generator) -> Tensor:
    """Return a mask with this many elements set."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel(), generator=draw)[: max(kept, 0)]] = True
    return mask
