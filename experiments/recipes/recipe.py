"""What a recipe is to the test that runs it: two training steps, and the large batch of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Step = Callable[[nn.Module, Any, Sequence[Any]], None]
"""`step(model, optimizer, window)`: one optimizer step over the micro-batches of a window."""


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return plain gradient descent on what is trained."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A training step in two versions, and what they should be."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    """The samples of one window: any nesting of tensors whose first dimension counts them."""
    train_step: Step
    large_batch: Callable[[nn.Module, Any], Tensor]
    """The loss of the whole batch in one pass, by hand."""
    first_written: Step
    watched: Any = None
    """What `watch` is given as the criterion of the step that is first written."""
    cause: str
    """What `watch` should name of the step that is first written."""
    before_step: Callable[[list[nn.Parameter]], Any] = list
    """What rightly happens to the large batch's gradient before the step, as clipping does."""
    optimizer: Callable[[nn.Module], Any] = sgd
    equal: bool = False
    """Whether the step that is first written is wrong even where micro-batches are equally large."""


def micro_batches(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut a batch into micro-batches of these sizes."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        tree_map(lambda t, a=start, n=size: t[a : a + n], batch)
        for start, size in zip(starts, sizes, strict=True)
    ]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers in float64, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_tokens(*shape: int, most: int, seed: int = 0) -> Tensor:
    """Return whole numbers from 0 to most - 1, the same every time."""
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))
