"""Combine Muon and AdamW into one optimizer."""

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
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimizers.append(
                torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)
            )
        if others:
            self._optimizers.append(torch.optim.AdamW(others, lr=adamw_lr, weight_decay=weight_decay))
        super().__init__(params, {})
        self.param_groups = [group for inner in self._optimizers for group in inner.param_groups]
        self._share_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both; the closure, if any, is evaluated once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self._optimizers:
            inner.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, and share them between both optimizers."""
        super().load_state_dict(state_dict)
        self._share_state()

    def _share_state(self) -> None:
        for inner, group in zip(self._optimizers, self.param_groups, strict=True):
            inner.param_groups = [group]
            inner.state = self.state
