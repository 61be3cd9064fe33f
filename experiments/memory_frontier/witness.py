"""A second witness of a step's peak: every allocation that the operators make, as the profiler sees it.

It knows nothing of tensors, and sees what no tensor tracker does: workspace inside operators.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def allocated_peak(step: Callable[[], Any]) -> int:
    """Run a step on the CPU; return the most bytes allocated in it beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def one_dnn(enabled: bool) -> Iterator[None]:
    """Switch oneDNN's kernels on or off for a block."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
