"""Segmentation: weighted pixels that may be ignored, and a dice over the batch, which is no sum at all.

Dice divides sums of overlaps by sums of areas. Over a window it is a function of the window's sums, and
is given as one: (sums, denominator, weight, of).
"""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.recipes.recipe import Recipe, drawn, drawn_tokens
from gaccum_exp import accumulate_gradients
from gaccum_exp.audit.result import NOT_ADDITIVE

IMAGES, SIDE, CLASSES, OF_DICE, IGNORED = 12, 4, 3, 0.7, 255
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def build():
    """Return a model from images (batch, 2, side, side) to logits (batch, classes, side, side)."""
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1))


def overlaps(logits, labels):
    """Return overlaps and areas of the classes, over all pixels that are not ignored (2, classes)."""
    there = (labels != IGNORED)[:, None]
    predicted = logits.softmax(1) * there
    true = F.one_hot(labels.masked_fill(labels == IGNORED, 0), CLASSES).movedim(-1, 1) * there
    return torch.stack([(predicted * true).sum((0, 2, 3)), (predicted + true).sum((0, 2, 3))])


def dice(sums):
    """Return 1 − dice, averaged over classes."""
    return 1 - (2 * sums[0] / sums[1]).mean()


def loss_fn(model, micro_batch):
    """Return two terms: a weighted mean over pixels, and a function of the window's sums."""
    images, labels = micro_batch
    logits = model(images)
    pixels = F.cross_entropy(logits, labels, weight=WEIGHT, ignore_index=IGNORED, reduction="sum")
    counted = labels[labels != IGNORED]
    return {
        "pixels": (pixels, WEIGHT[counted].sum().item()),
        "dice": (overlaps(logits, labels), None, OF_DICE, dice),  # a ratio of sums: nothing to divide by
    }


def train_step(model, optimizer, window):
    """Two passes, because of the dice: the window's sums first, then each micro-batch's part in them."""
    optimizer.zero_grad()
    accumulate_gradients(model, loss_fn, window)
    optimizer.step()


def compute_loss(model, micro_batch):
    """Return the loss as it stands in a loop without accumulation."""
    images, labels = micro_batch
    logits = model(images)
    pixels = F.cross_entropy(logits, labels, weight=WEIGHT, ignore_index=IGNORED)
    return pixels + OF_DICE * dice(overlaps(logits, labels))


def first_written(model, optimizer, window):
    """The mean of the micro-batches' dices is not the window's dice, however equal they are."""
    optimizer.zero_grad()
    for micro_batch in window:
        (compute_loss(model, micro_batch) / len(window)).backward()
    optimizer.step()


def batch():
    """Return images and labels (batch, side, side), some of them ignored."""
    labels = drawn_tokens(IMAGES, SIDE, SIDE, most=CLASSES, seed=1)
    ignored = drawn(IMAGES, SIDE, SIDE, seed=2) > 0.8
    return drawn(IMAGES, 2, SIDE, SIDE), labels.masked_fill(ignored, IGNORED)


RECIPES = {
    "segmentation": Recipe(
        build=build,
        batch=batch,
        train_step=train_step,
        large_batch=compute_loss,
        first_written=first_written,
        watched=compute_loss,
        cause=NOT_ADDITIVE,
        equal=True,
    )
}
