"""Numbers about a whole gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients taken together, 0-dim, on their device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A sparse gradient may list a row twice; only its coalesced values have the gradient's norm.
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return torch.nn.utils.get_total_norm(dense)
