"""What a model's own loss is a mean over, inferred by probing it on two samples.

The labels of a probe are ignored but for three: one in the first sample, and in the second the first of
the sequence and another one. Asked for the loss of the one, of the others, and of all three, on inputs
that stay the same, a mean over labels shows what it counts: m = (n₁ m₁ + n₂ m₂) / (n₁ + n₂). Labels that
cannot be ignored, one for each sample or numbers, are left out with their sample.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaccum_exp.core.dtypes import in_precision, is_inexact
from gaccum_exp.core.modes import evaluation_mode, unobserved
from gaccum_exp.errors import BadInputError

COARSE = 2.0**-11
"""Relative rounding of float32 products on an accelerator, which may compute them in TF32."""
FEW = 8
"""Roundings by which the same number may differ when the same kernels saw the same inputs."""

Counter = Callable[[Tensor], Tensor]
"""Gives how many labels count, 0-dim, of a micro-batch's labels."""


@dataclass(frozen=True, slots=True)
class LossQuery:
    """How a model is asked for its loss; the fields are those of `ModelLoss`."""

    labels: str
    count_argument: str
    ignore_index: int

    def loss(
        self,
        model: nn.Module,
        micro_batch: Mapping[str, Any],
        n: int | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the model's loss, under a count if given, with other tensors in the model if given.

        Raises:
            BadInputError: it returns none.
        """
        arguments = {**micro_batch, **({} if n is None else {self.count_argument: n})}
        if tensors is None:
            outputs = model(**arguments)
        else:
            outputs = torch.func.functional_call(model, tensors, kwargs=arguments)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise BadInputError(f"{type(model).__name__} returns no loss: {type(outputs).__name__}")
        return loss

    def counters(self, labels: Tensor) -> list[Counter]:
        """Return the ways to count such labels."""
        if labels.is_floating_point():  # a regression: its elements
            return [lambda t: torch.tensor(t.numel(), device=t.device)]
        every: Counter = lambda t: (t != self.ignore_index).sum()  # noqa: E731
        return [every, lambda t: every(t[:, 1:])] if labels.ndim > 1 else [every]

    def label_other_than(self, *labels: int) -> int:
        """Return a label that counts, as small as can be: which is the largest is not known."""
        return next(label for label in range(3) if label not in (*labels, self.ignore_index))


class CountFinding(NamedTuple):
    """The ways of counting that agree with a model's loss."""

    counters: Sequence[Counter]
    """What its mean may divide by: none, where it is no mean over its labels."""
    takes_count: bool = False
    why: str = ""
    """In words that follow the model's name, why there are none."""


def infer_counters(model: nn.Module, query: LossQuery, micro_batch: Mapping[str, Any]) -> CountFinding:
    """Infer what a model's loss is a mean over; the model is left as it was."""
    device = micro_batch[query.labels].device
    own_precision = torch.autocast(device.type, enabled=False)
    with unobserved(), torch.no_grad(), evaluation_mode(model), own_precision:
        probe = _probe(query, micro_batch)
        finding = _agreeing_counters(model, query, probe, None)
        if len(finding.counters) == 1:
            return finding
        # Losses that ought to be alike differ, perhaps by rounding; or those that ought to differ are
        # alike, for want of digits, or because all weights of the last layer are zero.
        alike = len(finding.counters) > 1
        dtype = torch.float32 if device.type == "mps" else torch.float64
        with suppress(Exception):  # the user's model, in a precision that it may not support
            exact = _Probe([_cast(part, dtype) for part in probe.parts], probe.apart)
            closer = _agreeing_counters(model, query, exact, _tensors_in(model, dtype, moved=alike))
            if len(closer.counters) == 1:
                return closer
    why = "the losses of different labels are too much alike to tell what it is a mean over"
    return CountFinding([], why=why) if alike else finding


class _Probe(NamedTuple):
    """Two samples with the labels that tell."""

    parts: Sequence[Mapping[str, Any]]
    """With all three labels, with the one, with the others, and with the one and its sample twice."""
    apart: bool = False
    """Whether the one and the others are single samples: other kernels may compute them."""


def _agreeing_counters(
    model: nn.Module, query: LossQuery, probe: _Probe, tensors: dict[str, Tensor] | None
) -> CountFinding:
    """Return the ways of counting that agree with the model's losses."""
    losses = [query.loss(model, part, None, tensors) for part in probe.parts]
    every, one, others, twins = map(float, losses)
    used = model.parameters() if tensors is None else tensors.values()
    eps = torch.finfo(losses[0].dtype).eps
    of_model = max([eps, *(torch.finfo(t.dtype).eps for t in used if is_inexact(t))])
    size = max(map(abs, (every, one, others)))
    within = size * FEW * eps
    if probe.apart:
        within = size * math.sqrt(of_model if losses[0].device.type == "cpu" else max(of_model, COARSE))
    divided = None
    """The loss under a count of one, where the count divides all of it."""
    with suppress(TypeError):  # which says that the model takes no count
        under = [query.loss(model, probe.parts[0], n, tensors) for n in (1, 2)]
        total, half = map(float, under)
        rounding = FEW * torch.finfo(under[0].dtype).eps * abs(total)
        if total != 0 and abs(total - 2 * half) <= rounding:
            divided = total
        elif abs(total - half) > rounding:
            return CountFinding([], why=f"only a part of it is divided by {query.count_argument}")
    if abs(twins - one) > size * FEW * of_model:
        seen = f"{one:.6g} beside one sample and {twins:.6g} beside another"
        return CountFinding(
            [], why=f"it depends on what else is in a batch (the same labels have {seen})"
        )
    fitting = []
    labels = [part[query.labels] for part in probe.parts[:2]]
    for counter in query.counters(labels[0]):
        n, of_one = (float(counter(t)) for t in labels)
        agrees = n > 0 and abs((of_one * one + (n - of_one) * others) / n - every) <= within
        if agrees and (divided is None or abs(divided / n - every) <= within):
            fitting.append(counter)
    seen = f"some have {one:.4g}, others {others:.4g}, and all of these together {every:.4g}"
    return CountFinding(fitting, divided is not None, f"it is no mean over its {query.labels} ({seen})")


def _probe(query: LossQuery, micro_batch: Mapping[str, Any]) -> _Probe:
    key, labels = query.labels, micro_batch[query.labels]
    size = len(labels)

    def rows(*numbers: int) -> dict[str, Any]:
        return {
            k: v[list(numbers)] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v
            for k, v in micro_batch.items()
        }

    def apart(both: Tensor) -> _Probe:
        one, other = ({**rows(row), key: both[[n]]} for n, row in enumerate((0, size - 1)))
        return _Probe([{**rows(0, size - 1), key: both}, one, other, one], apart=True)

    if labels.is_floating_point():
        return apart(labels[[0, size - 1]])
    counting = labels != query.ignore_index
    known = labels[counting]
    a = int(known[0]) if len(known) else query.label_other_than()
    unlike = known[known != a]
    # Another label, so that class weights show.
    b = int(unlike[0]) if len(unlike) else query.label_other_than(a)
    if labels.ndim < 2:
        return apart(labels.new_tensor([a, b]))
    places = counting.flatten(2).any(2) if labels.ndim > 2 else counting
    # The samples with the most labels, the second rather with one at its beginning.
    most = places.sum(1)
    second = int((most + places[:, 0] * places.shape[1]).argmax())
    if size > 1:
        most[second] = -1
    first = int(most.argmax())
    one = torch.full_like(labels[[first, second]], query.ignore_index)
    others = one.clone()
    one[0, _later_place(places[first])] = a
    others[1, [0, _later_place(places[second])]] = b
    every = torch.where(one == query.ignore_index, others, one)
    both, twins = rows(first, second), {**rows(first, first), key: one}
    return _Probe([*({**both, key: t} for t in (every, one, others)), twins])


def _later_place(places: Tensor) -> int:
    """Return where a sequence has a label that is not its first."""
    later = places[1:].nonzero()
    return 1 + int(later[0]) if len(later) else min(1, len(places) - 1)


def _tensors_in(model: nn.Module, dtype: torch.dtype, moved: bool) -> dict[str, Tensor]:
    """Return the model's tensors in one type, and if asked its parameters moved at random.

    What a loss is a mean over does not depend on them.
    """
    parameters = dict(model.named_parameters())
    tensors = _cast({**parameters, **dict(model.named_buffers())}, dtype)
    generators: dict[torch.device, torch.Generator] = {}
    for name in parameters if moved else ():
        value = tensors[name]
        if is_inexact(value):
            if value.device not in generators:
                generators[value.device] = torch.Generator(value.device).manual_seed(0)
            noise = torch.empty_like(value).normal_(generator=generators[value.device])
            # So much that a layer's output stays about as large as its input.
            tensors[name] = value + noise / math.sqrt(max(1, *value.shape[-1:]))
    return tensors


def _cast(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(in_precision(v.dtype, dtype)) if isinstance(v, Tensor) else v for k, v in values.items()
    }
