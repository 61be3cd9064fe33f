"""The names of a run's metrics, as they are stored."""

import re

INFINITE = 1e300
"""From here on a stored loss was infinite: some stores keep the largest float instead."""
TRAIN_LOSS = "train/loss"
LOSS_GAP = "train/loss_gap"
LOSS_GAP_ULP = "train/loss_gap_ulp"
LEARNING_RATE = "optim/lr"
GRADIENT_NORM = "optim/grad_norm"
EVAL_LOSS = "eval/loss"
EVAL_ACCURACY = "eval/accuracy"
EVAL_PERPLEXITY = "eval/perplexity"
EMPTY_WINDOWS = "train/empty_windows"
LOSS_SCALE = "optim/loss_scale"
SKIPPED = "optim/skipped"
SKIPPED_WINDOWS = "train/skipped_windows"
PEAK_BYTES = "memory/peak_bytes"
TRACKED_PEAK_BYTES = "memory/tracked_peak_bytes"
PEAK_RATIO = "memory/peak_ratio"
PREDICTED_PEAK_BYTES = "memory/predicted_peak_bytes"
OOM_EVENTS = "memory/oom_events"
ACCUM_STEPS_NOW = "accum/steps"
RESIDENT_SET_BYTES = "memory/resident_set_bytes"
AUDIT_E64 = "audit/e64"
AUDIT_E = "audit/e"
AUDIT_FLOOR = "audit/floor"
COMPILED_ERROR = "compile/error"
COMPILED_FLOOR = "compile/floor"
STEP_TIME_S = "time/step_s"
STEP_TIME_LOW_S = "time/step_low_s"
STEP_TIME_HIGH_S = "time/step_high_s"
STEP_WINDOWS = "time/step_windows"
STEP_TIME_MS = "time/step_ms"
STEP_RATIO = "time/step_ratio"
SAMPLES_PER_S = "throughput/samples_per_s"
TOKENS_PER_S = "throughput/tokens_per_s"
NOISE_TRACE = "noise/trace"
NOISE_SQUARED_NORM = "noise/squared_norm"
NOISE_SCALE = "noise/scale"
NOISE_SCALE_LOW = "noise/scale_low"
NOISE_SCALE_HIGH = "noise/scale_high"


def in_adam_metric(metric: str) -> str:
    """Return the metric of the same in Adam's: `noise/adam_scale`."""
    return metric.replace("noise/", "noise/adam_")


OF_NOISE = (
    NOISE_TRACE,
    *(NOISE_SCALE, NOISE_SCALE_LOW, NOISE_SCALE_HIGH),
    *map(in_adam_metric, (NOISE_TRACE, NOISE_SCALE, NOISE_SCALE_LOW, NOISE_SCALE_HIGH)),
)
"""What tells the noise scale at a step: an end that is not recorded there does not exist."""


def of_term(metric: str, name: str) -> str:
    """Return the metric of one term of a loss: `train/loss/box`, in letters that the store takes."""
    taken = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    return f"{metric}/{taken}"


def memory_part(name: str) -> str:
    """Return the metric of a part of the memory, in bytes: `activations`, `allocator_reserved`."""
    return f"memory/{name}_bytes"
