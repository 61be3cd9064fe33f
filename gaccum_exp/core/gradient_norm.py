"""Numbers about a whole gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients taken together, 0-dim, on their device.

    Of gradients in half precision in float32: their norm in their own has two or three digits.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A sparse gradient may list a row twice; only its coalesced values have the gradient's norm.
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    half = [g for g in dense if g.dtype in (torch.float16, torch.bfloat16)]
    others = [g for g in dense if g.dtype not in (torch.float16, torch.bfloat16)] if half else dense
    norms: list[Tensor] = []
    if others:
        norms += torch._foreach_norm(others)  # as torch's own clipping takes them
    if half:
        norms += torch._foreach_norm(half, dtype=torch.float32)
    if not norms:
        return torch.tensor(0.0)
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return total
