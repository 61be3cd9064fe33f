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
        params: the model's parameters, or groups of them with options of their own; the learning rate
            of a group is that of all in it.
        lr: Muon's learning rate.
        momentum: Muon's.
        weight_decay: of both.
        adamw_lr: AdamW's learning rate; schedules scale both by the same factor.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adamw_lr: float = 1e-3,
    ) -> None:
        given: list[Any] = list(params)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        matrices = _parts(groups, matrices=True)
        others = _parts(groups, matrices=False)
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimizers.append(
                torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)
            )
        if others:
            self._optimizers.append(torch.optim.AdamW(others, lr=adamw_lr, weight_decay=weight_decay))
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([*matrices, *others], options)
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
        groups = iter(self.param_groups)
        for inner in self._optimizers:
            inner.param_groups = [next(groups) for _ in inner.param_groups]
            inner.state = self.state


def _parts(groups: list[dict[str, Any]], *, matrices: bool) -> list[dict[str, Any]]:
    """Return the groups with what in them is a matrix, or is none, and without those left empty."""
    parts = [
        {**group, "params": [p for p in group["params"] if (p.ndim == 2) == matrices]}
        for group in groups
    ]
    return [part for part in parts if part["params"]]
