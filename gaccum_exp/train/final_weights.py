"""The weights that a training ends with, as a state dict that loads into the model they are of.

    model.load_state_dict(torch.load("weights.pt"))

Of a model of which only some parameters are trained, adapters or a head, it holds these alone, and loads
with `strict=False`.
"""

import io
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.errors import first_line
from gaccum_exp.tracking.sink import StateDict
from gaccum_exp.train.checkpoint.parts import plain_name
from gaccum_exp.train.state import TrainState


def weights_of(state: TrainState) -> StateDict:
    """Return the model's final weights; `left_out` says what of it is not among them."""
    return _state_dict(state.model)


def criterion_weights_of(state: TrainState) -> StateDict | None:
    """Return those of the criterion; None: it has none that were trained."""
    criterion = None if state.criterion_loss is None else state.criterion_loss.criterion
    if criterion is None or not any(p.requires_grad for p in criterion.parameters()):
        return None
    return _state_dict(criterion)


def _state_dict(module: nn.Module) -> StateDict:
    parameters = dict(module.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    left_out: list[str] = []
    kept: OrderedDict[str, Any] = OrderedDict()
    if len(trained) < len(parameters):
        kept.update({plain_name(name): parameters[name] for name in trained})
        left_out.append(
            f"the {len(parameters) - len(trained)} of {len(parameters)} parameters that were not trained"
        )
    else:
        whole = module.state_dict()
        kept.update({plain_name(name): value for name, value in whole.items()})
        # Versions of modules by their names, by which torch reads older state dicts.
        versions = getattr(whole, "_metadata", {})
        vars(kept)["_metadata"] = OrderedDict({plain_name(n): v for n, v in versions.items()})
    copies: dict[Any, Tensor] = {}
    for name, value in list(kept.items()):
        if isinstance(value, Tensor):
            place = value.device, value.data_ptr(), value.shape, value.stride(), value.dtype
            kept[name] = copies.setdefault(place, _on_host(value)) if value.numel() else _on_host(value)
        elif (why := _unreadable(value)) is not None:
            del kept[name]
            left_out.append(f"{name} ({why})")
    return StateDict(kept, [plain_name(name) for name in trained], left_out)


def _on_host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.clone()  # a part of something larger, all of which would be written
    return tensor


def _unreadable(value: Any) -> str | None:
    """Return why what `get_extra_state` gives cannot be read without trusting the file; None: it can."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # whatever pickle says of it
        return first_line(error)
    return None
