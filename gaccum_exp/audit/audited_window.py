"""What an audit knows of the window that it judged, as a run keeps it: `window.json`. No torch here.

A run's window is that of its worst verdict, whose words are the run's tags. Its keys:

    verdict             of the audit
    reduction           global_mean, mean or sum
    accum_steps         N, the window's micro-batches
    global_batch_size   samples of the window that was judged; where memory took a slice of it, of that
    global_step         optimizer steps taken before it; null where nobody has said
    unit                what the loss counts: samples, tokens, or units (elements, class weights, ...)
    micro_batches       of each micro-batch:
        index, first, samples          its number, the place of its first sample in the window, how many
        counted                        nᵢ, what its loss counts; null where the loss has several terms
        weight                         what the reduction multiplies the loss of one counted unit by;
                                       null where nothing counts
        one_pass_weight                what one pass over all samples multiplies it by
        terms                          of a loss of several terms, for each: name, counted, weight,
                                       one_pass_weight; else empty
    layers              of each layer, in the order of the model:
        name, parameters               a parameter as the model names it, or several by what their names
                                       begin with; and how many they are
        norm                           ‖g_1‖ of the layer, of the gradient of one pass, in float64
        error, floor                   ‖g_N − g_1‖ / ‖g_1‖ of the layer in the run's precision, and how
                                       far rounding moves g_1 there: the largest distance to other orders
                                       of the samples and to float64
        error64, floor64               the same in float64, where the floor is another order's
        by_micro_batch                 ‖its contribution to g_N − its share in g_1‖ / ‖g_1‖ of the layer,
                                       for each of `micro_batches`, in float64; null: see `no_shares`
    no_shares           why a micro-batch has no share in g_1, in a clause; null where each has one

A micro-batch's share in g_1 is its own gradient, weighed as in one pass. Shares are stated where the
differences are seen to add up, as vectors, to g_N − g_1; so they never are where a module or the loss
couples samples. `by_micro_batch` tells of weights: what rounding adds is in `error` alone. Layers are of
the gradient, also where the verdict is on the step that a strategy takes with it. Relative to a
layer whose g_1 is zero, what is zero too is 0 and anything else null; where a layer's floor is near 1 or
above, its g_1 is rounding, and its error tells nothing.

Of more than 60 parameters those are joined whose names begin with the same modules, as deep as leaves
60 layers at most; still more are joined with their neighbours. Of more than 128 micro-batches the first
64 and the last 64 are kept. Numbers of layers have six digits in the file.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

WINDOW_FILE = "window.json"
SAMPLES, UNITS = "samples", "units"
"""What a loss counts: every sample once, or anything else."""
MOST_LAYERS = 60
MOST_MICRO_BATCHES = 128
DIGITS = 6
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TermShare:
    """One term's part in a micro-batch."""

    name: str
    counted: float | None = None
    """nᵢ of the term."""
    weight: float | None = None
    """What the reduction multiplies one counted unit by, the term's own weight aside."""
    one_pass_weight: float | None = None


@dataclass(frozen=True, slots=True)
class MicroBatchShare:
    """One micro-batch: what is in it, what was counted, and what that was weighed by."""

    index: int
    first: int
    """The place of its first sample in the window."""
    samples: int
    counted: float | None = None
    """nᵢ; None: the loss has several terms."""
    weight: float | None = None
    """What the reduction multiplies the loss of one counted unit by; None: nothing counts."""
    one_pass_weight: float | None = None
    """What one pass over all samples multiplies it by."""
    terms: tuple[TermShare, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far one layer's accumulated gradient lies from that of one pass, relative to the latter."""

    name: str
    parameters: int = 1
    """How many are joined in it."""
    norm: float | None = None
    """‖g_1‖ in float64."""
    error: float | None = None
    """In the run's precision."""
    floor: float | None = None
    """How far rounding moves g_1 there."""
    error64: float | None = None
    floor64: float | None = None
    by_micro_batch: tuple[float | None, ...] | None = None
    """How much each micro-batch's contribution differs from its share in g_1; None: it has none."""


@dataclass(frozen=True, slots=True)
class AuditedWindow:
    """What an audit knows of its window."""

    reduction: str
    accum_steps: int
    global_batch_size: int
    unit: str = UNITS
    micro_batches: tuple[MicroBatchShare, ...] = ()
    layers: tuple[LayerError, ...] = ()
    """In the order of the model."""
    no_shares: str | None = None
    """Why no micro-batch has a share in the gradient of one pass."""
    verdict: str | None = None
    global_step: int | None = None
    """Optimizer steps taken before it."""

    def as_json(self) -> str:
        """Return it as `window.json` has it; a number that is not finite is null."""
        values = asdict(self)
        values["layers"] = [_rounded(layer) for layer in values["layers"]]
        return json.dumps(_with_nulls(values), allow_nan=False)

    @classmethod
    def of_json(cls, text: str) -> "AuditedWindow":
        """Return the window that a file tells; keys that it lacks, or has besides, do not matter.

        Raises:
            ValueError: it tells of none.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"{WINDOW_FILE} holds no window")
        try:
            batches = [
                _made(MicroBatchShare, {**each, "terms": _all(TermShare, each.get("terms"))})
                for each in values.get("micro_batches") or ()
            ]
            layers = _all(LayerError, values.get("layers"))
            return _made(cls, {**values, "micro_batches": tuple(batches), "layers": layers})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{WINDOW_FILE} holds no window: {error}") from error


def read_window(path: Path) -> AuditedWindow | None:
    """Return the window that a file tells; None where it tells of none."""
    try:
        return AuditedWindow.of_json(path.read_text())
    except (OSError, ValueError):
        return None


def kept(count: int) -> list[int]:
    """Return the indices of those of so many micro-batches that are kept."""
    if count <= MOST_MICRO_BATCHES:
        return list(range(count))
    half = MOST_MICRO_BATCHES // 2
    return [*range(half), *range(count - half, count)]


def joined(names: Sequence[str], most: int = MOST_LAYERS) -> dict[str, list[str]]:
    """Return layers by name, each with the parameters of these names that are in it, `most` at most."""
    deepest = max((name.count(".") for name in names), default=0) + 1
    for depth in range(deepest, 0, -1):
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(found) <= most:
            return found
    rows = list(found.items())
    size = -(-len(rows) // most)
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return {f"{part[0][0]} … {part[-1][0]}": [n for _, of in part for n in of] for part in parts}


def _all(kind: Callable[..., T], parts: Iterable[Mapping[str, Any]] | None) -> tuple[T, ...]:
    return tuple(_made(kind, part) for part in parts or ())


def _made(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass each
    given = {key: value for key, value in values.items() if key in known}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_nulls(v) for key, v in value.items()}
    return [_with_nulls(v) for v in value] if isinstance(value, (list, tuple)) else value
