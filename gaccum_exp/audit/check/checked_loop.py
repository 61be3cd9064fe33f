"""Watch the loop of a script, note what is judged, and end the script once that is enough."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from gaccum_exp.audit.check.captured import CapturedWindow
from gaccum_exp.audit.check.other_windows import Data, data_of
from gaccum_exp.audit.watch.discovery import LoopFinder, making_noted, stepped_by, unwrapped
from gaccum_exp.audit.watch.scalars import LOSS_NAMES, calling_frame
from gaccum_exp.audit.watch.tape import Observations, ignored_label, models_own_loss
from gaccum_exp.audit.watch.taped_window import sample_readings
from gaccum_exp.audit.watch.watch import Watched, watch
from gaccum_exp.core.gradient import Gradient
from gaccum_exp.errors import first_line

IN_VAIN = 3
"""So often at most the end is raised in a script that swallows it."""
PATIENCE = 10
"""Of so many times the windows asked for, the others' optimizers are waited for."""


class CheckEndedError(BaseException):
    """Ends a script whose windows have been judged; `except Exception` lets it pass."""


@dataclass(slots=True)
class Epoch:
    """What is known of the data that the loop goes through."""

    micro_batches: int | None
    """Of an epoch; None: nobody knows before its end."""
    last_samples: int | None = None
    """Of its last micro-batch, where that has fewer."""
    samples: int | None = None
    """Of a micro-batch, where its last has fewer."""
    data: Data | None = None
    """What it reads, where that can be read again."""
    read: int | None = None
    """Batches that were read of it; None: that is not known."""


@dataclass(slots=True)
class Group:
    """Optimizers that take a step together, and the windows that they took."""

    optimizers: list[str]
    """Class names."""
    modules: list[str]
    """Those of the modules that were called."""
    losses: list[str]
    parameters: int
    """Numbers in the parameters that are stepped."""
    windows: list[int] = field(default_factory=list)
    """Places in the list of audits."""
    sizes: list[list[int]] = field(default_factory=list)
    """Of each window the samples of its micro-batches; empty where these are not known."""
    captured: CapturedWindow | None = None
    """The last one."""
    not_captured: str = ""
    """Why there is none."""
    beside: list[str] = field(default_factory=list)
    """Modules with weights that ran beside the model."""
    ignored: int = -100
    """The label that its losses do not count."""


class CheckedLoop(watch):
    """Watches a script's loop.

    Args:
        windows: how many to judge, of all optimizers that step together.
        batch_dim: as in `watch`.
        swallowed: called where the script goes on though it was ended; it does not return.
        judged: called with how many windows of an optimizer are judged now, the last verdict, and of
            several optimizers its name.
        noise: as in `watch`.
    """

    def __init__(
        self,
        windows: int,
        batch_dim: int | None,
        swallowed: Callable[[], None],
        judged: Callable[[int, str, str], None] = lambda count, verdict, whose: None,
        *,
        noise: bool = False,
    ) -> None:
        super().__init__(batch_dim=batch_dim, noise=noise)
        self._finder = LoopFinder(self._found, self._made, before=False)
        self._asked, self._swallowed, self._judged_one = windows, swallowed, judged
        self.groups: dict[frozenset[str], Group] = {}
        self.epoch: Epoch | None = None
        """Of the data loader that was read last; None: there was none."""
        self._loaders: list[tuple[weakref.ref[Any], Epoch]] = []
        """The iterators over data loaders that were made."""
        self.raised = 0
        """How often the script was ended."""
        self.steps = 0
        """Optimizer steps taken, judged or not."""
        self.compiled = False
        """Whether torch.compile compiled the model as a whole."""

    def __enter__(self) -> Watched:
        self._stack.enter_context(making_noted(_BaseDataLoaderIter, self._note_loader))
        return super().__enter__()

    def _note_loader(self, iterator: Any) -> None:
        """Note an iterator over a data loader: a loop may read it before it calls a module."""
        assert self._finder is not None
        epoch = None if self._finder.elsewhere else _epoch_of(iterator)
        if epoch is not None:
            self._loaders.append((weakref.ref(iterator), epoch))

    def _epoch_read(self) -> Epoch | None:
        """Return the epoch of the data loader that was read last, as far as it was read."""
        asked: Any = None if self._tracer is None else self._tracer.loader
        found = _epoch_of(asked)
        if found is None:
            read = [(made(), epoch) for made, epoch in self._loaders]
            known = [(made, epoch) for made, epoch in read if made is None or made._num_yielded]
            asked, found = known[-1] if known else (None, self.epoch)
        # A second iterator, or one that began anew, does not tell what was read before.
        once = len(self._loaders) == 1 and not getattr(asked, "_persistent_workers", True)
        return replace(found, read=asked._num_yielded) if found is not None and once else found

    def _found(
        self, called: nn.Module | None, optimizers: Sequence[Any], frame: FrameType | None = None
    ) -> None:
        self.compiled |= type(called).__name__ == "OptimizedModule"
        super()._found(called, optimizers, frame)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        assert self._finder is not None
        if self._finder.elsewhere:
            return None
        self.steps += 1
        given = None if self.raised else super()._before_step(optimizer, args, kwargs)
        if self.raised or self._enough():
            self.raised += 1
            if self.raised > IN_VAIN:
                self._swallowed()
            raise CheckEndedError
        return given

    def _enough(self) -> bool:
        judged = {names for names, group in self.groups.items() if self._whole(group) >= self._asked}
        if not judged or self._tracer is None:
            return False
        everything = frozenset[str]().union(*judged) >= self._modules.compared
        return everything or self._global_step >= PATIENCE * self._asked

    def _due(self, seen: Observations) -> bool:
        group = self.groups.get(frozenset(seen.stepped))
        return group is None or self._whole(group) < self._asked

    def _whole(self, group: Group) -> int:
        """Return how many of a group's windows are judged, without one that was seen in part."""
        in_part = None if self._seen_in_part is None else self._seen_in_part[0]
        return len(group.windows) - (in_part in group.windows)

    def _reached(self, seen: Observations, gradient: Gradient) -> None:
        due, before = self._due(seen), len(self._watched.windows)
        super()._reached(seen, gradient)
        self.epoch = self._epoch_read()
        if not due or seen.evaluation:
            return
        group = self.groups.setdefault(frozenset(seen.stepped), self._group_of(seen))
        added = range(before, len(self._watched.windows))
        if not added:  # it is in the place of one that was seen in part
            group.sizes.pop()
        group.windows += added
        whose = " + ".join(group.optimizers) if len(self.groups) > 1 else ""
        self._judged_one(self._whole(group), self._watched.windows[group.windows[-1]].verdict, whose)
        self._capture(seen, group)

    def _group_of(self, seen: Observations) -> Group:
        parameters = self._modules.parameters()
        stepped = [parameters[name] for name in seen.stepped]
        held = {id(p) for p in stepped}
        calls = [call for m in seen.tape.micro_batches() for call in m.models]
        own = [c.function for c in calls if isinstance(c.function, nn.Module)]
        called = [f for f in own if any(id(p) in held for p in f.parameters())] or own or [self._model]
        losses = [call for m in seen.tape.micro_batches() for call in m.losses]
        labels = (ignored_label(loss) for loss in losses)
        beside = [module for module, _ in (seen.tape.moving.beside if seen.tape.moving else {}).values()]
        return Group(
            _names(self._stepping(held)),
            _names(called),
            list(dict.fromkeys(map(_name_of_loss, losses))),
            sum(p.numel() for p in stepped),
            beside=_names([m for m in beside if next(m.parameters(), None) is not None]),
            ignored=next((label for label in labels if label is not None), -100),
        )

    def _stepping(self, held: set[int]) -> list[Any]:
        assert self._finder is not None
        return [o for o in self._finder.optimizers if any(id(p) in held for p in stepped_by([o]))]

    def _capture(self, seen: Observations, group: Group) -> None:
        """Keep the window, to be run again at other N."""
        micro_batches = seen.tape.micro_batches()
        try:
            layout = sample_readings(micro_batches, self._dim)[0]
        except Exception as error:  # the script must go on, whatever happens here
            group.not_captured = first_line(error)
            group.sizes.append([])
            return
        group.sizes.append(list(layout.sizes))
        if seen.evaluation or not micro_batches:
            return
        parameters = self._modules.parameters()
        held = {id(parameters[name]) for name in seen.stepped}
        group.captured = CapturedWindow(
            micro_batches, layout.sizes, layout.dim, self._modules, self._stepping(held), seen.shares
        )


def _names(of: list[Any]) -> list[str]:
    """Return the class of each, and in which variable the loop has it."""
    variables = _variables()
    found = []
    for each in of:
        each = unwrapped(each)
        kind, name = type(each).__name__, variables.get(id(each))
        found.append(f"{name} ({kind})" if name else kind)
    return list(dict.fromkeys(found))


def _variables() -> dict[int, str]:
    """Return the names of the running functions' variables, by the identity of their values."""
    found: dict[int, str] = {}
    frame = calling_frame()
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("torch", "gaccum_exp"):
            held = {**frame.f_globals, **frame.f_locals} if name == "__main__" else frame.f_locals
            for key, value in held.items():
                if isinstance(value, (nn.Module, Optimizer)) and key != "self":
                    found.setdefault(id(unwrapped(value)), key)
        frame = frame.f_back
    return found


def _name_of_loss(call: Any) -> str:
    function = call.function
    if function is models_own_loss:
        return "the model's own loss"
    if isinstance(function, nn.Module):
        return type(function).__name__
    name = str(getattr(function, "__name__", ""))
    known = name.endswith(LOSS_NAMES)
    return name if known else "a loss of the script's own arithmetic"


def _epoch_of(loader: Any) -> Epoch | None:
    """Return what an iterator of a data loader tells of its epoch."""
    if loader is None:
        return None
    try:
        count = len(loader)
    except TypeError:  # of an iterable data set
        return Epoch(None)
    sampler, data = getattr(loader, "_index_sampler", None), data_of(loader)
    if isinstance(sampler, BatchSampler) and not sampler.drop_last:
        try:
            rest = len(sampler.sampler) % sampler.batch_size  # type: ignore[arg-type]
        except TypeError:
            rest = 0
        if rest:
            return Epoch(count, rest, sampler.batch_size, data)
    return Epoch(count, data=data)
