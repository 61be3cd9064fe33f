"""A taped window that can be run again: in its micro-batches, and with all samples at once.

Its loss is a sum of terms, one for each scalar that the loop back-propagates in a micro-batch, or for
each that such a scalar is the sum of. Every term is weighed by itself, since each may have a
denominator of its own.
"""

import copy
import functools
import inspect
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.audit.causes.loss_coupling import coupling_of
from gaccum_exp.audit.rerun.passes import Cast, ForwardContext
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.watch import tape
from gaccum_exp.audit.watch.first_values import FirstValues
from gaccum_exp.audit.watch.kept_features import KeptFeatures
from gaccum_exp.audit.watch.scalars import LOSS_NAMES, Factor, ScalarForms, Term, source_line
from gaccum_exp.audit.watch.slots import Slot
from gaccum_exp.audit.watch.tape import Outputs, TapedCall, TapedMicroBatch, made_of, resolved
from gaccum_exp.core.joined_samples import NotJoinableError, SampleLayout, own_rows
from gaccum_exp.core.nesting import mapped, tensors_in
from gaccum_exp.core.sample_reading import sample_layouts

SAME_FACTOR = 1e-5
"""Relative: how close a factor of the whole pass is to that of a micro-batch where it is a constant."""
SAME_LOSS = 1e-4
"""Relative, and in parts of the largest: how close the gradients are of what is one loss."""
OTHERS = (
    "the loss of each micro-batch takes in features of the others, and is not one loss of all of them: "
    "what it is over the whole window cannot be seen from outside"
)
BESIDE = "beside"
"""Stands for the modules beside model and loss, and for the loop's own tensors."""
Holding = Sequence[Any] | None
"""Modules, and BESIDE; None: everything."""


class CouplingError(NotJoinableError):
    """The loop mixes samples outside of model and loss."""


@dataclass(slots=True)
class _Column:
    """Corresponding calls, one of each micro-batch; None where a micro-batch has none."""

    calls: list[TapedCall | None]
    layout: SampleLayout | None
    """Where the samples are in the arguments of those that there are; None: they have scalars alone."""
    sizes: list[int]
    """Samples in each micro-batch's call; 0 where there is none."""
    by_element: bool = False
    """Whether its tensors are laid end to end, of sequences of other lengths: none is padded then."""
    whole: list[TapedCall] = field(default_factory=list)
    """Of a loss that takes in features kept from other passes: each call with all of them alive."""

    @property
    def first(self) -> TapedCall:
        """The first call that there is."""
        return next(call for call in self.calls if call is not None)

    @property
    def computed(self) -> bool:
        """Whether an argument comes from other calls."""
        return bool(self.first.refs())


@dataclass(slots=True)
class TermWeights:
    """What the loop multiplies one term's gradients by."""

    name: str
    weights: list[float]
    """Of each micro-batch's ∇ℓᵢ: d(what was back-propagated) / dℓᵢ, as the loop's precision has it."""
    literal: float
    """The part of them that stands in the source: a weight of the term, and no N."""
    counted: float
    """The part that is a tensor of the loop's: what a window counts, and no N."""
    factors: tuple[Factor, ...]
    """Those of the loop's own arithmetic, one by one."""

    @property
    def numbers(self) -> list[float]:
        """Those of them that are neither literals nor counted."""
        return [f.value for f in self.factors if not (f.counted or f.literal or f.weight)]


@dataclass(slots=True)
class _Forms:
    """The terms of each loss, as the runs so far have shown them."""

    micro: dict[tuple[int, int], list[Term]] = field(default_factory=dict)
    """By column and micro-batch, without tensors' use: names and factors."""
    constant: dict[int, list[list[bool]]] = field(default_factory=dict)
    """By column and term: which factors are the same number for any batch."""


class TapedWindow:
    """The micro-batches of a tape as a `RerunnableWindow`.

    Args:
        modules: of model and loss.
        micro_batches: of the tape.
        layout: where the samples are in the arguments of each one's first call.
        moved: what moved in the window, and what the large batch would have met in its place.
        kept: which losses take in features kept from other passes.
        sharing: whether what later calls are given alike in all micro-batches is shared by these, as are
            the weights of so many classes as there are samples.

    Raises:
        NotJoinableError: they do not make one batch.
    """

    def __init__(
        self,
        modules: NamedModules,
        micro_batches: Sequence[TapedMicroBatch],
        layout: SampleLayout,
        moved: FirstValues | None = None,
        kept: KeptFeatures | None = None,
        *,
        sharing: bool = False,
    ) -> None:
        self.modules = modules
        self._sharing = sharing
        self.shares = False
        """Whether something is shared so."""
        self._kept_features = kept
        self.layout = layout
        self.moved = moved or FirstValues()
        """The one pass meets its values; micro-batches do where they are held."""
        self._holding: Holding = ()
        self.moves = self.moved.moves
        self.moved_beside = [(each, [each]) for each in self.moved.inside]
        self.moved_beside += [(name, [BESIDE]) for name in self.moved.owners[:1]]
        self.moved_beside += [(each, [BESIDE]) for each in self.moved.mixing[:1]]
        self._micro_batches = micro_batches
        self._alive, self._whole = (kept.alive, kept.whole) if kept else ({}, {})
        self._models, self._losses = (
            [self._column(calls) for calls in corresponding(each)]
            for each in ([m.models for m in micro_batches], [m.losses for m in micro_batches])
        )
        columns = [column for column in (*self._models, *self._losses) if not column.whole]
        self.sizes = layout.sizes
        started = [next((c.start for c in m.calls if c.start), []) for m in micro_batches]
        self.starts = [start for start in started if start]
        """The random states in which they began."""
        layouts = [column.layout for column in columns if column.layout is not None]
        self.padded = any(each.padded for each in layouts)
        """Whether joining the micro-batches pads their sequences."""
        self.guessed = [shapes for each in layouts for shapes in each.guessed]
        """The shapes of tensors of other lengths, taken for samples of their own."""
        self.differing = list(dict.fromkeys(name for each in layouts for name in each.differing))
        """Names of arguments that belong to no sample, and differ between micro-batches."""
        self._first_values = self._padding = False
        self._forms = _Forms()
        self._micro_weights: list[list[float]] | None = None
        self._whole_weights: list[float] | None = None
        self.coefficients: list[list[float] | None] = []
        """By term, of the ∇ℓᵢ in the gradient of ℓ; None where it is no combination of them."""
        sizes = {
            c: n for column in columns for c, n in zip(column.calls, column.sizes, strict=True) if c
        }
        found = (coupling_of(m, sizes, layout.dim, self._alive) for m in micro_batches)
        why = next((why for why in found if why is not None), None)
        if why is not None:
            raise CouplingError(why)

    def weighed(
        self,
        micro: Sequence[Sequence[float]],
        whole: Sequence[float],
        coefficients: Sequence[list[float] | None] = (),
    ) -> "TapedWindow":
        """Return the same window with these weights of each term, in micro-batches and in one pass."""
        other = copy.copy(self)
        other._micro_weights, other._whole_weights = [list(w) for w in micro], list(whole)
        other.coefficients = list(coefficients)
        return other

    def doubled(self) -> "TapedWindow":
        """Return the window with every micro-batch twice."""
        twice = [*range(len(self.sizes))] * 2
        micro_batches = [self._micro_batches[i] for i in twice]
        return TapedWindow(
            self.modules, micro_batches, self.layout.of(twice), self.moved, self._kept_features,
            sharing=self.shares,  # of one micro-batch, twice, all would seem to be shared
        )  # fmt: skip

    def holding(self, owners: Holding) -> "TapedWindow":
        """Return the window in which the state of these keeps still between micro-batches."""
        other = copy.copy(self)
        other._holding = owners
        return other

    def with_first_values(self) -> "TapedWindow | None":
        """Return the window with the first micro-batch's values of what differs; None: nothing does."""
        if not self.differing:
            return None
        other = copy.copy(self)
        other._first_values = True
        return other

    def padded_alone(self) -> "TapedWindow | None":
        """Return the window whose micro-batches are as long as the longest; None: they are."""
        if not self.padded:
            return None
        other = copy.copy(self)
        other._padding = True
        return other

    def only(self, term: int) -> "TapedWindow":
        """Return the window with one of its terms alone, of weight 1 everywhere."""
        count = len(self.terms())
        micro = [[float(t == term)] * len(self.sizes) for t in range(count)]
        return self.weighed(micro, [float(t == term) for t in range(count)])

    def terms(self) -> list[TermWeights]:
        """Return each term's weights in the loop; the window must have run once in either way."""
        found = []
        for c, column in enumerate(self._losses):
            shown = next(
                self._forms.micro[c, i] for i in range(len(self.sizes)) if (c, i) in self._forms.micro
            )
            for t, constant in enumerate(self._constant(c)):
                weights = []
                for i, call in enumerate(column.calls):
                    by = 0.0 if call is None else _number(call.cotangent)
                    weights.append(by * _constant_part(self._forms.micro, c, i, t, constant))
                first, literal = column.first, [f for f in _factors(shown, t, constant) if f.weight]
                # A loop divides by a literal N; what it multiplies by is a weight.
                literal += [f for f in first.factors if f.weight and not f.divides]
                counted = math.prod(f.value for f in first.factors if f.counted)
                name = shown[t].name if t < len(shown) else "loss"
                name = "the penalty on the weights" if first.of_weights_alone else name
                of_source = math.prod(f.value for f in literal)
                found.append(TermWeights(name, weights, of_source, counted, first.factors))
        return found

    def accumulate(self, context: ForwardContext, cast: Cast) -> None:
        """Run the micro-batches as the loop did, or with the weights that were given."""
        kept = self._kept(cast)
        for index in range(len(self._micro_batches)):
            with context(index):
                losses = self._losses_of(index, cast, kept)
            pairs = [(x, w) for x, w in self._weighed(losses, index) if w != 0 and x.requires_grad]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [torch.full_like(x, w) for x, w in pairs])

    def one_pass(self, context: AbstractContextManager[None], cast: Cast, order: Tensor | None) -> None:
        """Run all samples at once, through the loop's own model and loss."""
        with context:
            losses = self._whole_losses(cast, order)
        for c, terms in enumerate(losses):
            self._see_whole(c, terms)
        pairs = [(x, w) for x, w in self._weighed(losses, None) if w != 0 and x.requires_grad]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [torch.full_like(x, w) for x, w in pairs])

    def forward(self, index: int | None, cast: Cast) -> tuple[Tensor, Any]:
        """Return the loss, and what it counts where the criterion says so (NaN else)."""
        counts = self.counts() or [math.nan] * len(self.sizes)
        if index is None:
            losses, count = self._whole_losses(cast, None), sum(counts)
        else:
            # As they are in the one pass, so that module by module samples can be compared.
            window, kept = self.holding(None), self._kept(cast)
            losses = (window.padded_alone() or window)._losses_of(index, cast, kept)
            count = counts[index]
        total = sum(t.tensor.double() for terms in losses for t in terms)
        assert isinstance(total, Tensor)
        return total, count

    def additive(self, parts: Sequence[tuple[float, Any]], whole: tuple[float, Any]) -> bool:
        """Whether the one pass's gradient is a combination of the micro-batches' gradients."""
        return bool(self.coefficients) and None not in self.coefficients

    @property
    def coupled(self) -> list[str]:
        """The names of the terms that are no sums over samples."""
        if len(self.coefficients) < 2:
            return []
        pairs = zip(self.terms(), self.coefficients, strict=True)
        return [term.name for term, coefficients in pairs if coefficients is None]

    def recounted(self, counts: Sequence[float]) -> "TapedWindow | None":
        """Return the window with the large batch's weight for each micro-batch, term by term."""
        if not self.coefficients or all(c is None for c in self.coefficients):
            return None
        assert self._whole_weights is not None
        assert self._micro_weights is not None
        micro = [
            own if coefficients is None else [c * whole for c in coefficients]
            for own, coefficients, whole in zip(
                self._micro_weights, self.coefficients, self._whole_weights, strict=True
            )
        ]
        return self.weighed(micro, self._whole_weights, self.coefficients)

    def counts(self) -> list[float] | None:
        """Return what each micro-batch's loss counts, for criteria that are known to count."""
        return self.counts_of(0) if len(self._losses) == 1 else None

    def counts_of(self, column: int) -> list[float] | None:
        """Return what each micro-batch's loss in a column counts, likewise."""
        calls = self._losses[column].calls
        found = [0.0 if call is None else tape.count_of(call) for call in calls]
        known = [n for n in found if n is not None]
        return known if len(known) == len(found) else None

    def column_of(self, term: int) -> int:
        """Return the loss that a term belongs to."""
        return [c for c in range(len(self._losses)) for _ in self._constant(c)][term]

    def sizes_of(self, column: int) -> list[int]:
        """Return the samples in each micro-batch of a loss."""
        sizes = self._losses[column].sizes
        return sizes if any(sizes) else self.sizes

    def of_the_whole(self, column: int) -> bool:
        """Whether each micro-batch's loss is one over all of the window's features."""
        return bool(self._losses[column].whole)

    @property
    def shares_scalars(self) -> bool:
        """Whether the loop makes scalars of its own from the model's for a loss of kept features."""
        losses = [call for column in self._losses for call in column.whole]
        return any(
            call.kind == "between" and call.outputs[:1] and call.outputs[0][0] == ()
            for call in made_of(losses)
        )

    def sums(self, column: int) -> bool:
        """Whether a loss is known to reduce by a sum."""
        for loss in filter(None, self._losses[column].calls):
            of_criterion = loss.attributes[0][1] if loss.attributes else {}
            said = loss.arguments.get("reduction", of_criterion.get("reduction"))
            if said != "sum" and getattr(loss.function, "__name__", "") not in ("sum", "nansum"):
                return False
        return True

    def of_weights_alone(self, column: int) -> bool:
        """Whether a loss is a penalty on the weights: the same for any samples."""
        return self._losses[column].first.of_weights_alone

    @property
    def computed_by_user(self) -> bool:
        """Whether a loss is computed by the user's own code, which may hold terms and factors."""
        functions = [column.first.function for column in self._losses]
        return any(f is tape.models_own_loss or _own_code(f) for f in functions)

    @property
    def constants_outside(self) -> bool:
        """Whether no loss function multiplies by a constant itself."""
        return not any(self.constants_inside(t) for t in range(len(self.terms())))

    def constants_inside(self, term: int) -> list[Factor]:
        """Return the factors, and no literals, that a loss function multiplies a term by itself."""
        column = self.column_of(term)
        micro = next(terms for (c, _), terms in self._forms.micro.items() if c == column)
        t = term - sum(len(self._constant(c)) for c in range(column))
        return [f for f in _factors(micro, t, self._constant(column)[t]) if not f.weight]

    def literal_inside(self, column: int) -> float:
        """Return the weight that a loss function's own source gives its only term."""
        micro = next(terms for (c, _), terms in self._forms.micro.items() if c == column)
        constant = self._constant(column)
        return math.prod(f.value for f in _factors(micro, 0, constant[0]) if f.weight)

    def _column(self, calls: list[TapedCall | None]) -> _Column:
        there = [call for call in calls if call is not None]
        whole = [self._whole.get(call, self._alive[call]) for call in there if call in self._alive]
        if len(whole) == len(calls):
            return _Column(calls, None, [1] * len(calls), whole=whole)
        if len(there) == len(self._micro_batches) and there[0] is self._micro_batches[0].first:
            return _Column(calls, self.layout, self.layout.sizes)
        given = [tape.shapes_of(call.arguments, self.moved.values) for call in there]
        if there[0].of_weights_alone or not any(tensor.ndim for tensor in tensors_in(given)):
            return _Column(calls, None, [int(call is not None) for call in calls])
        by_element = tape.by_element(there)
        given = [_laid_out(each) for each in given] if by_element else given
        others = [[shape for shape, _ in call.outputs] for call in there]
        sizes = self.layout.sizes if len(there) == len(calls) else None
        how: dict[str, Any] = {"others": others, "sizes": sizes, "apart": True, "guess": True}
        how["label"] = tape.ignored_label(there[0])
        readings: list[SampleLayout] = []
        if self.layout.dim == 0:  # what has samples of its own has them there, too
            with suppress(NotJoinableError):
                readings = sample_layouts(given, dim=0, **how)
        if not readings:
            readings = sample_layouts(given, **how)
        along = next((r for r in readings if r.dim == self.layout.dim), readings[0])
        if sizes is not None and list(along.sizes) != list(sizes):
            # That dimension may count time (of CTC's log-probabilities): more tensors tell than one.
            fitting = [r for r in readings if list(r.sizes) == list(sizes)]
            along = next((r for r in fitting if r.agreeing > along.agreeing), along)
        along = along.with_labels_last() if self.layout.labels_last else along
        shared = along.sharing_equals(given) if self._sharing else None
        self.shares |= shared is not None
        along = shared or along
        numbers = iter(along.sizes)
        own = [0 if call is None else next(numbers) for call in calls]
        return _Column(calls, along, own, by_element)

    def _weighed(self, losses: list[list[Term]], index: int | None) -> list[tuple[Tensor, float]]:
        """Return every term and its weight, in a micro-batch or (None) in the one pass."""
        pairs: list[tuple[Tensor, float]] = []
        given = self._whole_weights if index is None else self._micro_weights
        for c, terms in enumerate(losses):
            if given is None:  # as the loop has them
                call = self._losses[c].first if index is None else self._losses[c].calls[index]
                by = 0.0 if call is None else _number(call.cotangent)
                pairs += [(t.tensor, by * math.prod(f.value for f in t.factors)) for t in terms]
                continue
            if not terms:  # a micro-batch without this loss
                pairs += [(torch.zeros(()), 0.0)] * len(self._constant(c))
                continue
            for constant, term in zip(self._constant(c), self._collapsed(c, terms), strict=True):
                weight: Any = given[len(pairs)]
                weight = weight if index is None else weight[index]
                own = [f.value for f, same in zip(term.factors, constant, strict=True) if not same]
                pairs.append((term.tensor, weight * math.prod(own)))
        return pairs

    def _constant(self, column: int) -> list[list[bool]]:
        return self._forms.constant.get(column, [[]])

    def _collapsed(self, column: int, terms: list[Term]) -> list[Term]:
        """Return the terms of a loss; where they differ from run to run, the loss as its only one."""
        constant = self._constant(column)
        if len(terms) == len(constant) and all(
            len(t.factors) == len(c) for t, c in zip(terms, constant, strict=True)
        ):
            return terms
        total = sum(t.tensor * math.prod(f.value for f in t.factors) for t in terms)
        return [Term(total if isinstance(total, Tensor) else torch.zeros(()), "loss")]

    def _see_whole(self, column: int, whole: list[Term]) -> None:
        """Find out which factors are the same numbers in the one pass as in every micro-batch."""
        if column in self._forms.constant:
            return
        parts = [terms for (c, _), terms in self._forms.micro.items() if c == column]
        shape = [len(t.factors) for t in whole]
        if any([len(t.factors) for t in terms] != shape for terms in parts):
            self._forms.constant[column] = [[]]
            return
        self._forms.constant[column] = [
            [
                all(
                    math.isclose(part[t].factors[k].value, f.value, rel_tol=SAME_FACTOR)
                    for part in parts
                )
                for k, f in enumerate(term.factors)
            ]
            for t, term in enumerate(whole)
        ]

    def _kept(self, cast: Cast) -> Outputs:
        """Return the outputs of all micro-batches' calls without graphs, where losses take them in."""
        outputs: Outputs = {}
        with torch.no_grad():
            for call in (c for column in self._models for c in column.calls if c and self._alive):
                arguments = resolved(call.arguments, outputs, cast)
                outputs[call] = call.put_out(arguments, call.states)
        return outputs

    def _losses_of(self, index: int, cast: Cast, kept: Outputs) -> list[list[Term]]:
        outputs = dict(kept)
        uncut: Outputs = {}
        """The model's outputs with their padding, where micro-batches are padded."""
        held = self._holding
        values = self.moved.values if held is None or BESIDE in held else None
        still = {id(owner) for owner in held or ()}

        def same_shapes(padded: Any, call: TapedCall) -> bool:
            """Whether what is made of the outputs, a pooled state, is of one shape for any length."""
            pairs = zip(tensors_in(padded), tensors_in(tape.shapes_of(call.arguments)), strict=True)
            return all(one.shape == other.shape for one, other in pairs)

        def states(call: TapedCall) -> list[tuple[Slot, Any]]:
            return [s for s in call.states if held is not None and id(s[0].owner) not in still]

        def arguments(column: _Column, call: TapedCall) -> Any:
            given = call.arguments
            if self._first_values and column.layout is not None:
                given = column.layout.with_first_values([column.first.arguments, given])[1]
            with suppress(RuntimeError, IndexError):  # what is as long as the micro-batch does not fit
                if uncut and column.computed and call.kind == "loss":
                    padded = resolved(given, {**kept, **uncut}, cast, values)
                    if same_shapes(padded, call):
                        return padded
            given = resolved(given, outputs, cast, values)
            given = _laid_out(given) if column.by_element else given
            return column.layout.padded_alone(given) if self._padding and column.layout else given

        with self._forms_of_model() as forms:
            for column in self._models:
                if (call := column.calls[index]) is not None:
                    found = call.put_out(arguments(column, call), states(call))
                    outputs[call] = found
                    if self._padding and column.layout is not None:
                        uncut[call] = found
                        outputs[call] = _rows(call, found, [column.sizes[index]], 0, None, column.layout)
        losses = []
        for c, column in enumerate(self._losses):
            taped, terms = column.calls[index], list[Term]()
            if taped is not None:
                given = self._alive.get(taped, taped)
                terms = _run(taped, arguments(column, given), forms, states(taped))
            if taped is not None:
                self._forms.micro.setdefault((c, index), [t.without_tensor() for t in terms])
            losses.append(terms)
        return losses

    def _whole_losses(self, cast: Cast, order: Tensor | None) -> list[list[Term]]:
        """Run all samples at once; operations between model and loss run on each micro-batch's rows."""
        each: list[Outputs] = [{} for _ in self._micro_batches]
        of_no_sample: set[tuple[int, int]] = set()
        """Outputs that the samples of the window have in common, as a criterion's vector of losses."""

        def arguments(column: _Column) -> Any:
            there = [
                (c, outputs) for c, outputs in zip(column.calls, each, strict=True) if c is not None
            ]
            whole_scalars(column.calls)
            whole_of_gradients(column.calls, set())
            values = self.moved.values
            given = [resolved(call.arguments, outputs, cast, values) for call, outputs in there]
            outer = [
                r for ref in column.first.refs() for r in tape.all_of(ref) if r.call.kind == "model"
            ]
            if column.layout is None or (
                outer and {(id(r.call), r.place) for r in outer} <= of_no_sample
            ):
                return given[0]
            given = [_laid_out(each) for each in given] if column.by_element else given
            inputs = column.layout.joined(given)
            here = _order_of(order, self.sizes, column.sizes)
            if here is None or column.computed:  # else they come in the order of the rows
                return inputs
            return column.layout.picked(inputs, here)

        def whole_scalars(calls: Sequence[TapedCall | None]) -> None:
            """Take what a loss makes of other losses from the one pass."""
            first = next(call for call in calls if call is not None)
            for place, ref in enumerate(first.refs()):
                if ref.call.kind == "model" or ref.call.outputs[ref.place][0] != ():
                    continue
                inner = [None if call is None else call.refs()[place].call for call in calls]
                if not any(call in outputs for call in inner for outputs in each):
                    made = arguments(self._column(inner))
                    found = ref.call.put_out(made)
                    for outputs in each:
                        outputs.update({call: found for call in inner if call is not None})

        def whole_of_gradients(calls: Sequence[TapedCall | None], seen: set[TapedCall]) -> None:
            """Take what a gradient is asked of from the one pass, where that is a scalar."""
            first = next(call for call in calls if call is not None)
            for place, ref in enumerate(first.refs()):
                if ref.call.kind != "model" and ref.call not in seen:
                    seen.add(ref.call)
                    inner = [None if call is None else call.refs()[place].call for call in calls]
                    if ref.call.function is tape.gradient_asked_for:
                        whole_scalars(inner)
                    whole_of_gradients(inner, seen)

        with self._forms_of_model() as forms:
            for column in self._models:
                outputs = column.first.put_out(arguments(column))
                of_no_sample |= _of_no_sample(column, outputs)
                here = None if column.computed else _order_of(order, self.sizes, column.sizes)
                for index, call in enumerate(column.calls):
                    if call is not None:
                        each[index][call] = _rows(
                            call, outputs, column.sizes, index, here, column.layout
                        )
        losses = []
        for column in self._losses:
            if column.whole:
                rows = {call: own for outputs in each for call, own in outputs.items()}
                values, every = self.moved.values, dict(rows)
                given = [resolved(call.arguments, every, cast, values) for call in column.whole]
                losses.append(_of_the_whole(column.whole, given, rows))
            elif column.first.function is tape.models_own_loss:
                ref = column.first.refs()[0]
                own = each[column.calls.index(column.first)][ref.call][ref.place]
                losses.append(_run(column.first, {0: own}, forms))
            else:
                losses.append(_run(column.first, arguments(column), None))
        return losses

    def _forms_of_model(self) -> AbstractContextManager[ScalarForms | None]:
        """Follow the scalars inside the model, where it computes its loss itself."""
        own = any(column.first.function is tape.models_own_loss for column in self._losses)
        return ScalarForms() if own else nullcontext()


def sample_readings(
    micro_batches: Sequence[TapedMicroBatch], dim: int | None, moved: FirstValues | None = None
) -> list[SampleLayout]:
    """Return where the samples of the micro-batches' first calls may be, the likeliest first.

    Args:
        micro_batches: of the tape.
        dim: the dimension of the model's inputs that counts samples; None: what the shapes agree on.
        moved: what moved in the window, and its first values.

    Raises:
        NotJoinableError: they do not make one batch.
    """
    values = moved.values if moved is not None else None
    given = [tape.shapes_of(m.first.arguments, values) for m in micro_batches]
    around = tape.shapes_around(micro_batches)
    layouts = sample_layouts(given, others=around, dim=dim, apart=True, guess=True)
    return layouts + [other for layout in layouts if (other := layout.sharing_equals(given))]


def corresponding(every: Sequence[list[TapedCall]]) -> list[list[TapedCall | None]]:
    """Return the calls that correspond to each other: by their order, or by where they are called."""
    if len({len(calls) for calls in every}) == 1:
        return [list(calls) for calls in zip(*every, strict=True)]
    placed: list[dict[tuple[int, int], TapedCall]] = []
    for calls in every:
        found: dict[tuple[int, int], TapedCall] = {}
        for call in calls:
            nth = sum(site == call.site for site, _ in found)
            found[call.site, nth] = call
        placed.append(found)
    keys = dict.fromkeys(key for found in placed for key in found)
    columns: list[list[TapedCall | None]] = [[found.get(key) for found in placed] for key in keys]
    if max(len(calls) for calls in every) != len(columns):
        raise NotJoinableError("micro-batches differ in how often they call model and loss")
    return columns


def _order_of(order: Tensor | None, sizes: list[int], own: list[int]) -> Tensor | None:
    """Return the order of a call's samples that goes with an order of the window's."""
    if order is None or own == sizes:
        return order
    by, rest = divmod(sum(own), sum(sizes))
    if rest or [n * by for n in sizes] != own:
        return None
    return (order[:, None] * by + torch.arange(by, device=order.device)).flatten()


def _laid_out(arguments: Any) -> Any:
    """Return arguments with all elements of their tensors in one row."""
    return mapped(lambda x: x.flatten() if isinstance(x, Tensor) else x, arguments)


def _of_no_sample(column: _Column, whole: list[Tensor]) -> set[tuple[int, int]]:
    """Return the outputs, but scalars, that have as many rows for all samples as for a micro-batch's."""
    several = sum(n > 0 for n in column.sizes) > 1
    return {
        (id(call), place)
        for call in column.calls if call is not None and several
        for place, (tensor, (shape, _)) in enumerate(zip(whole, call.outputs, strict=True))
        if shape and tuple(tensor.shape) == shape
    }  # fmt: skip


def _rows(
    call: TapedCall,
    whole: list[Tensor],
    sizes: list[int],
    index: int,
    order: Tensor | None,
    layout: SampleLayout | None,
) -> list[Tensor]:
    """Return a micro-batch's own rows of the model's outputs for all samples, without their padding."""
    start, size, total = sum(sizes[:index]), sizes[index], sum(sizes)
    where = torch.arange(total) if order is None else torch.argsort(order)
    own = where[start : start + size]
    dim, padded = (0, False) if layout is None else (layout.dim, layout.padded)
    return [
        own_rows(tensor, shape, own, total, dim, padded)
        for tensor, (shape, _) in zip(whole, call.outputs, strict=True)
    ]


def _run(
    call: TapedCall,
    arguments: Any,
    of_model: ScalarForms | None,
    states: Sequence[tuple[Slot, Any]] = (),
) -> list[Term]:
    """Run a loss; return the terms that it is the sum of."""
    if call.function is tape.models_own_loss and of_model is not None:
        loss = arguments[0]
        return of_model.terms(loss) if loss.requires_grad else [Term(loss, "loss")]
    if not _own_code(call.function):
        loss = _loss_of(call.run(arguments, states))
        return [Term(loss, _name_of(call))]
    with ScalarForms() as forms:
        loss = _loss_of(call.run(arguments, states))
    return forms.terms(loss) if loss.requires_grad else [Term(loss, "loss")]


def _name_of(call: TapedCall) -> str:
    """Return a name for a loss of torch's or of the loop's own arithmetic: that of the function, or the
    line of the source."""
    if isinstance(call.function, nn.Module):
        return type(call.function).__name__
    name = str(getattr(call.function, "__name__", "loss"))
    if call.place is None or name.endswith(LOSS_NAMES):
        return name
    return source_line(*call.place) or name


def _of_the_whole(calls: list[TapedCall], given: Sequence[Any], outputs: Outputs) -> list[Term]:
    """Run the loss over the whole window, which each of these calls is to be."""
    every = [_run(call, arguments, None) for call, arguments in zip(calls, given, strict=True)]
    alive = [tensor for tensors in outputs.values() for tensor in tensors if tensor.requires_grad]
    if not alive:  # a forward pass alone
        return every[0]
    totals = [sum(t.tensor * math.prod(f.value for f in t.factors) for t in terms) for terms in every]
    gradients = [
        torch.autograd.grad(total, alive, retain_graph=True, allow_unused=True, materialize_grads=True)
        for total in totals
        if isinstance(total, Tensor)
    ]
    for gradient in gradients[1:]:
        for one, other in zip(gradients[0], gradient, strict=True):
            if not torch.allclose(one, other, rtol=SAME_LOSS, atol=SAME_LOSS * float(one.abs().max())):
                raise CouplingError(OTHERS)
    return every[0]


def _own_code(function: Any) -> bool:
    """Whether a loss is computed by Python code that is none of torch's."""
    while isinstance(function, functools.partial):
        function = function.func
    if function is tape.models_own_loss:
        return False
    if isinstance(function, nn.Module):
        function = type(function).forward
    elif not inspect.isroutine(function):
        function = type(function).__call__
    code = getattr(inspect.unwrap(function), "__globals__", None)
    return code is not None and not str(code.get("__name__", "")).startswith("torch.")


def _loss_of(output: Any) -> Tensor:
    loss = tape.loss_in(output)
    if loss is None:
        raise NotJoinableError("run again, the loss has no gradient")
    return loss


def _number(cotangent: Tensor | None) -> float:
    return 0.0 if cotangent is None else float(cotangent)


def _factors(terms: list[Term], t: int, constant: list[bool]) -> list[Factor]:
    if t >= len(terms) or len(terms[t].factors) != len(constant):
        return []
    return [f for f, same in zip(terms[t].factors, constant, strict=True) if same]


def _constant_part(
    micro: dict[tuple[int, int], list[Term]], column: int, index: int, t: int, constant: list[bool]
) -> float:
    return math.prod(f.value for f in _factors(micro.get((column, index), []), t, constant))
