"""Set-prediction detection: classes are averaged by weight, boxes by the number of boxes in the window.

Carion et al. 2020, arXiv 2005.12872 (DETR), with a matching by boxes alone.
"""

from itertools import permutations

import torch
import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn, drawn_tokens
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import UNEQUAL_DENOMINATORS
from gaccum_exp.core.losses.protocol import at_least

IMAGES, WIDTH, QUERIES, CLASSES, OF_BOXES = 12, 6, 3, 2, 5.0
WEIGHT = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)  # the last is "no object"
ORDERS = torch.tensor(list(permutations(range(QUERIES))))


class Detector(nn.Module):
    """Predicts a class and a box for each of its queries."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh())
        self.classes = nn.Linear(8, QUERIES * (CLASSES + 1))
        self.boxes = nn.Linear(8, QUERIES * 4)

    def forward(self, x):
        """Map images (batch, width) to logits (batch, queries, classes + 1), boxes (…, queries, 4)."""
        hidden = self.trunk(x)
        logits, boxes = self.classes(hidden), self.boxes(hidden)
        return logits.unflatten(-1, (QUERIES, -1)), boxes.unflatten(-1, (QUERIES, -1)).sigmoid()


def sums(model, micro_batch):
    """Return each term's sum and its denominator; `least`: of the window's boxes."""
    x, labels, boxes = micro_batch
    logits, predicted = model(x)
    there = (labels < CLASSES).to(boxes)  # targets are padded with "no object"
    cost = (predicted[:, :, None] - boxes[:, None]).abs().sum(-1) * there[:, None]
    with torch.no_grad():
        best = cost[:, ORDERS, torch.arange(QUERIES)].sum(-1).argmin(-1)
    matched = ORDERS[best].argsort(-1)  # the target of each query
    labels = labels.gather(1, matched)
    of_classes = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=WEIGHT, reduction="sum")
    of_boxes = cost.gather(2, matched[..., None]).sum()
    return (of_classes, WEIGHT[labels].sum().item()), (of_boxes, there.sum().item())


def loss_fn(model, micro_batch):
    """Return the terms; boxes are clamped as the window has them: an empty image divides by nothing."""
    of_classes, (of_boxes, n) = sums(model, micro_batch)
    return {"classes": of_classes, "boxes": (of_boxes, at_least(n), OF_BOXES)}


def train_step(model, optimizer, window):
    """Each term is divided once, by its own count over the window."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()


def compute_loss(model, micro_batch):
    """Return the loss with the boxes of one micro-batch as the denominator."""
    (of_classes, weights), (of_boxes, n) = sums(model, micro_batch)
    return of_classes / weights + OF_BOXES * of_boxes / max(1, n)


def first_written(model, optimizer, window):
    """`num_boxes` of the micro-batch: boxes of crowded images weigh less than those of empty ones."""
    optimizer.zero_grad()
    for micro_batch in window:
        (compute_loss(model, micro_batch) / len(window)).backward()
    optimizer.step()


def batch():
    """Return images, labels (batch, queries) and boxes (batch, queries, 4), crowded and empty ones."""
    labels = drawn_tokens(IMAGES, QUERIES, most=CLASSES, seed=1)
    objects = torch.tensor([3, 1, 0, 0, 0, 0, 2, 1, 3, 0, 3, 3])
    labels = labels.masked_fill(torch.arange(QUERIES) >= objects[:, None], CLASSES)
    return drawn(IMAGES, WIDTH), labels, drawn(IMAGES, QUERIES, 4, seed=2).sigmoid()


RECIPES = {
    "set-prediction detection": Recipe(
        build=Detector,
        batch=batch,
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=UNEQUAL_DENOMINATORS,
        equal=True,
    )
}
