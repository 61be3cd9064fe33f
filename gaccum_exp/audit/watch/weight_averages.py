"""Averages of the weights that a loop keeps (EMA, SWA), and whether they move within the window.

An average is known by what is written, whatever it is called or held in: operations without a graph that
take in the weights after one backward pass, and again, with what came of it, after a later one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from gaccum_exp.audit.watch.moving_state import writes
from gaccum_exp.audit.watch.tape import Observations
from gaccum_exp.core.nesting import tensors_in

IN_PLACE, MADE_ANEW = 2, 3
"""After so many backward passes what takes in the weights is an average: what is made anew each time
may after two be a difference."""

OVERWRITING = ("copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_", "__setitem__")
"""Operations that write over their first argument, whatever it held."""
NOWHERE = -1
"""The address of a tensor that has none."""


class WeightAverages:
    """What of the weights has gone into which tensors, in one window."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self._shapes = {tuple(p.shape) for p in self._weights}
        self.begin()

    def begin(self) -> None:
        """Begin a window."""
        self._taken_in: dict[int, set[int]] = {}
        """After which backward passes the weights went into what lies at an address."""
        self._addresses: set[int] | None = None
        """Of the weights; None: not looked up in this window."""

    def note(self, name: str, args: tuple[object, ...], output: object, seen: Observations) -> None:
        """Note an operation between the passes.

        Args:
            name: of the operation.
            args: its arguments.
            output: what it gave back.
            seen: of the window; takes it where an average has moved after several backward passes.
        """
        if seen.average_moved:
            return
        now = seen.tape.backwards
        if self._addresses is None:
            self._addresses = {address_of(p) for p in self._weights} - {NOWHERE}
        read = args[1:] if name in OVERWRITING else args
        taken_in, inputs = set[int](), [address_of(t) for t in tensors_in(read)]
        if not self._addresses.isdisjoint(inputs):
            taken_in.add(now)
        for address in inputs:
            taken_in |= self._taken_in.get(address, set())
        written = tensors_in(args[:1]) if writes(name) else []
        targets = {address_of(t) for t in written}
        made = [*written, *tensors_in(output)]
        if not taken_in:  # an address may have been another tensor's before
            for tensor in made:
                self._taken_in.pop(address_of(tensor), None)
            return
        for tensor in made:
            address = address_of(tensor)
            if address == NOWHERE or address in self._addresses or tensor.grad_fn is not None:
                continue
            self._taken_in[address] = set(taken_in)
            least = IN_PLACE if address in targets else MADE_ANEW
            like_weights = tensor.numel() > 1 and tuple(tensor.shape) in self._shapes
            moved = now in taken_in and len(taken_in) >= least and like_weights
            if moved and not self._is_gradient(address):
                seen.average_moved = True
                seen.places.note("average")

    def _is_gradient(self, address: int) -> bool:
        return any(p.grad is not None and address_of(p.grad) == address for p in self._weights)


def address_of(tensor: Tensor) -> int:
    """Return where a tensor's numbers lie; `NOWHERE` of one that has no such place, or no numbers."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return NOWHERE
    try:
        return tensor.untyped_storage().data_ptr() or NOWHERE
    except RuntimeError:  # of a fake, or within torch.func's transforms
        return NOWHERE
