"""Features that a loop keeps from other passes over its window, as a contrastive loss needs them.

Such a loop takes the features of all samples without a graph first. Then each micro-batch's loss is one
over all of them, with those of its own samples alive; or the loss is taken once, and each micro-batch
gets the gradient at its own features (a surrogate). The large batch has all features alive. Kept ones
are known by their values: each of their rows is one that a pass with a graph has put out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gaccum_exp.audit.watch.tape import (
    OutputRef,
    ParameterRef,
    Tape,
    TapedCall,
    TapedMicroBatch,
    leaves,
    made_of,
    row_marks,
)
from gaccum_exp.core.nesting import mapped

SAME_ROW = 1e-5
"""How close the marks of two rows are that hold the same numbers, in parts of the largest mark."""
UNKNOWN_LOSS = (
    "the loop back-propagates a gradient that it took from features without a graph, and which "
    "features those are is not seen"
)


class UnknownLossError(ValueError):
    """The gradient that a loop hands on is that of a loss which is not known."""


@dataclass(frozen=True, slots=True)
class _Row:
    mark: float
    ref: OutputRef
    place: int
    micro_batch: int


@dataclass(slots=True)
class KeptFeatures:
    """What the micro-batches' passes have put out, by which kept features are known.

    Args:
        micro_batches: of the tape.
    """

    micro_batches: Sequence[TapedMicroBatch]
    alive: dict[TapedCall, TapedCall] = field(default_factory=dict)
    """Losses, and what they are made of, that kept features enter: the same with all these alive."""
    whole: dict[TapedCall, TapedCall] = field(default_factory=dict)
    """The same with parameters alive that a loss reads itself, as one micro-batch alone has them."""
    _owner: dict[TapedCall, int] = field(default_factory=dict)
    _rows: dict[tuple[int, ...], list[_Row]] = field(default_factory=dict)
    """By the shape of a row."""

    def __post_init__(self) -> None:
        # A loss of kept features alone may reach parameters by itself, e.g. a temperature.
        passes = [
            m for m in self.micro_batches if m.models or not all(x.of_kept_features for x in m.losses)
        ]
        self.micro_batches = passes or self.micro_batches
        for i, micro_batch in enumerate(self.micro_batches):
            for call in made_of([*micro_batch.models, *micro_batch.losses]):
                self._owner.setdefault(call, i)
        depths: dict[TapedCall, int] = {}
        for call in sorted(self._owner, key=lambda call: _depth(call, depths)):
            if call.kind != "model" and self._enliven(call, targets=True):
                continue
            for place, marks in enumerate(call.marks):  # what is made of these may be kept, too
                if marks is not None:
                    ref, shape = OutputRef(call, place), call.outputs[place][0][1:]
                    found = [_Row(m, ref, k, self._owner[call]) for k, m in enumerate(marks.tolist())]
                    self._rows.setdefault(shape, []).extend(found)
        for call in [c for c in self.alive if c.kind == "loss"]:
            self.alive[call] = _undetached(self.alive[call])

    def with_surrogates(self, tape: Tape) -> list[TapedMicroBatch]:
        """Return the micro-batches; for surrogates, each with the loss whose gradient it was given.

        Raises:
            UnknownLossError: which loss that is cannot be told.
        """
        taken = [call for call in tape.calls if call.kind == "loss" and call.of_kept_features]
        if not taken or any(len({_by(x) for x in m.losses}) > 1 for m in self.micro_batches):
            return list(self.micro_batches)
        owners: dict[TapedCall, set[int]] = {}
        for loss in taken:
            owners[loss] = set()
            for call in sorted(made_of([loss]), key=lambda call: call.order):
                self._owner[call] = -1
                self._enliven(call, targets=False, owners=owners[loss])
        every, of_one = set(range(len(self.micro_batches))), all(len(o) == 1 for o in owners.values())
        if not all(o == every for o in owners.values()) and not (
            of_one and set().union(*owners.values()) == every
        ):
            raise UnknownLossError(UNKNOWN_LOSS)
        found = []
        for i, micro_batch in enumerate(self.micro_batches):
            first = micro_batch.losses[0]
            own = [loss for loss in taken if i in owners[loss]]
            losses = [
                replace(
                    self.alive[loss] if len(owners[loss]) == 1 else loss,
                    backward=first.backward,
                    cotangent=torch.tensor(_by(first) * _by(loss)),
                )
                for loss in own
            ]
            for loss, copied in zip(own, losses, strict=True):
                if len(owners[loss]) > 1:
                    self.whole[copied] = self.alive[loss]
                    self.alive[copied] = _of_dead_parameters(self.alive[loss]) if i else self.alive[loss]
            found.append(TapedMicroBatch(micro_batch.models, losses))
        return found

    def _enliven(self, call: TapedCall, *, targets: bool, owners: set[int] | None = None) -> bool:
        """Find kept features among a call's arguments; its own samples' alone may be `targets`."""
        changed = False

        def leaf(x: Any) -> Any:
            nonlocal changed
            if isinstance(x, OutputRef) and x.call in self.alive:
                changed = True
                return OutputRef(self.alive[x.call], x.place)
            rows = self._rows_in(x) if isinstance(x, Tensor) else None
            if rows is None or (targets and all(r.micro_batch == self._owner[call] for r in rows)):
                return x
            changed = True
            if owners is not None:
                owners.update(row.micro_batch for row in rows)
            return _taken(rows, x, call)

        arguments = mapped(leaf, call.arguments)
        if changed:
            self.alive[call] = replace(call, arguments=arguments)
        return changed

    def _rows_in(self, kept: Tensor) -> list[_Row] | None:
        """Return the rows of passes that a tensor holds; None where it holds any other row."""
        rows = self._rows.get(tuple(kept.shape[1:]), []) if kept.ndim > 1 else []
        marks = row_marks(kept) if rows else None
        if marks is None:
            return None
        known = torch.tensor([row.mark for row in rows], dtype=torch.float64)
        nearest = (marks.cpu()[:, None] - known).abs().min(1)
        if not bool((nearest.values <= SAME_ROW * known.abs().max()).all()):
            return None
        return [rows[k] for k in nearest.indices.tolist()]


def _depth(call: TapedCall, depths: dict[TapedCall, int]) -> int:
    if call not in depths:
        depths[call] = max((_depth(ref.call, depths) + 1 for ref in call.refs()), default=0)
    return depths[call]


def _undetached(call: TapedCall) -> TapedCall:
    """Return the call with scalars of the model's alive that were detached.

    A scale that all samples share gets its gradient from every micro-batch's loss, so that a loop may
    detach a part of it; the features of samples are detached for their own sake.
    """

    def leaf(x: Any) -> Any:
        if not isinstance(x, OutputRef) or x.call.kind == "model":
            return x
        first = x.call.arguments.get(0)
        scalar = x.call.outputs[x.place][0] == () if x.call.outputs else False
        if scalar and not x.call.has_graph and isinstance(first, OutputRef):
            return leaf(first)
        made = _undetached(x.call)
        return x if made is x.call else OutputRef(made, x.place)

    arguments = mapped(leaf, call.arguments)
    same = all(a is b for a, b in zip(leaves(arguments), leaves(call.arguments), strict=True))
    return call if same else replace(call, arguments=arguments)


def _of_dead_parameters(call: TapedCall) -> TapedCall:
    """Return the call with the parameters detached that it reads itself."""

    def leaf(x: Any) -> Any:
        if isinstance(x, ParameterRef):
            made = TapedCall("between", torch.detach, {0: x}, call.order)
            made.outputs = [(tuple(x.tensor().shape), x.tensor().dtype)]
            return OutputRef(made, 0)
        if isinstance(x, OutputRef) and x.call.kind != "model":
            return OutputRef(_of_dead_parameters(x.call), x.place)
        return x

    return replace(call, arguments=mapped(leaf, call.arguments))


def _by(loss: TapedCall) -> float:
    return 0.0 if loss.cotangent is None else float(loss.cotangent)


def _taken(rows: list[_Row], like: Tensor, call: TapedCall) -> OutputRef:
    """Return a reference to these rows of other calls' outputs."""
    refs = list({(id(row.ref.call), row.ref.place): row.ref for row in rows}.values())
    starts, total = dict[tuple[int, int], int](), 0
    for ref in refs:
        starts[id(ref.call), ref.place] = total
        total += ref.call.outputs[ref.place][0][0]
    picked = [starts[id(r.ref.call), r.ref.place] + r.place for r in rows]
    if len(refs) == 1 and picked == list(range(total)):
        return refs[0]
    places = torch.tensor(picked, device=like.device)
    made = TapedCall("between", _rows_of, {0: refs, 1: places}, call.order)
    made.outputs, made.has_graph = [(tuple(like.shape), like.dtype)], True
    return OutputRef(made, 0)


def _rows_of(tensors: list[Tensor], picked: Tensor) -> Tensor:
    return torch.cat(tensors)[picked]
