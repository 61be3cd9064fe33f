"""What a stored run is, once read back: plain values, nothing of the store they came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over training: `values[i]` was measured after `steps[i]` optimizer steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One arm of a sweep as it stands in the store."""

    run_id: str
    experiment_id: str
    name: str
    """What differs: `N=4 · micro 64 · mean`."""
    status: str
    """MLflow's word: RUNNING, FINISHED, FAILED or KILLED."""
    start_time_ms: int
    params: Mapping[str, str]
    """Every resolved config value by its dotted key, e.g. `accum.steps`."""
    tags: Mapping[str, str]
    """`sweep_id`, `role` (reference, candidate or control), `verdict`, `cause`, `culprit` and `remedy`
    where audited, `memory.source`, `memory.peak_phase`, `failure`, versions, device."""
    metrics: Mapping[str, float]
    """The last value of each metric, e.g. `train/loss`, `memory/peak_bytes`, `time/step_s`."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """The metrics that were recorded at every optimizer step or evaluation."""


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """One data set that a run was fed."""

    name: str
    digest: str
    samples: int
    context: str
    """training | evaluation"""
