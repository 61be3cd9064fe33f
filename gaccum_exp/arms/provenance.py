"""The provenance of a result: commit, versions, machine, data."""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from gaccum_exp.arms.resume import version_of
from gaccum_exp.config.schema import Settings
from gaccum_exp.config.targets import handed_over
from gaccum_exp.core.seeding import random_state_kept, seed_host
from gaccum_exp.tracking.records import TRAINING_SAMPLES, DatasetRecord
from gaccum_exp.train.build import TrainingData
from gaccum_exp.train.state import TrainState

DIGEST = "data_digest"
"""The tag that tells the data of a run."""
DECISIVE = ("host", "device", "threads", "version.torch", "version.numpy")
"""Tags without which a run computed again need not give the same bits."""
SAMPLES = 8
"""So many samples of a data set are looked at that does not lie in memory."""
PACKAGES = ("gaccum_exp", "torch", "torchvision", "hydra-core", "mlflow", "numpy")


def environment_tags() -> dict[str, str]:
    """Return the tags that every run of this process shares: host, commit, versions."""
    tags = {"host": platform.node(), "python": platform.python_version(), "git_commit": git_commit()}
    return tags | {f"version.{package}": version_of(package) for package in PACKAGES}


def device_tags(device: torch.device) -> dict[str, str]:
    """Return the tags of a run's device, `cpu` or the accelerator's name, and of its CPU threads."""
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "threads": str(torch.get_num_threads())}


def dataset_records(settings: Settings, loaded: TrainingData | TrainState) -> list[DatasetRecord]:
    """Return a record of each data set that a run is fed."""
    data = settings.data
    sets = [("training", loaded.train_data, data.train)]
    if loaded.eval_data is not None and data.eval is not None:
        sets.append(("evaluation", loaded.eval_data, data.eval))
    return [
        DatasetRecord(
            name=handed_over(node) or str(node["_target_"]),
            digest=_fingerprint(dataset, node),
            samples=len(dataset),  # type: ignore[arg-type]  # checked to be map-style
            context=context,
        )
        for context, dataset, node in sets
    ]


def data_tags(records: Sequence[DatasetRecord]) -> dict[str, str]:
    """Return the tags of a run's data: its fingerprints, and how many samples the training set holds."""
    return {DIGEST: digest_of(records), TRAINING_SAMPLES: str(records[0].samples)}


def digest_of(records: Sequence[DatasetRecord]) -> str:
    """Return the fingerprints of all data sets of a run, as its tag has them."""
    return " ".join(record.digest for record in records)


def _fingerprint(dataset: Dataset[Any], node: Mapping[str, Any]) -> str:
    """Return eight hex digits that change with the data.

    All of it where it lies in memory in a data set of the program's, torch's or torchvision's; else the
    configuration, the size, the names of files, and samples from the first to the last.
    """
    digest = hashlib.blake2b(digest_size=4)
    if type(dataset) is TensorDataset:
        for tensor in dataset.tensors:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()
    add_value(digest, (sorted(node.items()), len(dataset)))  # type: ignore[arg-type]  # it is map-style
    add_samples(digest, dataset)
    return digest.hexdigest()


def add_samples(digest: "hashlib.blake2b", dataset: Any) -> None:
    """Add what a data set holds, or some of its samples: see `_fingerprint`."""
    size = len(dataset)
    if not _add_whole(digest, dataset):
        places = sorted({round(k * (size - 1) / (SAMPLES - 1)) for k in range(SAMPLES)})
        with random_state_kept():
            seed_host(0)  # so that random augmentation does not change it
            for place in places:
                add_value(digest, dataset[place])


def _add_whole(digest: "hashlib.blake2b", dataset: Any) -> bool:
    """Add what a data set of a known kind holds; return whether that is all of its data."""
    if isinstance(dataset, Subset):
        add_value(digest, list(dataset.indices))
        return _add_whole(digest, dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(_add_whole(digest, part) for part in dataset.datasets)
    if not type(dataset).__module__.startswith(("gaccum_exp.", "torch.", "torchvision.")):
        return False
    if isinstance(dataset, TensorDataset):
        add_value(digest, list(dataset.tensors))
        return True
    held = {id(v): (k, v) for k, v in vars(dataset).items() if _is_array(v) or isinstance(v, list)}
    add_value(digest, list(held.values()))
    return any(_is_array(v) for _, v in held.values())


def _is_array(value: Any) -> bool:
    """Whether it is a tensor, or an array of NumPy's numbers."""
    return isinstance(value, Tensor) or (hasattr(value, "tobytes") and hasattr(value, "dtype"))


def add_value(digest: "hashlib.blake2b", value: Any) -> None:
    """Add a value's own bytes, whatever it is nested in."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    elif _is_array(value) and not getattr(value.dtype, "hasobject", True):
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        add_value(digest, list(value.items()))
    elif isinstance(value, (list, tuple)):
        try:
            digest.update(json.dumps(value).encode())  # a million names at once
        except (TypeError, ValueError):
            digest.update(b"[")
            for part in value:
                add_value(digest, part)
    else:
        # Where an object lies in memory is said of it by default, and is no part of it.
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode())


@cache
def git_commit() -> str:
    """Return the working directory's commit, marked where files differ from it; `none` outside git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "none"
    return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
