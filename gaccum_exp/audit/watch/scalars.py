"""Linear arithmetic on losses: of which terms a loss is the sum, and what they are multiplied by.

`loss = (ce + beta * kl) / accum_steps` is a linear form: its terms are the scalars `ce` and `kl`, which
come from something else than scalars, and their factors are known one by one. So a division by N is
told apart from what the loss itself divides by, wherever it happens.
"""

import dis
import functools
import itertools
import linecache
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ADDING = {"add": 1.0, "sub": -1.0, "subtract": -1.0}
"""Names of operators without underscores, and the sign of their second operand."""
SCALING = {
    "mul": False,
    "multiply": False,
    "div": True,
    "truediv": True,
    "true_divide": True,
    "divide": True,
}
"""The same, and whether they divide."""
PASSING = frozenset(
    {"float", "double", "half", "bfloat16", "to", "type", "clone", "squeeze", "reshape", "view", "sum"}
    | {"mean", "contiguous", "flatten", "as_tensor"}
)
"""Operators that leave a scalar as it is."""
LOSS_NAMES = ("_loss", "entropy", "logits", "kl_div")
"""What the names of loss functions end with."""
LIBRARIES = ("torch", "gaccum_exp.audit")


@dataclass(frozen=True, slots=True)
class Factor:
    """A number that a scalar is multiplied by."""

    value: float
    weight: bool = False
    """Whether it stands in the source as a literal: a weight of the loss, and no N."""
    literal: bool = False
    """Whether it stands in the source at all, a weight or a divisor."""
    counted: bool = False
    """Whether it is a tensor: something that was counted, and no N."""
    divides: bool = False
    """Whether the scalar is divided, by its reciprocal."""

    @property
    def divisor(self) -> int | None:
        """The whole number above 1 that it divides by; None: there is none, or it was counted."""
        return None if self.counted else whole_divisor(self.value)


def whole_divisor(number: float) -> int | None:
    """Return M where a number is 1/M, but for the rounding of the loop's precision; None: it is not."""
    by = 1 / number if number > 0 else 0.0
    return round(by) if by > 1.5 and math.isclose(by, round(by), rel_tol=1e-4) else None


@dataclass(frozen=True, slots=True)
class Term:
    """A scalar that is no linear form of others, with the factors on its way into a loss."""

    tensor: Tensor
    name: str
    factors: tuple[Factor, ...] = ()

    def without_tensor(self) -> "Term":
        """Return its name and factors alone, which hold no graph."""
        return Term(torch.empty(0), self.name, self.factors)


@dataclass(frozen=True, slots=True)
class Linear:
    """An operation on scalars that is linear in those with a graph."""

    operands: list[tuple[Tensor, Factor | None]]
    """Each with the factor that it gets; None: none."""


def linear(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Linear | None:
    """Return an operation's linear form, if it is one of scalars."""
    name = getattr(function, "__name__", "").strip("_")
    reverse = name.startswith("r") and name[1:] in {*ADDING, *SCALING}
    name = name[1:] if reverse or (name.startswith("i") and name[1:] in {*ADDING, *SCALING}) else name
    given = [*args, *(v for k, v in kwargs.items() if k in ("other", "input"))]
    graphs = [x for x in given[:2] if isinstance(x, Tensor) and x.requires_grad]
    if not graphs or any(x.numel() != 1 for x in given[:2] if isinstance(x, Tensor)):
        return None
    if name in PASSING:
        return Linear([(graphs[0], None)]) if graphs[0] is given[0] else None
    if name in ("neg", "negative"):
        return Linear([(graphs[0], Factor(-1.0, weight=True))])
    if len(given) < 2:
        return None
    if name in ADDING:
        signs = [1.0, ADDING[name] * float(kwargs.get("alpha", 1))]
        signs = signs[::-1] if reverse else signs
        pairs = zip(given[:2], signs, strict=True)
        summed = [(x, s) for x, s in pairs if isinstance(x, Tensor) and x.requires_grad]
        return Linear([(x, None if s == 1 else Factor(s, weight=True)) for x, s in summed])
    if name not in SCALING or len(graphs) == 2:
        return None
    divides, number = SCALING[name], given[1] if given[0] is graphs[0] else given[0]
    if divides and (reverse or number is given[0]):
        return None
    value, counted = float(number), isinstance(number, Tensor)
    literal = not isinstance(number, Tensor) and literal_operand(calling_frame())
    if divides:  # half of a sum is a weight; a third may be one, or N
        by = 1 / value if value else torch.inf
        factor = Factor(by, literal and value == 2, literal, counted, divides=True)
        return Linear([(graphs[0], factor)])
    return Linear([(graphs[0], Factor(value, literal, literal, counted))])


@dataclass(slots=True)
class _Form:
    terms: list[Term]
    tensor: Tensor
    """Kept, so that no other tensor gets its identity."""


class ScalarForms(TorchFunctionMode):
    """Follows the arithmetic on scalars within its block."""

    def __init__(self) -> None:
        super().__init__()
        self._forms: dict[int, _Form] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = linear(func, args, kwargs) if args else None
        # An operation in place changes its operand, of which the terms are already known.
        given = [] if form is None else form.operands
        operands = [
            (self.terms(x), f) if id(x) in self._forms else ([Term(x.clone(), "loss")], f)
            for x, f in given
        ]
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or output.numel() != 1 or not output.requires_grad:
            return output
        terms = [Term(output.clone(), term_name(func))]  # which no later operation changes in place
        if form is not None:
            terms = [
                Term(term.tensor, term.name, (*term.factors, *([factor] if factor else [])))
                for operand, factor in operands
                for term in operand
            ]
        self._forms[id(output)] = _Form(terms, output)
        return output

    def terms(self, loss: Tensor) -> list[Term]:
        """Return the terms of a loss; the loss itself where it is none of the block's scalars."""
        found = self._forms.get(id(loss))
        return found.terms if found else [Term(loss, "loss")]


def term_name(function: Any) -> str:
    """Return a name for what an operation puts out: a loss function's own, or the line of the source."""
    name = str(getattr(function, "__name__", "loss"))
    if name.endswith(LOSS_NAMES):
        return name
    frame = calling_frame()
    return (frame and source_line(frame.f_code.co_filename, frame.f_lineno)) or name


def source_line(file: str, line: int) -> str:
    """Return a line of a source in quotes, without its middle where that is long; empty: not known."""
    said = linecache.getline(file, line).strip()
    return f"`{said if len(said) <= 60 else said[:57] + '...'}`" if said else ""


def calling_frame() -> FrameType | None:
    """Return the innermost frame outside of torch and of the audit."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _in_library(frame):
        frame = frame.f_back
    return frame


def call_site() -> int:
    """Return a number for the place of a call: the positions of all frames above it."""
    site, frame = 0, calling_frame()
    while frame is not None:
        site = hash((site, id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return site


def calling_functions() -> tuple[tuple[int, CodeType], ...]:
    """Return the functions that are running, the innermost first: of each a number of its call, and its
    code."""
    found, frame = [], calling_frame()
    while frame is not None:
        if not _in_library(frame):
            found.append((id(frame), frame.f_code))
        frame = frame.f_back
    return tuple(found)


def _in_library(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == "torch" or name.startswith(("torch.", *(f"{each}." for each in LIBRARIES)))


def literal_operand(frame: FrameType | None) -> bool:
    """Whether an operand of the binary operation that a frame is at is a number in its source."""
    if frame is None:
        return False
    positions = list(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2 + 1))
    first, last, start, end = positions[-1] if positions else (None,) * 4
    if first is None or start is None:
        return False
    return any(
        (line, column) == (first, start) or (last_line, last_column) == (last, end)
        for line, last_line, column, last_column in _literals(frame.f_code)
    )


@functools.lru_cache(maxsize=256)
def _literals(code: CodeType) -> list[tuple[Any, ...]]:
    """Return where numbers stand in the source of a function: line, last line, column, last column."""
    return [
        tuple(instruction.positions)
        for instruction in dis.get_instructions(code)
        if instruction.positions is not None
        and instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT")
        and isinstance(instruction.argval, (int, float))
    ]
