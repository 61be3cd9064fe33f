"""The runtime of a training: device, precision, and the settings that are global to the process."""

import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from gaccum_exp.config.schema import Settings
from gaccum_exp.core.dtypes import complex_tensor_in, module_in_precision
from gaccum_exp.core.losses.placement import Placement
from gaccum_exp.errors import BadInputError, nearest

DEFAULT_THREADS = torch.get_num_threads()


def prepare_runtime(settings: Settings) -> torch.device:
    """Apply the settings that are global to the process, and return the device."""
    runtime = settings.runtime
    torch.set_num_threads(runtime.threads or DEFAULT_THREADS)
    if runtime.deterministic:
        # cuBLAS needs this before its first call, or it refuses to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != runtime.deterministic:
        torch.use_deterministic_algorithms(runtime.deterministic)  # imports torch's compiler
    torch.set_float32_matmul_precision(runtime.matmul_precision)
    torch.backends.cudnn.allow_tf32 = runtime.tf32
    device = _device(runtime.device)
    _limit_memory(device, runtime.memory_budget_gib)
    return device


def _limit_memory(device: torch.device, budget_gib: float | None) -> None:
    """Let the allocator enforce the budget, where it can; without a budget it may use all."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        share = 1.0 if budget_gib is None else min(1.0, budget_gib / whole)
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(share, index)


def _device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    here = ["cpu"] + ([accelerator.type] if accelerator else [])
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = nearest(name, ["auto", "cpu", "cuda", "mps", "xpu"])
        raise BadInputError(f"runtime.device={name}: no such device{hint}") from None
    if device.type not in here or (device.index or 0) >= max(1, torch.accelerator.device_count()):
        raise BadInputError(f"runtime.device={name}: not on this machine, which has {', '.join(here)}")
    return device


def placement_of(settings: Settings, device: torch.device) -> Placement:
    """Return the placement of micro-batches and weights that the settings ask for."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
    pure = settings.runtime.weight_dtype == "same"
    return Placement(
        device,
        dtype=torch.float64 if settings.precision == "fp64" else half if pure else None,
        autocast=None if pure else half,
        device_type=device.type,
        compiled=settings.runtime.compile,
    )


def placed_weights(model: nn.Module, settings: Settings, placement: Placement) -> nn.Module:
    """Move the weights to the placement's device and type.

    Raises:
        BadInputError: complex weights that are to be in bfloat16.
    """
    pure = settings.runtime.weight_dtype == "same" and settings.runtime.precision == "bf16"
    named = complex_tensor_in(model) if pure else None
    if named is not None:
        raise BadInputError(
            f"runtime.weight_dtype=same: {named} is complex, and torch does not compute in complex "
            "bfloat16; keep runtime.weight_dtype=float32, under which it stays complex64"
        )
    model = module_in_precision(model, placement.device, placement.dtype)
    if settings.audit.control_precision and settings.runtime.weight_dtype == "same":
        model = model.to(torch.bfloat16).float()  # a control begins at its reference's weights
    return model


def scaler_of(
    settings: Settings, optimizer: torch.optim.Optimizer, device: torch.device
) -> torch.amp.GradScaler | None:
    """Make the scaler of the loss, where passes compute in float16.

    Raises:
        BadInputError: the optimizer evaluates a window several times in a step, or parameters are
            complex.
    """
    if settings.precision != "fp16":
        return None
    if needs_closure(type(optimizer).step):
        raise BadInputError(
            f"runtime.precision=fp16: {type(optimizer).__name__} evaluates a window several times in a "
            "step, which a GradScaler cannot follow; use bf16 or fp32"
        )
    shapes = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if p.is_complex()]
    if shapes:
        raise BadInputError(
            f"runtime.precision=fp16: {len(shapes)} parameters are complex, the first of shape "
            f"{shapes[0]}, and a GradScaler cannot unscale complex gradients; use bf16 or fp32"
        )
    return torch.amp.GradScaler(device.type)


@cache
def needs_closure(step: Callable[..., Any]) -> bool:
    """Whether an optimizer's step evaluates the gradient itself, as L-BFGS does."""
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
