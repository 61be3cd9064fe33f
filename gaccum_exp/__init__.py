"""Is my gradient accumulation really my large batch, what does it save, and is it worth it?

`python -m gaccum_exp -m accum.steps=1,2,4,8` runs the experiment. For anyone's own training loop,
`accumulate_gradients` is the accumulation itself, `noise_scale` the same while it measures how large a
batch pays, `watch` the audit of what the loop does, and `plan_memory` says what each N would hold.
"""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and "gaccum_exp" in sys.orig_argv:
    # `python -m gaccum_exp`, before anything else is imported: a file random.py or socket.py in the
    # working directory is not the standard library's. What brought Python here was looked for there.
    sys.path.append(sys.path.pop(0))

TYPE_CHECKING = False  # typing itself is a module that a file there could stand for
if TYPE_CHECKING:
    from typing import Any

    from gaccum_exp.audit.watch.watch import watch
    from gaccum_exp.core.accumulate import accumulate_gradients
    from gaccum_exp.core.noise_scale import noise_scale
    from gaccum_exp.memory.plan_memory import plan_memory

__version__ = "0.1.0"
__all__ = ["accumulate_gradients", "noise_scale", "plan_memory", "watch"]


def __getattr__(name: str) -> "Any":
    # Lazily, because `--help` and config errors must answer without waiting for torch.
    if name == "accumulate_gradients":
        from gaccum_exp.core.accumulate import accumulate_gradients

        return accumulate_gradients
    if name == "watch":
        from gaccum_exp.audit.watch.watch import watch

        return watch
    if name == "noise_scale":
        from gaccum_exp.core.noise_scale import noise_scale

        return noise_scale
    if name == "plan_memory":
        from gaccum_exp.memory.plan_memory import plan_memory

        return plan_memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
