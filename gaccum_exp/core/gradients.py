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
    if not half:
        return torch.nn.utils.get_total_norm(dense)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in half]
    others = [g for g in dense if g.dtype not in (torch.float16, torch.bfloat16)]
    return torch.nn.utils.get_total_norm([*others, *norms])
