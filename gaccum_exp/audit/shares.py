"""Each micro-batch's share in the large batch's gradient, found from the gradients alone.

Where the one pass's gradient is a sum of the micro gradients, its coefficients say what the large batch
gives to each micro-batch: nᵢ/n for a loss that is a mean, 1 for one that is a sum. Nobody has to say
what the loss counts.
"""

from collections.abc import Sequence

import torch

from gaccum_exp.audit.gradient import Gradient

RESIDUAL = 1e-6
"""Of the one pass in terms of the micro gradients, relative, where it is a sum of theirs."""
MOST_ELEMENTS = 1_000_000
"""Of each micro gradient so many are kept to find the shares; there are far fewer unknowns."""


def sampled(gradient: Gradient) -> dict[str, torch.Tensor]:
    """Keep some elements of every parameter's gradient."""
    per = max(1, MOST_ELEMENTS // max(1, len(gradient)))
    return {name: g.flatten()[:per].double().cpu() for name, g in gradient.items()}


def fitted_shares(
    micro: Sequence[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]
) -> list[float] | None:
    """Return the coefficients of `whole` in terms of the micro gradients, or None: it is no such sum."""
    names = sorted({name for g in [*micro, whole] for name in g})
    size = {name: next(g[name].numel() for g in [*micro, whole] if name in g) for name in names}

    def vector(g: dict[str, torch.Tensor]) -> torch.Tensor:
        zeros = (g.get(name, torch.zeros(size[name], dtype=torch.float64)) for name in names)
        return torch.cat(list(zeros))

    target = vector(whole)
    columns = torch.stack([vector(g) for g in micro], 1)
    length = float(target.norm())
    if length == 0:
        return None
    found = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    residual = float((columns @ found - target).norm())
    return found.tolist() if residual <= RESIDUAL * length else None
