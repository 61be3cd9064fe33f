"""The data block: batch sizes, two of which determine the third, and the two data sets' targets."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from gaccum_exp.config.allowed import MOST, Count, check_allowed
from gaccum_exp.errors import BadInputError


@dataclass(frozen=True, slots=True)
class DataConfig:
    """The part of the data block that is about batches; the rest are arguments of its two targets."""

    global_batch_size: int = field(metadata={"allowed": Count(), "kind": "integer or null"})
    """Samples of one optimizer step, split by accum.steps; null: data.micro_batch_size × accum.steps."""
    micro_batch_size: int = field(metadata={"allowed": Count(), "kind": "integer or null"})
    """Samples of a full window's largest micro-batch; null: data.global_batch_size / accum.steps."""
    eval_batch_size: int = field(metadata={"allowed": Count()})
    """Samples of one pass of an evaluation."""
    workers: int = field(metadata={"allowed": Count(0, 512, "since each is a process")})
    """DataLoader processes; they change speed only, never samples."""
    sort_by_length: bool
    """Order each window's samples by length before it is split, the shortest first."""
    train: Mapping[str, Any]
    """The training set: a `_target_` and its arguments."""
    eval: Mapping[str, Any] | None
    """The data set of evaluations, likewise; a `_target_` of null: there are none."""
    block: Mapping[str, Any]
    """The whole block as composed: batch sizes that were derived are null in it."""


@dataclass(frozen=True, slots=True)
class AccumStage:
    """N, and the global batch that goes with it, from some point of training on."""

    start: int
    """Epoch or global step."""
    accum_steps: int
    global_batch_size: int


BATCH_KEYS = tuple(f.name for f in fields(DataConfig) if f.name != "block")


def data_config(data: Mapping[str, Any], accum_steps: int | None) -> tuple[DataConfig, int]:
    """Return the data block with its sizes derived, and N.

    Raises:
        BadInputError: a size that is none, or sizes that do not fit together.
    """
    _check_integers(data)
    sizes = batch_sizes(data.get("global_batch_size"), data.get("micro_batch_size"), accum_steps)
    check_allowed("data", DataConfig, {name: data[name] for name in ("eval_batch_size", "workers")})
    sort_by_length = data.get("sort_by_length", False)
    if not isinstance(sort_by_length, bool):
        raise BadInputError(f"data.sort_by_length={sort_by_length}: not true or false")
    config = DataConfig(
        global_batch_size=sizes[0],
        micro_batch_size=sizes[1],
        eval_batch_size=data["eval_batch_size"],
        workers=data["workers"],
        sort_by_length=sort_by_length,
        train=_target_of("data.train", data.get("train")),
        eval=_target_of("data.eval", data.get("eval")) or None,
        block=data,
    )
    return config, sizes[2]


def batch_sizes(
    global_batch_size: int | None, micro_batch_size: int | None, accum_steps: int | None
) -> tuple[int, int, int]:
    """Derive the third of global batch, micro-batch and N from the two that are set.

    A global batch that N does not divide is split as evenly as possible, and the micro-batch is then the
    largest of its parts.

    Raises:
        BadInputError: fewer than two set, three that do not fit together, or N larger than the batch.
    """
    named = {
        "data.global_batch_size": global_batch_size,
        "data.micro_batch_size": micro_batch_size,
        "accum.steps": accum_steps,
    }
    for key, value in named.items():
        if value is not None:
            check_positive(key, value)
    given = [key for key, value in named.items() if value is not None]
    if len(given) < 2:
        raise BadInputError(
            f"set two of {', '.join(named)}: the third follows from them (set: {given or 'none'})"
        )
    if global_batch_size is None:
        assert micro_batch_size is not None
        assert accum_steps is not None
        check_positive("data.micro_batch_size * accum.steps", micro_batch_size * accum_steps)
        return micro_batch_size * accum_steps, micro_batch_size, accum_steps
    if accum_steps is None:
        assert micro_batch_size is not None
        accum_steps = -(-global_batch_size // micro_batch_size)
    if accum_steps > global_batch_size:
        raise BadInputError(
            f"data.global_batch_size={global_batch_size} cannot be split into accum.steps={accum_steps} "
            "micro-batches: each needs at least one sample"
        )
    largest = -(-global_batch_size // accum_steps)
    if len(given) == 3 and micro_batch_size != largest:
        raise BadInputError(
            f"data.global_batch_size={global_batch_size}, data.micro_batch_size={micro_batch_size} "
            f"and accum.steps={accum_steps} do not fit together ({global_batch_size} / {accum_steps} is "
            f"{largest} samples a micro-batch): set one of them to null"
        )
    return global_batch_size, largest, accum_steps


def stages_of(schedule: Mapping[int, int], data: Mapping[str, Any]) -> tuple[AccumStage, ...]:
    """Return the stages of `accum.schedule`.

    Where data.micro_batch_size is set, N multiplies it: the global batch grows with N. Where it is not,
    the global batch is fixed, and only how it is split changes.

    Raises:
        BadInputError: a schedule that does not begin at 0, or an N that does not fit.
    """
    _check_integers(data)
    whole = isinstance(schedule, Mapping) and all(type(n) is int for p in schedule.items() for n in p)
    if not whole or not schedule or min(schedule) != 0:
        raise BadInputError(f"accum.schedule={schedule}: must say N from 0 on, e.g. {{0:1,4:2,8:4}}")
    if max(schedule) > MOST:
        raise BadInputError(f"accum.schedule: {max(schedule)} is beyond {MOST:,}")
    micro = data.get("micro_batch_size")
    stages = []
    for start, accum_steps in sorted(schedule.items()):
        check_positive(f"accum.schedule.{start}", accum_steps)
        total = data.get("global_batch_size") if micro is None else micro * accum_steps
        check_positive("data.global_batch_size", total or 1)
        if total is not None and accum_steps > total:
            raise BadInputError(
                f"data.global_batch_size={total} cannot be split into "
                f"accum.schedule.{start}={accum_steps} micro-batches: each needs at least one sample"
            )
        stages.append(AccumStage(start, accum_steps, total or 0))
    return tuple(stages)


def _check_integers(data: Mapping[str, Any]) -> None:
    for key in ("global_batch_size", "micro_batch_size", "eval_batch_size", "workers"):
        value = data.get(key)
        derived = key in ("global_batch_size", "micro_batch_size")
        if derived and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadInputError(f"data.{key}={value}: not an integer")
        if derived:
            check_positive(f"data.{key}", value)


def _target_of(key: str, node: Any) -> Mapping[str, Any]:
    """Return a block's mapping; one whose `_target_` is null is empty."""
    if node is not None and not isinstance(node, Mapping):
        raise BadInputError(f"{key}={node}: not a mapping with a _target_")
    return node if node and node.get("_target_") else {}


def check_positive(key: str, value: int) -> None:
    """Refuse what is below 1, and what no count is."""
    Count().check(key, value)
