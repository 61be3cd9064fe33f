"""Is my gradient accumulation really my large batch, what does it save, and is it worth it?

`python -m gaccum_exp -m accum.steps=1,2,4,8` runs the experiment; from Python `sweep` does, and
`compare` reads old ones again. For anyone's own training loop, `accumulate_gradients` is the
accumulation itself, `noise_scale` the same while it measures how large a batch pays, `watch` the audit
of what the loop does, and `plan_memory` says what each N would hold.
"""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and "gaccum_exp" in sys.orig_argv:
    # `python -m gaccum_exp`, before anything else is imported: a file random.py or socket.py in the
    # working directory is not the standard library's. What brought Python here was looked for there.
    sys.path.append(sys.path.pop(0))

TYPE_CHECKING = False  # typing itself is a module that a file there could stand for
if TYPE_CHECKING:
    from typing import Any

    from gaccum_exp.api.result import SweepResult
    from gaccum_exp.api.sweep import compare, sweep
    from gaccum_exp.audit.watch.watch import watch
    from gaccum_exp.core.accumulate import accumulate_gradients
    from gaccum_exp.core.noise_scale import noise_scale
    from gaccum_exp.errors import BadInputError
    from gaccum_exp.memory.plan_memory import plan_memory

__version__ = "0.1.0"
__all__ = [
    "BadInputError",
    "SweepResult",
    "accumulate_gradients",
    "compare",
    "noise_scale",
    "plan_memory",
    "sweep",
    "watch",
]
_HOMES = {
    "BadInputError": "gaccum_exp.errors",
    "SweepResult": "gaccum_exp.api.result",
    "accumulate_gradients": "gaccum_exp.core.accumulate",
    "compare": "gaccum_exp.api.sweep",
    "noise_scale": "gaccum_exp.core.noise_scale",
    "plan_memory": "gaccum_exp.memory.plan_memory",
    "sweep": "gaccum_exp.api.sweep",
    "watch": "gaccum_exp.audit.watch.watch",
}


def __getattr__(name: str) -> "Any":
    # Lazily, because `--help` and config errors must answer without waiting for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> "list[str]":
    return ["__version__", *__all__]
