"""A loss of several criteria as a loss function, each of them of an output and a target of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.losses.micro_batch import Keywords, outputs_in, run_model, split_micro_batch
from gaccum_exp.core.losses.protocol import Clamped, Counts
from gaccum_exp.errors import BadInputError, nearest

Place = str | int | Sequence[str | int] | None
"""Where outputs or targets are: a key, an index, several of them, or all there are (None)."""


@dataclass(frozen=True, slots=True)
class CriterionTerm:
    """One criterion of several."""

    criterion: nn.Module
    output: Place = None
    """Of what the model puts out."""
    target: Place = None
    """Of the micro-batch's targets."""
    weight: float = 1.0


class TermsLoss:
    """Several criteria as one loss function of as many terms. Make it once and keep it.

    What stands in a micro-batch besides its inputs are its targets: of `(input, *targets)` and `(input,
    (target, ...))` they have indices, of `(input, {"mask": …, "label": …})` keys. Of a mapping the
    entries that a term names are targets, every other is an argument of the model's by that name.

    Args:
        terms: by name.
        reduction: the window's.
        whole_window: as `CriterionLoss` has it.

    Raises:
        BadInputError: as `CriterionLoss`; and where the model or a micro-batch has no such output or
            target, at the first one.
    """

    def __init__(
        self,
        terms: Mapping[str, CriterionTerm],
        reduction: str = "global_mean",
        *,
        whole_window: bool = False,
    ) -> None:
        self._terms = dict(terms)
        self._losses = {
            name: CriterionLoss(term.criterion, reduction, whole_window=whole_window)
            for name, term in terms.items()
        }
        self.criterion = nn.ModuleDict({name: term.criterion for name, term in terms.items()})
        """All of them, by name."""
        named = [key for term in terms.values() for key in _keys(term.target) if isinstance(key, str)]
        self._targets = list(dict.fromkeys(named))
        self._counts = True

    def assume(self, micro_batch: Any) -> None:
        """Count nothing where values cannot be read: passes hold the same memory."""
        self._counts = False

    def split(self, micro_batch: Any) -> tuple[Any, Any]:
        """Split a micro-batch into the model's inputs and the targets: a mapping or a list."""
        if isinstance(micro_batch, Mapping) and self._targets:
            found = {key: micro_batch[key] for key in self._targets if key in micro_batch}
            return Keywords({k: v for k, v in micro_batch.items() if k not in found}), found
        inputs, targets = split_micro_batch(micro_batch)
        return inputs, targets[0] if len(targets) == 1 and isinstance(targets[0], Mapping) else targets

    def count(self, micro_batch: Any) -> Counts:
        """Return the denominators of those terms whose targets tell."""
        _, targets = self.split(micro_batch)
        counts = {}
        for name, term in self._terms.items():
            n = self._losses[name].count((None, _picked(name, "target", targets, term.target)))
            if n is not None:
                counts[name] = n
        return counts  # type: ignore[return-value]  # a criterion by itself has one denominator

    def outputs(self, model: nn.Module, micro_batch: Any) -> Any:
        """Run the model alone on one micro-batch."""
        return run_model(model, self.split(micro_batch)[0])

    def without_inputs(self, micro_batch: Any) -> Any:
        """Return the micro-batch's targets alone, as a micro-batch."""
        inputs, targets = self.split(micro_batch)
        if isinstance(inputs, Keywords):
            return {key: value for key, value in micro_batch.items() if key not in inputs}
        return (None, targets) if isinstance(targets, Mapping) else (None, *targets)

    def __call__(self, model: nn.Module, micro_batch: Any) -> dict[str, Any]:
        """Run the model on one micro-batch; return its terms."""
        inputs, targets = self.split(micro_batch)
        return self.of_outputs(run_model(model, inputs), targets)

    def of_outputs(self, outputs: Any, targets: Any) -> dict[str, Any]:
        """Return the terms of the model's outputs for the targets that `split` gives."""
        terms: dict[str, Any] = {}
        for name, term in self._terms.items():
            loss = self._losses[name]
            given = _picked(name, "output", outputs, term.output)
            asked = _picked(name, "target", targets, term.target)
            if not self._counts:
                terms[name] = loss.sum_of_outputs(given, asked), 1.0, term.weight
                continue
            total, n = loss.of_outputs(given, asked)
            terms[name] = total, Clamped(n, loss.window_denominator), term.weight
        return terms


def _keys(place: Place) -> list[str | int]:
    if place is None:
        return []
    return [place] if isinstance(place, (str, int)) else list(place)


def _picked(name: str, what: str, values: Any, place: Place) -> list[Any]:
    """Return the outputs or targets at a term's places, in order."""
    if place is None:
        return list(values.values()) if isinstance(values, Mapping) else outputs_in(values)
    return [_at(name, what, values, key) for key in _keys(place)]


def _at(name: str, what: str, values: Any, key: str | int) -> Any:
    if isinstance(key, str):
        if not isinstance(values, (Mapping, list, tuple)) and hasattr(values, key):
            return getattr(values, key)
        known = (
            list(map(str, values))
            if isinstance(values, Mapping)
            else list(getattr(values, "_fields", ()))
        )
        if key in known:
            return values[key] if isinstance(values, Mapping) else getattr(values, key)
        there = f"only {', '.join(known)}" if known else "none with a name"
        raise BadInputError(f"term {name!r}: there is no {what} {key!r}, {there}{nearest(key, known)}")
    several = list(values.values()) if isinstance(values, Mapping) else outputs_in(values)
    if not -len(several) <= key < len(several):
        raise BadInputError(f"term {name!r}: there is no {what} {key}, the {what}s are {len(several)}")
    return several[key]
