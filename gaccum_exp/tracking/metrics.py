"""The names of a run's metrics, as they are stored."""

import re

INFINITE = 1e300
"""From here on a stored loss was infinite: some stores keep the largest float instead."""
TRAIN_LOSS = "train/loss"
"""Every optimizer step: the mean loss over all that counts in the window, whatever the reduction."""
LOSS_GAP = "train/loss_gap"
"""At a sweep's end, for every step: |train loss − the reference's|."""
LOSS_GAP_ULP = "train/loss_gap_ulp"
"""At a sweep's end: the largest gap so far, in units of rounding at the reference's largest loss."""
LEARNING_RATE = "optim/lr"
"""Every optimizer step: the learning rate of the first parameter group."""
GRADIENT_NORM = "optim/grad_norm"
"""Every optimizer step: the Euclidean norm of the window's gradient, before it is clipped."""
EVAL_LOSS = "eval/loss"
"""Every evaluation: the mean loss on the held-out data."""
EVAL_ACCURACY = "eval/accuracy"
"""Every evaluation of a classification: the share of samples (tokens) whose class is the likeliest."""
EVAL_PERPLEXITY = "eval/perplexity"
"""Every evaluation on tokens: exp(evaluation loss)."""
EMPTY_WINDOWS = "train/empty_windows"
"""At the end: the windows in which nothing counted, so that no step was taken."""
LOSS_SCALE = "optim/loss_scale"
"""Every optimizer step under `fp16`: what the loss was multiplied by."""
SKIPPED = "optim/skipped"
"""Every optimizer step under `fp16`: 1 where the gradient was not finite and no step was taken, else
0."""
SKIPPED_WINDOWS = "train/skipped_windows"
"""At the end, under `fp16`: the windows without a step."""
PEAK_BYTES = "memory/peak_bytes"
"""Once, in a steady-state window: the peak, tracked on a CPU, the allocator's on an accelerator."""
TRACKED_PEAK_BYTES = "memory/tracked_peak_bytes"
"""Once, on an accelerator: the tracker's peak beside the allocator's."""
PEAK_RATIO = "memory/peak_ratio"
"""At a sweep's end: the peak over the reference's."""
PREDICTED_PEAK_BYTES = "memory/predicted_peak_bytes"
"""Once, before the run: the peak that was predicted."""
OOM_EVENTS = "memory/oom_events"
"""Where memory ran out: how often windows have been split finer so far."""
ACCUM_STEPS_NOW = "accum/steps"
"""Where N changes in the training: N from that step on."""
RESIDENT_SET_BYTES = "memory/resident_set_bytes"
"""Once, on a CPU: what the process holds in RAM, libraries included."""
AUDIT_E64 = "audit/e64"
"""Every audit: ‖g_N − g_1‖ / ‖g_1‖ in float64."""
AUDIT_E = "audit/e"
"""Every audit: the same in the run's own precision."""
AUDIT_FLOOR = "audit/floor"
"""Every audit: how much of g_1 is rounding in that precision."""
COMPILED_ERROR = "compile/error"
"""Before training under `runtime.compile`: the compiled gradient's distance to float64, relative."""
COMPILED_FLOOR = "compile/floor"
"""Before training under `runtime.compile`: the eager gradient's, which is rounding."""
STEP_TIME_S = "time/step_s"
"""At the end: the median seconds of the windows after warm-up."""
STEP_TIME_LOW_S = "time/step_low_s"
"""At the end: their lower quartile."""
STEP_TIME_HIGH_S = "time/step_high_s"
"""At the end: their upper quartile."""
STEP_WINDOWS = "time/step_windows"
"""At the end: how many windows were timed."""
WAITING_SHARE = "time/waiting_share"
"""At the end, on Linux: the share of the training in which it was ready and waited for a processor."""
STEP_TIME_MS = "time/step_ms"
"""At a sweep's end: the median in milliseconds, for MLflow's charts."""
STEP_RATIO = "time/step_ratio"
"""At a sweep's end: the median over the reference's; none where there is no measurable difference."""
SAMPLES_PER_S = "throughput/samples_per_s"
"""At the end: samples of a full window over the median seconds of one."""
TOKENS_PER_S = "throughput/tokens_per_s"
"""At the end, where the loss counts tokens: the same in tokens."""
NOISE_TRACE = "noise/trace"
"""Every measured window: tr(Σ), the variance of one sample's gradient over all parameters."""
NOISE_SQUARED_NORM = "noise/squared_norm"
"""Every measured window: ‖G‖², without bias, so that it may be negative."""
NOISE_SCALE = "noise/scale"
"""Every measured window: the noise scale of the last 64, in samples; none while ‖G‖² is not positive."""
NOISE_SCALE_LOW = "noise/scale_low"
"""Every measured window: the lower end of its 95 % interval."""
NOISE_SCALE_HIGH = "noise/scale_high"
"""Every measured window: the upper end; none where the windows do not bound it."""


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


def planned(size: str) -> str:
    """Return the metric of what a plan predicts, N in place of the step: `plan/peak_bytes`."""
    return f"plan/{size}"
