"""Settings of torch's for the whole process that arms change, and may leave changed."""

from collections.abc import Callable
from typing import Any

import torch


def _of(place: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return what reads a setting of torch's that is an attribute, and what sets it."""
    return lambda: getattr(place, name), lambda value: setattr(place, name, value)


_DETERMINISM = (
    lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ),
    lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
)
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _DETERMINISM,
    *(_of(torch.backends.cudnn, x) for x in ("allow_tf32", "benchmark", "deterministic", "enabled")),
    _of(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    _of(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)
"""What reads a setting of torch's for the process, and what sets it."""


def _left_in_torch() -> tuple[Any, ...]:
    """Return what an arm's code may have left in torch and cannot simply be put back."""
    modules: Any = torch.nn.modules.module
    smallest = torch.tensor(5e-324, dtype=torch.float64)  # 0 times 1 where denormals are flushed
    return (
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        modules._has_any_global_hook(),
        bool((smallest * 1.0) == 0.0),
    )


def torch_settings() -> tuple[Any, ...]:
    """Return what arms set for the process, as threads, precision and determinism, and may leave."""
    return (*(read() for read, _ in _SETTINGS), _left_in_torch())


def set_torch_settings(settings: tuple[Any, ...]) -> bool:
    """Put back what `torch_settings` has returned; return whether all is as it was."""
    for (read, write), value in zip(_SETTINGS, settings[:-1], strict=True):
        if read() != value:  # setting determinism imports torch's compiler
            write(value)
    return settings == torch_settings()


BEFORE_ANY_ARM = torch_settings()
