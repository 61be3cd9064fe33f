"""Sweeps and their comparisons, from Python: the same command as in a shell, handed back as values."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from gaccum_exp.api.result import SweepResult
from gaccum_exp.arms.context import Caller
from gaccum_exp.cli import call
from gaccum_exp.config.arguments import command_line, written
from gaccum_exp.errors import BadInputError, complain

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

_FOLDERS = ("--config-dir", "--config-path", "--config-name")
"""The flags that say where configurations lie."""
_KEYS = {
    "accum_steps": "accum.steps",
    "reduction": "accum.reduction",
    "global_batch_size": "data.global_batch_size",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "seed": "seed",
    "device": "runtime.device",
    "tracking": "tracking.uri",
}
"""Arguments by name that are a key of the configuration."""


def sweep(
    *overrides: str,
    model: "nn.Module | Callable[..., nn.Module] | None" = None,
    criterion: "nn.Module | Callable[..., Any] | None" = None,
    data: Any = None,
    optimizer: "Callable[..., Optimizer] | None" = None,
    accum_steps: "int | Literal['auto'] | Sequence[int | Literal['auto']] | None" = None,
    reduction: str | Sequence[str] | None = None,
    global_batch_size: int | Sequence[int] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int | Sequence[int] | None = None,
    device: str | None = None,
    tracking: str | None = None,
) -> SweepResult:
    """Train with every N on the same samples, and compare each training with the large batch.

    It is `python -m gaccum_exp -m` with these overrides: one training, an arm, for every combination of
    the values that are given, in a process beside this one; the same files in `multirun/`, the same runs
    in MLflow. Objects may take the place of configuration files:

        sweep("model=mlp", accum_steps=[1, 2, 4, 8])
        sweep(model=net, criterion=nn.CrossEntropyLoss(), data=(inputs, targets),
              optimizer=functools.partial(torch.optim.SGD, lr=0.1), accum_steps=[1, 2, 4])

    An arm gets a copy of each object, made by pickling (classes and functions of a notebook too), so
    that all arms begin with the same weights, and the objects stay as they are. Classes and functions
    that can be imported are recorded by their name and arguments, anything else by its name and a
    digest.

    Args:
        *overrides: as on the command line, `optimizer.lr=0.1`; several values, `optimizer.lr=0.1,0.2`,
            are swept over.
        model: a module, which every arm trains from these weights, whatever the seed; or a callable that
            makes one, with random numbers that follow from the seed.
        criterion: a `torch.nn` criterion; a function of output and target that takes `reduction`, as in
            `torch.nn.functional`; or `loss_fn(model, micro_batch) -> (loss_sum, denominator)`.
        data: a map-style data set, tensors `(inputs, targets)` of as many samples, or a callable that
            makes a data set; a tuple `(train, eval)` of two of these gives data to evaluate on too.
        optimizer: a callable that takes parameters: a class of `torch.optim`, a `functools.partial` of
            one, a function. Not an optimizer, which holds the parameters of one model.
        accum_steps: N, micro-batches per window, one or several; `"auto"`: the smallest that fits.
        reduction: `global_mean`, `mean` or `sum`, one or several.
        global_batch_size: samples of one optimizer step, one or several; 256 by default.
        epochs: how long to train; 20 by default.
        steps: instead, in optimizer steps.
        seed: of the order of samples, and of what is drawn; one or several.
        device: `cpu`, `cuda`; by default the accelerator if there is one.
        tracking: MLflow tracking URI; by default `MLFLOW_TRACKING_URI`, else SQLite in the working
            directory.

    Returns:
        What the sweep shows. An arm that failed is in its table, with the reason.

    Raises:
        BadInputError: an argument or a key that cannot be used, in one line; nothing was trained then.
        KeyboardInterrupt: after Ctrl-C, once the micro-batch in hand was done and what there is was
            recorded; `sweep.resume=last` in the same call goes on.
    """
    given = _checked(overrides)
    named: dict[str, Any] = {
        "accum_steps": accum_steps,
        "reduction": reduction,
        "global_batch_size": global_batch_size,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
        "device": device,
        "tracking": tracking,
    }
    objects = {"model": model, "criterion": criterion, "data": data, "optimizer": optimizer}
    named = {name: value for name, value in named.items() if value is not None}
    objects = {name: value for name, value in objects.items() if value is not None}
    for name in named:
        _refuse_both(name, given, _KEYS[name])
    of_objects, files = _overrides_of(objects, given)
    lines = [*of_objects, *(f"{_KEYS[name]}={_swept(name, value)}" for name, value in named.items())]
    spoken = [f"{name}=…" for name in objects] + [f"{name}={value!r}" for name, value in named.items()]
    command = call(Caller(overrides, tuple(spoken), files), ["-m", *lines, *overrides])
    assert command.report is not None
    return SweepResult(command.report)


def compare(
    sweep_ids: str | Iterable[str],
    *,
    tracking: str | None = None,
    experiment: str | None = None,
    folder: str | Path | None = None,
    formats: Sequence[str] | None = None,
) -> SweepResult:
    """Compare a sweep that has ended again, or several as one, as `python -m gaccum_exp report` does.

    Its runs are read from their journals below the working directory, else from MLflow.

    Args:
        sweep_ids: as printed when a sweep begins; several are compared as one.
        tracking: MLflow tracking URI; by default the sweep's.
        experiment: of the store; by default the sweep's.
        folder: of the files that are written; by default `reports/<sweep_id>`.
        formats: out of html, csv, md, latex, pdf, svg, png; by default the page, `comparison.csv`, and
            figures as the sweep has them.

    Raises:
        BadInputError: there is no such sweep, or no such format.
        TrackingError: the store does not answer.
    """
    from gaccum_exp.arms.report import formats_of, report_again
    from gaccum_exp.arms.settle import settle

    ids = [sweep_ids] if isinstance(sweep_ids, str) else list(sweep_ids)
    if not ids:
        raise BadInputError("compare([]): which sweep? Give its id, or several")
    place = None if folder is None else Path(folder)
    report, _ = report_again(ids, tracking, experiment, place, formats_of(formats, "formats"))
    if settle([report.folder]):
        complain(f"the report is not in {report.uri} yet: it is delivered with the next command")
    return SweepResult(report)


def _checked(overrides: Sequence[object]) -> dict[str, str]:
    """Return overrides as they were given, by key.

    Raises:
        BadInputError: one is no text, or a flag that does not say where configurations lie.
    """
    for override in overrides:
        if not isinstance(override, str):
            raise BadInputError(
                f"sweep({override!r}): an override is a text, 'key=value', each an argument of its own"
            )
    line = command_line([str(override) for override in overrides])
    for flag in line.flags:
        if flag not in _FOLDERS:
            raise BadInputError(f"{flag}: has no meaning in sweep(), which takes {', '.join(_FOLDERS)}")
    given: dict[str, str] = {}
    for override in line.overrides:
        try:
            key = OverridesParser.create().parse_override(override).get_key_element()
        except HydraException:  # it is said with all others
            continue
        given[key.lstrip("+~")] = override
    task = given.get("task", "task=train")
    if task != "task=train":
        raise BadInputError(f"{task}: sweep() trains; for others there is python -m gaccum_exp {task}")
    return given


def _overrides_of(objects: dict[str, Any], given: dict[str, str]) -> tuple[list[str], dict[str, bytes]]:
    """Return objects as overrides, but for arguments that are among the given ones, and their files."""
    if not objects:
        return [], {}
    from gaccum_exp.api.objects import HandedOver  # with torch

    handed_over = HandedOver()
    for name, value in objects.items():
        _refuse_both(name, given, name)
        getattr(handed_over, f"add_{name}")(value)
    lines = []
    for key, value in handed_over.overrides.items():
        own = key.lstrip("+~")
        if own.endswith(("_target_", ".digest")):
            _refuse_both(own.partition(".")[0], given, own)
        if own not in given:
            lines.append(f"{key}={value}" if value else key)
    return lines, handed_over.objects


def _refuse_both(name: str, given: dict[str, str], key: str) -> None:
    if key in given:
        raise BadInputError(f"{name}= and {given[key]!r} both say {key}: leave one of them out")


def _swept(name: str, value: Any) -> str:
    """Return the value of an argument as an override has it: several with commas.

    Raises:
        BadInputError: it is none that a configuration can hold, or there is none.
    """
    several = isinstance(value, (list, tuple, range)) or hasattr(value, "tolist")
    values = list(value) if several else [value]
    try:
        if not values:
            raise TypeError("there is no value")
        return ",".join(map(written, values))
    except TypeError as error:
        raise BadInputError(f"{name}={value!r}: {error}") from None
