"""The modes in which a model runs: training or evaluation, compiled or eager."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)

from gaccum_exp.core.seeding import random_state_kept

T = TypeVar("T")


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


@contextmanager
def unobserved() -> Iterator[None]:
    """Run operators of nobody's model: unseen by modes and transforms, with the generators put back."""
    with ExitStack() as hidden:
        # Where there is anything to hide from; what hides them imports much.
        if _get_current_dispatch_mode() is not None:
            hidden.enter_context(_disable_current_modes())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            hidden.enter_context(temporarily_clear_interpreter_stack())
        hidden.enter_context(random_state_kept())
        yield


def without_graph(run: Callable[[], T]) -> T:
    """Return what `run` returns without graph, or with one where it takes gradients itself.

    A gradient penalty does. `run` then begins anew, and so has to leave everything as it was.
    """
    try:
        with torch.no_grad():
            return run()
    except RuntimeError as error:
        if not asks_for_graph(error):
            raise
    with torch.enable_grad():
        return run()


def asks_for_graph(error: RuntimeError) -> bool:
    """Whether it is torch's for a gradient of what was computed without graph."""
    return "does not require grad" in str(error)


def eagerly() -> AbstractContextManager[Any]:
    """Run what torch.compile has compiled as if it had not, for the length of a block."""
    stance: Any = torch.compiler.set_stance
    return stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
