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

from gaccum_exp.core.modes import evaluation_mode
from gaccum_exp.errors import BadInputError

HALF = (torch.float16, torch.bfloat16)
COARSE = 2.0**-11
"""Relative rounding of float32 products on an accelerator, which may compute them in TF32."""
FEW = 8
"""Roundings by which the same number may differ when the same kernels saw the same inputs."""

Counter = Callable[[Tensor], Tensor]
"""Gives how many labels count, 0-dim, of a micro-batch's labels."""


@dataclass(frozen=True, slots=True)
class LossQuery:
    """How a model is asked for its loss."""

    labels: str
    """The key of the labels."""
    count_argument: str
    """The name under which the model takes the count."""
    ignore_index: int
    """Of labels that do not count."""

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
        if labels.ndim < 2:
            return [every]
        return [every, lambda t: (t[:, 1:] != self.ignore_index).sum()]

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
    with torch.no_grad(), evaluation_mode(model), torch.autocast(device.type, enabled=False):
        probe = _probe(query, micro_batch)
        finding = _agreeing_counters(model, query, probe, None)
        if len(finding.counters) == 1:
            return finding
        # Losses that ought to be alike differ, perhaps by rounding; or those that ought to differ are
        # alike, for want of digits, or because all weights of the last layer are zero.
        alike = len(finding.counters) > 1
        dtype = torch.float32 if device.type == "mps" else torch.float64
        with suppress(Exception):  # the user's model, in a precision that it may not support
            closer = _agreeing_counters(
                model, query, probe.in_dtype(dtype), _tensors_in(model, dtype, moved=alike)
            )
            if len(closer.counters) == 1:
                return closer
    why = "the losses of different labels are too much alike to tell what it is a mean over"
    return CountFinding([], why=why) if alike else finding


@dataclass(frozen=True, slots=True)
class _Probe:
    """Two samples, and parts of their labels."""

    every: Mapping[str, Any]
    one: Mapping[str, Any]
    others: Mapping[str, Any]
    twins: Mapping[str, Any]
    """As `one`, with that sample in the other's place as well."""
    apart: bool = False
    """`one` and `others` are single samples: other kernels may compute them."""

    def in_dtype(self, dtype: torch.dtype) -> "_Probe":
        """Return the same with all inputs that are not integers in one type."""
        every, one, others, twins = (
            {key: _cast(value, dtype) for key, value in part.items()}
            for part in (self.every, self.one, self.others, self.twins)
        )
        return _Probe(every, one, others, twins, self.apart)


def _agreeing_counters(
    model: nn.Module, query: LossQuery, probe: _Probe, tensors: dict[str, Tensor] | None
) -> CountFinding:
    """Return the ways of counting that agree with the model's losses."""

    def loss(micro_batch: Mapping[str, Any], n: int | None = None) -> Tensor:
        return query.loss(model, micro_batch, n, tensors)

    value = loss(probe.every)
    every, one, others, twins = map(float, (value, *map(loss, (probe.one, probe.others, probe.twins))))
    used = model.parameters() if tensors is None else tensors.values()
    eps = torch.finfo(value.dtype).eps
    of_model = max([eps, *(torch.finfo(t.dtype).eps for t in used if t.is_floating_point())])
    size = max(map(abs, (every, one, others)))
    within = size * FEW * eps
    if probe.apart:
        within = size * math.sqrt(of_model if value.device.type == "cpu" else max(of_model, COARSE))
    effect = _count_effect(loss, probe.every)
    if effect is not None and effect.divides_part:
        return CountFinding([], why=f"only a part of it is divided by {query.count_argument}")
    if abs(twins - one) > size * FEW * of_model:
        seen = f"{one:.6g} beside one sample and {twins:.6g} beside another"
        return CountFinding(
            [], why=f"it depends on what else is in a batch (the same labels have {seen})"
        )
    fitting = []
    for counter in query.counters(probe.every[query.labels]):
        n, of_one = (float(counter(part[query.labels])) for part in (probe.every, probe.one))
        agrees = n > 0 and abs((of_one * one + (n - of_one) * others) / n - every) <= within
        if agrees and (
            effect is None or not effect.divides_all or abs(effect.total / n - every) <= within
        ):
            fitting.append(counter)
    seen = f"some have {one:.4g}, others {others:.4g}, and all of these together {every:.4g}"
    why = f"it is no mean over its {query.labels} ({seen})"
    return CountFinding(fitting, effect is not None and effect.divides_all, why)


class _CountEffect(NamedTuple):
    """How a model's loss depends on the count that it is given."""

    total: float
    """The loss under a count of one."""
    divides_all: bool
    """Whether the whole loss is divided by the count."""
    divides_part: bool
    """Whether a part of it is."""


def _count_effect(
    loss: Callable[[Mapping[str, Any], int], Tensor], micro_batch: Mapping[str, Any]
) -> _CountEffect | None:
    """Measure the effect of a count; None where the model takes none."""
    try:
        values = [loss(micro_batch, n) for n in (1, 2)]
    except TypeError:
        return None
    one, two = map(float, values)
    within = FEW * torch.finfo(values[0].dtype).eps * abs(one)
    wholly = one != 0 and abs(one - 2 * two) <= within
    return _CountEffect(one, wholly, not wholly and abs(one - two) > within)


def _probe(query: LossQuery, micro_batch: Mapping[str, Any]) -> _Probe:
    """Return two samples with the labels that tell."""
    key = query.labels
    labels = micro_batch[key]
    if labels.is_floating_point():
        return _apart(_rows(micro_batch, key, [0, len(labels) - 1]), key)
    counting = labels != query.ignore_index
    known = labels[counting]
    a = int(known[0]) if len(known) else query.label_other_than()
    unlike = known[known != a]
    # Another label, so that class weights show.
    b = int(unlike[0]) if len(unlike) else query.label_other_than(a)
    if labels.ndim < 2:
        both = _rows(micro_batch, key, [0, len(labels) - 1])
        return _apart({**both, key: labels.new_tensor([a, b])}, key)
    places = counting.flatten(2).any(2) if labels.ndim > 2 else counting
    first, second = _two_rows(places)
    one = torch.full_like(labels[[first, second]], query.ignore_index)
    others = one.clone()
    one[0, _later_place(places[first])] = a
    others[1, [0, _later_place(places[second])]] = b
    every = torch.where(one == query.ignore_index, others, one)
    both, same = (_rows(micro_batch, key, rows) for rows in ([first, second], [first, first]))
    return _Probe({**both, key: every}, {**both, key: one}, {**both, key: others}, {**same, key: one})


def _apart(both: dict[str, Any], key: str) -> _Probe:
    first, second = (_rows(both, key, [row]) for row in (0, 1))
    return _Probe(both, first, second, first, apart=True)


def _two_rows(places: Tensor) -> tuple[int, int]:
    """Return the samples with the most labels, the second rather with one at its beginning."""
    labels = places.sum(1)
    second = int((labels + places[:, 0] * places.shape[1]).argmax())
    if len(labels) > 1:
        labels[second] = -1
    return int(labels.argmax()), second


def _later_place(places: Tensor) -> int:
    """Return where a sequence has a label that is not its first."""
    later = places[1:].nonzero()
    return 1 + int(later[0]) if len(later) else min(1, len(places) - 1)


def _rows(micro_batch: Mapping[str, Any], key: str, rows: list[int]) -> dict[str, Any]:
    """Return some of the samples."""
    size = len(micro_batch[key])
    return {
        k: v[rows] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v
        for k, v in micro_batch.items()
    }


def _tensors_in(model: nn.Module, dtype: torch.dtype, moved: bool) -> dict[str, Tensor]:
    """Return the model's tensors in one type, and if asked its parameters moved at random.

    What a loss is a mean over does not depend on them.
    """
    tensors = {name: _cast(buffer, dtype) for name, buffer in model.named_buffers()}
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        value = _cast(parameter.detach(), dtype)
        if moved and value.is_floating_point():
            if value.device not in generators:
                generators[value.device] = torch.Generator(value.device).manual_seed(0)
            noise = torch.empty_like(value).normal_(generator=generators[value.device])
            # So much that a layer's output stays about as large as its input.
            value = value + noise / math.sqrt(max(1, *value.shape[-1:]))
        tensors[name] = value
    return tensors


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
