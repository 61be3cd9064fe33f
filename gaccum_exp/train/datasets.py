"""The data sets of a training, and a cache of those that the arms of a sweep share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from gaccum_exp.config.targets import import_target, instantiate, spoken
from gaccum_exp.core.seeding import derive_seed, drawn_since, seed_host
from gaccum_exp.errors import BadInputError


@dataclass(frozen=True, slots=True)
class LoadedDataset:
    """A data set, and what it was built from."""

    dataset: Dataset[Any]
    drawn: bool
    """Whether random numbers were drawn as it was built, so that another seed gives another one."""
    node: Mapping[str, Any]
    """Its configuration."""
    seed: int
    """The run's."""

    @property
    def reusable(self) -> bool:
        """Whether it is certain to be the same after a training as before: tensors, or one of ours."""
        ours = str(self.node["_target_"]).startswith("gaccum_exp.data.")
        return ours or type(self.dataset) is TensorDataset

    def serves(self, node: Mapping[str, Any], seed: int) -> bool:
        """Whether building it again would give the same."""
        return node == self.node and (not self.drawn or seed == self.seed)


@dataclass(slots=True)
class DatasetCache:
    """Keeps the data sets of one arm for the next one, if that asks for the same; nothing older.

    A data set of the user's own is not kept: a training might change it.
    """

    _kept: dict[str, LoadedDataset] = field(default_factory=dict)

    def load(self, key: str, node: Mapping[str, Any], seed: int) -> LoadedDataset:
        """Return the data set of this key, loaded or kept; as `load_dataset`."""
        found = self._kept.pop(key, None)
        if found is None or not found.serves(node, seed):
            del found  # two of them may not fit into memory
            found = load_dataset(key, node, seed)
        if found.reusable:
            self._kept[key] = found
        return found


def load_dataset(key: str, node: Mapping[str, Any], seed: int) -> LoadedDataset:
    """Build a data set.

    Args:
        key: of its configuration, e.g. `data.train`.
        node: its configuration.
        seed: the run's.

    Raises:
        BadInputError: there is no such data set, or it cannot be fetched from by index.
    """
    import_target(node)
    key_seed = derive_seed(seed, key)
    seed_host(key_seed)  # data may be drawn at random as the set is built: the same for every arm
    dataset: Dataset[Any] = instantiate(key, node)
    drawn = drawn_since(key_seed)
    if isinstance(dataset, IterableDataset) or not all(
        hasattr(dataset, method) for method in ("__len__", "__getitem__")
    ):
        raise BadInputError(
            f"{spoken(key, node)}: gives {type(dataset).__name__}, not a map-style "
            "dataset (with __len__ and __getitem__)"
        )
    if len(dataset) == 0:  # type: ignore[arg-type]  # it has __len__, as was just seen
        raise BadInputError(f"{key} is empty: it holds 0 samples")
    return LoadedDataset(dataset, drawn, node, seed)


def lengths_of(dataset: Dataset[Any]) -> Tensor:
    """Return the data set's own lengths of its samples, (samples,).

    Raises:
        BadInputError: it has none.
    """
    lengths = getattr(dataset, "lengths", None)
    if lengths is None or len(lengths) != len(dataset):  # type: ignore[arg-type]  # checked to be map-style
        raise BadInputError(
            "data.sort_by_length=true: the data set does not say how long its samples are (an attribute "
            "`lengths`, one number for each)"
        )
    return torch.as_tensor(lengths)
