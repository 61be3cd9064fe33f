"""The configuration: its schema, and its validation, once, into plain objects.

The dataclasses are the schema that Hydra composes into (a wrong key or type is an error there) and the
plain objects that the program uses. They have `slots`, so that a key added with `+` that nothing knows
is an error too and does not vanish. `model`, `data`, `criterion`, `optimizer` and `scheduler` are open
dictionaries: their keys are the arguments of somebody's `_target_`.

Neither torch nor MLflow is imported here: a mistake in the configuration is answered at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from gaccum_exp.batch import BATCH_KEYS, DataConfig, check_positive, data_config, target_of
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
class AuditConfig:
    """When a run's gradient is compared with the large batch's, on the run's own windows."""

    at_start: bool = True
    """Audit the first window of a training, at the initial weights."""
    every_steps: int | None = None
    """Audit every so many optimizer steps, the first included, before the step is taken."""
    controls: int = 0
    """How often the reference (N = 1) is trained again with only the order inside windows permuted."""
    control_seed: int | None = None
    """Of such a control: its number, which seeds the permutations; null: none."""


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
    audit: AuditConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    task: str = "train"
    seed: int = 0
    sweep_id: str = "none"


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
    audit: AuditConfig
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

    @property
    def audit_asked(self) -> bool:
        """Whether the exit status answers for the verdict: the audit at the start comes unasked."""
        return self.task == "audit" or self.audit.every_steps is not None

    def as_control(self, number: int) -> "Settings":
        """Return the same arm with only the order inside its windows permuted."""
        audit = replace(self.audit, control_seed=number)
        tree = {**self.tree, "audit": {**self.tree["audit"], "control_seed": number}}
        return replace(self, audit=audit, tree=tree)

    def flat(self) -> dict[str, Any]:
        """Return every value by its dotted key."""
        return dict(_flatten(self.tree))


SECTIONS: dict[str, type] = {
    "": Config,
    "accum": AccumConfig,
    "runtime": RuntimeConfig,
    "tracking": TrackingConfig,
    "audit": AuditConfig,
    "train": TrainConfig,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("train", "audit"),
    "accum.reduction": ("global_mean", "mean", "sum"),
    "accum.sum_scale": ("constant", "none"),
    "accum.partial_window": ("exact", "drop", "carry", "error"),
}


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
        check_positive("runtime.threads", config.runtime.threads)
    if config.audit.every_steps is not None:
        check_positive("audit.every_steps", config.audit.every_steps)
    if config.audit.controls < 0:
        raise BadInputError(f"audit.controls={config.audit.controls}: cannot be negative")
    data, config.accum.steps = data_config(config.data, config.accum.steps)
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
        scheduler=target_of("scheduler", config.scheduler) or None,
        accum=config.accum,
        runtime=config.runtime,
        tracking=config.tracking,
        audit=config.audit,
        train=config.train,
        task=config.task,
        seed=config.seed,
        sweep_id=config.sweep_id,
        tree=tree,
    )


def _check_length(train: TrainConfig) -> None:
    lengths = {k: getattr(train, k) for k in ("steps", "epochs", "samples")}
    given = {k: v for k, v in lengths.items() if v is not None}
    if len(given) > 1:
        named = " and ".join(f"train.{k}={v}" for k, v in given.items())
        raise BadInputError(f"{named} are both training lengths: set one of them to null")
    for key, value in given.items():
        check_positive(f"train.{key}", value)
    if train.eval_every_steps is not None:
        check_positive("train.eval_every_steps", train.eval_every_steps)
    if not given:
        train.epochs = DEFAULT_EPOCHS


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
