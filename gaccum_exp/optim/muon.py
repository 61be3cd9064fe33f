"""Optimizers that torch.optim does not have in one piece."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on weight matrices and AdamW on every other parameter.

    Muon orthogonalises the update of a matrix, so it is defined for two-dimensional parameters only;
    convolutions, biases, norms and embeddings' vectors go to AdamW, as its author advises
    (torch.optim.Muon's documentation). Both share one list of parameter groups and one state, so that
    learning-rate schedules, checkpoints and memory accounting see a single optimizer.

    Args:
        params: the model's parameters.
        lr: Muon's learning rate.
        momentum: Muon's.
        weight_decay: of both.
        adamw_lr: AdamW's learning rate; schedules scale both by the same factor.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adamw_lr: float = 1e-3,
    ) -> None:
        params = list(params)
        matrices = [p for p in params if p.ndim == 2]
        others = [p for p in params if p.ndim != 2]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)
            )
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=adamw_lr, weight_decay=weight_decay))
        super().__init__(params, {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both; the closure, if any, is evaluated once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, and let both parts see them."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state
