"""Build a training from settings: model, loss, optimizer and schedule around the data."""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, TensorDataset

from gaccum_exp.config.schema import Settings
from gaccum_exp.config.targets import (
    checked,
    import_target,
    instantiate,
    parameter_names,
    spoken,
)
from gaccum_exp.core.batch_growth import BatchGrowth
from gaccum_exp.core.checkpointing import checkpoint_blocks
from gaccum_exp.core.dtypes import module_in_precision
from gaccum_exp.core.feed import windows
from gaccum_exp.core.losses.criteria import as_criterion
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.losses.denominator import PER_LABEL, is_kind
from gaccum_exp.core.losses.micro_batch import tokens_in
from gaccum_exp.core.losses.model_loss import ModelLoss
from gaccum_exp.core.losses.placement import placed
from gaccum_exp.core.losses.protocol import LossFn, count, window_denominator
from gaccum_exp.core.losses.terms import CriterionTerm, TermsLoss
from gaccum_exp.core.reductions import Sum, reduction_named
from gaccum_exp.core.seeding import derive_seed, seed_host
from gaccum_exp.core.strategies import InPlace
from gaccum_exp.core.window import BatchStage, WindowPlan
from gaccum_exp.core.window_loss import LossTotal
from gaccum_exp.errors import BadInputError, nearest
from gaccum_exp.memory.available import free_bytes
from gaccum_exp.memory.fake import SizesOnly, fake_copies, nothing_left_behind, sizes_only
from gaccum_exp.memory.plan import size
from gaccum_exp.tracking import metrics
from gaccum_exp.train.batch_rules import (
    Rates,
    batch_factor,
    rates_of,
    require_following,
    require_scaled_once,
)
from gaccum_exp.train.datasets import DatasetCache, lengths_of
from gaccum_exp.train.device_and_precision import (
    placed_weights,
    placement_of,
    prepare_runtime,
    scaler_of,
)
from gaccum_exp.train.growth import growth_of, require_one_schedule, stages_of
from gaccum_exp.train.optimizers import GROUPS, optimizer_of
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.two_sample_check import first_samples, try_first_samples

log = logging.getLogger(__name__)
MOST_EPOCHS = 1000
"""Of the data set in one window."""
SIZED = ("gaccum_exp.models.mlp.", "gaccum_exp.models.cnn.", "gaccum_exp.models.gpt.")
"""Beginnings of the models whose size is the configuration's."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The device, the data and the plan of a training: the same for every N."""

    device: torch.device
    train_data: Dataset[Any]
    eval_data: Dataset[Any] | None
    plan: WindowPlan
    total_steps: int
    drawn: bool
    """Whether random numbers were drawn as the data sets were built: another seed has others."""
    growth: BatchGrowth | None = None
    """Of a batch that grows, under `plan`."""

    def of_seed(self, seed: int) -> "TrainingData":
        """Return the same data in another seed's order."""
        return replace(self, plan=replace(self.plan, seed=seed))

    def in_stages(self, settings: Settings) -> Settings:
        """Return the settings with the stages of a batch that grows, which only the data decide."""
        return settings if self.growth is None else settings.in_stages(stages_of(self.growth, settings))


def load(settings: Settings, cache: DatasetCache | None = None) -> TrainingData:
    """Prepare the runtime, and build the data sets.

    Args:
        settings: of the run.
        cache: gives the data sets of the arm before, and keeps these for the next; None: builds them.

    Raises:
        BadInputError: anything in the configuration of these that cannot be used.
    """
    device = prepare_runtime(settings)
    seed = settings.seed
    cache = cache or DatasetCache()
    train = cache.load("data.train", settings.data.train, seed)
    held_out = None
    if settings.data.eval is not None and settings.task != "plan":
        held_out = cache.load("data.eval", settings.data.eval, seed)
    train_data = train.dataset
    plan = WindowPlan(
        len(train_data),  # type: ignore[arg-type]  # checked to be map-style
        [BatchStage(stage.start, stage.global_batch_size) for stage in settings.stages],
        settings.seed,
        settings.accum.partial_window,  # type: ignore[arg-type]  # checked to be one of these
        lengths=lengths_of(train_data) if settings.data.sort_by_length else None,
        by_step=settings.accum.schedule_by == "step",
    )
    _refuse_windows_beyond_data(settings, plan)
    total_steps, growth = _total_steps(settings, plan), None
    if settings.accum.grow is not None:
        growth = _growth(settings, plan, total_steps)
        plan, total_steps = plan.in_stages(growth.stages), len(growth.factors)
    if settings.train.beta2_rule != "fixed" and len({of.global_batch_size for of in plan.stages}) > 1:
        log.warning(
            "train.beta2_rule=%s: β₂ is that of a global batch of %d, and does not follow the batch",
            settings.train.beta2_rule, settings.data.global_batch_size,
        )  # fmt: skip
    return TrainingData(
        device=device,
        train_data=train_data,
        eval_data=None if held_out is None else held_out.dataset,
        plan=plan,
        total_steps=total_steps,
        drawn=train.drawn or (held_out is not None and held_out.drawn),
        growth=growth,
    )


def _growth(settings: Settings, plan: WindowPlan, total_steps: int) -> BatchGrowth:
    # The schedule is read off a parameter of no model: its data are not there yet.
    # Its groups are by the names of a model's: each has the one schedule, or is refused afterwards.
    plain = {key: value for key, value in settings.optimizer.items() if key != GROUPS}
    any_model = nn.ModuleList([nn.Linear(2, 2, bias=False, device="meta")])
    optimizer, rates = _rates(
        replace(settings, optimizer=plain), any_model, [torch.zeros(2, 2)], total_steps
    )
    return growth_of(settings, plan, optimizer, [first for first, *_ in rates])


def _rates(
    settings: Settings, modules: nn.ModuleList, tensors: Sequence[Tensor], total_steps: int
) -> tuple[torch.optim.Optimizer, Rates]:
    """Return an optimizer like the run's of tensors like these, and the rates of its schedule."""
    optimizer = optimizer_of(settings, modules, [nn.Parameter(tensor) for tensor in tensors])
    scheduler = scheduler_of(settings, optimizer, total_steps)
    assert scheduler is not None  # of settings that have one
    return optimizer, rates_of(optimizer, scheduler, total_steps)


def _refuse_rates_of_their_own(settings: Settings, modules: nn.ModuleList, total_steps: int) -> None:
    """Refuse a schedule some of whose rates are not what the batch's rules make of them."""
    grows, follows = settings.accum.grow is not None, batch_factor(settings) != 1.0
    if not settings.scheduler.get("_target_") or not (grows or follows):
        return
    # An optimizer may hang hooks on what it is given, so that these are others, in as many dimensions.
    like = [p.detach().new_zeros((1,) * p.ndim) for p in modules.parameters() if p.requires_grad]
    _, rates = _rates(settings, modules, like, total_steps)
    if grows:
        require_one_schedule(settings, rates)
    if follows:
        unscaled = replace(settings, train=replace(settings.train, lr_rule="none"))
        require_following(settings, rates, _rates(unscaled, modules, like, total_steps)[1])


def _refuse_windows_beyond_data(settings: Settings, plan: WindowPlan) -> None:
    """Refuse windows that no data set of this size can fill, or be split for."""
    n, asked = max(stage.accum_steps for stage in settings.stages), plan.full_window
    if n > asked:
        raise BadInputError(
            f"accum.steps={n}: data.train holds {plan.samples} samples, so that no window can be split "
            f"into more than {asked} micro-batches"
        )
    if asked > MOST_EPOCHS * plan.samples:
        raise BadInputError(
            f"data.global_batch_size={asked}: under accum.partial_window=carry a window would hold "
            f"{asked // plan.samples:,} epochs of data.train ({plan.samples} samples), more than "
            f"{MOST_EPOCHS:,}"
        )


def build(
    settings: Settings, loaded: TrainingData | None = None, fake: FakeTensorMode | None = None
) -> TrainState:
    """Build a training at its first global step.

    Args:
        settings: of the run.
        loaded: for these settings, or for the same with another N; None: load them.
        fake: build it without memory, to be used inside this mode, which predicts what passes hold.

    Raises:
        BadInputError: anything in the configuration that does not lead to a runnable training.
    """
    loaded = loaded or load(settings)
    settings = loaded.in_stages(settings)
    device, train_data, plan = loaded.device, loaded.train_data, loaded.plan
    placement, strategy = placement_of(settings, device), _strategy(settings)
    reduction = reduction_named(settings.accum.reduction)
    strategy.require(reduction)
    first = first_samples(train_data, plan)
    if fake is None:
        _refuse_weights_beyond_memory(settings, train_data)
        model = placed_weights(_model(settings, train_data), settings, placement)
    else:
        weights = _sized_model(settings, train_data)
        weights = placed_weights(weights, settings, replace(placement, device=None))
        (model,) = fake_copies(fake, (weights,), device)
    criterion_loss, loss_fn = _loss(settings, strategy, model, device, fake)
    with fake or nullcontext():
        if settings.runtime.activation_checkpointing and not checkpoint_blocks(model):
            raise BadInputError(
                f"runtime.activation_checkpointing=true: {type(model).__name__} has no blocks that "
                "could be run again one by one"
            )
        if fake is not None:
            loss_fn = SizesOnly(loss_fn, first)
        try_first_samples(model, None if fake else criterion_loss, loss_fn, first, placement)
        if fake is not None:
            strategy = sizes_only(strategy)
        elif settings.accum_steps > 1:
            strategy.inspect(model, placed(loss_fn, placement), [first])
        if settings.runtime.compile and fake is None:
            model.compile()
        roots = [model] if criterion_loss is None else [model, criterion_loss.criterion]
        modules = nn.ModuleList(roots)
        parameters = [p for p in modules.parameters() if p.requires_grad]
        if not parameters:
            raise BadInputError("model: it has no parameter that requires a gradient")
        optimizer = optimizer_of(settings, modules)
    strategy = strategy.for_optimizer(optimizer)
    require_scaled_once(settings, strategy, plan, loaded.total_steps)
    from_host = placed(loss_fn, placement)
    criterion = None if criterion_loss is None else criterion_loss.criterion
    ignored = getattr(criterion, "ignore_index", None)
    if isinstance(reduction, Sum) and settings.accum.sum_scale == "constant" and fake is None:
        reduction = Sum(nominal_denominator(model, from_host, train_data, plan))
    state = TrainState(
        model=model,
        loss_fn=from_host,
        criterion_loss=criterion_loss,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=None,
        train_data=train_data,
        eval_data=loaded.eval_data,
        plan=plan,
        total_steps=loaded.total_steps,
        reduction=reduction,
        strategy=strategy,
        device=device,
        placement=placement,
        # A scaler's step reads values, which fake tensors do not have; it holds a few bytes.
        scaler=None if fake else scaler_of(settings, optimizer, device),
        # A loss function of the user's own is taken to count every integer of a target as a label.
        counts_tokens=tokens_in(first) is not None
        and (criterion is None or is_kind(criterion, PER_LABEL)),
        ignore_index=-100 if ignored is None else int(ignored),
        settings=settings,
        growth=loaded.growth,
    )
    if fake is None:
        _refuse_rates_of_their_own(settings, modules, state.schedule_steps)
        state.scheduler = scheduler_of(settings, optimizer, state.schedule_steps)
    return state


def _sized_model(settings: Settings, train_data: Dataset[Any]) -> nn.Module:
    """Build the model without memory, on `meta`; one whose constructor reads values, with memory."""
    try:
        with nothing_left_behind(), torch.device("meta"):
            return _model(settings, train_data)
    except Exception:  # where values are not what is missing, the second attempt raises the same
        return _model(settings, train_data)


def _refuse_weights_beyond_memory(settings: Settings, train_data: Dataset[Any]) -> None:
    """Refuse a model of ours whose weights alone do not fit, before one of them is allocated.

    Of others who knows what building them does besides; torch says when it cannot.
    """
    if not str(settings.model["_target_"]).startswith(SIZED):
        return
    weights = sum(p.nbytes for p in _sized_model(settings, train_data).parameters())
    free = free_bytes(torch.device("cpu"))  # where they are made first
    if free is not None and weights > free:
        raise BadInputError(
            f"model: its weights alone hold {size(weights)}, of {size(free)} that are free"
        )


def nominal_denominator(
    model: nn.Module, loss_fn: LossFn, train_data: Dataset[Any], plan: WindowPlan
) -> float | dict[str, float]:
    """Return the denominator of a full window, or that of each term, the same for every N.

    It is that of the run's first window, scaled to full size. A loss function that cannot count
    beforehand is run once, on a copy of the model, so that nothing of the run moves.
    """
    samples = len(plan.indices(0))
    # One sample at a time where the model must run: this never takes more memory than training does.
    window = next(windows(train_data, plan, accum_steps=samples, global_steps=range(1)))
    counts = [count(loss_fn, micro_batch) for micro_batch in window]
    known = [n for n in counts if n is not None and not isinstance(n, dict)]
    scale, total = plan.largest_batch / samples, LossTotal(loss_fn)
    if len(known) == len(window):
        nominal: float | dict[str, float] = float(window_denominator(loss_fn, sum(known) * scale))
    else:
        model = copy.deepcopy(model).eval()
        with torch.no_grad():
            for micro_batch, of_it in zip(window, counts, strict=True):
                total.add(loss_fn(model, micro_batch), of_it)
        nominal = total.denominators(scale)
    if not nominal:
        raise BadInputError(
            "accum.sum_scale=constant: nothing in the first window counts, so there is no constant; "
            "use accum.sum_scale=none or accum.reduction=global_mean"
        )
    return nominal


def _total_steps(settings: Settings, plan: WindowPlan) -> int:
    length, n, size = settings.train, plan.samples, plan.largest_batch
    if n < size:
        log.warning(
            "data.train holds %d samples, fewer than data.global_batch_size=%d: a window holds %s",
            n, size, "several epochs" if plan.partial_window == "carry" else "one epoch",
        )  # fmt: skip
    total = length.steps or plan.steps_in(epochs=length.epochs, samples=length.samples)
    if total == 0:
        asked = f"{length.epochs} epochs" if length.epochs else f"{length.samples} samples"
        raise BadInputError(
            f"{asked} of data.train ({n} samples) hold no whole window of data.global_batch_size={size}"
        )
    left = -sum(plan.size(k) for k in range(total)) % n if plan.partial_window == "carry" else 0
    if left > 0:
        log.warning("accum.partial_window=carry: %d samples are left of the last epoch", left)
    return total


def _model(settings: Settings, train_data: Dataset[Any]) -> nn.Module:
    node = dict(settings.model)
    for key in ("input_shape", "num_classes", "vocab_size"):  # taken from the data where they are null
        if key in node and node[key] is None:
            shape = key == "input_shape"
            node[key] = _input_shape(train_data) if shape else _number_of_classes(train_data, key)
    import_target(node)
    seed_host(derive_seed(settings.seed, "weights"))
    model: nn.Module = checked("model", node, nn.Module)
    return model


def _input_shape(dataset: Dataset[Any]) -> list[int]:
    try:
        return list(dataset[0][0].shape)
    except (AttributeError, KeyError, TypeError, IndexError):
        raise BadInputError(
            f"model.input_shape: the first sample of data.train, a {type(dataset[0]).__name__}, is no "
            "(input, target) pair with a tensor as input, so set model.input_shape"
        ) from None


def _number_of_classes(dataset: Dataset[Any], key: str) -> int:
    if hasattr(dataset, "classes"):
        return len(dataset.classes)
    if type(dataset) is TensorDataset and not dataset.tensors[-1].is_floating_point():
        return int(dataset.tensors[-1].max()) + 1
    raise BadInputError(
        f"model.{key}: the dataset does not say how many there are (no attribute `classes`), "
        f"so set model.{key}"
    )


def _strategy(settings: Settings) -> InPlace:
    strategy: InPlace = checked("strategy", settings.strategy, InPlace)
    accum, precision = settings.accum, settings.precision
    needing = {
        f"accum.max_grad_norm={accum.max_grad_norm}": accum.max_grad_norm is not None,
        f"runtime.precision={precision}, with its GradScaler,": precision == "fp16",
        f"accum.on_oom={accum.on_oom}": accum.on_oom == "increase_steps",
    }
    asked = next((key for key, holds in needing.items() if holds), None)
    if asked is not None and not strategy.leaves_gradient:
        raise BadInputError(
            f"{asked} has no meaning under strategy={strategy.name}: a micro gradient is in the "
            "optimizer's moments as soon as it is there, and cannot be looked at, changed or taken out "
            "again; leave it out, or use strategy=in_place"
        )
    return strategy.buffered(torch.float32) if settings.accum.buffer_dtype == "float32" else strategy


def _loss(
    settings: Settings,
    strategy: InPlace,
    model: nn.Module,
    device: torch.device,
    fake: FakeTensorMode | None,
) -> tuple[CriterionLoss | TermsLoss | None, LossFn]:
    node, reduction = settings.criterion, settings.accum.reduction
    # Class weights have to be as precise as the outputs that they weigh.
    double = any(p.dtype in (torch.float64, torch.complex128) for p in model.parameters())
    dtype = torch.float64 if double else torch.float32
    whole = strategy.takes_window_at_once

    def placed_criterion(criterion: nn.Module) -> nn.Module:
        criterion = module_in_precision(criterion, None if fake else device, dtype)
        return criterion if fake is None else fake_copies(fake, (criterion,), device)[0]

    if "terms" in node and not node.get("_target_"):
        terms = {
            name: replace(term, criterion=placed_criterion(term.criterion))
            for name, term in _terms(node).items()
        }
        loss_of_terms = TermsLoss(terms, reduction, whole_window=whole)
        return loss_of_terms, loss_of_terms
    criterion = _criterion("criterion", node)
    criterion = as_criterion(criterion) or criterion
    if isinstance(criterion, nn.Module):
        loss = CriterionLoss(placed_criterion(criterion), reduction, whole_window=whole)
        return loss, loss
    if isinstance(criterion, ModelLoss):
        criterion.reduction = reduction
    if not callable(criterion):
        raise BadInputError(
            f"{spoken('criterion', node)}: gives {type(criterion).__name__}, neither a "
            "torch.nn module nor a callable loss_fn(model, micro_batch) -> (loss_sum, denominator)"
        )
    return None, criterion


def _criterion(key: str, node: Mapping[str, Any]) -> Any:
    # On the command line a tensor can only be a list; these are torch's names for such arguments.
    tensors = {
        key: torch.tensor(value, dtype=torch.float32)
        for key, value in node.items()
        if key in ("weight", "pos_weight") and isinstance(value, list)
    }
    return instantiate(key, {k: v for k, v in node.items() if k not in tensors}, **tensors)


def _terms(node: Mapping[str, Any]) -> dict[str, CriterionTerm]:
    """Build the criteria of `criterion.terms`."""
    given, known = node["terms"], [f.name for f in fields(CriterionTerm)]
    if not isinstance(given, Mapping) or not given or set(node) - {"terms", "_target_"}:
        raise BadInputError(
            "criterion.terms: is a mapping of names to {criterion: {_target_: …}, output: …, target: …, "
            "weight: …}, and nothing stands beside it"
        )
    terms = {}
    for name, term in given.items():
        key = f"criterion.terms.{name}"
        if not isinstance(term, Mapping) or not isinstance(term.get("criterion"), Mapping):
            raise BadInputError(f"{key}.criterion._target_ must be set")
        for other in set(map(str, term)) - set(known):
            raise BadInputError(f"{key}.{other}: no such key{nearest(other, known)}")
        weight = term.get("weight", 1.0)
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise BadInputError(f"{key}.weight={weight}: must be a number")
        if "." in str(name) or metrics.of_term("", str(name)) != f"/{name}":
            raise BadInputError(f"{key}: a term's name is made of letters, digits, - and _")
        criterion = _criterion(f"{key}.criterion", term["criterion"])
        if not isinstance(criterion, nn.Module):
            raise BadInputError(
                f"{key}.criterion._target_={term['criterion']['_target_']}: gives "
                f"{type(criterion).__name__}, not a torch.nn.Module"
            )
        terms[str(name)] = CriterionTerm(**{**term, "criterion": criterion, "weight": float(weight)})
    return terms


def scheduler_of(
    settings: Settings, optimizer: torch.optim.Optimizer, total_steps: int
) -> LRScheduler | None:
    """Build the learning-rate schedule of an optimizer; None where there is none."""
    node = settings.scheduler
    if not node.get("_target_"):
        return None
    extra = {}
    if "total_steps" in parameter_names(node) and node.get("total_steps") is None:
        extra["total_steps"] = total_steps
    scheduler: LRScheduler = checked("scheduler", node, LRScheduler, optimizer, **extra)
    if "metrics" in inspect.signature(scheduler.step).parameters:
        raise BadInputError(
            f"scheduler._target_={node['_target_']}: steps on a metric, and a schedule here is a "
            "function of the optimizer step"
        )
    return scheduler
