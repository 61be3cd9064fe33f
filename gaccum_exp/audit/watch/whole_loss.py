"""Find the function of the loop's that computes a loss, where that mixes samples.

Line by line such a loss cannot be run over the whole window, but a function that is handed outputs and
targets can. What was called knows by which functions, so that the one around all of it is found.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

from gaccum_exp.audit.watch.tape import TapedMicroBatch


def function_of_loss(micro_batches: Sequence[TapedMicroBatch]) -> Callable[..., Any] | None:
    """Return the outermost function that makes the losses of a micro-batch, and calls no model.

    None: there is none, as where the loop computes them in its own lines; or it takes in what was there
    when it was made.
    """
    found = set[CodeType]()
    for micro_batch in micro_batches:
        of_models = {each for call in micro_batch.models for each in call.functions}
        around = [
            each for each in micro_batch.losses[0].functions
            if each not in of_models and all(each in loss.functions for loss in micro_batch.losses)
        ]  # fmt: skip
        if not around:
            return None
        found.add(around[-1][1])
    functions = [each for code in found for each in _functions_of(code)]
    alone = len(found) == 1 and len(functions) == 1 and not functions[0].__closure__
    return functions[0] if alone else None


def _functions_of(code: CodeType) -> list[FunctionType]:
    """Return the functions that run this code: those that the garbage collector knows, or a module's."""
    known = [x for x in gc.get_referrers(code) if isinstance(x, FunctionType) and x.__code__ is code]
    if known:
        return known
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == code.co_filename:
            function: Any = module
            for name in code.co_qualname.split("."):
                function = getattr(function, name, None)
            if getattr(function, "__code__", None) is code:
                return [function]
    return []
