"""The modes in which a model runs: training or evaluation, compiled or eager."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class EagerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's metaclass
    """A dispatch mode that torch need not keep its compiler out of.

    torch would do so at every operator, and import the compiler for it, which takes as long as importing
    torch itself.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation and back, module by module: some may have been in it all along."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def eagerly() -> AbstractContextManager[Any]:
    """Run what torch.compile has compiled as if it had not, for the length of a block."""
    stance: Any = torch.compiler.set_stance
    return stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
