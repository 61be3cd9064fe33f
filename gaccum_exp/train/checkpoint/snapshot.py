"""All that a training is at one place, as a tree; and a training put back to where it was.

By parameter name of the plain model. Data are not in it: which samples feed a window follows from the
global step, and what a window draws from its seed.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.core.window import split_sizes
from gaccum_exp.train.checkpoint.attributes import PuttingBack, attributes_of
from gaccum_exp.train.checkpoint.encoding import decode
from gaccum_exp.train.checkpoint.files import UnusableCheckpointError, read
from gaccum_exp.train.checkpoint.parts import (
    fitting,
    moving,
    names_of,
    objects_of,
    parameters_of,
    parts_of,
    put_back,
)
from gaccum_exp.train.device_and_precision import needs_closure
from gaccum_exp.train.hooks import Hook, Stateful
from gaccum_exp.train.state import TrainState

log = logging.getLogger(__name__)
Tree = dict[str, Any]
VERSION = 2


def goes_on_inside(state: TrainState) -> bool:
    """Whether a window that has begun can go on from any of its micro-batches.

    Not under a closure, nor where the loss is taken once over the window: that begins again.
    """
    return not needs_closure(type(state.optimizer).step) and not state.strategy.takes_window_at_once


def may_begin_again(state: TrainState, *, cheaply: bool) -> bool:
    """Whether a window that goes on may still have to begin again: at another N, or out of memory.

    At another N it need not, and goes on as it was split; where its start is kept `cheaply`, it does.
    """
    at_another_n = cheaply and not state.reduction.splits_again and state.strategy.leaves_gradient
    return at_another_n or state.settings.accum.on_oom == "increase_steps"


def snapshot(
    state: TrainState,
    hooks: Iterable[Hook],
    accumulator: AccumulatorState | None = None,
    at_start: Tree | None = None,
) -> Tree:
    """Return what a training is, tensors as they are: to be encoded before it moves on.

    Args:
        state: of the training.
        hooks: that watch it.
        accumulator: of a window that has begun; None: at the end of one.
        at_start: what `moving` returned when that began, where it may have to begin again.
    """
    parts = parts_of(state)
    parameters = parameters_of(parts)
    names = {parameter: name for name, parameter in parameters.items()}
    scheduler = None if state.scheduler is None else _without_functions(state.scheduler.state_dict())
    now = moving(parts)
    window: Tree | None = None
    if accumulator is not None and goes_on_inside(state):
        # Micro-batches are counted again: what a count stands for may be a function.
        held = accumulator.state_dict(names) | {"counts": [], "generators": None}
        window = {"sizes": _sizes(state), "accumulator": held, "at_start": at_start}
    elif accumulator is not None and at_start is not None:
        now = at_start
    return {
        "version": VERSION,
        "global_step": state.global_step,
        "split_factor": state.split_factor,
        "accum_steps": [stage.accum_steps for stage in state.settings.stages],
        "device": state.device.type,
        "parameters": parameters,
        "moving": now,
        "optimizer": _optimizer_tree(state, names)
        | {"attributes": attributes_of(state.optimizer, names_of(parts))[0]},
        "scheduler": scheduler,
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "hooks": {type(h).__name__: h.state_dict() for h in hooks if isinstance(h, Stateful)},
        "window": window,
    }


def restore(path: Path, state: TrainState, hooks: Iterable[Hook]) -> str | None:
    """Put a training that was just built back to where a checkpoint was taken.

    Under the same N it goes on bit for bit. Under another one from the end of a window, or inside one
    that may be split again; one that may not begins again from its start, without what it had added up.

    Args:
        path: of the checkpoint.
        state: of the training, at its beginning.
        hooks: that are going to watch it.

    Returns:
        What is to be said of a window that begins again; None: there is none.

    Raises:
        UnusableCheckpointError: it does not count, or is of another model or optimizer; then nothing was
            put back.
    """
    encoded = read(path)
    try:
        device = state.device
        tree = decode(encoded, device)
        if tree["device"] == "cpu" and device.type != "cpu":
            tree = _on_device(tree, device)
        if tree["window"] is not None:
            accumulator = tree["window"]["accumulator"]
            accumulator["generators"] = fitting(tree["moving"]["random"])
        version = tree["version"]
    except Exception as error:
        raise UnusableCheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error})"
        ) from error
    if version != VERSION:
        raise UnusableCheckpointError(f"{path}: is of another version of gaccum_exp")
    parts = parts_of(state)
    parameters = parameters_of(parts)
    _require_same_model(path, parameters, tree["parameters"])
    _require_same_optimizer(path, state, parameters, tree)
    same_n = tree["accum_steps"] == [stage.accum_steps for stage in state.settings.stages]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.data.copy_(tree["parameters"][name])
    state.global_step = tree["global_step"]
    state.split_factor = tree["split_factor"] if same_n else 1
    window = tree["window"]
    begins_again = window is not None and _begins_again(state, window)
    put_back(parts, window["at_start"] if begins_again else tree["moving"])
    _put_back_optimizer(state.optimizer, tree["optimizer"], parameters)
    PuttingBack(objects_of(parts)).attributes(state.optimizer, tree["optimizer"]["attributes"])
    if state.scheduler is not None:
        state.scheduler.load_state_dict(tree["scheduler"])
    if state.scaler is not None:
        state.scaler.load_state_dict(tree["scaler"])
    for hook in hooks:
        kept = tree["hooks"].get(type(hook).__name__)
        if isinstance(hook, Stateful) and kept is not None and (same_n or not hook.measures_split):
            hook.load_state_dict(kept)
    if begins_again:
        return _say_begins_again(state, window)
    if window is not None:
        _go_on_inside(state, window, parameters)
    return None


def _begins_again(state: TrainState, window: Tree) -> bool:
    """Whether the window in which a checkpoint was taken cannot go on as it would be split now."""
    splits = _splits_again(state) or window["sizes"] == _sizes(state)
    return not splits and window["at_start"] is not None


def _say_begins_again(state: TrainState, window: Tree) -> str:
    done, asked = window["accumulator"]["passes_done"], len(window["sizes"])
    said = (
        f"the window of step {state.global_step + 1} begins again: {done} of its {asked} micro-batches "
        f"were done, and under accum.reduction={state.reduction.name} it cannot go on with "
        f"N = {len(_sizes(state))}"
    )
    log.warning("%s", said)
    return said


def _go_on_inside(state: TrainState, window: Tree, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let the window in which a checkpoint was taken go on, what is left of it split as it is now.

    Under a reduction whose 1/N is spent, or a strategy with a part of the step taken, it is left as it
    was split.
    """
    sizes, done = window["sizes"], window["accumulator"]["passes_done"]
    now = _sizes(state)
    state.begun_sizes = None
    if sizes != now and not _splits_again(state):
        state.begun_sizes = sizes
    elif sizes != now:
        left = sum(sizes[done:])
        state.begun_sizes = [*sizes[:done], *(split_sizes(left, -(-left // now[0])) if left else [])]
    state.begun_at_start = window["at_start"]
    state.begun = AccumulatorState.from_state_dict(window["accumulator"], parameters)


def _splits_again(state: TrainState) -> bool:
    """Whether what is left of a window may be split for another N."""
    return state.reduction.splits_again and state.strategy.leaves_gradient


def _sizes(state: TrainState) -> list[int]:
    """Return the micro-batches of the window at the state's global step."""
    if state.begun_sizes is not None:
        return state.begun_sizes
    return split_sizes(state.plan.size(state.global_step), state.accum_steps(state.global_step))


def _without_functions(tree: Tree) -> Tree:
    """Return the entries that are values: functions belong to the configuration."""
    return {key: value for key, value in tree.items() if not callable(value)}


def _optimizer_tree(state: TrainState, names: Mapping[Any, str]) -> Tree:
    """Return an optimizer's state and groups by parameter name.

    Directly, since `load_state_dict` would cast the state to the parameters' type; one with a
    `state_dict` of its own knows more than these, and is taken by its word.
    """
    optimizer = state.optimizer
    tree: Tree = {"groups": [], "own": None}
    for number, group in enumerate(optimizer.param_groups):
        plain = {key: value for key, value in _without_functions(group).items() if key != "params"}
        if state.rates is not None:
            plain["lr"] = state.rates[number]
        tree["groups"].append({"params": [names[p] for p in group["params"]], "values": plain})
    if type(optimizer).state_dict is not Optimizer.state_dict:
        own = optimizer.state_dict()
        if state.rates is not None:
            for group, rate in zip(own.get("param_groups", ()), state.rates, strict=False):
                group["lr"] = rate
        return tree | {"own": own}
    tree["state"] = {names[key]: of for key, of in optimizer.state.items() if key in names}
    tree["others"] = {key: of for key, of in optimizer.state.items() if key not in names}
    return tree


def _put_back_optimizer(
    optimizer: Optimizer, tree: Tree, parameters: Mapping[str, nn.Parameter]
) -> None:
    if tree["own"] is not None:
        optimizer.load_state_dict(tree["own"])
    else:
        optimizer.state.clear()  # in place: several optimizers may share it
        optimizer.state.update({parameters[name]: of for name, of in tree["state"].items()})
        optimizer.state.update(tree["others"])
        for group, kept in zip(optimizer.param_groups, tree["groups"], strict=True):
            for key in _without_functions(group).keys() - {"params"} - kept["values"].keys():
                del group[key]
            group.update(kept["values"])


def _require_same_model(path: Path, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    ours, theirs = ({n: (tuple(p.shape), p.dtype) for n, p in of.items()} for of in (here, there))
    for name in dict.fromkeys([*theirs, *ours]):
        if ours.get(name) != theirs.get(name):
            said = [
                f"{tuple(p.shape)}, {p.dtype}" if p is not None else "not there"
                for p in (there.get(name), here.get(name))
            ]
            raise UnusableCheckpointError(
                f"{path}: is of another model: {name} is {said[0]} in it, and {said[1]} here"
            )


def _require_same_optimizer(
    path: Path, state: TrainState, parameters: Mapping[str, nn.Parameter], tree: Tree
) -> None:
    names = {parameter: name for name, parameter in parameters.items()}
    ours = [[names[p] for p in group["params"]] for group in state.optimizer.param_groups]
    others = (state.scheduler is None) != (tree["scheduler"] is None) or (
        (state.scaler is None) != (tree["scaler"] is None)
    )
    if ours != [group["params"] for group in tree["optimizer"]["groups"]] or others:
        raise UnusableCheckpointError(f"{path}: is of another optimizer, schedule or precision")


def _on_device(tree: Tree, device: torch.device) -> Tree:
    """Return the tree of a training on the host, for one that goes on elsewhere."""

    def moved(of: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), of)

    def of_modules(kept: Tree) -> Tree:
        return kept | {key: moved(kept[key]) for key in ("buffers", "attributes")}  # no generators

    window = tree["window"]
    if window is not None:
        at_start = window["at_start"] and of_modules(window["at_start"])
        window |= {"accumulator": moved(window["accumulator"]), "at_start": at_start}
    elsewhere = {"optimizer": moved(tree["optimizer"]), "moving": of_modules(tree["moving"])}
    return tree | elsewhere | {"window": window}
