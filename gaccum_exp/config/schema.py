"""The configuration: its schema, and its validation, once, into plain objects.

The dataclasses are the schema that Hydra composes into, where a wrong key or type is an error, and the
plain objects that the program uses. With `slots`, an unknown key that is added with `+` is an error too.
`model`, `data`, `criterion`, `optimizer`, `scheduler` and `strategy` are open dictionaries: their keys
are the arguments of a `_target_`.

Neither torch nor MLflow is imported here: a mistake in the configuration is answered at once.
"""
# ruff: noqa: RUF009  # `setting` returns what `dataclasses.field` does, as a dataclass wants it

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from gaccum_exp.config.allowed import (
    MOST,
    ChoicesOrInches,
    Count,
    Positive,
    SomeOf,
    check_allowed,
    one_of,
    setting,
)
from gaccum_exp.config.batch_sizes import (
    BATCH_KEYS,
    AccumStage,
    DataConfig,
    data_config,
    stages_of,
)
from gaccum_exp.config.explain import of_configuration
from gaccum_exp.config.files import conf_dir as conf_dir  # from here, too
from gaccum_exp.config.files import options
from gaccum_exp.errors import BadInputError, nearest

DEFAULT_EPOCHS = 20
"""Training length where none of train.steps, train.epochs and train.samples is set."""
MOST_CONTROLS, MOST_THREADS = 1000, 4096
"""Beyond it a process cannot have them, and ends instead of saying so."""
FIGURE_WIDTHS = ("single", "double", "talk")
FIGURE_FORMATS = ("svg", "png", "pdf")


@dataclass(slots=True)
class AccumConfig:
    """How the batch of one optimizer step is split, and how micro gradients become its gradient."""

    steps: Any = setting(1, kind="integer, null or auto")  # no union that OmegaConf knows
    """N, micro-batches per window; null: derived from the batch sizes; auto: the smallest that fits."""
    reduction: str = one_of("global_mean", "mean", "sum")
    """How micro gradients become the window's: global_mean (sums, divided once by all that counts in the
    window) | mean (each micro-batch's own mean, divided by N) | sum (sums, as `sum_scale` says)."""
    sum_scale: str = one_of("constant", "none")
    """What `sum` divides by: constant (a full window's nominal denominator) | none (the literal sum)."""
    partial_window: str = one_of("exact", "drop", "carry", "error")
    """Samples left at the end of an epoch: exact (a step on what there is) | drop (no step) | carry
    (completed with the next epoch's first samples) | error (refuse a batch that leaves some)."""
    buffer_dtype: str = one_of("same", "float32")
    """What micro gradients are added up in: same (the weights' own type) | float32 (rounded to that
    once)."""
    on_oom: str = one_of("raise", "increase_steps")
    """Out of memory in a window: raise (the run fails) | increase_steps (repeat the window in twice as
    many micro-batches, and go on so)."""
    max_grad_norm: float | None = setting(None, Positive("no clipping", endless=True))
    """Clip the whole window's gradient to this norm, once; null: no clipping."""
    schedule: Any = setting(None, kind="mapping or null")  # a typed one gets no keys from `-m`
    """N from an epoch (or step) on, e.g. {0: 1, 4: 2, 8: 4}; null: `steps` throughout."""
    schedule_by: str = one_of("epoch", "step")
    """What the keys of `schedule` count: epochs | optimizer steps."""
    schedule_lr: str = one_of("none", "linear", "sqrt")
    """How the learning rate follows a global batch that the schedule changes: none (it stays) | linear
    or sqrt of batch / largest batch."""
    grow: str | None = one_of("null", "auto", "sgd", "adam")
    """Let the batch grow where `scheduler` would let the rate fall: auto (by the optimizer) | sgd (the
    rate stays) | adam (the rate falls by the square root); null: it does not grow."""
    grow_to: int | None = setting(None, Count(2))
    """Largest N of a batch that grows; null: as many micro-batches as the data set holds."""


@dataclass(slots=True)
class RuntimeConfig:
    """Where and how it runs. Nothing here changes which samples are seen."""

    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU; or cpu, cuda, cuda:1, mps, xpu."""
    deterministic: bool = False
    """Only deterministic kernels; an operator that has none is an error."""
    threads: int | None = setting(None, Count(1, MOST_THREADS))
    """Threads of one run on the CPU; null: torch's own choice."""
    precision: str = one_of("fp32", "fp64", "bf16", "fp16")
    """What passes compute in: fp32 | fp64 | bf16 and fp16 (autocast over float32 weights, fp16 with a
    GradScaler)."""
    weight_dtype: str = one_of("float32", "same")
    """What weights are kept in under bf16: float32 | same (pure bfloat16, no autocast)."""
    matmul_precision: str = one_of("highest", "high", "medium")
    """What float32 matrix products compute in (torch.set_float32_matmul_precision): highest (float32) |
    high (TF32) | medium (bfloat16)."""
    tf32: bool = False
    """Let cuDNN's convolutions use TF32."""
    memory_budget_gib: float | None = setting(None, Positive("what is free", most=MOST))
    """GiB that a window may hold at its peak: an arm that is predicted above it is refused, and plans
    are made for it; null: nine tenths of what the device has free."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the model's repeated blocks, and run them again in the backward pass."""
    compile: bool = False
    """torch.compile the model, and check its gradient against the eager one before training.

    One graph serves all sizes of micro-batches and lengths of sequences; there is another for
    evaluation, and one where a micro-batch holds a single sample.
    """


@dataclass(slots=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: Any = setting(None, kind="text or null")  # until a command begins, which decides
    """Any MLflow tracking URI; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    experiment_name: Any = setting(None, kind="text or null")  # likewise
    """The experiment in that store; null: MLFLOW_EXPERIMENT_NAME, else gaccum_exp."""
    log_weights: bool = True
    """Keep the final weights with the run; the distance between arms is measured on them."""


@dataclass(slots=True)
class TrainConfig:
    """Training length (one of three; none: 20 epochs) and how often to evaluate."""

    steps: int | None = setting(None, Count())
    """Length in optimizer steps."""
    epochs: int | None = setting(None, Count())
    """Length in passes over the training data; 20 where no length is set."""
    samples: int | None = setting(None, Count())
    """Length in samples: the whole windows that fit into so many."""
    eval_every_steps: int | None = setting(None, Count())
    """Optimizer steps between evaluations; null: once per epoch. The end is always evaluated."""
    eval_every_samples: int | None = setting(None, Count())
    """The same in samples, so that global batches are evaluated at the same ones."""
    base_batch_size: int | None = setting(None, Count())
    """The global batch that the optimizer's numbers were chosen for, from which lr_rule and beta2_rule
    lead."""
    lr_rule: str = one_of("none", "sqrt", "linear")
    """The learning rate at another global batch: none (it stays) | sqrt or linear of batch /
    base batch."""
    beta2_rule: str = one_of("fixed", "half_life")
    """Adam's β₂ at another global batch: fixed | half_life (β₂ to the power batch / base batch: as long
    in samples)."""


@dataclass(slots=True)
class AuditConfig:
    """When a run's gradient is compared with the large batch's, on the run's own windows."""

    at_start: bool = True
    """Audit the first window of a training, at the initial weights."""
    every_steps: int | None = setting(None, Count())
    """Audit every so many optimizer steps, the first included, before the step is taken."""
    controls: int = setting(0, Count(0, MOST_CONTROLS, "since each is a training"))
    """How often the reference (N = 1) is trained again with only the order inside windows permuted."""
    control_seed: int | None = None
    """Written by the program, of such a control: its number, which seeds the permutations."""
    control_precision: str | None = None
    """Written by the program, of such a control of a run in half precision: fp32. There another order
    alone moves next to nothing, and the distance to float32 is what rounding does."""


@dataclass(slots=True)
class CheckpointConfig:
    """When a training is kept on disk, so that an interrupted one can go on."""

    every_steps: int | None = setting(None, Count())
    """Take one every so many optimizer steps, too; null: by the minutes alone."""
    every_minutes: float | None = setting(10, Positive("by checkpoint.every_steps alone"))
    """Take one every so many minutes, inside a window too where that takes longer; both null: never."""
    keep: int = setting(2, Count())
    """How many stay, the newest ones; those of a finished training are removed."""


@dataclass(slots=True)
class NoiseConfig:
    """When the gradient noise scale is measured, from a window's micro gradients."""

    every_steps: int | None = setting(None, Count())
    """Measure it every so many optimizer steps, the first included; null: never."""
    of: str = one_of("population", "training_set")
    """Which gradient's: population (of which the data are samples) | training_set (the data themselves;
    no dropout, no augmentation)."""


@dataclass(slots=True)
class SweepConfig:
    """How the arms of a sweep are trained."""

    vectorize: str | None = one_of("null", "seed")
    """seed: train the seeds of an arm as one, where that gives each the curve it has alone; null: one
    after the other."""
    seeds: Any = setting(None, kind="list or null")  # a typed one could not be made null again
    """Written by the program, where `-m` finds several: the seeds of an arm under `vectorize`."""
    resume: str | None = None
    """Go on with a sweep: last (the newest that is not whole) | its id. Of the command's arms those run
    that it has not ended."""
    into: str | None = None
    """Add the command's arms to the sweep with this id, whole or not."""
    rerun_failed: bool = False
    """Beside `resume` or `into`, run those arms again, too, that failed by a fault of their own: of
    their input, their model."""
    extend: str | None = None
    """Double or halve this swept key (optimizer.lr) until its best value lies between two others."""


@dataclass(slots=True)
class FiguresConfig:
    """What the figures of a comparison are like, at a sweep's end and in later reports of it."""

    width: Any = setting("double", ChoicesOrInches(FIGURE_WIDTHS, 2, 40))
    """How wide they are: single (a paper's column, 3.5 inches) | double (its text, 7.2) | talk (a
    slide, 12) | a number of inches."""
    format: Any = setting(("svg", "png"), SomeOf(FIGURE_FORMATS))
    """The files that each figure is written to, one or several."""


@dataclass(slots=True)
class Config:
    """The root of the schema. Dictionaries hold a `_target_` and its arguments."""

    model: dict[str, Any] = MISSING
    """What is trained: a network."""
    data: dict[str, Any] = MISSING
    """What the model is trained and evaluated on, and in what batches."""
    criterion: dict[str, Any] = MISSING
    """The loss."""
    optimizer: dict[str, Any] = MISSING
    """What takes the steps."""
    scheduler: dict[str, Any] = MISSING
    """How the learning rate goes, once per optimizer step."""
    strategy: dict[str, Any] = MISSING
    """Where micro gradients are held, and how they are added up."""
    accum: AccumConfig = MISSING
    runtime: RuntimeConfig = MISSING
    tracking: TrackingConfig = MISSING
    audit: AuditConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    noise: NoiseConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    figures: FiguresConfig = field(default_factory=FiguresConfig)
    task: str = one_of("train", "audit", "plan", "advise")
    """What is done: train | audit (judge a window's gradient against the large batch's) | plan (predict
    the memory of each N) | advise (try the ways to a batch, and recommend one)."""
    seed: int = 0
    """Draw initial weights, the order of samples, augmentation and dropout from this number."""
    resume: str = "auto"
    """auto (go on with this configuration's newest unfinished run) | never (begin another) | a run's
    folder or id (go on with that one)."""
    sweep_id: str = "none"
    """Written by the program: the name that the arms of a command share, a date, a time and six
    signs."""


BLOCKS: dict[str, Any] = {"": Config} | {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
"""The dataclasses whose keys are all known, by their block; the root is the empty name."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One arm, validated: batch sizes derived, training length decided, nothing left to guess."""

    model: Mapping[str, Any]
    data: DataConfig
    criterion: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    """Without a `_target_` there is none."""
    strategy: Mapping[str, Any]
    """How a window's gradient is accumulated."""
    accum: AccumConfig
    runtime: RuntimeConfig
    tracking: TrackingConfig
    audit: AuditConfig
    checkpoint: CheckpointConfig
    noise: NoiseConfig
    train: TrainConfig
    sweep: SweepConfig
    figures: FiguresConfig
    task: str
    seed: int
    resume: str
    sweep_id: str
    stages: tuple[AccumStage, ...]
    """N and the global batch over training: one stage, or those of accum.schedule; under accum.grow,
    the first one until the data are loaded."""
    chooses_accum_steps: bool
    """Whether N is still to be chosen (`accum.steps=auto`); until then it is 1."""

    @property
    def accum_steps(self) -> int:
        """N, micro-batches per window; the largest of several."""
        return max(stage.accum_steps for stage in self.stages)

    @property
    def largest_batch(self) -> int:
        """The global batch size; the largest of several."""
        return max(stage.global_batch_size for stage in self.stages)

    @property
    def in_one_pass(self) -> bool:
        """Whether every window is taken in one pass, as a reference's are."""
        return self.accum_steps == 1 and self.accum.grow is None

    @property
    def precision(self) -> str:
        """What passes compute in: fp32 | fp64 | bf16 | fp16."""
        return self.audit.control_precision or self.runtime.precision

    @property
    def audit_asked(self) -> bool:
        """Whether the exit status answers for the verdict: the audit at the start comes unasked."""
        return self.task == "audit" or self.audit.every_steps is not None

    def as_control(self, number: int) -> "Settings":
        """Return the same arm in another order inside its windows, one of half precision in fp32."""
        precision = "fp32" if self.runtime.precision in ("bf16", "fp16") else None
        audit = replace(self.audit, control_seed=number, control_precision=precision)
        return replace(self, audit=audit)

    def with_accum_steps(self, accum_steps: int) -> "Settings":
        """Return the same with N as chosen; it has no schedule."""
        size = self.data.global_batch_size
        return replace(
            self,
            accum=replace(self.accum, steps=accum_steps),
            data=replace(self.data, micro_batch_size=-(-size // accum_steps)),
            stages=(AccumStage(0, accum_steps, size),),
        )

    def in_stages(self, stages: tuple[AccumStage, ...]) -> "Settings":
        """Return the same with the stages of a batch that grows."""
        return replace(self, stages=stages)

    def flat(self) -> dict[str, Any]:
        """Return every value of the configuration by its dotted key, as it is recorded with the run."""
        tree = {f.name: getattr(self, f.name) for f in fields(Config)}
        sizes = {key: getattr(self.data, key) for key in ("global_batch_size", "micro_batch_size")}
        return dict(_flatten(tree | {"data": {**self.data.block, **sizes}}))


def register(sweep_id: str = "none") -> None:
    """Make the schema known to Hydra under the name that config.yaml's defaults list uses.

    Args:
        sweep_id: of the command that begins. The jobs of a sweep are given it as an override.
    """
    ConfigStore.instance().store(name="schema", node=Config(sweep_id=sweep_id))


def validate(cfg: DictConfig) -> Settings:
    """Turn a composed configuration into plain, consistent values.

    Raises:
        BadInputError: a value that cannot be used, with the numbers and the nearest valid value.
    """
    try:
        OmegaConf.to_container(cfg, resolve=True)  # raises of an interpolation whose key it is
        _refuse_other_than_blocks(cfg)
        _refuse_unknown_keys(cfg)
        _check_targets(cfg)
        config = OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        raise BadInputError(f"{error.full_key} must be set") from None
    except (OmegaConfBaseException, RecursionError) as error:
        raise BadInputError(of_configuration(error)) from None
    assert isinstance(config, Config)
    check_id("sweep_id", config.sweep_id)
    check_figures(config.figures)
    for block, kind in BLOCKS.items():
        node = getattr(config, block) if block else config
        check_allowed(block, kind, {f.name: getattr(node, f.name) for f in fields(kind)})
    _check_values(config)
    to = config.tracking
    # Of any type until a command has decided; a number that a sweep gives is a text too.
    to.uri, to.experiment_name = (x if x is None else str(x) for x in (to.uri, to.experiment_name))
    chooses_accum_steps = _take_auto(config)
    stages = _take_schedule(config)
    data, config.accum.steps = data_config(config.data, config.accum.steps)
    _check_growth(config, data)
    if not stages:
        stages = (AccumStage(0, config.accum.steps, data.global_batch_size),)
    values = {f.name: getattr(config, f.name) for f in fields(Config)} | {"data": data}
    settings = Settings(**values, stages=stages, chooses_accum_steps=chooses_accum_steps)
    for key, value in settings.flat().items():
        if isinstance(value, float) and math.isnan(value):
            raise BadInputError(f"{key}={value}: is no number; leave it out for the default")
    return settings


def check_id(key: str, value: object) -> None:
    """Refuse an id that is no plain name of a folder.

    Raises:
        BadInputError: it has other signs than letters, digits, -, _ and dots, or leaves the folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", str(value)):
        raise BadInputError(
            f"{key}={value}: an id is made of letters, digits, -, _ and dots, beginning with a "
            "letter or a digit"
        )


def _refuse_other_than_blocks(cfg: DictConfig) -> None:
    """Refuse a block that is null, a number, or not there."""
    plain = ("task", "seed", "resume", "sweep_id")
    for name in (f.name for f in fields(Config) if f.name not in plain):
        missing = name not in cfg or OmegaConf.is_missing(cfg, name)
        node = None if missing else cfg[name]
        if isinstance(node, DictConfig):
            continue
        files = options(name)
        way_out = f"choose a file of it ({name}={files[0]})" if files else "set its keys one by one"
        raise BadInputError(f"{name}={'null' if node is None else node}: must be a block; {way_out}")


def _check_values(config: Config) -> None:
    """Refuse numbers out of range, and values that exclude each other; decide the training length."""
    runtime, train, seeds = config.runtime, config.train, config.sweep.seeds
    lengths = {f"train.{key}": getattr(train, key) for key in ("steps", "epochs", "samples")}
    given = {key: value for key, value in lengths.items() if value is not None}
    if len(given) > 1:
        named = " and ".join(f"{key}={value}" for key, value in given.items())
        raise BadInputError(f"{named} are both training lengths: set one of them to null")
    if not given:
        train.epochs = DEFAULT_EPOCHS
    if train.eval_every_steps is not None and train.eval_every_samples is not None:
        raise BadInputError(
            f"train.eval_every_steps={train.eval_every_steps} and train.eval_every_samples="
            f"{train.eval_every_samples} both say when to evaluate: set only one of them"
        )
    for rule, off in ((train.lr_rule, "none"), (train.beta2_rule, "fixed")):
        if rule != off and train.base_batch_size is None:
            key = "lr_rule" if off == "none" else "beta2_rule"
            raise BadInputError(
                f"train.{key}={rule}: from which global batch? train.base_batch_size says for which one "
                "the optimizer's numbers were chosen"
            )
    if runtime.weight_dtype == "same" and runtime.precision == "fp16":
        raise BadInputError(
            "runtime.weight_dtype=same with runtime.precision=fp16: gradients of float16 weights cannot "
            "be unscaled; keep runtime.weight_dtype=float32, or use runtime.precision=bf16"
        )
    if not config.resume.strip():
        raise BadInputError("resume=: must be auto, never, or the folder or the id of a run")
    distinct = isinstance(seeds, list) and {*map(type, seeds)} == {int} and len({*seeds}) == len(seeds)
    if seeds is not None and (config.sweep.vectorize is None or not distinct):
        raise BadInputError(f"sweep.seeds={seeds}: is written by -m seed=0,1,2 sweep.vectorize=seed")


def check_figures(figures: FiguresConfig) -> None:
    """Refuse what no figure can be like; of formats several become a list, one as well."""
    if isinstance(figures.format, str):
        figures.format = [figures.format]
    check_allowed("figures", FiguresConfig, {"width": figures.width, "format": figures.format})
    figures.format = list(map(str, figures.format))


def _take_auto(config: Config) -> bool:
    """Return whether N is to be chosen by what fits, and then let it be 1 for the time being."""
    accum, asked = config.accum, config.accum.steps
    if asked is None or (isinstance(asked, int) and not isinstance(asked, bool)):
        return False
    if asked != "auto":
        raise BadInputError(
            f"accum.steps={asked}: not an integer, null or auto{nearest(str(asked), ['auto'])}"
        )
    if accum.schedule is not None:
        raise BadInputError(
            f"accum.steps=auto and accum.schedule={accum.schedule} are both N: set only one of them"
        )
    if accum.grow is not None:
        raise BadInputError(
            f"accum.steps=auto and accum.grow={accum.grow} are both N: set accum.steps to the first N "
            "and accum.grow_to to the largest"
        )
    if config.data.get("micro_batch_size") is not None:
        raise BadInputError(
            f"accum.steps=auto chooses how data.global_batch_size is split, and "
            f"data.micro_batch_size={config.data['micro_batch_size']} does as well: set it to null"
        )
    accum.steps = 1
    return True


def _take_schedule(config: Config) -> tuple[AccumStage, ...]:
    """Return the stages of accum.schedule, if there is one; let its largest N stand for accum.steps."""
    schedule, accum = config.accum.schedule, config.accum
    if schedule is None:
        if accum.schedule_lr != "none":
            raise BadInputError(f"accum.schedule_lr={accum.schedule_lr}: there is no accum.schedule")
        return ()
    stages = stages_of(schedule, config.data)
    largest = max(schedule.values())
    if accum.steps not in (None, 1, largest):
        raise BadInputError(
            f"accum.steps={accum.steps} and accum.schedule={schedule} are both N: set only one of them"
        )
    accum.steps = largest
    spelled = ",".join(f"{stage.start}:{stage.accum_steps}" for stage in stages)
    accum.schedule = f"{{{spelled}}}"  # one value to be recorded, as on the command line
    return stages


def _check_growth(config: Config, data: DataConfig) -> None:
    """Refuse a batch that is to grow and cannot, as far as that is known without the data."""
    accum, first = config.accum, config.accum.steps
    changing = {"accum.schedule": accum.schedule, "accum.grow": accum.grow}
    for key, value in changing.items():
        if config.task == "advise" and value is not None:
            raise BadInputError(
                f"task=advise: shows the ways to one global batch, and {key}={value} changes it; set it "
                "to null"
            )
    if accum.grow is None:
        if accum.grow_to is not None:
            raise BadInputError(
                f"accum.grow_to={accum.grow_to}: no batch grows; accum.grow=auto lets one grow"
            )
        return
    if accum.schedule is not None:
        raise BadInputError(
            f"accum.grow={accum.grow} and accum.schedule={accum.schedule} are both N: set only one of "
            "them"
        )
    if not config.scheduler.get("_target_"):
        raise BadInputError(
            f"accum.grow={accum.grow}: the batch grows where the learning rate would fall, and there is "
            "no scheduler that lets it; choose one, as scheduler=cosine"
        )
    if accum.grow_to is not None and not first < accum.grow_to <= MOST:
        raise BadInputError(
            f"accum.grow_to={accum.grow_to}: must be above accum.steps={first}, the first N, and at "
            f"most {MOST:,}"
        )
    if data.global_batch_size % first:
        raise BadInputError(
            f"accum.grow={accum.grow}: a batch grows by whole micro-batches, and accum.steps={first} "
            f"does not divide data.global_batch_size={data.global_batch_size}; set "
            "data.micro_batch_size, and data.global_batch_size to null"
        )


def _check_targets(cfg: DictConfig) -> None:
    """Refuse a block that does not say what to build, with the likely reason."""
    for block in ("model", "criterion", "optimizer"):
        node = cfg[block]
        missing = OmegaConf.is_missing(node, "_target_")
        if not missing and node.get("_target_"):
            continue
        if isinstance(node.get(block), DictConfig):
            raise BadInputError(
                f"{block}.{block}: a file {block}/NAME.yaml holds the keys of the block, without a line "
                f"`{block}:` around them"
            )
        terms = block == "criterion" and "terms" in node
        if missing or not terms:
            instead = "; criterion.terms belongs to criterion=terms" if terms else ""
            raise BadInputError(f"{block}._target_ must be set{instead}")


def _refuse_unknown_keys(cfg: DictConfig) -> None:
    # Added with `+` to a block whose keys are all known, a key would end in a TypeError.
    for block, schema in BLOCKS.items():
        known = [f.name for f in fields(schema)]
        for key in map(str, cfg[block] if block else cfg):
            if key not in known:
                name = f"{block}.{key}" if block else key
                raise BadInputError(f"{name}: no such key{nearest(key, known)}")
    # `+data.typo=3` would vanish: besides the batch keys, only those that train or eval refers to count.
    text = OmegaConf.to_yaml(cfg.data, resolve=False)
    for key in map(str, cfg.data):
        used = f"${{data.{key}" in text or f"${{..{key}" in text
        # A missing one (`root: ???`) came with the file; what used it may have been overridden.
        if key not in BATCH_KEYS and not used and not OmegaConf.is_missing(cfg.data, key):
            hint = nearest(key, BATCH_KEYS)
            raise BadInputError(f"data.{key}: nothing in data.train or data.eval uses it{hint}")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        value = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
