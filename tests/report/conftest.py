"""Synthetic runs: what a sweep leaves in the store, without training anything."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gaccum_exp.tracking.records import Curve, RunRecord

STEP_TIMES = ("time/step_s", "time/step_low_s", "time/step_high_s", "time/step_windows")


def make_arm(
    steps: int = 1,
    *,
    run_id: str | None = None,
    reduction: str = "mean",
    global_batch: int = 256,
    micro_batch: int | None = None,
    seed: int = 0,
    status: str = "FINISHED",
    losses: list[float] | None = None,
    n_losses: int = 140,
    noise: float = 1e-7,
    start: int = 1_763_900_000_000,
    params: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    drop: tuple[str, ...] = (),
) -> RunRecord:
    """Return one arm whose loss falls like 1/√k, `noise` × (N − 1) away from the one-pass arm's.

    `drop` names metrics, parameters and tags that the arm did not get as far as recording.
    """
    small, larger = divmod(global_batch, steps)
    sizes = [small + 1] * larger + [small] * (steps - larger)
    run_id = run_id or f"{reduction}-{global_batch}-s{seed}-n{steps}"
    random_state = random.Random(run_id)
    if losses is None:
        losses = [
            2.3 / math.sqrt(k) + 0.01 * seed + random_state.uniform(-1, 1) * noise * (steps - 1)
            for k in range(1, n_losses + 1)
        ]
    curves = {"train/loss": Curve(tuple(range(1, len(losses) + 1)), tuple(losses))}
    step_s = 0.0123 * (1 + 0.03 * (steps - 1)) * (1 + 0.02 * seed)
    activations = 40e6 * sizes[0] / 256
    in_backward = activations > 6e6
    split = {
        "memory/parameters_bytes": 4e6,
        "memory/gradients_bytes": 4e6,
        "memory/optimizer_state_bytes": 8e6,
        "memory/activations_bytes": activations if in_backward else 0.0,
        "memory/temporaries_bytes": 1e6 if in_backward else 6e6,
    }
    metrics = {
        **({"train/loss": losses[-1]} if losses else {}),
        "eval/loss": 0.21 + 0.001 * seed,
        "eval/accuracy": 0.9472,
        "memory/peak_bytes": sum(split.values()),
        "memory/predicted_peak_bytes": sum(split.values()) + 64,
        "memory/resident_set_bytes": 7e8,
        "memory/tracked_peak_bytes": sum(split.values()),
        **split,
        **dict(zip(STEP_TIMES, (step_s, 0.99 * step_s, 1.01 * step_s, 100.0), strict=True)),
    }
    all_params = {
        "accum.steps": str(steps),
        "accum.reduction": reduction,
        "accum.sum_scale": "constant",
        "accum.partial_window": "exact",
        "data.global_batch_size": str(global_batch),
        "data.micro_batch_size": str(micro_batch or sizes[0]),
        "seed": str(seed),
        "model._target_": "gaccum_exp.models.cnn.CNN",
        "model.norm": "group",
        "data._target_": "gaccum_exp.data.digits.Digits",
        "optimizer.lr": "0.1",
        "tracking.uri": "sqlite:///mlflow.db",
        **(params or {}),
    }
    all_tags = {
        "sweep_id": "s1",
        "role": "reference" if steps == 1 else "candidate",
        "memory.source": "tracker",
        "memory.peak_phase": "forward/backward" if in_backward else "optimizer step",
        "device": "cpu",
        "threads": "2",
        "micro_batch_sizes": ", ".join(map(str, sizes)),
        **(tags or {}),
    }
    return RunRecord(
        run_id=run_id,
        experiment_id="1",
        name=f"N={steps} · micro {sizes[0]} · {reduction}",
        status=status,
        start_time_ms=start,
        params={key: value for key, value in all_params.items() if key not in drop},
        tags={key: value for key, value in all_tags.items() if key not in drop},
        metrics={key: value for key, value in metrics.items() if key not in drop},
        curves={key: value for key, value in curves.items() if key not in drop},
    )


def make_audited(run: RunRecord, verdict: str, **words: str) -> RunRecord:
    """Return the run as an audit leaves it: `words` are the tags cause, culprit and remedy."""
    numbers = {"audit/e64": 3e-15, "audit/e": 1.5e-7, "audit/floor": 2.5e-7}
    return replace(
        run, tags={**run.tags, "verdict": verdict, **words}, metrics={**run.metrics, **numbers}
    )


def make_control(reference: RunRecord, seed: int, gap: float, **changes: Any) -> RunRecord:
    """Return the reference trained again in another order: its curve is `gap` away at every step."""
    curve = reference.curves["train/loss"]
    values = tuple(value + gap for value in curve.values)
    told: dict[str, Any] = {
        "run_id": f"{reference.run_id}-control-{seed}",
        "name": f"{reference.name} · control {seed}",
        "params": {**reference.params, "audit.control_seed": str(seed)},
        "tags": {**reference.tags, "role": "control", "control_of": reference.name},
        "curves": {"train/loss": Curve(curve.global_steps, values)},
    }
    return replace(reference, **(told | changes))


@pytest.fixture
def arm() -> Callable[..., RunRecord]:
    """Return the maker of synthetic arms."""
    return make_arm


@pytest.fixture
def audited() -> Callable[..., RunRecord]:
    """Return what tags a run with an audit."""
    return make_audited


@pytest.fixture
def control() -> Callable[..., RunRecord]:
    """Return the maker of a reference's controls."""
    return make_control
