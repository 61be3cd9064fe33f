"""The configuration: its schema, and its validation, once, into plain objects.

The dataclasses are the schema that Hydra composes into (a wrong key or type is an error there) and the
plain objects that the program uses. They have `slots`, so that a key added with `+` that nothing knows
is an error too and does not vanish. `model`, `data`, `criterion`, `optimizer` and `scheduler` are open
dictionaries: their keys are the arguments of somebody's `_target_`.

Neither torch nor MLflow is imported here: a mistake in the configuration is answered at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from gaccum_exp.errors import BadInputError, nearest

DEFAULT_EPOCHS = 20
"""Training length where none of train.steps, train.epochs and train.samples is set."""


def conf_dir() -> str:
    """Return the folder of the YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


@dataclass(slots=True)
class AccumConfig:
    """How the batch of one optimizer step is split, and how micro gradients become its gradient."""

    steps: int | None = 1
    """N, micro-batches per window; null: derived from the two batch sizes."""
    reduction: str = "global_mean"
    """global_mean | mean | sum"""
    sum_scale: str = "constant"
    """What `sum` divides by: constant (a full window's nominal denominator) | none (the literal sum)."""
    partial_window: str = "exact"
    """Samples left at the end of an epoch: exact | drop | carry | error"""


@dataclass(slots=True)
class RuntimeConfig:
    """Where and how it runs. Nothing here changes which samples are seen."""

    device: str = "auto"
    """auto: the accelerator if there is one. Else cpu, cuda, cuda:1, mps, xpu, …"""
    deterministic: bool = False
    """Only deterministic kernels; an operator that has none is an error."""
    threads: int | None = None
    """Threads of one run on the CPU; null: torch's own choice."""


@dataclass(slots=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = "sqlite:///mlflow.db"
    experiment_name: str = "gaccum_exp"
    log_weights: bool = True
    """Keep the final weights with the run; the distance between arms is measured on them."""


@dataclass(slots=True)
class TrainConfig:
    """Training length (one of three; none: 20 epochs) and how often to evaluate."""

    steps: int | None = None
    """Optimizer steps."""
    epochs: int | None = None
    samples: int | None = None
    """Whole windows that fit into so many samples."""
    eval_every_steps: int | None = None
    """Optimizer steps between evaluations; null: once per epoch. The end is always evaluated."""


@dataclass(slots=True)
class Config:
    """The root of the schema. Dictionaries hold a `_target_` and its arguments."""

    model: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    criterion: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    accum: AccumConfig = MISSING
    runtime: RuntimeConfig = MISSING
    tracking: TrackingConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    task: str = "train"
    seed: int = 0
    sweep_id: str = "none"


@dataclass(frozen=True, slots=True)
class DataConfig:
    """The part of the data block that is about batches; the rest are arguments of its two targets."""

    global_batch_size: int
    """Samples of one optimizer step."""
    micro_batch_size: int
    """Samples of the largest micro-batch of a full window."""
    eval_batch_size: int
    workers: int
    """DataLoader processes; they change speed only."""
    train: Mapping[str, Any]
    eval: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Settings:
    """One arm, validated: batch sizes derived, training length decided, nothing left to guess."""

    model: Mapping[str, Any]
    data: DataConfig
    criterion: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    accum: AccumConfig
    runtime: RuntimeConfig
    tracking: TrackingConfig
    train: TrainConfig
    task: str
    seed: int
    sweep_id: str
    tree: Mapping[str, Any]
    """Every value above under its key, as recorded with the run."""

    @property
    def accum_steps(self) -> int:
        """N, micro-batches per window."""
        assert self.accum.steps is not None
        return self.accum.steps

    def flat(self) -> dict[str, Any]:
        """Return every value by its dotted key."""
        return dict(_flatten(self.tree))


SECTIONS: dict[str, type] = {
    "": Config,
    "accum": AccumConfig,
    "runtime": RuntimeConfig,
    "tracking": TrackingConfig,
    "train": TrainConfig,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("train",),
    "accum.reduction": ("global_mean", "mean", "sum"),
    "accum.sum_scale": ("constant", "none"),
    "accum.partial_window": ("exact", "drop", "carry", "error"),
}
BATCH_KEYS = tuple(f.name for f in fields(DataConfig))


def register() -> None:
    """Make the schema known to Hydra under the name that config.yaml's defaults list uses."""
    ConfigStore.instance().store(name="schema", node=Config)


def validate(cfg: DictConfig) -> Settings:
    """Turn a composed configuration into plain, consistent values.

    Raises:
        BadInputError: a value that cannot be used, with the numbers and the nearest valid value.
    """
    _refuse_unknown_keys(cfg)
    _refuse_unused_data_keys(cfg)
    try:
        config = OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        raise BadInputError(f"{error.full_key} must be set") from None
    assert isinstance(config, Config)
    for key, choices in CHOICES.items():
        _check_choice(key, OmegaConf.select(cfg, key), choices)
    _check_length(config.train)
    if config.runtime.threads is not None:
        _check_positive("runtime.threads", config.runtime.threads)
    data = _data_config(config)
    tree: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]  # no list
    sizes = {k: getattr(data, k) for k in ("global_batch_size", "micro_batch_size")}
    tree["data"] |= sizes
    tree["accum"]["steps"] = config.accum.steps
    tree["train"]["epochs"] = config.train.epochs
    return Settings(
        model=config.model,
        data=data,
        criterion=config.criterion,
        optimizer=config.optimizer,
        scheduler=_target("scheduler", config.scheduler) or None,
        accum=config.accum,
        runtime=config.runtime,
        tracking=config.tracking,
        train=config.train,
        task=config.task,
        seed=config.seed,
        sweep_id=config.sweep_id,
        tree=tree,
    )


def batch_sizes(
    global_batch_size: int | None, micro_batch_size: int | None, steps: int | None
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
        "accum.steps": steps,
    }
    for key, value in named.items():
        if value is not None:
            _check_positive(key, value)
    given = [key for key, value in named.items() if value is not None]
    if len(given) < 2:
        raise BadInputError(
            f"set two of {', '.join(named)}: the third follows from them (set: {given or 'none'})"
        )
    if global_batch_size is None:
        assert micro_batch_size is not None
        assert steps is not None
        return micro_batch_size * steps, micro_batch_size, steps
    if steps is None:
        assert micro_batch_size is not None
        steps = -(-global_batch_size // micro_batch_size)
    if steps > global_batch_size:
        raise BadInputError(
            f"data.global_batch_size={global_batch_size} cannot be split into accum.steps={steps} "
            "micro-batches: each needs at least one sample"
        )
    largest = -(-global_batch_size // steps)
    if len(given) == 3 and micro_batch_size != largest:
        raise BadInputError(
            f"data.global_batch_size={global_batch_size}, data.micro_batch_size={micro_batch_size} "
            f"and accum.steps={steps} do not fit together ({global_batch_size} / {steps} is "
            f"{largest} samples a micro-batch): set one of them to null"
        )
    return global_batch_size, largest, steps


def _data_config(config: Config) -> DataConfig:
    data = dict(config.data)
    for key in ("global_batch_size", "micro_batch_size", "eval_batch_size", "workers"):
        value = data.get(key)
        derived = key in ("global_batch_size", "micro_batch_size")
        if not (isinstance(value, int) and not isinstance(value, bool)) and not (
            derived and value is None
        ):
            raise BadInputError(f"data.{key}={value}: not an integer")
    sizes = batch_sizes(data.get("global_batch_size"), data.get("micro_batch_size"), config.accum.steps)
    config.accum.steps = sizes[2]
    _check_positive("data.eval_batch_size", data["eval_batch_size"])
    if data["workers"] < 0:
        raise BadInputError(f"data.workers={data['workers']}: cannot be negative")
    return DataConfig(
        global_batch_size=sizes[0],
        micro_batch_size=sizes[1],
        eval_batch_size=data["eval_batch_size"],
        workers=data["workers"],
        train=_target("data.train", data.get("train")),
        eval=_target("data.eval", data.get("eval")) or None,
    )


def _target(key: str, node: Any) -> Mapping[str, Any]:
    """Return a block's mapping; one whose `_target_` is null is empty."""
    if node is not None and not isinstance(node, Mapping):
        raise BadInputError(f"{key}={node}: not a mapping with a _target_")
    return node if node and node.get("_target_") else {}


def _check_length(train: TrainConfig) -> None:
    lengths = {k: getattr(train, k) for k in ("steps", "epochs", "samples")}
    given = {k: v for k, v in lengths.items() if v is not None}
    if len(given) > 1:
        named = " and ".join(f"train.{k}={v}" for k, v in given.items())
        raise BadInputError(f"{named} are both training lengths: set one of them to null")
    for key, value in given.items():
        _check_positive(f"train.{key}", value)
    if train.eval_every_steps is not None:
        _check_positive("train.eval_every_steps", train.eval_every_steps)
    if not given:
        train.epochs = DEFAULT_EPOCHS


def _check_positive(key: str, value: int) -> None:
    if value < 1:
        raise BadInputError(f"{key}={value}: must be at least 1")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = nearest(str(value), choices)
        raise BadInputError(f"{key}={value}: not one of {', '.join(choices)}{hint}")


def _refuse_unknown_keys(cfg: DictConfig) -> None:
    """What was added with `+` to a block whose keys are all known would otherwise end in a TypeError."""
    for block, schema in SECTIONS.items():
        known = [f.name for f in fields(schema)]
        for key in map(str, cfg[block] if block else cfg):
            if key not in known:
                name = f"{block}.{key}" if block else key
                raise BadInputError(f"{name}: no such key{nearest(key, known)}")


def _refuse_unused_data_keys(cfg: DictConfig) -> None:
    """`+data.typo=3` would vanish: beside the batch keys, only what train or eval refers to counts."""
    text = OmegaConf.to_yaml(cfg.data, resolve=False)
    for key in map(str, cfg.data):
        used = f"${{data.{key}" in text or f"${{..{key}" in text
        # A missing one (`root: ???`) came with the file; what used it may have been overridden.
        if key not in BATCH_KEYS and not used and not OmegaConf.is_missing(cfg.data, key):
            hint = nearest(key, BATCH_KEYS)
            raise BadInputError(f"data.{key}: nothing in data.train or data.eval uses it{hint}")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
