"""Types of numbers: how precise real and complex ones are, and how one becomes as precise as another.

torch's own `tensor.double()` and `module.to(torch.float64)` drop the imaginary part of complex numbers,
and `is_floating_point` does not know them: whatever changes or compares precision does so by this file.
"""

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def in_precision(own: torch.dtype, real: torch.dtype | None) -> torch.dtype:
    """Return the type of the same kind of number, in the precision of a real type; None: as it is.

    complex64 in float64's precision is complex128. Integers stay what they are, and complex numbers stay
    complex64 where half precision is asked for: torch computes next to nothing with complex halves.
    """
    if real is None or not (own.is_floating_point or own.is_complex):
        return own
    if not own.is_complex:
        return real
    return torch.complex128 if real == torch.float64 else torch.complex64


def is_inexact(tensor: Tensor) -> bool:
    """Whether it holds real or complex numbers, and no integers or truth values."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_narrower(own: torch.dtype, real: torch.dtype) -> bool:
    """Whether numbers of a type are less precise than a real type's."""
    return own.itemsize < in_precision(own, real).itemsize


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 or complex128, on the CPU where its device has neither."""
    here = tensor.cpu() if tensor.device.type == "mps" else tensor
    return here.to(torch.complex128 if tensor.is_complex() else torch.float64)


def out_of_half(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision in float32, and any other as it is.

    Half precision has no count of 257 (bfloat16) and no sum beyond 65,504 (float16), and a window's sum
    would lose its last micro-batches.
    """
    return tensor.float() if tensor.dtype in HALF else tensor


def reals(tensor: Tensor) -> Tensor:
    """Return the real numbers that a tensor is made of: of complex ones (...) both parts, (..., 2)."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def complex_tensor_in(module: nn.Module) -> str | None:
    """Return the name of a complex parameter or buffer, if there is one."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return next((name for name, tensor in tensors if tensor.is_complex()), None)


def module_in_precision(
    module: nn.Module, device: torch.device | None, real: torch.dtype | None
) -> nn.Module:
    """Move a module to a device and a precision as `module.to` does, but for its complex numbers."""
    if complex_tensor_in(module) is None:
        return module.to(device=device, dtype=real)
    module._apply(  # type: ignore[no-untyped-call]  # torch's own, which `module.to` calls as well
        lambda tensor: tensor.to(device, in_precision(tensor.dtype, real))
    )
    return module
