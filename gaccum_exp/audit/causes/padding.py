"""Find out whether a micro-batch that is padded to the longest one's length keeps its gradient.

Where it does, the large batch may be padded, and what is seen of it is no matter of padding.
"""

from dataclasses import replace
from typing import Any

from gaccum_exp.audit.agreement import NEVER_ROUNDING64
from gaccum_exp.audit.causes.loss_weights import sampled
from gaccum_exp.audit.rerun.passes import ACCUMULATED64, Rerun
from gaccum_exp.audit.verdict import multiple
from gaccum_exp.core.gradient import distance

PADDED = "padded to the longest one of the window, a micro-batch gives another gradient"
MASK = "pad all micro-batches of a window to one length, or have model and loss leave padding out"


def difference_by_padding(rerun: Rerun) -> str | None:
    """Return why padding keeps a window from being judged; None: it does not, or nothing is padded."""
    padded = rerun.window.padded_alone()
    if padded is None:
        return None
    own: list[Any] = rerun.micro_gradients(ACCUMULATED64, sampled)
    other: list[Any] = replace(rerun, window=padded).micro_gradients(ACCUMULATED64, sampled)
    pairs = list(zip(other, own, strict=True))
    if max(distance(theirs, ours) for theirs, ours in pairs) <= NEVER_ROUNDING64:
        return None
    if all(multiple(theirs, ours, NEVER_ROUNDING64) is not None for theirs, ours in pairs):
        return f"{PADDED}, since its loss averages over padding, too: {MASK}"
    return f"{PADDED}: {MASK}"
